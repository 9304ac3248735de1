"""Laws of gains that span all heads: among heads of zeros they give what they would over the others alone."""

from dataclasses import replace

import pytest
import torch

from pipeline.model.blueprint import Group, LayerPlan, everything
from pipeline.model.hf_config import student_config
from pipeline.prune.head_norms import alone
from pipeline.prune.second_order.hessian import gram
from pipeline.prune.second_order.sequential import columns_of, prune_in_sequence
from pipeline.prune.second_order.supernet import compose
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.restoration import HERE, anatomy, batches, names_in, supernet
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens

OUTPUT, DOWN = "model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.down_proj.weight"


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def dense_and_anatomy(**changed):
    """A model whose norms span all heads, four in two groups, with an epsilon that counts."""
    model = tiny_model("olmo2", rms_norm_eps=0.5, **changed)
    return model, {name: tensor.clone() for name, tensor in tensors_of(model).items()}, anatomy(model)


def read_by(weight, size):
    """Return the units of `size` columns that a weight reads."""
    return weight.unflatten(1, (-1, size)).ne(0).any(2).any(0).nonzero().flatten().tolist()


def cut_logits(model, source, folder):
    """Return the logits of the cut to what the W_O and W_down of a model read, all else dense."""
    whole, solved, plans = anatomy(model), dict(source), []
    for layer in range(4):
        output, down = (pattern.format(layer) for pattern in (OUTPUT, DOWN))
        solved |= {name: model.get_parameter(name).detach() for name in (output, down)}
        heads = read_by(solved[output], 8)
        groups = {head // 2: tuple(each for each in heads if each // 2 == head // 2) for head in heads}
        neurons = tuple(read_by(solved[down], 1))
        plans.append(LayerPlan(layer, tuple(Group(layer, kv, some) for kv, some in groups.items()), neurons))
    blueprint = replace(everything(whole.sizes), layers=tuple(plans))
    kind = student_config(config_of(model), whole, blueprint)
    write_checkpoint(folder, kind, cut(whole, blueprint, solved), 1e9)
    return logits(load_model(folder, torch.float64, "eager"))


def assert_same(one, other):
    """Up to the float32 in which the classes' norms compute."""
    assert (one - other).norm() / other.norm() < 1e-5


@pytest.mark.parametrize("heads", [[1, 2], [2, 3], [0], [0, 1, 2, 3]])
def test_heads_alone_are_those_of_the_cut_whatever_the_epsilon(heads, tmp_path):
    model, source, whole = dense_and_anatomy()
    gone = [head for head in range(4) if head not in heads]
    with torch.no_grad():
        for layer in range(4):
            model.get_parameter(OUTPUT.format(layer)).view(32, 4, 8)[:, gone] = 0.0
            for name, narrow in alone(whole, layer, heads, source.__getitem__):
                model.get_parameter(name).copy_(narrow)
    same = [torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items()]
    assert all(same) == (not gone)
    assert_same(logits(model), cut_logits(model, source, tmp_path))


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind != "olmo2"])
def test_where_no_gain_spans_heads_nothing_changes(kind):
    model = tiny_model(kind)
    assert not dict(alone(anatomy(model), 0, [1, 2], tensors_of(model).__getitem__))


@pytest.mark.parametrize("kept", [[0, 2], [3]])
def test_what_is_solved_in_sequence_reads_what_the_cut_gives(kept, tmp_path):
    """W_down of every layer is solved for the heads that stay, normalised by themselves."""
    model, source, whole = dense_and_anatomy()
    seen = {}

    def prune(name, weight, moments):
        if name.endswith("down_proj"):
            seen[name] = moments
            return weight
        solved = torch.zeros_like(weight)
        columns = columns_of(torch.tensor(kept), 8)
        solved[:, columns] = weight[:, columns]
        return solved

    dict(prune_in_sequence(model.model, whole, batches(), prune, HERE))
    assert_same(logits(model), cut_logits(model, source, tmp_path))
    narrow = load_model(tmp_path, torch.float64, "eager")
    wanted = gram(narrow.model, anatomy(narrow), batches(), range(4), stream=False).inputs
    for name, moments in seen.items():
        assert_same(moments, wanted[name])


def test_a_composed_model_is_the_cut_one_and_can_be_widened_again(tmp_path):
    model, source, whole = dense_and_anatomy()
    stored = supernet(model, [1, 2, 12, 24])
    narrow, wide = (
        {n: neurons if n.endswith("down_proj") else groups for n in names_in(stored)}
        for groups, neurons in ((1, 12), (2, 24))
    )
    present = {}
    compose(model, whole, source, stored, narrow, present)
    assert_same(logits(model), cut_logits(model, source, tmp_path))
    compose(model, whole, source, stored, wide, present)
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
