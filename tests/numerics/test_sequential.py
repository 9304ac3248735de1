"""Laws of the layer-by-layer pass: each projection sees its pruned predecessors, and the expectation of candidates."""

import copy

import pytest
import torch

from pipeline.prune.second_order.hessian import gram
from pipeline.prune.second_order.removal_order import obs_order
from pipeline.prune.second_order.restore import restore
from pipeline.prune.second_order.sequential import at_width, expected_weight, prune_in_sequence
from tests.restoration import HERE, anatomy, batches, output_error, problem
from tests.tiny import CLASSES, tiny_model, tokens
from tests.watching import inputs_of


def half(name, weight, moments):
    """Half of the heads, or of the neurons, restored."""
    size = 8 if name.endswith("o_proj") else 1
    units = weight.shape[1] // size
    return at_width(weight, moments, obs_order(moments, weight, size, units // 2), units // 2)


@pytest.mark.parametrize("kind", CLASSES)
def test_without_pruning_it_measures_what_one_pass_measures(kind):
    model = tiny_model(kind)
    before = copy.deepcopy(model.state_dict())
    seen = {}

    def keep(name, weight, moments):
        seen[name] = moments
        return weight

    names = [name for name, _ in prune_in_sequence(model.model, anatomy(model), batches(), keep, HERE)]
    grams = gram(model.model, anatomy(model), batches(), range(4), stream=False).inputs
    assert names == [f"{name}.weight" for name in seen] and seen.keys() == grams.keys()
    for name, moments in seen.items():
        torch.testing.assert_close(moments, grams[name], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "glm4", "phi3"])
def test_each_projection_sees_what_its_pruned_predecessors_produce(kind):
    model, measured = tiny_model(kind), tiny_model(kind)
    places = anatomy(model)

    def checked(name, weight, moments):
        wanted = gram(measured.model, places, batches(), range(4), stream=False).inputs[name]
        torch.testing.assert_close(moments, wanted, rtol=1e-5, atol=1e-6)
        return half(name, weight, moments)

    count = 0
    for name, weight in prune_in_sequence(model.model, places, batches(), checked, HERE):
        assert torch.equal(model.get_parameter(name), weight)
        with torch.no_grad():
            measured.get_parameter(name).copy_(weight)
        count += 1
    assert count == 8
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, measured(tokens()).logits)


def test_the_expectation_of_candidates_is_passed_on_after_attention_and_after_the_mlp():
    """Eq. 5 taken literally, by averaging the candidates' outputs, gives the H that the averaged weight gives."""
    sparsities = [0.0, 0.25, 0.5]
    model, literal = tiny_model("llama"), tiny_model("llama")
    places, candidates = anatomy(model), {}

    def supernet(name, weight, moments):
        with torch.no_grad():
            wanted = gram(literal.model, places, batches(), range(4), stream=False).inputs[name]
        torch.testing.assert_close(moments, wanted, rtol=1e-5, atol=1e-6)
        size = 8 if name.endswith("o_proj") else 1
        units = weight.shape[1] // size
        removal = obs_order(moments, weight, size, units)
        candidates[name] = [at_width(weight, moments, removal, round((1 - s) * units)) for s in sparsities]
        shares = [1 - s for s in sparsities]

        def average(module, inputs, output):
            outputs = [share * inputs[0] @ w.T for share, w in zip(shares, candidates[name])]
            return sum(outputs) / sum(shares)

        literal.get_submodule(name).register_forward_hook(average)
        return expected_weight(candidates[name], sparsities)

    assert len(dict(prune_in_sequence(model.model, places, batches(), supernet, HERE))) == 8
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, literal(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_candidates_are_nested_exact_restorations():
    weight, moments = problem(24)
    removal = obs_order(moments, weight, 4, 6)
    last, error = set(range(24)), 0.0
    for count in range(6, -1, -1):
        level = at_width(weight, moments, removal, count, 1e-9)
        kept = set(level.abs().sum(0).nonzero().flatten().tolist())
        assert len(kept) == 4 * count and kept <= last
        if kept:
            torch.testing.assert_close(level[:, sorted(kept)], restore(weight, moments, sorted(kept), 1e-9))
        now = output_error(weight, level, moments, range(24))
        assert now >= error - 1e-9
        last, error = kept, now


def test_solving_in_sequence_errs_less_where_predecessors_changed():
    """On the stream that the pruned first layers produce, the solve that has seen it beats the one that has not."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    grams = gram(dense.model, anatomy(model), batches(), range(4), stream=False).inputs
    dict(prune_in_sequence(model.model, anatomy(model), batches(), half, HERE))
    name = "model.layers.3.mlp.down_proj"
    read = torch.cat([inputs_of(model, ids, [name])[name] for ids in batches()])
    weight = dense.get_submodule(name).weight.detach()
    columns = model.get_submodule(name).weight.detach()
    kept = columns.abs().sum(0).nonzero().flatten().tolist()
    moments = read.T @ read
    seen = output_error(weight, columns[:, kept], moments, kept)
    assert seen < output_error(weight, restore(weight, grams[name], kept), moments, kept)


def test_an_expectation_needs_a_candidate_that_is_not_empty():
    with pytest.raises(ValueError, match="at least one must be below 1"):
        expected_weight([torch.ones(2, 2)], [1.0])
    average = expected_weight([torch.ones(2, 2), torch.zeros(2, 2)], [0.0, 0.5])
    torch.testing.assert_close(average, torch.full((2, 2), 2 / 3, dtype=torch.float64))
