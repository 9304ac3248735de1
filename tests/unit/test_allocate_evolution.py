"""Laws of the width search: even starts, budgets exact at every step, the optimum of a separable loss, resumption."""

import itertools

import pytest
import torch

from pipeline.allocate.evolution import Place, candidate_widths, evolve, mutated, spread

CURVES = torch.rand(6, generator=torch.Generator().manual_seed(3)).add(0.1).tolist()
PLACES = [Place("ffn", (16, 32, 48, 64), 3)] * 4 + [Place("attention", (1, 2, 3), 40)] * 2
START = (64, 16, 48, 16, 3, 1)
ASKED = {"offspring": 8, "survivors": [4, 1], "swaps": 3, "seed": 1}


def weights_of(places, widths):
    """Return the parameters of a choice."""
    return sum(place.weights * width for place, width in zip(places, widths, strict=True))


def separable(widths, selection):
    """Convex in every width, so that single swaps lead to the optimum."""
    return sum(curve * (64.0 if width > 3 else 4.0) / width for curve, width in zip(CURVES, widths, strict=True))


def test_the_search_finds_the_optimum_of_a_separable_loss_within_the_budget_of_each_kind():
    wanted = min(
        (c for c in itertools.product(*(p.widths for p in PLACES)) if sum(c[:4]) == 144 and sum(c[4:]) == 4),
        key=lambda c: separable(c, 0),
    )
    *_, last = evolve(PLACES, START, separable, 40, **ASKED)
    assert last.widths == wanted != START and last.loss == separable(wanted, 1) < separable(START, 1)


def test_losses_never_rise_and_every_choice_measured_has_the_weights_of_the_start():
    seen = []

    def loss(widths, selection):
        seen.append((widths, selection))
        return separable(widths, selection) + (0.3 * torch.tensor(widths).sin().sum() if selection == 0 else 0.0)

    losses = [each.loss for each in evolve(PLACES, START, loss, 12, **ASKED)]
    assert losses == sorted(losses, reverse=True) and len(losses) == 13
    assert len(seen) == len(set(seen)) and {weights_of(PLACES, widths) for widths, _ in seen} == {
        weights_of(PLACES, START)
    }
    assert {sum(widths[4:]) for widths, _ in seen} == {4}, "a kind keeps its own budget"
    firsts, lasts = (sum(s == selection for _, s in seen) for selection in (0, 1))
    assert firsts <= 12 * 8 and lasts <= 1 + 12 * 4


def test_uneven_candidates_are_swapped_only_for_equal_weights():
    """Where clipping left an uneven step, it moves only against one just as uneven."""
    places = [Place("ffn", (8, 16, 24), 2), Place("ffn", (8, 16, 20), 2), Place("ffn", (4, 8, 16), 4)]
    draw, reached = torch.Generator().manual_seed(0), set()
    widths = (16, 16, 8)
    for _ in range(300):
        widths = mutated(places, widths, draw)
        assert weights_of(places, widths) == weights_of(places, (16, 16, 8))
        reached.add(widths)
    assert {(24, 8, 8), (8, 24, 8)} & reached and not any(20 in each for each in reached)


def test_without_a_swap_the_start_stays():
    places = [Place("attention", (1, 2), 1), Place("ffn", (8, 16), 1)]
    found = evolve(places, (2, 8), lambda widths, selection: float(sum(widths)), 3, **ASKED)
    assert [each.widths for each in found] == [(2, 8)] * 4


def test_a_search_taken_up_after_any_generation_ends_as_one_never_interrupted():
    whole = list(evolve(PLACES, START, separable, 8, **ASKED))
    assert len({each.widths for each in whole}) > 2
    for done in whole:
        assert list(evolve(PLACES, START, separable, 8, **ASKED, done=done)) == whole[done.number + 1 :]


def test_a_loss_that_is_no_number_never_wins():
    def loss(widths, selection):
        return float("nan") if widths[0] < widths[1] else separable(widths, selection)

    assert all(each.widths[0] >= each.widths[1] for each in evolve(PLACES, START, loss, 10, **ASKED))


@pytest.mark.parametrize("total", [32, 40, 48, 72, 128])
def test_a_spread_start_is_exact_and_even(total):
    widths = spread(total, [32] * 4, 8, 8)
    assert sum(widths) == total and max(widths) - min(widths) <= 8 and min(widths) >= 8
    assert spread(7, [3, 3, 3], 1, 1) in {(2, 2, 3), (2, 3, 2), (3, 2, 2)}
    uneven = spread(30, [8, 32], 0, 1)
    assert uneven == (6, 24)


def test_a_total_out_of_reach_is_refused():
    for total in (7, 20, 136):
        with pytest.raises(ValueError, match="are impossible: 8 to 32"):
            spread(total, [32], 8, 8)


def test_candidates_are_clipped_and_few_units_have_few():
    assert candidate_widths(1152, 1536, 32, 0.125, 4, 32) == tuple(range(384, 1537, 192))
    assert candidate_widths(2, 3, 1, 0.125, 4, 1) == (1, 2, 3)
    assert candidate_widths(40, 64, 16, 0.25, 2, 8) == (16, 24, 40, 56, 64)
    assert candidate_widths(64, 64, 64, 0.25, 4, 8) == (64,)


def test_survivors_must_end_in_one():
    for survivors in ([4, 2], [1, 4, 1]):
        with pytest.raises(ValueError, match="end in 1"):
            list(evolve(PLACES, START, separable, 1, 4, survivors, 1, 0))
    with pytest.raises(ValueError, match="place 0 starts at 33"):
        list(evolve(PLACES, (33, *START[1:]), separable, 1, **ASKED))
