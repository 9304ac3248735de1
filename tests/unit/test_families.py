"""Laws of the tables: for every type with one, on a tiny random model of the real class, in float64."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import fused
from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything
from pipeline.model.export_forms import padded
from pipeline.model.families import AXES, FAMILIES, family_of
from pipeline.model.families.table import SUBLAYERS
from pipeline.model.hf_config import student_config
from pipeline.model.logits import logits_of
from pipeline.prune.importance.coupled import coupled, is_coupled
from pipeline.prune.importance.measure import measure
from pipeline.prune.passes.layerwise import layers_of, recorded
from pipeline.prune.surgery.cut import cut
from pipeline.prune.surgery.reinit import stabilise_gains
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.fused_layers import LAYER_OPERATORS, fused_layers
from pipeline.runtime.model_class import class_shapes
from pipeline.runtime.model_loader import load_model
from tests.laws import lacking_sublayers, masked, plan_of
from tests.tiny import TINY, config_of, model_type, save_tiny, tensors_of, tiny_model, tokens

FLOAT64 = torch.float64


def assert_close(one, other):
    """Assert equality up to the float32 in which the classes' norms and softmax compute, also inside float64 models."""
    assert (one - other).norm() / other.norm() < 1e-5, (one - other).abs().max()


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def anatomy(model):
    return anatomy_of(config_of(model), tensors_of(model))


def export(model, blueprint, folder):
    config = student_config(config_of(model), anatomy(model), blueprint)
    write_checkpoint(folder, config, cut(anatomy(model), blueprint, tensors_of(model)), 20_000)
    return folder


def built(model, blueprint):
    """Return the student as its class computes it, without a folder on disk."""
    config = AutoConfig.for_model(**student_config(config_of(model), anatomy(model), blueprint))
    student = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(model.dtype).eval()
    tensors = dict(cut(anatomy(model), blueprint, tensors_of(model)))
    if config.tie_word_embeddings:
        family = family_of(model.config.model_type)
        tensors[f"{family.head}.weight"] = tensors[f"{family.embedding}.weight"]
    student.load_state_dict(tensors)
    return student


def student_of(model, blueprint, folder):
    """Return the student as its class loads it, which refuses missing and unexpected tensors."""
    student = load_model(export(model, blueprint, folder), model.dtype, "eager")
    if family_of(model.config.model_type).experts:
        student.set_experts_implementation("eager")  # the others refuse float64
    return student


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


@pytest.mark.parametrize("kind", [kind for kind in TINY if FAMILIES[model_type(kind)].experts])
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


@pytest.mark.parametrize("kind", [kind for kind in TINY if FAMILIES[model_type(kind)].experts])
def test_dropping_experts_equals_a_router_that_never_chooses_them(kind, tmp_path, monkeypatch):
    """The logit of a dropped expert is minus infinity, and so is its correction bias, where it has one."""
    model = tiny_model(kind)
    of = anatomy(model)
    total = of.sizes.carried["e"]
    gone = [1, 6] if kind == "deepseek_v3-groups" else [1]
    kept = tuple(expert for expert in range(total) if expert not in gone)
    blueprint = Blueprint(
        everything(of.sizes).channels, tuple(replace(p, experts=kept) for p in everything(of.sizes).layers)
    )
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
    short = Blueprint(blueprint.channels, tuple(replace(plan, experts=(0,)) for plan in blueprint.layers))
    with pytest.raises(ValueError, match="experts"):
        student_config(config_of(model), of, short)


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
    of, decoder = anatomy(model), model.get_decoder()
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
        states = model.get_decoder()(tokens(), use_cache=False).last_hidden_state
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


def test_gemma_narrowed_embedding_keeps_its_magnitude(tmp_path):
    for kind in ("gemma2", "gemma3_text"):
        model = tiny_model(kind, num_attention_heads=2, num_key_value_heads=1)
        of = anatomy(model)
        whole = everything(of.sizes)
        blueprint = Blueprint(tuple(range(16)), whole.layers)
        student = load_model(export(model, blueprint, tmp_path / kind), torch.float64, "eager")
        x = tokens()
        assert torch.allclose(student.model.embed_tokens(x), model.model.embed_tokens(x)[..., :16], rtol=1e-6)
        with torch.no_grad():
            stream = torch.randn(1, 3, 16, dtype=torch.float64)
            got = student.lm_head(student.model.norm(stream))
            gain = 1.0 + model.model.norm.weight[:16]
            wanted = (stream / (stream.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()) * gain
            wanted = wanted @ model.lm_head.weight[:, :16].T
        assert_close(got, wanted)


def test_a_llama_whose_heads_do_not_divide_its_width_is_saved_as_mistral(tmp_path):
    model = tiny_model("llama")
    of = anatomy(model)
    whole = everything(of.sizes)
    blueprint = Blueprint(tuple(range(30)), plan_of(of, "neurons").layers[:3] + (whole.layers[3],))
    uniform = Blueprint(tuple(range(30)), whole.layers)
    student = load_model(export(model, uniform, tmp_path / "s"), torch.float64, "eager")
    assert type(student).__name__ == "MistralForCausalLM" and student.config.sliding_window is None
    mixed = load_model(export(model, blueprint, tmp_path / "m"), torch.float64, "eager")
    assert torch.isfinite(logits(mixed)).all()
    biased = tiny_model("llama-biases")
    with pytest.raises(ValueError, match="shape.hidden is 30, not a multiple of shape.heads"):
        export(biased, uniform, tmp_path / "b")


def test_an_unknown_type_is_refused_with_what_a_table_needs_and_a_known_one_with_its_reason():
    with pytest.raises(ValueError, match="model_type 'unheard_of' has no table.*axes"):
        family_of("unheard_of")
    with pytest.raises(ValueError, match="model_type 'mamba' has no table: .*state-space"):
        family_of("mamba")


def test_a_checkpoint_that_does_not_match_its_table_is_refused():
    model = tiny_model("llama")
    names = dict(tensors_of(model))
    names["model.layers.0.self_attn.rogue.weight"] = names.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="missing .*layers.1.mlp.up_proj.*unknown .*rogue"):
        anatomy_of(config_of(model), names)


