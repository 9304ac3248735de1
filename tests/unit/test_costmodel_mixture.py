"""The chip model of mixtures of experts: exact counts, and the laws of their times and memory."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from pipeline.costmodel.cost import (
    Work,
    decode,
    ffn_seconds,
    mixture_seconds,
    pass_seconds,
    prefill,
    router_seconds,
    serving_bytes,
)
from pipeline.costmodel.expert_budget import possible_counts
from pipeline.costmodel.expert_speed import experts_for_speed, with_count
from pipeline.costmodel.mixture import Mixture
from pipeline.costmodel.pareto import Limits, Serving, describe, shape_within, speedup_of
from pipeline.costmodel.shapes import Grid, ModelShape, multiples_for
from pipeline.costmodel.training_cost import Recovery, memory_parts, step_parts
from pipeline.model.anatomy import anatomy_of
from tests.chips import chip
from tests.tiny import config_of, tensors_of, tiny_model

CHIPS = ("910B3", "H100", "CPU")
QWEN = ModelShape(48, 2048, 32, 4, 128, 6144, 151936, False, mixture=Mixture(48, 0, 128, 8, 768))
WORKS = [decode(1, 1024, "bf16"), decode(16, 1024, "bf16"), decode(256, 1024, "bf16"), prefill(4, 512, "bf16")]
RUN = Recovery(100, 512, 16, 4, "bf16", 1, False, 1024, 6, 1 << 25)
SERVING = Serving(16, 512, 1024, "bf16", 1, "decode")


def anatomy(kind, **changed):
    model = tiny_model(kind, **changed)
    return anatomy_of(config_of(model), tensors_of(model))


def one_expert(neurons=768):
    return replace(QWEN, mixture=Mixture(48, 0, 1, 1, neurons))


@pytest.mark.parametrize(
    "kind", ["mixtral", "granitemoe", "granitemoeshared", "olmoe", "dots1", "solar_open", "mellum"]
)
def test_parameters_are_those_of_the_model_up_to_its_small_tensors(kind):
    of = anatomy(kind)
    shape, small = ModelShape.of(of), 0
    for layer in range(4):
        for name, segments in of.layer_tensors.items():
            length = np.prod(of.shape(segments, layer)) if of.has(name, layer) else 0
            small += int(length) if name.endswith("bias") or "q_norm" in name or "k_norm" in name else 0
    assert shape.parameters() == of.parameters()[0] - small
    if kind == "mixtral":
        assert not small and shape.mixture == Mixture(4, 0, 4, 2, 24)
    if kind == "dots1":
        assert shape.mixture == Mixture(3, 1, 4, 2, 12, 24)
    assert shape.mixture.beside == (kind == "granitemoeshared")


def test_the_grid_counts_what_a_shape_counts():
    teacher = ModelShape.of(anatomy("dots1"))
    grid = Grid(teacher, multiples_for(teacher))
    rows, counts = grid.rows(np.ones(grid.counts.shape, dtype=bool))
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        shape = replace(teacher, **dict(zip(("layers", "hidden", "heads", "groups", "neurons"), row)))
        assert shape.non_embedding_parameters() == count


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("work", WORKS)
def test_one_expert_is_a_dense_layer_and_a_router(name, work: Work):
    own, mixture = chip(name), one_expert().mixture
    dense = ffn_seconds(own, work, 2048, 768)
    whole = mixture_seconds(own, work, 2048, 6144, mixture)
    assert whole - router_seconds(own, work, 2048, mixture) == pytest.approx(dense, rel=1e-12)
    assert pass_seconds(own, one_expert(), work) > pass_seconds(own, replace(QWEN, neurons=768, mixture=None), work)


def test_one_expert_trains_as_a_dense_layer_and_a_router():
    dense, mixture = replace(QWEN, neurons=768, mixture=None), one_expert()
    routers = mixture.parameters() - dense.parameters()
    assert routers == 48 * 2048
    small, large = (memory_parts(None, shape, RUN, 1) for shape in (dense, mixture))
    assert large["optimizer"] - small["optimizer"] == 16 * routers
    kept = large["activations"] - small["activations"]
    assert kept == RUN.rows * 48 * (8 + 2 * 2 * 2048)  # scores, and each row beside its copy
    seconds = [step_parts(chip("H100"), None, shape, RUN, 1)["student"] for shape in (dense, mixture)]
    assert seconds[0] < seconds[1] < 1.5 * seconds[0]


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("work", WORKS)
def test_times_and_memory_rise_with_experts_and_experts_of_a_token(name, work):
    """To three thousandths: the router's product, of few columns, has steps of its own where it changes tiles."""
    own = chip(name)
    counts = [with_count(QWEN, count) for count in (16, 32, 48, 64, 96, 128, 256)]
    tops = [replace(QWEN, mixture=replace(QWEN.mixture, top=top)) for top in (1, 2, 3, 4, 6, 8, 16, 32)]
    for shapes in (counts, tops):
        times = [pass_seconds(own, shape, work) for shape in shapes]
        assert all(later >= earlier * 0.997 for earlier, later in itertools.pairwise(times))
        assert times[-1] > 1.02 * times[0] or (shapes is counts and work.rows == 1)  # which reads its own experts
    held = [serving_bytes(shape, 16, 1024, "bf16") for shape in counts]
    assert held == sorted(held) and len(set(held)) == len(held)
    assert len({serving_bytes(shape, 16, 1024, "bf16") for shape in tops}) == 1  # all experts are held


