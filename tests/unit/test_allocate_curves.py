"""Laws of widths by measured losses: the best choice of additive convex curves, budgets kept, nothing unmeasured."""

import itertools
import math

import pytest
import torch

from pipeline.allocate.budgets import layer_weights
from pipeline.allocate.curves import Narrowing, Sensitivities, lower_hull, measured_widths, removals
from pipeline.model.sizes import LayerSizes, Sizes

LAYER = LayerSizes(6, 3, 96)  # a KV group of two queries weighs as much as 16 neurons: 2 · 32 · 8 · 3 = 3 · 32 · 16
SIZES = Sizes(100, 32, 8, (LAYER,) * 3)
WHOLE = layer_weights(SIZES, SIZES.layers)
UNIT = 3 * 32 * 16


def convex(seed, units, count):
    """Random rising convex losses [count][units + 1] that begin at one loss for all."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.rand(count, units, generator=draw, dtype=torch.float64).sort().values
    return [[(0, 0.5), *((i + 1, 0.5 + float(total)) for i, total in enumerate(row))] for row in steps.cumsum(1)]


def stretched(curve, factor):
    return [(removed * factor, loss) for removed, loss in curve]


def promised(widths, groups, neurons):
    """Summed losses of widths at measured points."""
    return sum(
        dict(one)[LAYER.groups - width.groups] + dict(other)[LAYER.neurons - width.neurons]
        for width, one, other in zip(widths, groups, neurons, strict=True)
    )


def best_by_force(groups, neurons, weights, multiple, sizes=SIZES):
    each = [LayerSizes(2 * k, k, f) for k in (3, 2, 1) for f in range(96, 0, -multiple)]
    possible = itertools.product(each, repeat=len(sizes.layers))
    return min(promised(widths, groups, neurons) for widths in possible if layer_weights(sizes, widths) <= weights)


@pytest.mark.parametrize("seed", range(4))
def test_where_every_step_weighs_the_same_no_choice_within_the_budget_promises_less(seed):
    groups = convex(seed, 2, 3)
    neurons = [stretched(curve, 16) for curve in convex(seed + 100, 6, 3)]
    for kept in (0.9, 0.77, 0.6, 0.45):
        weights = int(kept * WHOLE)
        widths = measured_widths(SIZES, groups, neurons, weights, 16)
        assert weights - UNIT < layer_weights(SIZES, widths) <= weights
        found, wanted = promised(widths, groups, neurons), best_by_force(groups, neurons, weights, 16)
        assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_unequal_steps_promise_at_most_the_last_step_more_than_the_best(seed):
    groups = convex(seed, 2, 3)
    neurons = [stretched(curve, 32) for curve in convex(seed + 100, 3, 3)]
    largest = max(b[1] - a[1] for curve in (*groups, *neurons) for a, b in itertools.pairwise(curve))
    for kept in (0.9, 0.77, 0.6, 0.45):
        weights = int(kept * WHOLE)
        widths = measured_widths(SIZES, groups, neurons, weights, 32)
        assert weights - 2 * UNIT < layer_weights(SIZES, widths) <= weights
        assert promised(widths, groups, neurons) <= best_by_force(groups, neurons, weights, 32) + largest


@pytest.mark.parametrize("seed", range(3))
def test_any_curves_keep_to_the_budget_and_leave_less_than_a_step_of_any_narrowed_layer(seed):
    """Odd widths, layers that differ, curves with bumps and dips: never above, and nothing that went would fit."""
    draw = torch.Generator().manual_seed(seed)
    layers = (LayerSizes(8, 4, 1000), LayerSizes(6, 3, 640), LayerSizes(2, 1, 90), LayerSizes(8, 4, 1500))
    sizes = Sizes(100, 48, 16, layers)

    def bumpy(counts):
        return [(0, 0.1), *((count, float(torch.randn(1, generator=draw, dtype=torch.float64))) for count in counts)]

    groups = [bumpy(range(1, layer.groups)) for layer in layers]
    neurons = [bumpy(removals(layer.neurons, [0.3, 0.6, 1.0], layer.neurons)) for layer in layers]
    for kept in (1.0, 0.9, 0.5, 0.2):
        weights = int(kept * layer_weights(sizes, layers))
        widths = measured_widths(sizes, groups, neurons, weights, 128)
        total = layer_weights(sizes, widths)
        assert total <= weights
        for place, (now, own) in enumerate(zip(widths, layers, strict=True)):
            assert now.heads == 2 * now.groups and 1 <= now.groups <= own.groups
            assert now.neurons == own.neurons or (now.neurons % 128 == 0 and now.neurons >= 128)
            wider = [LayerSizes(now.heads + 2, now.groups + 1, now.neurons)] * (now.groups < own.groups)
            if now.neurons < own.neurons:
                wider.append(LayerSizes(now.heads, now.groups, min(now.neurons + 128, own.neurons)))
            for each in wider:
                assert layer_weights(sizes, [*widths[:place], each, *widths[place + 1 :]]) > weights
    assert measured_widths(sizes, groups, neurons, layer_weights(sizes, layers), 128) == list(layers)


def test_a_layer_whose_removal_costs_nothing_loses_first_and_all_it_can():
    flat, steep = [(0, 1.0), (96, 1.0)], [(0, 1.0), (48, 1.01), (96, 2.0)]
    heads = [[(0, 1.0), (1, 3.0), (2, 6.0)]] * 3
    widths = measured_widths(SIZES, heads, [steep, flat, steep], WHOLE - 5 * UNIT, 16)
    assert widths == [LAYER, LayerSizes(6, 3, 16), LAYER]
    more = measured_widths(SIZES, heads, [steep, flat, steep], WHOLE - 6 * UNIT, 16)
    assert more[1] == LayerSizes(6, 3, 16) and sorted(each.neurons for each in more) == [16, 80, 96]


def test_nothing_goes_that_was_not_measured():
    heads = [[(0, 0.0)]] * 3
    neurons = [[(0, 0.0), (48, 0.1)], [(0, 0.0), (40, 0.1)], [(0, 0.0)]]
    widths = measured_widths(SIZES, heads, neurons, WHOLE - 5 * UNIT, 16)
    assert [each.neurons for each in widths] == [48, 64, 96] and {each.groups for each in widths} == {3}
    with pytest.raises(ValueError, match="add a deeper level to sensitivity.levels"):
        measured_widths(SIZES, heads, neurons, WHOLE - 6 * UNIT, 16)


def test_the_hull_is_convex_nowhere_above_and_leaves_convex_curves_alone():
    bumpy = [(0, 1.0), (1, 3.0), (3, 2.0), (4, 5.0), (6, 4.0)]
    assert lower_hull(bumpy) == [(0, 1.0), (3, 2.0), (6, 4.0)]
    (curve,) = convex(3, 9, 1)
    assert lower_hull(curve) == curve and lower_hull([(0, 2.0)]) == [(0, 2.0)]


def test_rows_become_curves_that_end_before_a_loss_that_is_no_number():
    rows = [
        {"layer": None, "kind": None, "removed": 0, "loss": 0.25},
        {"layer": 4, "kind": "groups", "removed": 1, "loss": 0.5},
        {"layer": 4, "kind": "neurons", "removed": 8, "loss": 1.0},
        {"layer": 4, "kind": "neurons", "removed": 16, "loss": math.nan},
        {"layer": 5, "kind": "neurons", "removed": 8, "loss": 2.0},
    ]
    sensitivities = Sensitivities(tuple(Narrowing(**row) for row in rows))
    assert sensitivities.curves(4) == ([(0, 0.25), (1, 0.5)], [(0, 0.25), (8, 1.0)])
    assert sensitivities.curves(5) == ([(0, 0.25)], [(0, 0.25), (8, 2.0)])


def test_levels_remove_whole_units_and_keep_what_must_stay():
    assert removals(3, [0.25, 0.5, 0.75, 1.0], 2) == [1, 2]
    assert removals(1, [0.25, 0.5, 0.75, 1.0], 0) == []
    assert removals(1536, [1.0, 0.25], 1536) == [384, 1536]
