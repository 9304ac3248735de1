"""Laws of the tables: for every type with one, on a tiny random model of the real class, in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fused
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything
from pipeline.model.causal import decoder_of
from pipeline.model.families import AXES, FAMILIES
from pipeline.model.families.table import SUBLAYERS
from pipeline.model.hf_config import student_config
from pipeline.model.logits import logits_of
from pipeline.prune.importance.coupled import coupled, is_coupled
from pipeline.prune.importance.measure import measure
from pipeline.prune.passes.layerwise import layers_of, recorded
from pipeline.prune.surgery.cut import cut
from pipeline.prune.surgery.reinit import stabilise_gains
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.fused_layers import LAYER_OPERATORS, fused_layers
from tests.cut_models import anatomy, assert_close, built, logits, student_of
from tests.laws import lacking_sublayers, masked, plan_of
from tests.tiny import TINY, config_of, family, model_type, tensors_of, tiny_model, tokens

FLOAT64 = torch.float64


def test_every_type_with_a_table_has_a_tiny_model():
    assert {model_type(kind) for kind in TINY} == set(FAMILIES)


@pytest.mark.parametrize("kind", TINY)
def test_keeping_everything_is_bit_identical_and_the_table_counts_the_parameters_of_the_class(kind):
    model = tiny_model(kind)
    of, source = anatomy(model), tensors_of(model)
    kept = dict(cut(of, everything(of.sizes), source))
    assert kept.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(kept[name], tensor), name
    assert of.shapes() == {name: tuple(tensor.shape) for name, tensor in source.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = sum(tensor.numel() for name, tensor in model.state_dict().items() if name not in parameters)
    assert of.parameters()[0] - buffers == model.num_parameters()


@pytest.mark.parametrize("kind", TINY)
def test_cutting_equals_masking_for_every_axis(kind):
    whole = tiny_model(kind)
    of = anatomy(whole)
    for axis in AXES:
        if axis in of.family.fixed:
            with pytest.raises(ValueError, match=r"shape\.(\w+): .*keeps its \1"):
                everything_but(of, axis).check(of)
        elif not (of.family.experts or of.family.disk or of_own_form(of, axis)):  # tested through their folders
            blueprint, model = plan_of(of, axis), tiny_model(kind)
            student = built(model, blueprint)
            assert type(student) is type(model), axis
            assert_close(logits(student), logits(masked(model, of, blueprint, Path())))


@pytest.mark.parametrize("kind", TINY)
def test_the_stock_class_reloads_a_student_with_fewer_of_all_axes_as_the_masked_model(kind, tmp_path):
    model = tiny_model(kind)
    of = anatomy(model)
    blueprint = plan_of(of, "all")
    student = student_of(model, blueprint, tmp_path / "s")
    stock = "pruned" not in config_of(student)
    assert stock != of_own_form(of, "all") and (type(student) is type(model)) == stock
    assert open_checkpoint(tmp_path / "s").anatomy.sizes == blueprint.sizes(of.sizes)
    assert_close(logits(student), logits(masked(model, of, blueprint, tmp_path / "masked")))


@pytest.mark.parametrize("kind", [kind for kind in TINY if family(kind).experts])
@pytest.mark.parametrize("axis", ["layers", "hidden", "heads"])
def test_a_student_with_experts_is_the_masked_model_for_every_axis(kind, axis, tmp_path):
    model = tiny_model(kind)
    of = anatomy(model)
    if axis not in of.family.fixed:
        student = student_of(model, plan_of(of, axis), tmp_path / "s")
        assert_close(logits(student), logits(masked(model, of, plan_of(of, axis), tmp_path / "masked")))


def of_own_form(of, axis):
    """Whether the stock class cannot represent the student: its neurons follow from its channels."""
    return of.family.field("neurons") is None and axis != "layers"


def everything_but(of, axis):
    """Return a blueprint that has fewer of an axis that the family keeps."""
    whole = everything(of.sizes)
    first, *rest = whole.layers
    if axis == "layers":
        return Blueprint(whole.channels, tuple(rest))
    if axis in SUBLAYERS:
        return Blueprint(whole.channels, (first, replace(whole.layers[1], **{SUBLAYERS[axis]: ()}), *rest[1:]))
    if axis == "hidden":
        return Blueprint(whole.channels[1:], whole.layers)
    if axis == "neurons":
        return Blueprint(whole.channels, (LayerPlan(0, first.groups, first.neurons[1:]), *rest))
    several = len(first.groups[0].heads) > 1
    groups = tuple(Group(g.layer, g.kv, g.heads[1:]) for g in first.groups) if several else first.groups[1:]
    groups = first.groups[1:] if axis == "groups" else groups
    return Blueprint(whole.channels, (LayerPlan(0, groups, first.neurons), *rest))


@pytest.mark.parametrize("kind", TINY)
def test_layers_of_their_own_widths_equal_masking_and_reload(kind, tmp_path):
    model = tiny_model(kind)
    of = anatomy(model)
    family, whole = of.family, everything(of.sizes)
    heads = not of.whole_heads and "heads" not in family.fixed and "groups" not in family.fixed
    plans = []
    for layer, plan in enumerate(whole.layers):
        groups = (plan.groups, plan.groups[:1], plan.groups[1:], plan.groups)[layer % 4] if heads else plan.groups
        neurons = plan.neurons if "neurons" in family.fixed else plan.neurons[: (24, 8, 16, 24)[layer % 4]]
        plans.append(LayerPlan(layer, groups, neurons))
    blueprint = Blueprint(whole.channels, tuple(plans))
    student = student_of(model, blueprint, tmp_path / "s")
    assert_close(logits(student), logits(masked(model, of, blueprint, tmp_path / "masked")))
    assert open_checkpoint(tmp_path / "s").anatomy.shapes() == {
        n: tuple(t.shape) for n, t in tensors_of(student).items()
    }


@pytest.mark.parametrize("kind", TINY)
def test_a_student_without_some_attentions_and_ffns_is_the_masked_model_and_caches_what_is_left(kind, tmp_path):
    model = tiny_model(kind)
    of = anatomy(model)
    for axis in SUBLAYERS.keys() - of.family.sublayers.keys():
        with pytest.raises(ValueError, match=rf"shape\.{axis}: .*keeps its {axis}"):
            everything_but(of, axis).check(of)
    if not of.family.sublayers:
        return
    blueprint = lacking_sublayers(of)
    student = student_of(model, blueprint, tmp_path / "s")
    read = open_checkpoint(tmp_path / "s").anatomy
    assert read.sizes == blueprint.sizes(of.sizes) and read.shapes().keys() < of.shapes().keys()
    assert read.parameters()[0] < of.parameters()[0]
    wanted = logits(student)
    assert_close(wanted, logits(masked(model, of, blueprint, tmp_path / "masked")))
    if "attention_layers" in of.family.sublayers:
        ids = tokens()
        with torch.no_grad():
            first = student(ids[:, :-4], use_cache=True)
            steps = [student(ids[:, at : at + 1], past_key_values=first.past_key_values).logits for at in range(-4, -1)]
        assert_close(torch.cat([first.logits, *steps], 1), wanted[:, :-1])


def with_experts(of, kept):
    """Return the plan that keeps everything but some experts of each layer that has any."""
    whole = everything(of.sizes)
    return replace(whole, layers=tuple(replace(p, experts=kept) if of.sparse(p.host) else p for p in whole.layers))


@pytest.mark.parametrize("kind", [kind for kind in TINY if family(kind).experts])
def test_dropping_experts_equals_a_router_that_never_chooses_them(kind, tmp_path, monkeypatch):
    """The logit of a dropped expert is minus infinity, and so is its correction bias, where it has one."""
    model = tiny_model(kind)
    of = anatomy(model)
    total = of.sizes.carried["e"]
    gone = [1, 6] if kind == "deepseek_v3-groups" else [1]
    kept = tuple(expert for expert in range(total) if expert not in gone)
    blueprint = with_experts(of, kept)
    student = student_of(model, blueprint, tmp_path / "s")
    assert open_checkpoint(tmp_path / "s").anatomy.sizes.carried["e"] == len(kept)
    whole = logits(model)
    for name, tensor in model.state_dict().items():
        if tensor.shape in ((total,), (1, total)) and "bias" in name:
            tensor[..., gone] = -1e9
    linear = torch.nn.functional.linear

    def never_chosen(hidden, weight, bias=None):
        output = linear(hidden, weight, bias)
        if weight.shape == (total, 32):
            output[..., gone] = -torch.inf
        return output

    monkeypatch.setattr(torch.nn.functional, "linear", never_chosen)
    wanted = logits(model)
    monkeypatch.undo()
    assert_close(logits(student), wanted)
    assert (wanted - whole).norm() / whole.norm() > 1e-3
    with pytest.raises(ValueError, match="experts"):
        student_config(config_of(model), of, with_experts(of, (0,)))
    if not of.sparse(0):
        dense = replace(blueprint.layers[0], experts=kept)
        with pytest.raises(ValueError, match="layer 0 has none"):
            replace(blueprint, layers=(dense, *blueprint.layers[1:])).student(of)


@pytest.mark.parametrize("kind", TINY)
def test_a_structure_has_the_magnitude_in_the_student_that_it_has_in_the_model(kind):
    model = tiny_model(kind)
    of, source = anatomy(model), tensors_of(model)
    whole, plans = coupled(of, lambda name: source[name].abs()), everything(of.sizes).layers
    if not {"heads", "groups"} & of.family.fixed.keys() and len(plans[0].groups) > 1:
        plans = tuple(replace(plan, groups=plan.groups[1:]) for plan in plans)
    if "neurons" not in of.family.fixed:
        plans = tuple(replace(plan, neurons=plan.neurons[::2]) for plan in plans)
    blueprint = replace(everything(of.sizes), layers=plans)
    student = dict(cut(of, blueprint, source))
    narrow = coupled(blueprint.student(of), lambda name: student[name].abs())
    for layer, plan in enumerate(plans):
        heads = [head for group in plan.groups for head in group.heads]
        torch.testing.assert_close(narrow.heads[layer], whole.heads[layer][heads])
        torch.testing.assert_close(narrow.neurons[layer], whole.neurons[layer][list(plan.neurons)])
        names = [name for name, segments in of.layer_tensors.items() if is_coupled(segments) and of.has(name, layer)]
        total = sum((source[n.format(layer=layer)].double().abs().sum() for n in names), torch.zeros((), dtype=FLOAT64))
        torch.testing.assert_close(whole.heads[layer].sum() + whole.neurons[layer].sum(), total)


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY)
def test_scores_are_measured_and_layers_run_one_by_one(kind):
    model = tiny_model(kind)
    of, decoder = anatomy(model), decoder_of(model)
    scores = measure(decoder, of, [tokens()]).scores()
    assert all(torch.isfinite(each).all() for each in (scores.channels, scores.layers, *scores.heads, *scores.neurons))
    assert "heads" in of.family.fixed or all((heads > 0).all() for heads in scores.heads)
    assert "neurons" in of.family.fixed or all(
        (neurons > 0).any() for layer, neurons in enumerate(scores.neurons) if of.has(f"{of.writer('f')}.weight", layer)
    )
    layers = layers_of(dict(decoder.named_modules(prefix=of.family.decoder)), of)
    (step,) = recorded(decoder, layers, [tokens()])
    for index, layer in enumerate(layers):
        step.advance(layer, index, torch.device("cpu"))
    final = model.get_submodule(of.family.final_norm)
    assert_close(final(step.hidden), decoder(tokens(), use_cache=False).last_hidden_state)


@pytest.mark.parametrize("kind", TINY)
def test_logits_from_hidden_states_are_the_class_s(kind):
    model = tiny_model(kind)
    with torch.no_grad():
        states = decoder_of(model)(tokens(), use_cache=False).last_hidden_state
        assert_close(logits_of(model, states), logits(model))


@pytest.mark.parametrize("kind", TINY)
def test_the_operators_of_kernels_compute_what_the_class_computes(kind):
    model = tiny_model(kind)
    plain = logits(model)
    with fused_layers(model, {name: fused.op(name, "cpu") for name in LAYER_OPERATORS}):
        assert_close(logits(model), plain)


@pytest.mark.parametrize("kind", TINY)
def test_slnp_keeps_the_l2_norm_of_every_gain(kind):
    model = tiny_model(kind)
    of, source = anatomy(model), tensors_of(model)
    if "hidden" in of.family.fixed:
        pytest.skip("its hidden channels are kept")
    blueprint, offset = plan_of(of, "hidden"), of.family.norm_offset
    plain = dict(cut(of, blueprint, source))
    stable = dict(stabilise_gains(of, blueprint, source, plain.items()))
    gains = {name.format(layer=layer) for name in of.norms for layer in range(len(of.sizes.layers))}
    # a tied Gemma output matrix takes the embedding's sqrt(h / h') back in the final gain, on top of SLNP
    scale = (len(blueprint.channels) / of.sizes.hidden) ** 0.5 if of.family.embedding_times_root_hidden else 1.0
    for name, tensor in stable.items():
        if name in gains:
            wanted = (source[name] + offset).norm() * (scale if name == of.final_norm and of.tied else 1.0)
            assert torch.isclose((tensor + offset).norm(), wanted, rtol=1e-12), name
        else:
            assert torch.equal(tensor, plain[name]), name
    assert of.family.gainless or gains & stable.keys()
