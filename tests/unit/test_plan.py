"""Laws of planning: depth, CLAP, groups, neurons, channels; pure and fast."""

import time
from dataclasses import replace

import pytest
import torch

from pipeline.model.anatomy import Anatomy, anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan
from pipeline.model.families import FAMILIES
from pipeline.model.scores import Scores
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.prune.plan import kept_layers, plan, shuffled
from tests.tiny import config_of, tensors_of, tiny_model


def anatomy(layers=6, heads=6, groups=3, neurons=16, hidden=24, types=None):
    widths = (LayerSizes(heads, groups, neurons),) * layers
    types = types or ("full_attention",) * layers
    family = FAMILIES["llama"]
    return Anatomy(family, Sizes(10, hidden, 4, widths), frozenset(family.layer), True, types)


def scores(of: Anatomy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.rand(n, generator=generator, dtype=torch.float64)  # noqa: E731
    layers = of.sizes.layers
    heads = tuple(draw(w.heads) for w in layers)
    return Scores(draw(of.sizes.hidden), heads, tuple(draw(w.neurons) for w in layers), draw(len(layers)), 1)


def test_block_influence_drops_the_least_influential_and_never_the_first():
    influence = torch.tensor([0.0, 0.5, 0.1, 0.9, 0.2, 0.3])
    assert kept_layers(influence, 4, "influence", range(1)) == [0, 1, 3, 5]
    assert kept_layers(influence, 4, "influence", range(3)) == [0, 1, 2, 3]
    assert kept_layers(influence, 4, "contiguous", range(1)) == [0, 1, 2, 3]
    assert kept_layers(influence, 5, "contiguous", range(1)) == [0, 1, 3, 4, 5]
    assert kept_layers(influence, 4, "last", range(1)) == [0, 1, 2, 3]
    assert kept_layers(influence, 6, "influence", range(1)) == list(range(6))
    with pytest.raises(ValueError, match="shape.layers is 7"):
        kept_layers(influence, 7, "influence", range(1))


def test_heads_are_ranked_inside_their_group_and_neurons_and_channels_by_score():
    of = anatomy()
    given = scores(of)
    made = plan(of, given, range(6), [LayerSizes(3, 3, 5)] * 6, 7, clap=False)
    for layer, place in enumerate(made.layers):
        for kv, group in enumerate(place.groups):
            pair = given.heads[layer][2 * kv : 2 * kv + 2]
            assert group == Group(layer, kv, (2 * kv + int(pair.argmax()),))
        assert min(given.neurons[layer][list(place.neurons)]) > max(
            given.neurons[layer][[n for n in range(16) if n not in place.neurons]]
        )
    assert set(made.channels) == set(given.channels.topk(7).indices.tolist())


def test_donor_groups_all_scored_lower_leave_the_host_unchanged():
    of = anatomy()
    given = scores(of)
    low = tuple(h * (1e-3 if layer == 3 else 1.0) for layer, h in enumerate(given.heads))
    given = Scores(given.channels, low, given.neurons, given.layers, 1)
    widths = [LayerSizes(6, 3, 16)] * 5
    hosts = [0, 1, 2, 4, 5]
    assert plan(of, given, hosts, widths, 24, clap=True) == plan(of, given, hosts, widths, 24, clap=False)


def test_a_silent_host_takes_all_its_groups_from_the_donor():
    of = anatomy()
    given = scores(of)
    silent = tuple(h * (0.0 if layer == 2 else 1.0) for layer, h in enumerate(given.heads))
    given = Scores(given.channels, silent, given.neurons, given.layers, 1)
    made = plan(of, given, [0, 1, 2, 4, 5], [LayerSizes(6, 3, 16)] * 5, 24, clap=True)
    assert [group.layer for group in made.layers[2].groups] == [3, 3, 3]
    assert made.layers[2].host == 2


def test_folding_a_run_of_dropped_layers_deepest_first_equals_one_joint_top_g():
    of = anatomy()
    given = scores(of, seed=3)
    made = plan(of, given, [0, 1, 5], [LayerSizes(6, 3, 16)] * 3, 24, clap=True).layers[1].groups
    ranked = {
        (layer, kv): float(given.heads[layer][2 * kv : 2 * kv + 2].mean()) for layer in range(1, 5) for kv in range(3)
    }
    pool = {key: value for key, value in ranked.items() if key[0] == 4}
    for layer in (3, 2, 1):  # layer+1 folds into layer, deepest first
        pool |= {key: value for key, value in ranked.items() if key[0] == layer}
        pool = dict(sorted(pool.items(), key=lambda item: -item[1])[:3])
    assert {(group.layer, group.kv) for group in made} == set(pool)


def test_a_group_is_scored_by_its_surviving_heads():
    of = anatomy(layers=2, heads=4, groups=2)
    heads = (torch.tensor([9.0, 0.0, 5.0, 5.0]), torch.tensor([6.0, 6.0, 1.0, 1.0]))
    given = Scores(torch.rand(24), heads, (torch.rand(16),) * 2, torch.rand(2), 1)
    both = plan(of, given, [0], [LayerSizes(4, 2, 16)], 24, clap=True).layers[0].groups
    assert {(g.layer, g.kv) for g in both} == {(1, 0), (0, 1)}  # means 4.5 and 5 against 6 and 1
    one = plan(of, given, [0], [LayerSizes(2, 2, 16)], 24, clap=True).layers[0].groups
    assert {(g.layer, g.kv) for g in one} == {(0, 0), (1, 0)}  # after pruning: 9 and 5 against 6 and 1


def test_normalised_scores_make_layers_of_unlike_loudness_comparable():
    of = anatomy(layers=2, heads=2, groups=2)
    heads = (torch.tensor([100.0, 120.0]), torch.tensor([1.0, 3.0]))
    given = Scores(torch.rand(24), heads, (torch.rand(16),) * 2, torch.rand(2), 1)
    plain = plan(of, given, [0], [LayerSizes(2, 2, 16)], 24, clap=True).layers[0].groups
    even = plan(of, given, [0], [LayerSizes(2, 2, 16)], 24, clap=True, clap_normalise=True).layers[0].groups
    assert {g.layer for g in plain} == {0}
    assert {(g.layer, g.kv) for g in even} == {(1, 1), (0, 1)}


def test_a_donor_of_another_attention_type_does_not_compete_and_is_refused_in_a_blueprint():
    types = ("full_attention", "full_attention", "sliding_attention", "full_attention")
    of = anatomy(layers=4, types=types)
    given = scores(of)
    loud = tuple(h * (100.0 if layer == 2 else 1.0) for layer, h in enumerate(given.heads))
    given = Scores(given.channels, loud, given.neurons, given.layers, 1)
    made = plan(of, given, [0, 1], [LayerSizes(6, 3, 16)] * 2, 24, clap=True)
    assert 2 not in {group.layer for group in made.layers[1].groups}
    wrong = Blueprint(tuple(range(24)), (LayerPlan(1, (Group(2, 0, (0, 1)),), tuple(range(16))),))
    with pytest.raises(ValueError, match="donor layer 2 is sliding_attention and host layer 1 is full_attention"):
        wrong.check(of)


def test_a_donor_matches_its_host_in_every_list_with_an_entry_per_layer():
    """SmolLM3's layers 1 and 3 have no rotary embedding: all are full attention, and they are two types."""
    model = tiny_model("smollm3")
    of = anatomy_of(config_of(model), tensors_of(model))
    assert of.layer_types[0] == of.layer_types[2] != of.layer_types[1] == of.layer_types[3]
    assert all("full_attention" in kind for kind in of.layer_types)
    given = scores(of)
    loud = tuple(h * (100.0 if layer else 1e-4) for layer, h in enumerate(given.heads))
    made = plan(of, replace(given, heads=loud), [0], [LayerSizes(4, 2, 24)], 32, clap=True)
    assert {group.layer for group in made.layers[0].groups} == {2}


def test_a_type_that_keeps_its_heads_gets_no_donors():
    model = tiny_model("youtu")
    of = anatomy_of(config_of(model), tensors_of(model))
    given = scores(of)
    loud = tuple(h * (100.0 if layer else 1e-4) for layer, h in enumerate(given.heads))
    made = plan(of, replace(given, heads=loud), [0], [of.sizes.layers[0]], 32, clap=True)
    assert {group.layer for group in made.layers[0].groups} == {0}
    made.check(of)


def test_a_donor_of_fewer_heads_a_group_than_its_host_is_asked_for_does_not_compete():
    """Layer 1 goes and is loudest, with one head a group: it donates to a host that needs one, not two."""
    of = anatomy(layers=4)
    own = (LayerSizes(6, 3, 16), LayerSizes(3, 3, 16), LayerSizes(6, 3, 16), LayerSizes(6, 3, 16))
    of = replace(of, sizes=replace(of.sizes, layers=own))
    given = scores(of)
    given = replace(given, heads=tuple(h * loud for h, loud in zip(given.heads, (1e-4, 1e4, 1.0, 1.0), strict=True)))

    def donors(*widths):
        made = plan(of, given, [0, 3], widths, 24, clap=True)
        made.check(of)
        return {group.layer for group in made.layers[0].groups}

    assert donors(LayerSizes(6, 3, 16), LayerSizes(6, 3, 16)) == {2}
    assert donors(LayerSizes(3, 3, 16), LayerSizes(6, 3, 16)) == {1}
    with pytest.raises(ValueError, match="shape.groups is 2, but a KV group of layer 1 has 1 heads"):
        plan(of, given, [0, 1], [LayerSizes(6, 3, 16)] * 2, 24, clap=True)


def test_layers_may_have_widths_of_their_own():
    of = anatomy()
    widths = [LayerSizes(6, 3, 16), LayerSizes(2, 2, 8), LayerSizes(1, 1, 4)] * 2
    made = plan(of, scores(of), range(6), widths, 24, clap=False)
    assert made.sizes(of.sizes).layers == tuple(widths)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (LayerSizes(9, 3, 16), "heads / shape.groups is 3"),
        (LayerSizes(4, 4, 16), "shape.groups is 4"),
        (LayerSizes(6, 3, 17), "17 of 16"),
    ],
)
def test_a_student_is_never_wider_than_its_teacher(width, message):
    of = anatomy()
    with pytest.raises(ValueError, match=message):
        plan(of, scores(of), range(6), [width] * 6, 24, clap=False)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (LayerPlan(0, (Group(0, 0, (0,)), Group(0, 1, (2, 3))), (0,)), "equal numbers of heads"),
        (LayerPlan(0, (Group(0, 0, (0,)), Group(0, 0, (1,))), (0,)), "taken twice"),
        (LayerPlan(0, (Group(0, 0, (2,)),), (0,)), "do not all read KV group 0"),
        (LayerPlan(0, (Group(0, 0, (0,)),), (16,)), "outside 0..15"),
        (LayerPlan(7, (Group(0, 0, (0,)),), (1,)), "host has a repeated index or one outside"),
    ],
)
def test_a_blueprint_that_does_not_fit_is_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        Blueprint((0,), (broken,)).check(anatomy())


