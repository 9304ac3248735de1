"""Laws of least-squares restoration: exactness, optimality, nesting, and its place in a cut stream."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything
from pipeline.model.hf_config import student_config
from pipeline.prune.second_order.hessian import gram
from pipeline.prune.second_order.restore import damped, restore, restore_outputs
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.restoration import output_error, problem
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens


def parts(kind):
    model = tiny_model(kind)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    return model, anatomy, tensors_of(model), gram(model.model, anatomy, [tokens()], range(4), stream=False).inputs


def narrow(channels=range(32), host=1, donor=1):
    """Two layers: one whole, one of a host's second group beside a first group that may be donated."""
    groups = (Group(host, 1, (2, 3)), Group(donor, 0, (0, 1)))
    plans = (LayerPlan(0, (Group(0, 1, (3,)), Group(0, 0, (0,))), tuple(range(24))), LayerPlan(host, groups, (9, 2, 4)))
    return Blueprint(tuple(channels), plans)


def test_keeping_all_columns_gives_the_weight_itself():
    weight, moments = problem()
    assert torch.equal(restore(weight, moments, range(24)), weight)
    order = torch.randperm(24).tolist()
    assert torch.equal(restore(weight, moments, order), weight[:, order])


def test_restoration_is_the_normal_equations():
    weight, moments = problem()
    kept = [3, 1, 20, 7, 11]
    wanted = torch.linalg.solve(moments[kept][:, kept], (weight @ moments)[:, kept].T).T
    torch.testing.assert_close(restore(weight, moments, kept, 1e-13), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-9, 0.01, 1.0])
@pytest.mark.parametrize("rows", [6, 200])
def test_restoration_never_raises_the_error_of_no_update_and_falls_with_nested_columns(damping, rows):
    weight, moments = problem(rows=rows)
    regular = damped(moments, damping)
    last = 0.0
    for count in range(23, 0, -1):
        kept = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:count].tolist()
        columns = restore(weight, moments, kept, damping)
        before = output_error(weight, weight[:, kept], moments, kept)
        assert output_error(weight, columns, moments, kept) <= before * (1 + 1e-9)
        error = output_error(weight, columns, regular, kept)
        assert error >= last * (1 - 1e-9)
        last = error


def test_restoring_in_two_steps_equals_restoring_at_once():
    weight, moments = problem()
    regular = damped(moments)
    wide, narrower = list(range(18)), [0, 5, 6, 11, 17]
    first = torch.zeros_like(weight)
    first[:, wide] = restore(weight, regular, wide, 1e-15)
    torch.testing.assert_close(
        restore(first, regular, narrower, 1e-15), restore(weight, regular, narrower, 1e-15), rtol=1e-9, atol=1e-9
    )


def test_columns_that_are_copies_of_kept_ones_are_restored_without_loss():
    weight, moments = problem(12)
    twice = moments.repeat(2, 2)
    both = torch.cat([weight, weight.flip(1)], 1)
    kept = list(range(12))
    columns = restore(both, twice, kept, 1e-10)
    torch.testing.assert_close(columns, both[:, :12] + both[:, 12:], rtol=1e-6, atol=1e-6)


def test_damping_grows_until_the_matrix_can_be_inverted():
    _, moments = problem()
    indefinite = moments - 0.5 * moments.diagonal().mean() * torch.eye(24)
    added = (damped(indefinite, 1e-3) - indefinite).diagonal() / indefinite.diagonal().mean()
    assert added[0] in (pytest.approx(1e-1), pytest.approx(1.0), pytest.approx(10.0))
    torch.linalg.cholesky(damped(indefinite, 1e-3))


@pytest.mark.parametrize("bad", [torch.zeros(4, 4), torch.full((4, 4), torch.nan), -torch.eye(4)])
def test_a_gram_matrix_without_data_is_refused(bad):
    with pytest.raises(ValueError, match="a Gram matrix .* cannot be inverted"):
        restore(torch.ones(2, 4), bad, [0, 1])


