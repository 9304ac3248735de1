"""Laws of TRSP: what gates do to a model, what their objective is, which layers they pick, what regularisation does."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from pipeline.distill.gates import Learning, ascending, gated, learn, objective
from pipeline.distill.next_token import LanguageHead, next_tokens
from pipeline.distill.regularize import Settling
from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan
from pipeline.model.hf_config import student_config
from pipeline.prune.importance.measure import only_layers
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens

LAYERS = 4
FORMS = ("residual", "stream")


def logits(model, gates=None, form="residual"):
    ids = tokens()
    with torch.no_grad():
        if gates is None:
            return model(ids).logits
        with gated(model.base_model.layers, gates, range(LAYERS), form):
            return model(ids).logits


def exact(model):
    """Make Llama's norms and softmax compute in the type of their input, as the class itself does not."""
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, m=module: (
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon) * m.weight
            )
    return model


def values(*some):
    return torch.tensor(some, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2"])
def test_the_next_token_loss_and_its_gradients_are_those_of_whole_logits(kind, chunk):
    model, ids = tiny_model(kind), tokens()
    wanted = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    named = [parameter for _, parameter in model.named_parameters()]
    gradients = torch.autograd.grad(wanted, named)
    loss = LanguageHead(model, chunk)(model.base_model(ids).last_hidden_state, next_tokens(ids))
    assert abs(loss - wanted) < 1e-12
    for got, gradient in zip(torch.autograd.grad(loss, named), gradients):
        assert (got - gradient).abs().max() < 1e-10 * max(1.0, gradient.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CLASSES)
def test_gates_at_1_change_no_bit(kind, form, dtype):
    model = tiny_model(kind).to(dtype)
    ones = torch.ones(LAYERS, dtype=torch.promote_types(dtype, torch.float32))
    assert torch.equal(logits(model, ones, form), logits(model))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_gate_at_0_on_the_residual_branch_deletes_its_layer_exactly(kind):
    model = tiny_model(kind)
    with only_layers(model, LAYERS, (0, 2, 3)):
        wanted = logits(model)
    assert torch.equal(logits(model, values(1, 0, 1, 1)), wanted)
    assert not torch.allclose(wanted, logits(model))


def test_a_gate_at_0_is_the_model_that_cut_makes_without_the_layer(tmp_path):
    model = tiny_model("llama")
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    whole = (Group(0, 0, (0, 1)), Group(0, 1, (2, 3)))
    layers = (LayerPlan(i, tuple(Group(i, g.kv, g.heads) for g in whole), tuple(range(24))) for i in (0, 2, 3))
    blueprint = Blueprint(tuple(range(32)), tuple(layers))
    config = student_config(config_of(model), anatomy, blueprint)
    write_checkpoint(tmp_path, config, cut(anatomy, blueprint, tensors_of(model)), 1e9)
    student = load_model(tmp_path, torch.float64, "eager")
    assert torch.equal(logits(model, values(1, 0, 1, 1)), logits(student))


@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gated_layers_compute_the_formula_unrolled(form, tuples):
    """X^{i+1} = S_i F_i(X^i), or X^i + S_i (F_i(X^i) - X^i), also where a layer gives more than the stream."""

    class Layer(torch.nn.Linear):
        def forward(self, hidden_states):
            written = hidden_states + torch.tanh(super().forward(hidden_states))
            return (written, "weights") if tuples else written

    layers = [Layer(6, 6, dtype=torch.float64) for _ in range(3)]
    gates, start = values(0.3, -0.7, 1.4), torch.randn(2, 5, 6, dtype=torch.float64)
    stream = start
    with gated(layers, gates, range(3), form):
        for layer in layers:
            output = layer(hidden_states=stream)
            assert not tuples or output[1] == "weights"
            stream = output[0] if tuples else output
    wanted = start
    for gate, layer in zip(gates, layers):
        written = wanted + torch.tanh(torch.nn.functional.linear(wanted, layer.weight, layer.bias))
        wanted = gate * written if form == "stream" else wanted + gate * (written - wanted)
    torch.testing.assert_close(stream, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_the_objective_is_its_slope_penalty_and_all(form, penalty):
    model, ids = exact(tiny_model("llama")), tokens()
    head, live, requested = LanguageHead(model, 7), (0, 1, 3), Learning(form, penalty, 0.1)
    place = values(0.9, -0.4, 1.0, 0.6).requires_grad_()

    def value(gates):
        return objective(model, head, gates, live, ids, requested)[0]

    gradient = torch.autograd.grad(value(place), place)[0]
    for layer in range(LAYERS):
        step = torch.zeros(LAYERS, dtype=torch.float64).index_fill_(0, torch.tensor(layer), 1e-5)
        with torch.no_grad():
            slope = (value(place + step) - value(place - step)) / 2e-5
        assert gradient[layer] == pytest.approx(float(slope), abs=1e-8, rel=1e-7)
    assert gradient[2] == 0 and gradient[0] != 0
    plain = torch.autograd.grad(objective(model, head, place, live, ids, Learning(form, 0.0, 0.1))[0], place)[0]
    torch.testing.assert_close(gradient - plain, penalty * values(1, -1, 0, 1), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def with_an_idle_layer():
    """A model that was taught one text, its layer 2 writing nothing all the while; and the text."""
    torch.manual_seed(0)
    model, ids = tiny_model("llama", dtype=torch.float32), tokens(8, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)
        for silent in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            silent.weight.zero_()
            silent.weight.requires_grad_(False)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model.requires_grad_(False), ids


def test_the_layer_that_writes_nothing_is_picked_first(with_an_idle_layer):
    model, ids = with_an_idle_layer
    requested, ones = Learning("residual", 5e-3, 1e-2), torch.ones(LAYERS)
    gates, loss = learn(model, LanguageHead(model, 64), ones, range(LAYERS), [(ids, 1.0)] * 25, requested, lambda x: x)
    assert loss < 2.0, "the others must have something to lose"
    assert ascending(gates, range(1, LAYERS))[0] == 2


def test_layers_are_ordered_by_the_size_of_their_gates():
    gates = values(0.1, -0.2, 0.0, 0.9)
    assert ascending(gates, range(4)) == [2, 0, 1, 3]
    assert ascending(gates, (3, 1)) == [1, 3]


def test_the_penalty_alone_moves_the_gates_towards_0_by_the_rate_a_step():
    """Where nothing else pulls, Adam takes steps of its rate: a picked layer, which passes the stream, has no slope."""
    model = tiny_model("llama").requires_grad_(False)
    requested, start = Learning("residual", 5e-3, 1e-2), torch.ones(LAYERS, dtype=torch.float64)
    with only_layers(model, LAYERS, (0, 1, 3)):
        gates, _ = learn(model, LanguageHead(model, 64), start, range(4), [(tokens(), 1.0)] * 5, requested, lambda x: x)
        left, _ = learn(model, LanguageHead(model, 64), start, (0, 1, 3), [(tokens(), 1.0)] * 5, requested, lambda x: x)
    assert float(gates[2]) == pytest.approx(0.95, abs=1e-6)
    assert float(left[2]) == 1.0 and torch.equal(start, torch.ones_like(start))


def settled(norm="l2", weight=0.0, **changed):
    model = tiny_model("llama", dtype=torch.float64, **changed)
    return Settling(model, (1, 3), weight, norm, 7, False), model


def changes(model, norm):
    """The norm of what every layer adds to the stream, a mean over tokens, from the states themselves."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output - inputs[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(tokens())
    for hook in hooks:
        hook.remove()
    return [each.abs().sum(-1).mean() if norm == "l1" else each.square().sum(-1).sqrt().mean() for each in seen]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_settling_loss_is_its_formula_and_its_slope_reaches_every_weight(norm):
    module, model = settled(norm, 0.3)
    exact(model)
    ids = tokens()
    loss, parts = module(ids)
    entropy = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    change = sum(changes(model, norm)[layer] for layer in (1, 3))
    assert abs(parts["cross_entropy"] - entropy) < 1e-10 and abs(parts["change"] - change) < 1e-10
    assert abs(loss - entropy - 0.3 * change) < 1e-10
    named = dict(module.parameters_by_name())
    assert set(named) == {name for name, _ in model.named_parameters()}
    gradients = torch.autograd.grad(loss, list(named.values()))
    for parameter, gradient in zip(named.values(), gradients):
        place = int(gradient.abs().argmax())
        flat, old = parameter.data.view(-1), float(parameter.data.view(-1)[place])
        ends = []
        for step in (1e-5, -1e-5):
            flat[place] = old + step
            with torch.no_grad():
                ends.append(float(module(ids)[0]))
        flat[place] = old
        assert float(gradient.view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_settling_with_gradient_checkpointing_has_the_same_gradients(checkpointing):
    gradients = []
    for kept in (False, checkpointing):
        model = tiny_model("llama")
        module = Settling(model, (1, 3), 0.5, "l2", 7, kept).train()
        loss, _ = module(tokens())
        gradients.append(torch.autograd.grad(loss, [each for _, each in module.parameters_by_name()]))
    for one, other in zip(*gradients):
        assert torch.equal(one, other)


def test_a_large_weight_empties_the_picked_layers_and_forces_no_other():
    result = {}
    for weight in (0.0, 3.0):
        module, model = settled("l2", weight)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        before = changes(model, "l2")
        for _ in range(40):
            optimizer.zero_grad()
            module(tokens())[0].backward()
            optimizer.step()
        result[weight] = [float(after / first) for after, first in zip(changes(model, "l2"), before)]
    assert all(result[3.0][layer] < 0.5 * result[0.0][layer] for layer in (1, 3))
    assert all(result[3.0][layer] > 0.7 * result[0.0][layer] for layer in (0, 2))
