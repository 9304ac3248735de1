"""Laws of the supernet and of one narrowed projection: nested, exact, and never worse than no update."""

from dataclasses import replace

import pytest
import torch

from pipeline.evaluation.divergence import divergence, final_states
from pipeline.model.sizes import LayerSizes
from pipeline.prune.second_order.narrow import LOCAL_ORDERS, local_order, narrow_heads, narrow_units
from pipeline.prune.second_order.sequential import at_width, columns_of, expected_weight, prune_in_sequence
from pipeline.prune.second_order.supernet import candidate, candidates, compose, expectation, removal_of, widened
from tests.restoration import HERE, anatomy, batches, names_in, output_error, problem, supernet
from tests.tiny import tiny_model, tokens


@pytest.mark.parametrize("by", LOCAL_ORDERS)
@pytest.mark.parametrize("size", [1, 4])
def test_candidates_are_the_exact_restorations_of_nested_sets(by, size):
    weight, moments = problem(24)
    removal = local_order(by, moments, weight, size, 24 // size - 1)
    counts = [1, 2, 3, 5, 24 // size]
    last = set()
    for count, columns in candidates(weight, moments, removal, counts):
        whole = widened(columns, removal.order, count, 24)
        torch.testing.assert_close(whole, at_width(weight, moments, removal, count), rtol=1e-9, atol=1e-9)
        kept = set(whole.abs().sum(0).nonzero().flatten().tolist())
        assert last < kept and len(kept) == count * size
        last = kept
    assert torch.equal(whole, weight.double())


def test_the_expectation_is_that_of_the_candidates():
    weight, moments = problem(24)
    removal, kept = local_order("obs", moments, weight, 4, 5), {}
    found = expectation(weight, moments, removal, [1, 2, 4], kept.__setitem__)
    whole = [widened(kept[count], removal.order, count, 24) for count in (1, 2, 4)]
    torch.testing.assert_close(found, expected_weight(whole, [5 / 6, 4 / 6, 2 / 6]))
    torch.testing.assert_close(found, (whole[0] + 2 * whole[1] + 4 * whole[2]) / 7)


@pytest.mark.parametrize("by", LOCAL_ORDERS)
@pytest.mark.parametrize("size", [1, 3])
def test_narrowed_projections_err_no_more_than_without_update_and_scores_say_what_stays(by, size):
    weight, moments = problem(24)
    narrowed = narrow_units(weight, moments, size, 5, by)
    units = narrowed.scores.topk(5).indices.sort().values
    kept = columns_of(units, size)
    assert narrowed.weight.abs().sum(0).nonzero().flatten().tolist() == kept.tolist()
    restored = output_error(weight, narrowed.weight[:, kept], moments, kept)
    assert restored <= output_error(weight, weight[:, kept], moments, kept) * (1 + 1e-9)


@pytest.mark.parametrize(("groups", "heads"), [(3, 12), (2, 8), (2, 4), (1, 3), (3, 6)])
def test_groups_go_whole_and_then_heads_inside_those_that_stay(groups, heads):
    """12 heads of 2 columns in 3 groups: the plan's ranking, by the mean of a group's best heads, keeps just those."""
    weight, moments = problem(24)
    narrowed = narrow_heads(weight, moments, 2, LayerSizes(12, 3, 9), LayerSizes(heads, groups, 9), "obs")
    stays = narrowed.weight.abs().sum(0).unflatten(0, (12, 2)).sum(1) > 0
    best = narrowed.scores.unflatten(0, (3, 4)).topk(heads // groups, dim=1)
    chosen = best.values.mean(1).topk(groups).indices
    assert sorted((chosen[:, None] * 4 + best.indices[chosen]).flatten().tolist()) == stays.nonzero().flatten().tolist()
    kept = (stays.nonzero() * 2 + torch.arange(2)).flatten()
    restored = output_error(weight, narrowed.weight[:, kept], moments, kept)
    assert restored <= output_error(weight, weight[:, kept], moments, kept) * (1 + 1e-9)


def test_a_score_without_a_name_is_refused():
    weight, moments = problem(24)
    with pytest.raises(ValueError, match=r"^restore\.local: .*'random'"):
        local_order("random", moments, weight, 1, 3)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "llama-tied"])
def test_divergence_from_kept_states_is_that_of_the_logits(kind):
    """KL over the whole vocabulary, whatever the chunk, soft caps included; zero for the model itself."""
    dense, other, third = tiny_model(kind), tiny_model(kind), tiny_model(kind, seed=1).state_dict()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(third[name])
    ids = tokens(3, 10)
    kept = final_states(dense, ids)
    with torch.no_grad():
        p, q = (model(ids).logits.flatten(0, 1).log_softmax(-1) for model in (dense, other))
    wanted = (p.exp() * (p - q)).sum()
    for chunk in (7, 64):
        total = divergence(other, ids, kept, chunk)
        assert total.tolist() == pytest.approx([float(wanted), 30], rel=1e-6) and wanted > 1e-3
    assert float(divergence(dense, ids, kept, 64)[0]) == pytest.approx(0.0, abs=1e-9)


def test_accumulation_lowers_the_error_of_the_whole_model():
    """Candidates that saw what those before them leave compensate for some of it; those solved alone do not."""
    text = [tokens(8, 24, seed=seed) for seed in range(6)]
    for seed in range(3):
        found = []
        for accumulation in (True, False):
            model, dense = tiny_model("llama", seed), tiny_model("llama", seed)
            stored = supernet(model, [1, 2, 6, 12, 18], accumulation, text)
            choice = {n: 12 if n.endswith("down_proj") else 1 for n in names_in(stored)}
            compose(model, anatomy(model), {}, stored, choice, {})
            with torch.no_grad():
                gaps = (model(ids).logits - dense(ids).logits for ids in text)
                found.append(sum(float(gap.square().sum()) for gap in gaps))
        assert found[0] < 0.99 * found[1]


def test_a_composed_model_is_read_only_where_it_differs_and_can_be_taken_back():
    model = tiny_model("llama")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = supernet(model, [1, 2, 12, 24])
    names = names_in(stored)
    read, present = [], {}

    class Watched(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    stored, source = Watched(stored), Watched(dense)
    whole = {name: 24 if name.endswith("down_proj") else 2 for name in names}
    compose(model, anatomy(model), source, stored, whole, present)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())
    read.clear()
    compose(model, anatomy(model), source, stored, present | {names[1]: 12}, present)
    assert sorted(read) == sorted([candidate(names[1], 12), removal_of(names[1])])
    assert int((model.get_submodule(names[1]).weight.abs().sum(0) > 0).sum()) == 12


def test_layers_that_go_are_passed_by():
    model, shorter = tiny_model("llama"), tiny_model("llama")
    shorter.model.layers = torch.nn.ModuleList([shorter.model.layers[i] for i in (0, 2)])
    found = []
    for each, kept in ((model, (0, 2)), (shorter, None)):
        grams = []

        def keep(name, weight, moments, grams=grams):
            grams.append(moments)
            return weight

        list(prune_in_sequence(each.model, anatomy(model) if kept else short(model), batches(), keep, HERE, kept))
        found.append(grams)
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def short(model):
    whole = anatomy(model)
    return replace(whole, sizes=replace(whole.sizes, layers=whole.sizes.layers[:2]))
