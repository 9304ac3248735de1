"""Laws of widths layer by layer: never above the budget, never wider than before, close to what is allowed."""

from dataclasses import replace

import pytest
import torch

from pipeline.allocate.budgets import adapted, layer_weights
from pipeline.allocate.widths import adaptive_widths, even_widths, partway, weights_within, widths_above
from pipeline.costmodel.nearest_shape import given_shape
from pipeline.costmodel.shapes import ModelShape
from pipeline.model.anatomy import anatomy_of
from pipeline.model.sizes import LayerSizes, Sizes
from tests.tiny import anatomy_with, config_of, tensors_of, tiny_model

LAYER = LayerSizes(9, 3, 1536)
SIZES = Sizes(1000, 576, 64, (LAYER,) * 30)
WHOLE = layer_weights(SIZES, SIZES.layers)
ONE = 2 * 576 * 64 * 4 + 3 * 576 * 128  # a KV group with its three queries, and 128 neurons


def influence(seed):
    return torch.rand(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("amplitude", [0.0, 0.02, 0.05])
def test_rounds_reach_the_budget_step_by_step_and_no_layer_grows(amplitude):
    now, sparsities = SIZES.layers, torch.zeros(30, dtype=torch.float64)
    for done in range(1, 5):
        weights = int(WHOLE * (1 - 0.25 * done / 4))
        before, wanted = now, adapted(sparsities, influence(done), 0.0625, amplitude)
        now, sparsities = adaptive_widths(
            SIZES, before, sparsities, influence(done), weights, amplitude=amplitude, steps=1, multiple=128
        )
        torch.testing.assert_close(sparsities, wanted, rtol=1e-6, atol=1e-6)
        assert weights - ONE < layer_weights(SIZES, now) <= weights
        for here, there in zip(now, before, strict=True):
            assert here.heads == 3 * here.groups and here.neurons % 128 == 0
            assert here.groups <= there.groups and here.neurons <= there.neurons
    assert amplitude < 0.05 or len(set(now)) > 3


def test_the_layer_that_changes_the_stream_least_loses_most():
    given = torch.arange(30, dtype=torch.float64)
    widths, sparsities = adaptive_widths(
        SIZES, SIZES.layers, given * 0, given, int(0.7 * WHOLE), amplitude=0.25, steps=1, multiple=128
    )
    assert (sparsities.diff() < 0).all()
    assert widths[0].neurons < widths[15].neurons < widths[29].neurons and widths[0].groups < widths[29].groups


def test_steps_of_one_influence_are_one_step_of_their_sum():
    given, zeros = influence(5), torch.zeros(30, dtype=torch.float64)
    many = adaptive_widths(SIZES, SIZES.layers, zeros, given, int(0.8 * WHOLE), amplitude=0.02, steps=5, multiple=128)
    once = adaptive_widths(SIZES, SIZES.layers, zeros, given, int(0.8 * WHOLE), amplitude=0.1, steps=1, multiple=128)
    assert many[0] == once[0]
    torch.testing.assert_close(many[1], once[1])


def test_what_cannot_be_is_refused():
    zeros = torch.zeros(30, dtype=torch.float64)
    with pytest.raises(ValueError, match="plan.amplitude is 0.3; it must lie between 0 and the step 0.25"):
        adaptive_widths(
            SIZES, SIZES.layers, zeros, influence(0), int(0.75 * WHOLE), amplitude=0.3, steps=1, multiple=128
        )
    with pytest.raises(ValueError, match="cannot hold fewer than"):
        even_widths(SIZES, 1000, 128)


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.3])
def test_even_widths_are_the_widest_that_fit(fraction):
    widths = even_widths(SIZES, int(fraction * WHOLE), 128)
    assert len(set(widths)) == 1 and layer_weights(SIZES, widths) <= fraction * WHOLE
    (width,) = set(widths)
    for wider in (LayerSizes(width.heads + 3, width.groups + 1, width.neurons), LayerSizes(9, 3, width.neurons + 128)):
        if wider.groups <= 3 and wider.neurons <= 1536:
            assert layer_weights(SIZES, [wider] * 30) > fraction * WHOLE * 0.9


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_weights_within_a_fraction_are_those_of_a_student_that_keeps_it(kind):
    model = tiny_model(kind)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    inner = anatomy.parameters()[1]
    for fraction in (0.5, 0.7, 0.95):
        weights = weights_within(anatomy, fraction)
        rest = inner - layer_weights(anatomy.sizes, anatomy.sizes.layers)
        assert weights + rest <= fraction * inner < weights + rest + 1
    with pytest.raises(ValueError, match="budget.parameters is 0.001"):
        weights_within(anatomy, 0.001)


def test_one_threshold_takes_from_the_layers_that_score_low():
    draw = torch.Generator().manual_seed(0)

    def scores(count, shift):
        return torch.randn(count, generator=draw, dtype=torch.float64) + shift

    heads = [scores(9, layer % 2) for layer in range(30)]
    neurons = [scores(1536, layer % 2) for layer in range(30)]
    widths = widths_above(SIZES, heads, neurons, int(0.7 * WHOLE), 128)
    assert 0.68 * WHOLE < layer_weights(SIZES, widths) <= 0.7 * WHOLE
    low, high = (sum(w.neurons for w in widths[first::2]) for first in (0, 1))
    assert low < 0.75 * high


def test_shapes_on_the_way_narrow_in_equal_parts_and_end_at_the_student():
    teacher = ModelShape.of(anatomy_with(SIZES))
    student = ModelShape(26, 512, 6, 3, 64, 1152, 1000, True)
    shapes = [partway(teacher, student, done, 4) for done in range(5)]
    assert shapes[0] == teacher and shapes[4] == student
    for one, other in zip(shapes, shapes[1:]):
        assert all(other.axes()[axis] <= one.axes()[axis] for axis in one.axes())
        assert other.hidden % 64 == 0 and other.neurons % 128 == 0 and other.heads % other.groups == 0
    assert [shape.layers for shape in shapes] == [30, 29, 28, 27, 26]


@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_shapes_on_the_way_are_such_as_the_class_takes_and_never_widen(rounds):
    teacher = ModelShape(3, 96, 6, 3, 16, 48, 500, True, even_heads=True)
    attention = [(k * each, k) for k in (1, 2, 3) for each in (1, 2)]
    widths = [(hidden, *pair) for pair in attention for hidden in range(pair[0], 97, pair[0])]
    for hidden, heads, groups in widths:
        student = replace(teacher, layers=2, hidden=hidden, heads=heads, groups=groups)
        shapes = [partway(teacher, student, done, rounds) for done in range(rounds + 1)]
        assert shapes[0] == teacher and shapes[-1] == student
        for one, other in zip(shapes, shapes[1:]):
            assert other.accepted and given_shape(one, other.axes()) == other


def test_a_way_that_the_class_refuses_goes_on_by_the_nearest_steps_it_takes():
    teacher = ModelShape(26, 1536, 12, 6, 128, 6144, 153376, False)
    way = [partway(teacher, replace(teacher, hidden=1152), done, 4).hidden for done in range(5)]
    assert way == [1536, 1408, 1408, 1280, 1152]
    even = replace(teacher, even_heads=True)
    way = [partway(even, replace(even, hidden=1152), done, 4).hidden for done in range(5)]
    assert way == [1536, 1392, 1392, 1296, 1152]
