"""Laws of the scores of experts: their formulas against a plain reading, in float64, for every family that has them."""

from itertools import product

import pytest
import torch
from torch.overrides import TorchFunctionMode

from pipeline.model.anatomy import anatomy_of
from pipeline.model.causal import decoder_of
from pipeline.model.scores import Scores
from pipeline.prune.importance.experts import EXPERT_SCORES
from pipeline.prune.importance.measure import measure
from tests.mixtures import given_to, sent_to
from tests.tiny import TINY, config_of, family, tensors_of, tiny_model, tokens

MIXTURES = [kind for kind in TINY if family(kind).experts]


def anatomy(model):
    return anatomy_of(config_of(model), tensors_of(model))


def plainly(model, of, layer, batches):
    """Return what each expert of a layer scores, token by token: lists of (weight, norm of the output), and neurons.

    `batches` are the inputs of the layer's module of experts.
    """
    module = model.get_submodule(of.expert_module(layer))
    count, width = of.sizes.carried["e"], of.sizes.carried["x"]
    found, neurons = [[] for _ in range(count)], torch.zeros(count, width, dtype=torch.float64)
    for expert, inputs in product(range(count), batches):
        for state, share in zip(*sent_to(expert, count, *inputs)):
            output = vars(module)["whole"](*given_to(expert, count, state, of.family.scaled_inputs))
            found[expert].append((float(share), float(output.norm())))
            neurons[expert] += inner(module, expert, state).abs()
    return found, neurons


def inner(module, expert, state):
    """Return the neurons [x] of an expert for one state [h]."""
    gate_up = module.gate_up_proj[expert]
    if not hasattr(module, "is_transposed"):
        gate, up = (state @ gate_up).chunk(2)
        return module.act_fn(gate) * up
    both = state @ (gate_up if module.is_transposed else gate_up.T)
    both = both + module.gate_up_proj_bias[expert] if module.has_bias else both
    return module._apply_gate(both[None])[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", MIXTURES)
def test_scores_of_experts_are_those_of_their_formulas_and_the_pass_computes_what_the_class_does(kind):
    model, ids = tiny_model(kind), tokens(2, 10)
    of, read = anatomy(model), {}
    sparse = [layer for layer in range(4) if of.sparse(layer)]
    for layer in sparse:
        module = model.get_submodule(of.expert_module(layer))
        vars(module)["whole"] = module.forward  # of the class, for one token and expert at a time
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: read.setdefault(layer, []).append(inputs))
    whole = decoder_of(model)(ids, use_cache=False).last_hidden_state
    read.clear()
    outputs = []
    hook = model.get_submodule(of.family.final_norm).register_forward_hook(lambda *seen: outputs.append(seen[2]))
    sums = measure(decoder_of(model), of, [ids[:1], ids[1:]])
    hook.remove()
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-6, atol=1e-6)
    reap, often, man = (sums.scores(EXPERT_SCORES[name]).experts for name in ("reap", "frequency", "man"))
    for layer in range(4):
        assert len(reap[layer]) == (of.sizes.carried["e"] if layer in sparse else 0)
    for layer in sparse:
        found, neurons = plainly(model, of, layer, read[layer])
        for expert, routed in enumerate(found):
            count = max(1, len(routed))
            assert often[layer][expert] == len(routed)
            assert float(reap[layer][expert]) == pytest.approx(sum(g * n for g, n in routed) / count, rel=1e-6)
            assert float(man[layer][expert]) == pytest.approx(sum(n for _, n in routed) / count, rel=1e-6)
        torch.testing.assert_close(sums.scores().expert_neurons[layer], neurons, rtol=1e-6, atol=1e-9)


def test_scores_of_experts_add_over_ranks_and_are_kept_on_disk(tmp_path):
    model, ids = tiny_model("deepseek_v3"), tokens(4, 8)
    of = anatomy(model)
    whole = measure(model.model, of, [ids]).scores()
    ranks = [measure(model.model, of, [part]) for part in ids.split(2)]
    for total, part in zip(ranks[0].tensors(), ranks[1].tensors(), strict=True):
        total += part
    whole.save(tmp_path)
    for other in (ranks[0].scores(), Scores.load(tmp_path)):
        for (name, one), (again, two) in zip(whole.items(), other.items(), strict=True):
            assert name == again
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7, msg=name)


class Derived(TorchFunctionMode):
    """Note, for every tensor as large as one expert's weight that is made of `weight`, whether it shares its memory."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.place, self.size, self.shared = weight.untyped_storage().data_ptr(), weight[0].numel(), []

    def __torch_function__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        moved = isinstance(result, torch.Tensor) and "matmul" not in function.__name__ and result.numel() >= self.size
        if moved and any(self._at_place(each) for each in arguments):
            self.shared.append(self._at_place(result))
        return result

    def _at_place(self, value) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == self.place


def test_the_weights_of_experts_are_not_copied():
    model = tiny_model("mixtral")
    with Derived(model.model.layers[0].mlp.experts.down_proj) as derived:
        measure(model.model, anatomy(model), [tokens()])
    assert derived.shared and all(derived.shared)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_token_uses_the_parameters_of_the_experts_it_is_sent_to(kind):
    model = tiny_model(kind)
    of = anatomy(model)
    of_experts = sum(
        parameter.numel() for name, parameter in model.named_parameters() if f".{of.family.expert_module}." in name
    )
    whole, active = of.parameters(), of.active_parameters()
    total = of.sizes.carried["e"]
    unused = of_experts // total * (total - of.routing.top)
    assert [all_of - used for all_of, used in zip(whole, active)] == [unused] * 2