def test_a_blueprint_survives_its_file(tmp_path):
    of = anatomy()
    made = plan(of, scores(of), [0, 2], [LayerSizes(3, 3, 5)] * 2, 7, clap=True)
    made.save(tmp_path)
    assert Blueprint.load(tmp_path) == made
    (tmp_path / Blueprint.FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"blueprint\.json is damaged: channels"):
        Blueprint.load(tmp_path)


def test_random_scores_change_only_what_they_are_asked_to():
    of = anatomy()
    given = scores(of)
    drawn = shuffled(given, ["neurons"], 5)
    assert torch.equal(drawn.channels, given.channels) and torch.equal(drawn.heads[1], given.heads[1])
    assert not torch.equal(drawn.neurons[0], given.neurons[0])
    assert torch.equal(drawn.neurons[0], shuffled(given, ["neurons"], 5).neurons[0])


def test_a_large_plan_is_planned_in_a_moment():
    """A plan is arithmetic on lists: 40 layers of 20 000 neurons stay far below anything a person would notice."""
    of = anatomy(layers=40, heads=64, groups=8, neurons=20000, hidden=5120)
    given = scores(of)
    began = time.process_time()
    plan(of, given, range(0, 40, 2), [LayerSizes(32, 8, 12000)] * 20, 4096, clap=True)
    assert time.process_time() - began < 5.0
