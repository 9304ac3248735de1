"""Shape search: the sieve equals brute force, fronts are fronts, the pick follows its rule, results are plain data."""

from dataclasses import replace
from math import inf, log

import pytest

from pipeline.costmodel import pareto_plot
from pipeline.costmodel.pareto import Candidate, Limits, Serving, candidates, describe, pick, search, shape_within
from pipeline.costmodel.search_result import SearchResult
from pipeline.costmodel.shapes import AXES, LEAN, ModelShape, multiples_for, possible_shapes, possible_values
from tests.chips import chip

TEACHER = ModelShape(4, 64, 4, 2, 16, 96, 500, True)
SMOLLM2 = ModelShape(30, 576, 9, 3, 64, 1536, 49152, True)
DECODE = Serving(8, 64, 256, "bf16", 1, "decode")


def prior(shape: ModelShape) -> float:
    kept = shape.non_embedding_parameters() / TEACHER.non_embedding_parameters()
    off = sum(log(getattr(shape, a) / getattr(TEACHER, a) / kept ** LEAN[a]) ** 2 for a in AXES)
    return off - log(kept)


def limits_of(dense: Candidate) -> list[Limits]:
    return [
        Limits(parameters=0.6),
        Limits(speedup=1.4),
        Limits(decode_rate=1.3 * dense.decode_rate),
        Limits(prefill_seconds=0.7 * dense.prefill_seconds),
        Limits(memory_bytes=0.5 * dense.memory_bytes),
        Limits(parameters=0.9, memory_bytes=0.6 * dense.memory_bytes, speedup=1.2),
        Limits(),
    ]


def keeps_to(found: Candidate, dense: Candidate, limits: Limits, serving: Serving) -> bool:
    return (
        found.kept <= (limits.parameters or inf)
        and found.decode_rate >= (limits.decode_rate or 0.0)
        and found.prefill_seconds <= (limits.prefill_seconds or inf)
        and found.memory_bytes <= (limits.memory_bytes or inf)
        and dense.seconds(serving) >= (limits.speedup or 0.0) * found.seconds(serving)
    )


@pytest.mark.parametrize("case", range(7))
@pytest.mark.parametrize("serving", [DECODE, replace(DECODE, speed="prefill", tensor_parallel=2)])
def test_the_shape_within_limits_is_the_best_by_brute_force(case, serving):
    npu = chip("910B1")
    dense = describe(npu, TEACHER, TEACHER, serving)
    limits = limits_of(dense)[case]
    every = possible_shapes(TEACHER, 0.0, 1.0, multiples_for(TEACHER, serving.tensor_parallel))
    good = [shape for shape in every if keeps_to(describe(npu, TEACHER, shape, serving), dense, limits, serving)]
    found = shape_within(npu, TEACHER, serving, limits)
    assert found in good
    assert prior(found) == pytest.approx(min(map(prior, good)))


@pytest.mark.parametrize("name", ["910B3", "H100", "CPU"])
def test_candidates_keep_to_the_limits_are_aligned_and_rise_in_time(name):
    values = possible_values(SMOLLM2, multiples_for(SMOLLM2))
    found = candidates(chip(name), SMOLLM2, DECODE, Limits(parameters=0.75), 8)
    assert 2 <= len(found) <= 8 and len({each.shape for each in found}) == len(found)
    for each in found:
        assert 0.9 * 0.72 <= each.kept <= 0.75
        assert each.shape.hidden in values["hidden"] and each.shape.neurons in values["neurons"]
        assert (each.shape.heads, each.shape.groups) in values["attention"]
    seconds = [each.seconds(DECODE) for each in found]
    assert seconds == sorted(seconds)


def test_what_the_class_of_the_students_refuses_is_no_candidate():
    npu, limits = chip("910B3"), Limits(parameters=0.75)
    plain = ModelShape(26, 1536, 12, 6, 128, 6144, 153376, False)
    even = replace(plain, even_heads=True)
    assert any(each.shape.hidden % each.shape.heads for each in candidates(npu, plain, DECODE, limits, 8))
    found = search(npu, even, DECODE, limits, 8, 0.1, lambda shape: 1.0 + shape.hidden % shape.heads)
    assert len(found.candidates) >= 2 and {each.loss for each in found.candidates} == {1.0}
    assert found.costed.aligned == len(list(possible_shapes(even, 0.0, 1.0)))
    shape = shape_within(npu, even, DECODE, limits)
    assert shape.hidden % shape.heads == 0


