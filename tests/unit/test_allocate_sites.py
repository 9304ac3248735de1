"""Laws of where widths are searched and the even widths a search begins with."""

from dataclasses import replace

import pytest

from pipeline.allocate.budgets import layer_weights
from pipeline.allocate.sites import even_start, given_start, sites_of
from pipeline.model.shape import Shape
from pipeline.model.sizes import LayerSizes, Sizes

MODULES = {"n d": "layers.{layer}.o", "f": "layers.{layer}.down"}
SMOL = Sizes(49152, 576, 64, (LayerSizes(9, 3, 1536),) * 30)


def widths_of(sites, widths):
    pairs = zip(widths[::2], widths[1::2], strict=True)
    return [LayerSizes(3 * groups, groups, neurons) for groups, neurons in pairs]


@pytest.mark.parametrize("share", [1.0, 0.875, 0.75, 0.625, 0.5])
def test_an_even_start_fills_the_budget_to_a_step_and_both_kinds_keep_the_same_share(share):
    """30 layers of 3 KV groups: whole groups cannot all keep three quarters, so some layers keep 3 and some 2."""
    sites = sites_of(SMOL, range(30), MODULES, 32)
    allowed = int(share * layer_weights(SMOL, SMOL.layers))
    start = even_start(sites, allowed)
    weights = layer_weights(SMOL, widths_of(sites, start))
    assert allowed - 3 * 576 * 32 < weights <= allowed
    assert sum(start[::2]) == pytest.approx(90 * share, abs=0.5) and max(start[::2]) - min(start[::2]) <= 1
    assert max(start[1::2]) - min(start[1::2]) <= 32 and all(width % 32 == 0 for width in start[1::2])


def test_whole_groups_that_weigh_too_much_are_paid_for_by_neurons():
    sites = sites_of(SMOL, range(30), MODULES, 32)
    allowed = int(0.2 * layer_weights(SMOL, SMOL.layers))
    start = even_start(sites, allowed)
    assert set(start[::2]) == {1} and layer_weights(SMOL, widths_of(sites, start)) <= allowed
    with pytest.raises(ValueError, match=r"^budget\.parameters: "):
        even_start(sites, int(0.02 * layer_weights(SMOL, SMOL.layers)))


def test_weights_of_units_add_up_to_those_of_the_layers_that_stay():
    sites = sites_of(SMOL, [0, 4, 7], MODULES, 128)
    assert sum(site.most * site.weights for site in sites) == layer_weights(SMOL, SMOL.layers[:3])
    assert [site.name for site in sites[:3]] == ["layers.0.o", "layers.0.down", "layers.4.o"]
    assert all(site.size * site.most in (576, 1536) for site in sites)


def test_a_width_that_is_no_multiple_steps_by_what_both_divide():
    odd = Sizes(96, 32, 8, (LayerSizes(4, 2, 24),))
    assert sites_of(odd, [0], MODULES, 32)[1].least == 8


@pytest.mark.parametrize("multiple", [16, 8])
@pytest.mark.parametrize("share", [0.95, 0.7, 0.5])
def test_layers_of_unequal_widths_start_in_steps_that_all_of_them_can_take(multiple, share):
    odd = Sizes(96, 32, 8, tuple(LayerSizes(6, 2, neurons) for neurons in (24, 20, 24)))
    sites = sites_of(odd, range(3), MODULES, multiple)
    allowed = int(share * layer_weights(odd, odd.layers))
    start = even_start(sites, allowed)
    assert {site.least for site in sites[1::2]} == {4} and all(width % 4 == 0 for width in start[1::2])
    assert all(site.least <= width <= site.most for site, width in zip(sites, start, strict=True))
    assert allowed - 3 * 32 * 4 < layer_weights(odd, widths_of(sites, start)) <= allowed


def test_a_given_shape_starts_as_it_is_and_keeps_groups_whole():
    sites = sites_of(SMOL, range(2), MODULES, 32)
    shape = Shape(layers=2, hidden=576, heads=6, groups=2, neurons=1152)
    assert given_start(sites, shape) == (2, 1152, 2, 1152)
    with pytest.raises(ValueError, match=r"^shape\.heads: 4 "):
        given_start(sites, replace(shape, heads=4))
