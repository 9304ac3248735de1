"""Laws of first-order saliency: against autograd and finite differences, its coupling, ranks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.distill.next_token import LanguageHead
from pipeline.model.anatomy import anatomy_of
from pipeline.prune.importance.taylor import gradients, saliency
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens


def anatomy(model):
    return anatomy_of(config_of(model), tensors_of(model))


def slopes(model, batches, chunk=5):
    return gradients(model, anatomy(model), batches, LanguageHead(model, chunk))


def loss_of(model, ids):
    logits = model(input_ids=ids).logits[:, :-1]
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()


@pytest.mark.parametrize("kind", CLASSES)
def test_gradients_are_those_of_autograd(kind):
    model, ids = tiny_model(kind), tokens(3, 8)
    sums = slopes(model, [ids[:2], ids[2:]])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    loss_of(model, ids).backward()
    wanted = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if "_proj." in name and not name.endswith(("o_proj.bias", "down_proj.bias"))
    }
    assert wanted.keys() <= sums.keys() <= {name for name, _ in model.named_parameters()}
    for name, gradient in wanted.items():
        torch.testing.assert_close(sums[name], gradient, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor as wide as the vocabulary holds while it lasts."""

    numbers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        wide = [each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor) and 96 in each.shape]
        self.numbers = max(self.numbers, *wide, 0)
        return made


@pytest.mark.parametrize("chunk", [40, 64])
def test_no_more_logits_than_a_chunk_of_tokens_exist_at_once(chunk):
    """The output matrix itself is 96 x 32."""
    model = tiny_model("llama")
    with Largest() as seen:
        slopes(model, [tokens(6, 24)], chunk)
    assert seen.numbers == 96 * chunk


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen2"])
def test_saliency_sums_each_structure_over_its_own_weights(kind):
    model = tiny_model(kind)
    source, sums = tensors_of(model), slopes(model, [tokens()])
    heads, neurons, _ = saliency(anatomy(model), source, sums)

    def terms(name):
        name = f"model.layers.2.{name}"
        both = [(source[n] * sums[n]).abs() for n in (f"{name}.weight", f"{name}.bias") if n in sums]
        return both[0] + 0 if len(both) == 1 else torch.cat([both[0], both[1][:, None]], 1)

    if kind == "phi3":
        q, k, v = terms("self_attn.qkv_proj").split([32, 16, 16])
        gate, up = terms("mlp.gate_up_proj").chunk(2)
    else:
        q, k, v, gate, up = (
            terms(f"{part}_proj") for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
        )
    o, down = terms("self_attn.o_proj"), terms("mlp.down_proj")
    torch.testing.assert_close(neurons[2], gate.sum(1) + up.sum(1) + down.sum(0))
    for head in range(4):
        rows, group = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        wanted = q[rows].sum() + o[:, rows].sum() + (k[group].sum() + v[group].sum()) / 2
        torch.testing.assert_close(heads[2][head], wanted)


def test_queries_are_credited_to_the_group_they_read():
    """Keys and values of group 1 weigh nothing: the heads that read it, 2 and 3, have only their own Q and O left."""
    model = tiny_model("llama")
    source, sums = tensors_of(model), slopes(model, [tokens()])
    before = saliency(anatomy(model), source, sums)[0][0]
    for name in ("k_proj", "v_proj"):
        sums[f"model.layers.0.self_attn.{name}.weight"][8:] = 0.0
    after = saliency(anatomy(model), source, sums)[0][0]
    assert torch.equal(before[:2], after[:2]) and (before[2:] > after[2:]).all()


def test_one_weights_term_is_the_change_of_loss_that_removing_it_starts_with():
    model, ids = tiny_model("llama"), tokens()
    sums = slopes(model, [ids])
    name = "model.layers.3.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    row, column = divmod(int((weight * sums[name]).abs().argmax()), weight.shape[1])
    losses = []
    with torch.no_grad():
        kept = weight[row, column].clone()
        for factor in (0.98, 1.02):
            weight[row, column] = kept * factor
            losses.append(float(loss_of(model, ids)))
    assert float(kept * sums[name][row, column]) == pytest.approx((losses[1] - losses[0]) / 0.04, rel=1e-2)


def test_gradients_of_ranks_add():
    model, ids = tiny_model("llama"), tokens(2, 10)
    whole = slopes(model, [ids])
    ranks = [slopes(model, [part]) for part in (ids[:1], ids[1:])]
    for name, total in whole.items():
        torch.testing.assert_close(ranks[0][name] + ranks[1][name], total, rtol=1e-5, atol=1e-6)


def test_parameters_that_were_frozen_stay_frozen():
    model = tiny_model("llama").requires_grad_(False)
    sums = slopes(model, [tokens()])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(total.abs().sum() > 0 for total in sums.values())