def test_sharded_and_truncated_checkpoints(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    folder = save_tiny(model, tmp_path / "m")
    assert all(torch.equal(tensors_of(model)[name], tensor) for name, tensor in open_checkpoint(folder).items())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        open_checkpoint(folder)


def test_pickled_weights_are_refused_unless_asked_and_then_read_weights_only(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    folder = save_tiny(model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(tensors_of(model), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.allow_pickle=true"):
        open_checkpoint(folder)
    read = open_checkpoint(folder, allow_pickle=True)
    assert all(torch.equal(read[k], v) for k, v in tensors_of(model).items())
    torch.save({"x": print}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        open_checkpoint(folder, allow_pickle=True)


def test_a_student_of_a_hybrid_keeps_a_layer_with_attention():
    of = anatomy(tiny_model("bamba"))
    whole = everything(of.sizes)
    Blueprint(whole.channels, whole.layers[:3]).check(of)
    with pytest.raises(ValueError, match=r"shape\.layers: of the layers with attention \(2, 3\) none stays"):
        Blueprint(whole.channels, whole.layers[:2]).check(of)


def test_neurons_that_a_class_adjusts_are_read_from_the_weights_and_stated(tmp_path):
    model = tiny_model("lfm2", block_auto_adjust_ff_dim=True, block_multiple_of=8)
    folder = save_tiny(model, tmp_path / "m")
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    del stored["intermediate_size"], stored["layer_types"]
    path.write_text(json.dumps(stored | {"block_ff_dim": 24, "full_attn_idxs": [2, 3]}))
    source = open_checkpoint(folder)
    source.check()
    assert source.anatomy.sizes.layers[0].neurons == source.config["intermediate_size"] == 16
    assert "block_ff_dim" not in source.config and source.config["layer_types"] == TINY["lfm2"]["layer_types"]


def test_infinities_of_a_config_are_read_and_written_as_transformers_does(tmp_path):
    folder = save_tiny(tiny_model("nemotron_h"), tmp_path / "m")
    source = open_checkpoint(folder)
    assert source.config["time_step_limit"] == [0.0, float("inf")] and source.config["num_hidden_layers"] == 4
    write_checkpoint(tmp_path / "s", source.config, source.items(), 1e9)
    stored = [json.loads((path / "config.json").read_text())["time_step_limit"] for path in (folder, tmp_path / "s")]
    assert stored[0] == stored[1] == [0.0, {"__float__": "Infinity"}]
    assert set(load_file(tmp_path / "s" / "model.safetensors")) == set(load_file(folder / "model.safetensors"))


def test_a_student_whose_last_layer_alone_has_a_tensor_keeps_it_last():
    of = anatomy(tiny_model("gpt_neox_japanese"))
    whole = everything(of.sizes)
    Blueprint(whole.channels, whole.layers[1:]).check(of)
    with pytest.raises(ValueError, match="must be layer 3"):
        Blueprint(whole.channels, whole.layers[:3]).check(of)


@pytest.mark.parametrize("kind", ["granitemoehybrid", "recurrent_gemma"])
def test_the_padded_form_states_the_widths_under_the_names_of_the_class(kind):
    model = tiny_model(kind)
    of = anatomy(model)
    whole = everything(of.sizes)
    plans = tuple(replace(plan, neurons=plan.neurons[: 8 + 4 * layer]) for layer, plan in enumerate(whole.layers))
    blueprint = Blueprint(whole.channels, plans)
    written, wide = padded(student_config(config_of(model), of, blueprint), blueprint.student(of))
    assert {widths.neurons for widths in wide.layers} == {20}
    assert class_shapes(written, Path()) == of.narrowed(wide, of.layer_types).shapes()