@pytest.mark.parametrize("kind", CLASSES)
def test_a_cut_stream_changes_in_its_restored_columns_only(kind):
    model, anatomy, source, grams = parts(kind)
    blueprint = narrow(range(0, 32, 2))
    plain = dict(cut(anatomy, blueprint, source))
    restored = dict(restore_outputs(anatomy, blueprint, source, grams, cut(anatomy, blueprint, source)))
    changed = {name for name in plain if not torch.equal(plain[name], restored[name])}
    assert changed == {"model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    weight, name = source["model.layers.0.self_attn.o_proj.weight"], "model.layers.0.self_attn.o_proj"
    wanted = restore(weight, grams[name], [*range(24, 32), *range(8)])[::2]
    torch.testing.assert_close(restored[f"{name}.weight"], wanted, rtol=0, atol=0)
    name = "model.layers.1.mlp.down_proj"
    wanted = restore(source[f"{name}.weight"], grams[name], [9, 2, 4])[::2]
    torch.testing.assert_close(restored[f"{name}.weight"], wanted, rtol=0, atol=0)


def test_keeping_everything_is_bit_identical():
    _, anatomy, source, _ = parts("llama")
    whole = everything(anatomy.sizes)
    restored = dict(restore_outputs(anatomy, whole, source, {}, cut(anatomy, whole, source)))
    assert all(torch.equal(restored[name], tensor) for name, tensor in source.items())


def test_donated_heads_stay_as_cut_and_the_host_restores_with_its_own():
    _, anatomy, source, grams = parts("llama")
    blueprint = narrow(donor=2)
    name = "model.layers.1.self_attn.o_proj"
    plain = dict(cut(anatomy, blueprint, source))[f"{name}.weight"]
    restored = dict(restore_outputs(anatomy, blueprint, source, grams, cut(anatomy, blueprint, source)))
    wanted = restore(source[f"{name}.weight"], grams[name], range(16, 32))
    torch.testing.assert_close(restored[f"{name}.weight"][:, :16], wanted, rtol=0, atol=0)
    assert torch.equal(restored[f"{name}.weight"][:, 16:], plain[:, 16:])


def test_a_missing_gram_matrix_is_named():
    _, anatomy, source, grams = parts("llama")
    del grams["model.layers.1.mlp.down_proj"]
    with pytest.raises(ValueError, match="no Gram matrix of model.layers.1.mlp.down_proj"):
        dict(restore_outputs(anatomy, narrow(), source, grams, cut(anatomy, narrow(), source)))


def test_a_restored_student_writes_nearer_to_the_teacher(tmp_path):
    """One layer's FFN narrowed, nothing before it changed: its output on the calibration text errs less."""
    model, anatomy, source, grams = parts("llama")
    whole = everything(anatomy.sizes).layers
    blueprint = Blueprint(tuple(range(32)), (*whole[:3], LayerPlan(3, whole[3].groups, tuple(range(16)))))
    config = student_config(config_of(model), anatomy, blueprint)
    gaps = []
    for restored in (False, True):
        stream = cut(anatomy, blueprint, source)
        if restored:
            stream = restore_outputs(anatomy, blueprint, source, grams, stream, 1e-6)
        write_checkpoint(tmp_path / str(restored), config, stream, 1e9)
        student = load_model(tmp_path / str(restored), torch.float64, "eager")
        outputs = []
        for each in (student, model):
            hook = each.model.layers[3].register_forward_hook(lambda m, i, o, seen=outputs: seen.append(o))
            with torch.no_grad():
                each(tokens())
            hook.remove()
        gaps.append(float((outputs[0] - outputs[1]).square().sum()))
    kept = list(range(16))
    name = "model.layers.3.mlp.down_proj"
    weight = source[f"{name}.weight"]
    for gap, columns in zip(gaps, (weight[:, :16], restore(weight, grams[name], kept, 1e-6))):
        assert gap == pytest.approx(output_error(weight, columns, grams[name], kept), rel=1e-4)
    assert gaps[1] < 0.9 * gaps[0]