@pytest.mark.parametrize("name", CHIPS)
def test_training_costs_rise_with_experts_and_experts_of_a_token(name):
    for shapes in (
        [with_count(QWEN, count) for count in (8, 16, 32, 64, 128)],
        [replace(QWEN, mixture=replace(QWEN.mixture, top=top)) for top in (1, 2, 4, 8, 16)],
    ):
        seconds = [step_parts(chip(name), None, shape, RUN, 1)["student"] for shape in shapes]
        memory = [sum(memory_parts(None, shape, RUN, 1).values()) for shape in shapes]
        assert seconds == sorted(seconds) and memory == sorted(memory)


def test_a_batch_reads_the_expected_number_of_distinct_experts():
    mixture = Mixture(1, 0, 8, 2, 16)
    draw = np.random.default_rng(0)
    for tokens in (1, 3, 20):
        drawn = [len({e for _ in range(tokens) for e in draw.permutation(8)[:2]}) for _ in range(4000)]
        assert mixture.read(tokens) == pytest.approx(np.mean(drawn), rel=0.02)


def test_a_speedup_is_reached_by_shapes_or_by_experts_alone():
    of = anatomy("mixtral", num_local_experts=16, hidden_size=256, intermediate_size=512, vocab_size=96)
    teacher, own = ModelShape.of(of), chip("H100")
    slow = replace(own, launch_seconds=0.0, layer_seconds=0.0)
    shape = shape_within(slow, teacher, SERVING, Limits(speedup=1.3))
    assert speedup_of(slow, teacher, SERVING, 1.3, shape).reached >= 1.3
    count, made = experts_for_speed(slow, teacher, of, SERVING, 1.2)
    assert made.reached >= 1.2 and count in possible_counts(of) and count < 16
    speeds = {c: describe(slow, teacher, with_count(teacher, c), SERVING).seconds(SERVING) for c in possible_counts(of)}
    assert all(speeds[16] / speeds[c] < 1.2 for c in speeds if c > count)
    with pytest.raises(ValueError, match=r"^budget\.speedup: "):
        experts_for_speed(slow, teacher, of, replace(SERVING, batch_size=1), 5.0)


def test_attention_of_low_rank_is_refused_by_name():
    teacher = ModelShape.of(anatomy("deepseek_v3"))
    with pytest.raises(ValueError, match=r"^model\.path: .*MLA"):
        shape_within(chip("H100"), teacher, SERVING, Limits(parameters=0.8))