def test_limits_no_shape_keeps_are_refused_by_name():
    with pytest.raises(ValueError, match=r"budget.speedup: 1000 cannot be reached on 910B1; at most \d"):
        candidates(chip("910B1"), TEACHER, DECODE, Limits(speedup=1000.0), 4)
    with pytest.raises(ValueError, match=r"no aligned student .* keeps to parameters=0.5, speedup=1000 on 910B1"):
        candidates(chip("910B1"), TEACHER, DECODE, Limits(parameters=0.5, speedup=1000.0), 4)


def measured_search(tolerance: float):
    """A search whose loss falls with the layers kept: deep shapes are better, and slower."""
    losses = lambda shape: 5.0 - 0.1 * shape.layers + shape.neurons / 1e5  # noqa: E731
    return search(chip("910B1"), SMOLLM2, DECODE, Limits(parameters=0.75), 8, tolerance, losses)


def test_a_front_holds_what_no_other_beats_and_the_pick_is_the_fastest_good_one():
    found = measured_search(0.25)
    for each in found.candidates:
        beaten = any(
            other.seconds(DECODE) <= each.seconds(DECODE) and other.loss <= each.loss
            and (other.seconds(DECODE), other.loss) != (each.seconds(DECODE), each.loss)
            for other in found.candidates
        )  # fmt: skip
        assert each.front is not beaten
    lowest = min(each.loss for each in found.candidates)
    good = [each for each in found.candidates if each.loss <= lowest + 0.25]
    assert found.picked in good and found.picked.front
    assert found.picked.seconds(DECODE) == min(each.seconds(DECODE) for each in good)


def test_what_was_costed_is_every_aligned_shape_and_what_keeps_to_the_limits():
    found, inner = measured_search(0.25), SMOLLM2.non_embedding_parameters()
    every = list(possible_shapes(SMOLLM2, 0.0, 1.0))
    kept = sorted(each.non_embedding_parameters() / inner for each in every)
    kept = [share for share in kept if share <= 0.75]
    result = SearchResult.of(found)
    assert found.costed.aligned == result.aligned == len(every)
    assert sorted(found.costed.kept) == pytest.approx(kept) and len(found.costed.seconds) == result.within
    for each in found.candidates:
        assert min(abs(each.seconds(DECODE) / seconds - 1) for seconds in found.costed.seconds) < 1e-9


def test_no_tolerance_picks_the_best_and_a_wide_one_the_fastest():
    assert measured_search(0.0).picked.loss == min(each.loss for each in measured_search(0.0).candidates)
    assert measured_search(100.0).picked == measured_search(100.0).candidates[0]


def test_equal_speed_is_decided_by_the_loss():
    one = replace(describe(chip("CPU"), TEACHER, TEACHER, DECODE), loss=2.0)
    assert pick([one, replace(one, loss=1.9)], DECODE, 0.5).loss == 1.9


def test_every_candidate_is_measured_once_and_an_infinite_loss_is_refused():
    seen = []
    found = search(
        chip("CPU"),
        TEACHER,
        DECODE,
        Limits(parameters=0.5),
        5,
        0.1,
        lambda shape: seen.append(shape) or float(len(seen)),
    )
    assert seen == [each.shape for each in found.candidates] and len(seen) == len(set(seen))
    with pytest.raises(ValueError, match="is not finite; check the teacher and the evaluation text"):
        search(chip("CPU"), TEACHER, DECODE, Limits(parameters=0.5), 5, 0.1, lambda shape: float("nan"))


def test_a_search_is_plain_data_and_draws_a_picture(tmp_path):
    found = measured_search(0.25)
    SearchResult.of(found).save(tmp_path)
    result = SearchResult.load(tmp_path)
    assert result.picked.axes() == found.picked.shape.axes()
    assert [each.loss for each in result.candidates] == [each.loss for each in found.candidates]
    assert result.teacher.kept == 1.0 and result.chip == "910B1" and "0.25 nats" in result.rule
    pareto_plot.draw(found, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
