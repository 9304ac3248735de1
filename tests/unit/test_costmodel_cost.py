"""Serving and training costs: against the real classes, against first principles, and against themselves."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.costmodel import training_cost
from pipeline.costmodel.cost import (
    MEMORY_SHARE,
    Work,
    cache_bytes,
    decode,
    decode_rate,
    generation_rate,
    kernel_seconds,
    largest_batch,
    pass_seconds,
    prefill,
    serving_bytes,
)
from pipeline.costmodel.gemm import gather_seconds
from pipeline.costmodel.shapes import ModelShape
from pipeline.costmodel.training_cost import (
    LIVE_PARAMETERS,
    Recovery,
    memory_parts,
    step_parts,
    training_needs,
)
from pipeline.costmodel.training_memory import activation_bytes
from pipeline.model.decoding import cache_of
from tests.chips import chip

TINY = ModelShape(3, 48, 6, 2, 8, 80, 101, False)
LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, False)
STUDENT = ModelShape(26, 3584, 24, 8, 128, 9728, 128256, False)
LOSS = (6, 1 << 25)  # buffers, logits of a block
RUN = Recovery(953, 4096, 256, 1, "bf16", 2, True, 1024, *LOSS)


def llama(shape: ModelShape, dtype: torch.dtype):
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        head_dim=shape.head_size, tie_word_embeddings=shape.tied, attn_implementation="sdpa",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved_bytes(model, tokens: torch.Tensor) -> int:
    """Bytes the layers of a model keep for their backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(tokens, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_activation_bytes_are_what_the_real_class_keeps_for_its_backward_pass(precision, dtype):
    tokens = torch.randint(0, 101, (2, 32))
    more, fewer = TINY, ModelShape(2, 48, 6, 2, 8, 80, 101, False)
    difference = saved_bytes(llama(more, dtype), tokens) - saved_bytes(llama(fewer, dtype), tokens)
    predicted = activation_bytes(more, precision, False) - activation_bytes(fewer, precision, False)
    assert difference == tokens.numel() * predicted


def test_cache_bytes_are_what_the_real_cache_holds():
    model, tokens = llama(TINY, torch.bfloat16), torch.randint(0, 101, (2, 7))
    with torch.inference_mode():
        cache = cache_of(model(tokens, use_cache=True))
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(TINY, tokens.numel(), "bf16") == held


def test_decoding_one_sequence_takes_little_more_than_reading_the_weights_once():
    npu = chip("910B1")
    seconds = pass_seconds(npu, LLAMA_8B, decode(1, 128, "bf16"))
    weights = (LLAMA_8B.parameters() - LLAMA_8B.vocabulary * LLAMA_8B.hidden) * 2  # one embedding row is read
    floor = weights / (npu.hbm_bandwidth * npu.memory_efficiency)
    assert floor < seconds < 1.35 * floor


def test_a_long_prefill_runs_near_the_fitted_share_of_the_peak():
    npu = chip("910B1")
    seconds = pass_seconds(npu, LLAMA_8B, prefill(1, 4096, "bf16"))
    flops = 2 * LLAMA_8B.non_embedding_parameters() * 4096 / seconds
    assert 0.6 * npu.peak_flops("bf16") < flops < npu.cube_efficiency * npu.peak_flops("bf16")


def test_attention_of_one_query_is_bounded_by_its_cache_and_of_a_prompt_by_the_cube():
    npu = chip("910B1")
    single = kernel_seconds(npu, decode(16, 8192, "bf16"), 32, 8, 128) - npu.launch_seconds
    cache = cache_bytes(ModelShape(1, 4096, 32, 8, 128, 1, 1, True), 16 * 8192, "bf16")
    assert single == pytest.approx(cache / (npu.hbm_bandwidth * npu.memory_efficiency), rel=1e-2)
    macs = 2 * 32 * 8192 * (8193 / 2) * 128
    whole = kernel_seconds(npu, prefill(1, 8192, "bf16"), 32, 8, 128) - npu.launch_seconds
    assert whole == pytest.approx(macs / (24 * 4096 * 1.85e9 * npu.attention_efficiency))


def test_splitting_over_devices_divides_the_memory_and_costs_the_sums():
    npu = chip("910B1")
    one, four = (pass_seconds(npu, LLAMA_8B, prefill(4, 2048, "bf16", ways)) for ways in (1, 4))
    assert one / 4 < four < one
    assert serving_bytes(LLAMA_8B, 8, 1024, "bf16", 4) == pytest.approx(serving_bytes(LLAMA_8B, 8, 1024, "bf16") / 4)
    assert cache_bytes(LLAMA_8B, 1024, "bf16", 16) == cache_bytes(LLAMA_8B, 1024, "bf16", 8), "eight groups are copied"


def test_a_smaller_student_decodes_faster_and_the_largest_batch_just_fits():
    npu = chip("910B1")
    assert decode_rate(npu, STUDENT, 16, 1024, "bf16") > decode_rate(npu, LLAMA_8B, 16, 1024, "bf16")
    batch, room = largest_batch(npu, LLAMA_8B, 4096, "bf16"), MEMORY_SHARE * npu.hbm_bytes
    assert serving_bytes(LLAMA_8B, batch, 4096, "bf16") <= room < serving_bytes(LLAMA_8B, batch + 1, 4096, "bf16")
    assert largest_batch(chip("910B4"), ModelShape(80, 8192, 64, 8, 128, 28672, 128256, False), 4096, "bf16") == 0


def test_generation_is_prefill_and_decoding_in_turn():
    npu, requests = chip("910B1"), [(128, 1024), (256, 2048)]
    seconds = 0.0
    for prompt, answer in requests:
        seconds += pass_seconds(npu, LLAMA_8B, Work(8, prompt, prompt, "bf16"))
        seconds += answer * pass_seconds(npu, LLAMA_8B, Work(8, 1, prompt + answer // 2, "bf16"))
    assert generation_rate(npu, LLAMA_8B, requests, 8, "bf16") == pytest.approx(8 * 3072 / seconds)


def test_a_higher_zero_stage_shares_out_more_of_the_state_and_loses_none():
    own, frozen = STUDENT.parameters(), LLAMA_8B.parameters()
    parts = {
        stage: memory_parts(LLAMA_8B, STUDENT, Recovery(1, 128, 8, 1, "bf16", stage, True, 128, *LOSS), 8)
        for stage in range(4)
    }
    held = {stage: parts[stage]["weights"] + parts[stage]["gradients"] + parts[stage]["optimizer"] for stage in parts}
    assert held == {0: 20 * own, 1: 4 * own + 16 * own / 8, 2: 2 * own + 18 * own / 8, 3: 20 * own / 8}
    assert [parts[stage]["teacher"] for stage in range(4)] == [2 * frozen] * 3 + [2 * frozen / 8]


def test_stage_3_on_several_devices_counts_what_it_gathers_and_no_more_than_there_is():
    def gathered(teacher, student, stage, devices):
        run = Recovery(1, 128, 8, 1, "bf16", stage, True, 128, *LOSS)
        return memory_parts(teacher, student, run, devices)["gathered"]

    limit = 2 * (LIVE_PARAMETERS + 128256 * (LLAMA_8B.hidden + STUDENT.hidden))
    assert [gathered(LLAMA_8B, STUDENT, stage, 8) for stage in range(4)] == [0, 0, 0, limit]
    assert gathered(LLAMA_8B, STUDENT, 3, 1) == 0, "one device's part is the whole"
    assert gathered(None, TINY, 3, 8) == 2 * TINY.parameters()


def test_the_fewest_devices_that_hold_a_run_are_found():
    needs = training_needs(chip("910B1"), LLAMA_8B, STUDENT, RUN)
    assert needs.fits and needs.bytes_per_device <= MEMORY_SHARE * 64e9
    fewer = training_needs(chip("910B1"), LLAMA_8B, STUDENT, RUN, needs.devices // 2)
    assert not fewer.fits and "MORE than 90%" in fewer.sentence()
    assert needs.sentence().startswith(f"recovery needs {needs.devices} x ")
    assert needs.to_json()["devices"] == needs.devices


def test_a_run_takes_about_eight_flops_a_weight_and_token_and_two_for_the_teacher():
    npu = chip("910B1")
    needs = training_needs(npu, LLAMA_8B, STUDENT, RUN, 8)
    flops = 8 * STUDENT.non_embedding_parameters() + 2 * LLAMA_8B.non_embedding_parameters()  # 6, and 2 recomputed
    ideal = RUN.tokens * flops / (8 * npu.peak_flops("bf16") * npu.cube_efficiency) / 3600
    assert ideal < needs.hours < 1.5 * ideal
    twice = training_needs(npu, LLAMA_8B, STUDENT, Recovery(1906, 4096, 256, 1, "bf16", 2, True, 1024, *LOSS), 8)
    assert twice.tokens == 2 * needs.tokens == 2 * 953 * 256 * 4096 and twice.hours == pytest.approx(2 * needs.hours)


def test_without_a_teacher_its_share_is_gone_and_nothing_else():
    npu = chip("910B1")
    with_teacher, alone = (step_parts(npu, teacher, STUDENT, RUN, 8) for teacher in (LLAMA_8B, None))
    assert alone["teacher"] == 0 and alone["loss"] < with_teacher["loss"]
    assert all(alone[part] == with_teacher[part] for part in ("student", "optimizer", "communication"))
    held, own = (memory_parts(teacher, STUDENT, RUN, 8) for teacher in (LLAMA_8B, None))
    assert own["teacher"] == own["teacher_activations"] == 0
    assert held["loss"] - own["loss"] == 2 * 1024 * STUDENT.vocabulary  # one product of a chunk, in bf16
    assert all(own[part] == held[part] for part in ("weights", "gradients", "optimizer", "activations"))


def test_scoring_tokens_add_the_teachers_forward_passes():
    npu = chip("910B1")
    with_scores = Recovery(953, 4096, 256, 1, "bf16", 2, True, 1024, *LOSS, score_tokens=8 * 4096 * 100)
    extra = (
        training_needs(npu, LLAMA_8B, STUDENT, with_scores, 8).hours
        - training_needs(npu, LLAMA_8B, STUDENT, RUN, 8).hours
    )
    passes = 100 * pass_seconds(npu, LLAMA_8B, Work(1, 4096, 4096, "bf16", row_major=True))
    assert extra * 3600 == pytest.approx(passes)


@pytest.mark.parametrize("stage", [2, 3])
def test_answers_that_are_written_cost_a_pass_for_each_token_and_a_cache(stage):
    npu = chip("910B1")
    plain = Recovery(100, 512, 256, 4, "bf16", stage, True, 1024, *LOSS)
    run = replace(plain, section="onpolicy", written=128)
    read, write = (
        pass_seconds(npu, STUDENT, Work(4, *shape, "bf16", row_major=True)) for shape in ((384, 384), (1, 448))
    )
    steps = [step_parts(npu, LLAMA_8B, STUDENT, each, 8) for each in (plain, run)]
    gather = gather_seconds(npu, 2 * STUDENT.parameters(), 8) if stage == 3 else 0.0
    assert steps[1].pop("writing") == pytest.approx(8 * (read + 127 * write + 128 * gather))
    assert steps[0] == steps[1]
    memory = [memory_parts(LLAMA_8B, STUDENT, each, 8) for each in (plain, run)]
    assert sum(memory[1].values()) - sum(memory[0].values()) == cache_bytes(STUDENT, 4 * 512, "bf16")
    needs = training_needs(npu, LLAMA_8B, STUDENT, run, 8)
    assert needs.tokens == 100 * 256 * 128 and needs.sentence().startswith("on-policy distillation needs 8 x ")


def test_checkpointing_trades_time_for_memory():
    npu = chip("910B1")
    kept = Recovery(953, 4096, 256, 1, "bf16", 2, False, 1024, *LOSS)
    assert activation_bytes(STUDENT, "bf16", True) < activation_bytes(STUDENT, "bf16", False) / 5
    assert (
        step_parts(npu, LLAMA_8B, STUDENT, RUN, 8)["student"] > step_parts(npu, LLAMA_8B, STUDENT, kept, 8)["student"]
    )


def test_a_run_that_cannot_be_split_or_held_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"distill\.global_batch_size: 256 .* distill\.micro_batch_size \(1\) times 3"):
        training_needs(chip("910B1"), LLAMA_8B, STUDENT, RUN, 3)
    narrow = Recovery(953, 4096, 2, 1, "bf16", 0, False, 1024, *LOSS)
    with pytest.raises(ValueError, match=r"distill\.global_batch_size: 2 .* deepspeed\.stage \(now 0\)"):
        training_needs(chip("910B4"), LLAMA_8B, STUDENT, narrow)


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.0001, "0.36 seconds"), (0.02, "72 seconds"), (0.5, "30 minutes"), (1.99, "119 minutes"), (2.0, "2 hours")],
)
def test_a_duration_is_given_in_the_unit_that_suits_it(hours, text):
    assert training_cost._duration(hours) == text
