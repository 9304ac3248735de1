"""The law of composed blueprints: cutting twice is cutting once, donated heads and stabilised gains included."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, compose, everything
from pipeline.model.scores import Scores
from pipeline.model.sizes import LayerSizes
from pipeline.prune.plan import plan
from pipeline.prune.surgery.cut import cut
from pipeline.prune.surgery.reinit import stabilise_gains
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model

# Their gains follow one source layer, so they compose where no heads are donated.
QK_NORMS_OF_HEAD_SIZE = ("qwen3", "gemma3_text")


def planned(anatomy, hosts, widths, hidden, clap, seed):
    draw = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.rand(count, generator=draw, dtype=torch.float64)

    layers = anatomy.sizes.layers
    heads, neurons = tuple(some(w.heads) for w in layers), tuple(some(w.neurons) for w in layers)
    scores = Scores(some(anatomy.sizes.hidden), heads, neurons, some(len(layers)), 1)
    return plan(anatomy, scores, hosts, widths, hidden, clap=clap)


def stabilised(anatomy, blueprint, source):
    return dict(stabilise_gains(anatomy, blueprint, source, cut(anatomy, blueprint, source)))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_cutting_twice_is_cutting_once_by_the_composition(kind, seed):
    model = tiny_model(kind, num_attention_heads=8, num_key_value_heads=4)
    source = tensors_of(model)
    anatomy = anatomy_of(config_of(model), source)
    clap = kind not in QK_NORMS_OF_HEAD_SIZE
    first = planned(
        anatomy, [0, 1, 3], [LayerSizes(6, 3, 20), LayerSizes(4, 4, 22), LayerSizes(6, 3, 24)], 28, clap, seed
    )
    middle = first.student(anatomy)
    second = planned(middle, [0, 2], [LayerSizes(2, 2, 7), LayerSizes(1, 1, 20)], 20, clap, seed + 10)
    once = compose(first, second)
    once.check(anatomy)
    assert once.student(anatomy).shapes() == second.student(middle).shapes()
    twice = stabilised(middle, second, stabilised(anatomy, first, source))
    for name, tensor in stabilised(anatomy, once, source).items():
        torch.testing.assert_close(twice[name], tensor, rtol=1e-12, atol=1e-14)


def test_heads_donated_twice_keep_the_layer_they_came_from():
    """Layer 2's group 1 goes to layer 1, and with it, when that is dropped too, to layer 0; its group 0 is dropped."""
    first = Blueprint((0, 1, 2), (own(0, 0, 1), LayerPlan(1, (Group(1, 0, (1,)), Group(2, 1, (2,))), (0, 2))))
    second = Blueprint((2, 0), (LayerPlan(0, (Group(0, 1, (3,)), Group(1, 1, (1,))), (1,)),))
    assert compose(first, second) == Blueprint((2, 0), (LayerPlan(0, (Group(0, 1, (3,)), Group(2, 1, (2,))), (1,)),))


def own(layer, *groups):
    return LayerPlan(layer, tuple(Group(layer, kv, (2 * kv, 2 * kv + 1)) for kv in groups), (0, 1, 2))


def test_everything_composed_with_a_plan_is_that_plan():
    model = tiny_model("llama")
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    some = planned(anatomy, [0, 2, 3], [LayerSizes(2, 1, 9)] * 3, 16, True, 3)
    assert compose(everything(anatomy.sizes), some) == some
    assert compose(some, everything(some.sizes(anatomy.sizes))) == some
