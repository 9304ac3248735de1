"""Laws of layer budgets: the formulas, budgets kept exactly, searches that never lose what they found."""

import itertools

import pytest
import torch

from pipeline.allocate.budgets import (
    adapted,
    evolved_depth,
    greedy_depth,
    layer_weights,
    threshold_widths,
    uniform_widths,
    widths_at,
)
from pipeline.model.sizes import LayerSizes, Sizes

LAYER = LayerSizes(12, 4, 1536)
SIZES = Sizes(1000, 64, 16, (LAYER,) * 6)


def scores(seed, *lengths):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=draw, dtype=torch.float64) for length in lengths]


def test_no_sparsity_keeps_the_layer_and_full_sparsity_keeps_a_group_and_a_multiple():
    odd = LayerSizes(12, 4, 1500)
    assert uniform_widths([LAYER, odd], 0.0, 128) == [LAYER, odd]
    assert uniform_widths([LAYER, odd], 0.99, 128) == [LayerSizes(3, 1, 128)] * 2
    assert uniform_widths([LAYER], 0.25, 128) == [LayerSizes(9, 3, 1152)]


def test_a_growing_sparsity_never_widens_a_layer():
    before = LAYER
    for sparsity in torch.linspace(0, 1, 200, dtype=torch.float64):
        (now,) = widths_at([LAYER], sparsity[None], 16)
        assert now.heads <= before.heads and now.groups <= before.groups and now.neurons <= before.neurons
        assert now.heads == 3 * now.groups and now.neurons % 16 == 0
        before = now


def test_adapted_is_adapt_pruners_formula():
    influence, sparsities = torch.tensor([0.4, 0.1, 0.1, 0.2]).double(), torch.tensor([0.0, 0.1, 0.2, 0.985]).double()
    relative = torch.tensor([1.0, -0.5, -0.5, 0.0], dtype=torch.float64)
    wanted = (sparsities + 0.02 - 0.02 * relative).clamp(0, 0.99)
    torch.testing.assert_close(adapted(sparsities, influence, 0.02, 0.02), wanted)
    cosines = adapted(sparsities, influence - 1.0, 0.02, 0.02)
    torch.testing.assert_close(cosines, wanted)


def test_adapted_layers_never_grow_and_lose_the_step_on_average():
    influence, sparsities = scores(0, 10)[0], torch.zeros(10, dtype=torch.float64)
    for step in range(1, 20):
        after = adapted(sparsities, influence, 0.02, 0.02)
        assert (after >= sparsities).all()
        assert float(after.mean()) == pytest.approx(0.02 * step)
        assert after.argmin() == influence.argmax()
        sparsities = after
    assert torch.equal(adapted(sparsities, torch.ones(10), 0.02, 0.02), sparsities + 0.02)
    with pytest.raises(ValueError, match="amplitude is 0.03.*a layer would grow"):
        adapted(sparsities, influence, 0.02, 0.03)


@pytest.mark.parametrize("fraction", [1.0, 0.8, 0.5, 0.3])
@pytest.mark.parametrize("multiple", [1, 64])
def test_a_threshold_meets_its_budget_with_little_unused(fraction, multiple):
    groups, neurons = scores(1, *[4] * 6), scores(2, *[1536] * 6)
    widths = threshold_widths(SIZES, groups, neurons, fraction, multiple)
    whole, used = layer_weights(SIZES, SIZES.layers), layer_weights(SIZES, widths)
    assert used <= fraction * whole
    assert used > fraction * whole - max(2 * 64 * 16 * 4, 3 * 64 * multiple)
    assert all(width.neurons % multiple == 0 and width.groups >= 1 for width in widths)


def test_one_threshold_separates_what_goes_from_what_stays():
    groups, neurons = scores(3, *[4] * 6), scores(4, *[1536] * 6)
    widths = threshold_widths(SIZES, groups, neurons, 0.6, 1)
    free = [layer for layer in range(6) if widths[layer].groups > 1]
    gone = [groups[i].sort().values[: 4 - widths[i].groups] for i in range(6)]
    gone += [neurons[i].sort().values[: 1536 - widths[i].neurons] for i in range(6)]
    stays = [groups[i].sort().values[4 - widths[i].groups :] for i in free]
    stays += [neurons[i].sort().values[1536 - widths[i].neurons :] for i in range(6)]
    assert torch.cat(gone).max() <= torch.cat(stays).min()


def test_layer_weights_are_the_projections_own():
    widths = [LayerSizes(6, 2, 100), LAYER]
    plain = sum(64 * 16 * (2 * w.heads + 2 * w.groups) + 3 * 64 * w.neurons for w in widths)
    assert layer_weights(SIZES, widths) == plain


def test_an_impossible_threshold_is_refused():
    with pytest.raises(ValueError, match="budget.parameters is 0.1; 4 groups and 1 neurons"):
        threshold_widths(SIZES, scores(1, *[4] * 6), scores(2, *[1536] * 6), 0.1, 1, (4, 1))


def pairwise(seed, total):
    """A loss in which layers matter alone and in pairs; every set has its own value."""
    alone, pairs = scores(seed, total)[0].abs(), scores(seed + 1, total * total)[0].view(total, total) * 0.7

    def loss(kept):
        gone = [layer for layer in range(total) if layer not in kept]
        return float(sum(alone[i] for i in gone) + sum(pairs[i, j] for i in gone for j in gone if i < j))

    return loss


def test_greedy_takes_the_best_layer_each_time_and_keeps_the_first():
    loss = pairwise(0, 8)
    found = greedy_depth(8, 5, loss, {0, 1})
    kept = tuple(range(8))
    for _ in range(3):
        kept = min((tuple(x for x in kept if x != layer) for layer in kept[2:]), key=loss)
    assert found.kept == kept and found.loss == loss(kept)
    assert found.kept[:2] == (0, 1)
    assert len(found.tried) == 6 + 5 + 4


def test_evolution_finds_the_best_set_never_measures_one_twice_and_repeats_itself():
    loss, requested = pairwise(4, 8), []

    def counted(kept):
        requested.append(kept)
        return loss(kept)

    best = min(((0, *rest) for rest in itertools.combinations(range(1, 8), 4)), key=loss)
    start = (0, 1, 2, 3, 4)
    found = evolved_depth(8, 5, counted, {0}, start, 40, 8, seed=0)
    assert found.kept == best and found.loss == loss(best)
    assert len(requested) == len(set(requested)) == len(found.tried)
    assert found == evolved_depth(8, 5, loss, {0}, start, 40, 8, seed=0)


def test_evolution_never_ends_above_its_start_and_treats_nan_as_worst():
    for seed in range(5):
        start = (0, 2, 3, 6)
        loss = pairwise(seed, 8)
        assert evolved_depth(8, 4, loss, {0}, start, 2, 2, seed).loss <= loss(start)
    broken = evolved_depth(6, 3, lambda kept: 1.0 if kept == (0, 1, 2) else float("nan"), {0}, (0, 1, 2), 5, 4, 0)
    assert broken.kept == (0, 1, 2)
    whole = evolved_depth(4, 4, lambda kept: 2.0, {0}, range(4), 5, 4, 0)
    assert whole.kept == (0, 1, 2, 3)


def test_impossible_depths_are_refused():
    with pytest.raises(ValueError, match="shape.layers is 9; it must lie between 1 and 8"):
        greedy_depth(8, 9, len, ())
    with pytest.raises(ValueError, match=r"start keeps layers .* 4 of 8 with \[0, 1\]"):
        evolved_depth(8, 4, len, {0, 1}, (0, 2, 3, 4), 1, 1, 0)
