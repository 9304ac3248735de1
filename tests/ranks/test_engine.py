"""Laws of training under DeepSpeed: in one process without a launcher, and in two under torchrun with gloo."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.processes import launch

SCRIPT = Path(__file__).with_name("engine_laws.py")
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The facts of a run of two ranks and then one of one, by world size, with the folder they left."""
    folder = tmp_path_factory.mktemp("engine")
    for world in (2, 1):
        launch(world, SCRIPT, str(folder))
    return {world: json.loads((folder / f"facts-{world}.json").read_text()) for world in (1, 2)} | {"folder": folder}


def outcome(result, world, kind, stage):
    """Return the curve of a run and the weights it ended with."""
    weights = load_file(result["folder"] / f"end-{world}-{kind}-{stage}.safetensors")
    return result[world][f"{kind}-{stage}"]["curve"], weights


def runs():
    both = [(world, kind, stage) for world in (1, 2) for kind in ("fp32", "bf16") for stage in STAGES]
    return [run for run in both if run != (2, "bf16", 0)]


@pytest.mark.parametrize(("world", "kind", "stage"), runs())
def test_a_resumed_run_is_the_straight_one_digit_for_digit(result, world, kind, stage):
    facts = result[world][f"{kind}-{stage}"]
    assert facts["found"] == 2 and facts["damaged"] == []
    assert facts["same_curve"] and facts["same_weights"]
    assert facts["types"] == ["torch.float32"]
    losses = [loss for loss, _, _ in facts["curve"]]
    assert losses[-1] < losses[0], "the student must learn for this to mean anything"


@pytest.mark.parametrize(
    ("world", "kind", "stages", "tolerance"),
    [(1, "fp32", STAGES, 2e-6), (1, "bf16", STAGES, 1e-6), (2, "fp32", STAGES, 5e-6), (2, "bf16", (2, 3), 1e-6)],
)
def test_all_zero_stages_train_alike(result, world, kind, stages, tolerance):
    """Gradients are the same sums in another order, each rounded by 2^-24, as is their norm, by which they are clipped.

    Weights differ by more where a gradient is all but zero: Adam divides it by its own size.
    """
    first, *others = (outcome(result, world, kind, stage) for stage in stages)
    for curve, weights in others:
        for step, wanted in zip(curve, first[0], strict=True):
            assert step == pytest.approx(wanted, rel=tolerance)
        assert set(weights) == set(first[1])
        for name, tensor in first[1].items():
            assert (weights[name] - tensor).abs().max() < 1e-5 * tensor.abs().max(), name


def test_in_bf16_two_ranks_under_zero_1_and_2_train_alike_to_its_rounding(result):
    """Stage 2 adds ranks, then micro-batches, and stage 1 micro-batches first: each sum is rounded by 2^-9 in bf16."""
    for step, wanted in zip(result[2]["bf16-2"]["curve"], result[2]["bf16-1"]["curve"], strict=True):
        assert step == pytest.approx(wanted, rel=2**-7)


def test_two_ranks_under_zero_3_train_as_one_without_zero(result):
    """float32 within 1e-5 of the values: gradients are the same sums in another order."""
    for step, wanted in zip(result[2]["fp32-3"]["curve"], result[1]["fp32-0"]["curve"]):
        assert step == pytest.approx(wanted, rel=1e-5)
    two, one = (load_file(result["folder"] / f"end-{name}.safetensors") for name in ("2-fp32-3", "1-fp32-0"))
    assert set(two) == set(one)
    assert "lm_head.weight" not in one and "model.embed_tokens.weight" in one
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() < 1e-4 * tensor.abs().max(), name


def test_a_checkpoint_goes_on_at_another_number_of_ranks_and_another_stage(result):
    for step, wanted in zip(result[1]["moved"], result[2]["moved"]):
        assert step == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("world", "option"), [(1, "zero3"), (1, "zero3-checkpointing"), (2, "zero3-checkpointing")])
def test_zero_3_computes_every_term_with_and_without_gradient_checkpointing(result, world, option):
    for step, wanted in zip(result[world][f"options-{option}"], result[1]["options-plain"]):
        assert step == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_training_starts_from_float32_weights_that_bf16_cannot_hold(result, stage):
    assert result[1][f"taken-{stage}"] and result[1][f"rounded-{stage}"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_shows_in_the_norm(result, stage, bf16):
    assert result[1][f"poisoned-{stage}-{bf16}"] in ("nan", "inf")


def test_a_checkpoint_of_another_model_is_refused(result):
    assert "another model (exp_avg/lm_head.weight)" in result[1]["another"]


def test_the_last_checkpoints_and_the_best_are_kept_and_nothing_half_written(result):
    assert result[1]["kept"] == ["step-00000002", "step-00000004", "step-00000006"]


@pytest.mark.parametrize(
    "case", ["flip", "cut", "absent", "config", "no_digests", "digests", "renamed", "reshape", "beyond"]
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_taken(result, case):
    step, lines = result[1]["damage"][case]
    assert step == 4 and len(lines) == 1 and ("step-00000005" if case == "renamed" else "step-00000006") in lines[0]


def test_a_checkpoint_is_passed_over_where_another_that_it_needs_is_damaged_or_none_is_left(result):
    assert result[1]["damage"]["unusable"] == [2, []]
    step, lines = result[1]["damage"]["none"]
    assert step is None and len(lines) == 3
