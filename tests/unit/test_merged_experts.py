"""Merged experts: means of an expert and of removed ones, weighted by routing, neuron by neuron."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, compose, everything
from pipeline.model.scores import Scores
from pipeline.prune.merging import neurons_of, paired
from pipeline.prune.surgery.cut import cut, expert_tensors, reordered
from pipeline.runtime.checkpoint import open_checkpoint
from tests.mixtures import CUT, loaded, made, mixture_world
from tests.tiny import config_of, tensors_of, tiny_model
from tests.tiny_text import configured


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_merged_experts_are_means_weighted_by_routing(kind, tmp_path):
    world = mixture_world(tmp_path, kind)
    dropped, merged = (made(world, CUT, f"plan.experts={how}", shape__experts=2) for how in ("scores", "merge"))
    blueprint, scores = Blueprint.load(merged["blueprint"]), Scores.load(merged["scores"])
    source, student = open_checkpoint(merged["teacher"]), open_checkpoint(merged["initial_student"])
    assert student.anatomy.shapes() == open_checkpoint(dropped["initial_student"]).anatomy.shapes()
    model, narrow = loaded(merged["teacher"]), loaded(merged["initial_student"])
    for place, (plan, plain) in enumerate(zip(blueprint.layers, Blueprint.load(dropped["blueprint"]).layers)):
        assert plan.experts == plain.experts
        weights, rows = scores.routing[plan.host][1], source[source.anatomy.router.format(layer=plan.host)]
        assert sorted(expert for parts in plan.merged for expert, _ in parts) == list(range(4))
        whole, few = (
            each.get_submodule(source.anatomy.expert_module(at)) for each, at in ((model, plan.host), (narrow, place))
        )
        for own, (expert, parts) in enumerate(zip(plan.experts, plan.merged)):
            members = [each for each, _ in parts]
            assert members[0] == expert
            for other in members[1:]:
                cosines = torch.cosine_similarity(rows[list(plan.experts)], rows[other][None])
                assert plan.experts[int(cosines.argmax())] == expert
            shares = weights[members] / weights[members].sum() if weights[members].any() else torch.eye(len(members))[0]
            torch.testing.assert_close(torch.tensor([share for _, share in parts]).double(), shares.double())
            read = neurons_of(source.anatomy, source, plan.host)
            for other, order in zip(members[1:], plan.aligned[own][1:], strict=True):
                assert order == paired(read(expert), read(other)) != tuple(range(24))
            for name in ("gate_up_proj", "down_proj"):
                orders = plan.aligned[own]
                assert not orders[0] and all(sorted(order) == list(range(24)) for order in orders[1:])
                aligned = torch.stack([
                    ordered(kind, name, getattr(whole, name)[each], order) for each, order in zip(members, orders)
                ])  # fmt: skip
                mean = torch.einsum("e,e...->...", shares.double(), aligned)
                torch.testing.assert_close(getattr(few, name)[own], mean)


def ordered(kind, name, tensor, order):
    """Return a tensor of an expert of Mixtral or GPT-OSS with its neurons in an order; an empty one is its own."""
    order = torch.tensor(order or range(24))
    if name == "down_proj":
        return tensor[:, order] if kind == "mixtral" else tensor[order]
    return tensor[torch.cat([order, order + 24])] if kind == "mixtral" else tensor[
        :, torch.stack([2 * order, 2 * order + 1], 1).flatten()
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "granitemoe", "llama4_text"])
def test_an_expert_that_is_another_with_its_neurons_shuffled_merges_into_it_unchanged(kind):
    model = tiny_model(kind)
    of = anatomy_of(config_of(model), tensors_of(model))
    tensors, layer = tensors_of(model), max(layer for layer in range(4) if of.sparse(layer))
    order = torch.randperm(of.sizes.carried["x"], generator=torch.Generator().manual_seed(1)).tolist()
    for name in of.routed:
        stored = name.format(layer=layer)
        if name in of.expert_of:
            pattern, expert = of.expert_of[name]
            if expert == 1:
                tensors[stored] = reordered(of, name, expert_tensors(of, tensors, name, layer)(0), order)
        else:
            tensors[stored][1] = reordered(of, name, tensors[stored][0], order)
    found = paired(*map(neurons_of(of, tensors, layer), (0, 1)))
    assert [order[place] for place in found] == list(range(len(order)))
    whole = everything(of.sizes)
    merged = (((0, 0.25), (1, 0.75)), ((2, 1.0),), ((3, 1.0),))
    layers = [replace(plan, experts=(0, 2, 3)) if of.sparse(plan.host) else plan for plan in whole.layers]
    dropped = dict(cut(of, replace(whole, layers=tuple(layers)), tensors))
    layers[layer] = replace(layers[layer], merged=merged, aligned=(((), found), ((),), ((),)))
    for name, tensor in cut(of, replace(whole, layers=tuple(layers)), tensors):
        torch.testing.assert_close(tensor, dropped[name])


def test_merging_twice_is_one_merge_of_their_shares():
    model = tiny_model("qwen3_moe")
    of = anatomy_of(config_of(model), tensors_of(model))
    whole = everything(of.sizes)
    draw = torch.Generator().manual_seed(2)
    one, two, three = (tuple(torch.randperm(12, generator=draw).tolist()) for _ in range(3))
    steps = [
        ((0, 2, 3), (((0, 0.25), (1, 0.75)), ((2, 1.0),), ((3, 1.0),)), (((), one), ((),), (two,))),
        ((0, 2), (((0, 0.5), (1, 0.5)), ((2, 1.0),)), ((three, ()), ((),))),
    ]
    first, second = (
        replace(whole, layers=tuple(replace(p, experts=kept, merged=means, aligned=orders) for p in whole.layers))
        for kept, means, orders in steps
    )
    once = dict(cut(first.student(of), second, dict(cut(of, first, tensors_of(model)))))
    for name, tensor in cut(of, compose(first, second), tensors_of(model)):
        torch.testing.assert_close(tensor, once[name])


def test_experts_are_merged_whole():
    with pytest.raises(ValueError, match=r"plan\.experts: "):
        configured("plan.experts=merge", "shape.experts=2", "shape.expert_neurons=6")


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ((((), ()), ((),)), "one order for each"),
        ((((), (0,) * 12), ((),), ((),)), "no permutation"),
        ((((), tuple(range(11))), ((),), ((),)), "no permutation"),
    ],
)
def test_orders_of_neurons_that_are_none_are_refused(orders, words):
    model = tiny_model("qwen3_moe")
    of = anatomy_of(config_of(model), tensors_of(model))
    whole = everything(of.sizes)
    means = (((0, 0.5), (1, 0.5)), ((2, 1.0),), ((3, 1.0),))
    layers = tuple(replace(p, experts=(0, 2, 3), merged=means, aligned=orders) for p in whole.layers)
    with pytest.raises(ValueError, match=words):
        replace(whole, layers=layers).student(of)


@pytest.mark.parametrize("merged", [(((0, 0.5), (1, 0.5)), ((2, 1.0),), ((3, 1.0),)), ()])
def test_a_tensor_of_all_experts_is_read_once(merged):
    model = tiny_model("gpt_oss")
    of = anatomy_of(config_of(model), tensors_of(model))
    whole, source = everything(of.sizes), Counting(tensors_of(model))
    layers = tuple(replace(plan, experts=(0, 2, 3), merged=merged) for plan in whole.layers)
    dict(cut(of, replace(whole, layers=layers), source))
    assert set(source.reads.values()) == {1}
    source.reads.clear()
    read = neurons_of(of, source, 1)
    assert all(read(expert).shape[0] == 24 for expert in range(4)) and set(source.reads.values()) == {1}


class Counting(dict):
    """Tensors by name, with how often each was read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)
