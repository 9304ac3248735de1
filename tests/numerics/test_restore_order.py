"""Laws of greedy removal: every step is the one a search over all candidates would take, and errors are exact."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.scores import Scores
from pipeline.model.sizes import LayerSizes
from pipeline.prune.plan import plan
from pipeline.prune.second_order.removal_order import head_order, head_scores, obs_order, tyr_order
from pipeline.prune.second_order.restore import damped, restore
from tests.restoration import output_error, problem
from tests.tiny import config_of, tensors_of, tiny_model

TINY = 1e-14


def columns_of(units, size):
    return [unit * size + i for unit in units for i in range(size)]


def error_of(weight, regular, units, size):
    """The output error of keeping some units, restored from scratch; `regular` needs no damping."""
    kept = columns_of(units, size)
    if not kept:
        return float(((weight @ regular) * weight).sum())
    return output_error(weight, restore(weight, regular, kept, TINY), regular, kept)


@pytest.mark.parametrize(("size", "width"), [(1, 80), (2, 24), (4, 24)])
def test_each_removal_is_the_best_of_all_candidates(size, width):
    weight, moments = problem(width)
    regular = damped(moments)
    removal = obs_order(moments, weight, size, width // size)
    left = set(range(width // size))
    for unit, rise in zip(removal.order.tolist()[:-1], removal.errors.tolist()[:-1]):
        before = error_of(weight, regular, sorted(left), size)
        rises = {other: error_of(weight, regular, sorted(left - {other}), size) - before for other in left}
        assert rises[unit] <= min(rises.values()) + 1e-6
        assert rise == pytest.approx(rises[unit], rel=1e-6, abs=1e-6)
        left.remove(unit)


@pytest.mark.parametrize(("size", "at_once"), [(1, 1), (1, 7), (8, 1), (8, 3)])
def test_errors_add_up_to_the_error_of_the_exact_solve(size, at_once):
    weight, moments = problem(96, out=130)
    removal = obs_order(moments, weight, size, 60 // size, at_once)
    kept = removal.kept((96 // size) - 60 // size)
    assert len(removal.errors) == 60 // size
    wanted = error_of(weight, damped(moments), kept, size)
    assert float(removal.errors.sum()) == pytest.approx(wanted, rel=1e-8)
    assert sorted(removal.order.tolist()) == list(range(96 // size))


def test_several_at_once_are_those_of_least_score_at_the_start_of_the_step():
    weight, moments = problem(48)
    one_by_one = obs_order(moments, weight, 1, 48)
    scores = weight.square().sum(0) / damped(moments).inverse().diagonal()
    together = obs_order(moments, weight, 1, 8, at_once=8)
    assert together.order[:8].tolist() == scores.argsort()[:8].tolist()
    assert together.order[0] == one_by_one.order[0]
    assert together.errors.sum() >= one_by_one.errors[:8].sum() - 1e-9


def test_stopping_early_gives_the_beginning_of_the_whole_order():
    weight, moments = problem(80)
    whole, part = obs_order(moments, weight, 1, 80), obs_order(moments, weight, 1, 30)
    assert torch.equal(whole.order[:30], part.order[:30])
    assert set(part.order[30:].tolist()) == set(whole.order[30:].tolist())


def test_columns_without_influence_go_first():
    weight, moments = problem(80)
    weight[:, [5, 33]] = 0.0
    weight[:, 70] = weight[:, 71] = 1e-3
    independent = torch.diag(moments.diagonal())
    assert set(obs_order(independent, weight, 1, 4).order[:2].tolist()) == {5, 33}
    assert set(obs_order(independent, weight, 1, 4).order[2:4].tolist()) == {70, 71}


def test_groups_lose_heads_in_turn():
    weight, moments = problem(48)
    removal = head_order(moments, weight, 4, 3)
    for rounds in range(1, 5):
        gone = removal.order[: 3 * rounds] // 4
        assert torch.bincount(gone, minlength=3).tolist() == [rounds] * 3
    regular = damped(moments)
    first = min(range(12), key=lambda head: error_of(weight, regular, sorted(set(range(12)) - {head}), 4))
    assert removal.order[0] == first


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("size", "width"), [(1, 72), (4, 24)])
def test_tyr_order_is_its_formula_step_by_step(gradient, size, width):
    weight, moments = problem(width)
    regular = damped(moments)
    left = list(range(width // size))
    for unit in tyr_order(moments, weight, size, width // size, gradient).order.tolist():
        kept = columns_of(left, size)
        now = restore(weight, regular, kept, TINY)  # [out, kept]
        full = torch.zeros_like(weight)
        full[:, kept] = now
        pull = (weight @ regular)[:, kept]
        torch.testing.assert_close(pull, (full @ regular)[:, kept], rtol=1e-8, atol=1e-6)  # G of the rest is constant
        curvature = regular[kept][:, kept].inverse().diagonal()
        score = now.square().sum(0) / (2 * curvature) + gradient * (pull * now).sum(0).abs()
        score = score.unflatten(0, (-1, size)).mean(1)
        assert score[left.index(unit)] <= score.min() * (1 + 1e-8) + 1e-8
        left.remove(unit)


def test_orders_become_scores_from_which_planning_keeps_the_same_units():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    weight, moments = problem(64)
    groups, heads = obs_order(moments, weight, 16, 4), head_order(moments, weight, 8, 4)
    neurons = obs_order(*reversed(problem(24, seed=1)), 1, 10)
    scores = Scores(torch.ones(64), (head_scores(groups, heads),) * 4, (neurons.scores(),) * 4, torch.ones(4), 1)
    blueprint = plan(anatomy, scores, range(4), [LayerSizes(2, 2, 14)] * 4, 64, clap=False)
    gone = set(heads.order[:4].tolist())
    for layer in blueprint.layers:
        assert sorted(group.kv for group in layer.groups) == groups.kept(2)
        assert not gone & {head for group in layer.groups for head in group.heads}
        assert list(layer.neurons) == neurons.kept(14)


def test_units_that_do_not_fit_are_refused():
    weight, moments = problem()
    with pytest.raises(ValueError, match="7 units of 4 columns cannot be removed from 24 columns"):
        obs_order(moments, weight, 4, 7)
    with pytest.raises(ValueError, match="units of 5 columns"):
        obs_order(moments, weight, 5, 1)


def test_a_gram_matrix_without_rank_is_told_and_never_ordered_by_noise():
    """Rank 3 and next to no damping: rounding makes blocks of the inverse negative on the way."""
    result = 0
    for seed in range(10):
        torch.manual_seed(seed)
        x, weight = torch.randn(3, 40, dtype=torch.float64), torch.randn(8, 40, dtype=torch.float64)
        try:
            errors = obs_order(x.T @ x, weight, 1, 38, damping=1e-16).errors
        except ValueError as fault:
            assert "raise restore.damping" in str(fault)
            result += 1
        else:
            assert errors.isfinite().all()
    assert result
