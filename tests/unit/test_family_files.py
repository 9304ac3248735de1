"""Configurations and checkpoints of single families: what is written, adjusted, read or refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, everything
from pipeline.model.export_forms import padded
from pipeline.model.families import family_of
from pipeline.model.hf_config import student_config
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_class import class_shapes
from pipeline.runtime.model_loader import load_model
from tests.cut_models import anatomy, assert_close, export, logits
from tests.laws import plan_of
from tests.tiny import TINY, config_of, save_tiny, tensors_of, tiny_model, tokens


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


def test_a_kimi_linear_student_keeps_a_layer_with_a_cache_of_tokens():
    of = anatomy(tiny_model("kimi_linear"))
    whole = everything(of.sizes)
    Blueprint(whole.channels, whole.layers[1:3]).check(of)
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


def test_lists_of_layers_that_a_released_config_leaves_empty_are_those_of_the_class(tmp_path):
    model = tiny_model("llama4_text", no_rope_layers=[], moe_layers=None, interleave_moe_layer_step=2)
    folder = save_tiny(model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    own = {name: config.pop(name) for name in ("no_rope_layers", "moe_layers", "layer_types")}
    (folder / "config.json").write_text(json.dumps(config | {"no_rope_layers": []}))
    source = open_checkpoint(folder)
    assert {name: source.config[name] for name in own} == own
    whole = everything(source.anatomy.sizes)
    shorter = replace(whole, layers=(*whole.layers[:1], *whole.layers[2:]))
    edited = student_config(source.config, source.anatomy, shorter)
    assert (edited["no_rope_layers"], edited["moe_layers"]) == ([1, 1, 0], [2])
    other = save_tiny(tiny_model("smollm3"), tmp_path / "other")  # whose class leaves it empty
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"no_rope_layers": []}))
    with pytest.raises(ValueError, match="no_rope_layers has 0 entries and num_hidden_layers is 4"):
        open_checkpoint(other)


def test_a_kimi_linear_model_in_its_first_form_is_read(tmp_path):
    model = tiny_model("kimi_linear", dtype=torch.float32)
    folder = save_tiny(model, tmp_path / "m")
    plain = open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    linear = {"head_dim": 6, "num_heads": 3, "short_conv_kernel_size": 3}
    linear |= {"kda_layers": [1, 2], "full_attn_layers": [3, 4]}
    own = {name for name in config if name.startswith("linear_")} | {"layer_types", "mlp_layer_types"}
    stored = {name: value for name, value in config.items() if name not in own}
    (folder / "config.json").write_text(json.dumps(stored | {"linear_attn_config": linear, "first_k_dense_replace": 1}))
    tensors = load_file(folder / "model.safetensors")
    dense = {name: name.replace("block_sparse_moe.", "mlp.") for name in tensors if name.endswith("_proj.weight")
             and name.startswith("model.layers.0.block_sparse_moe.")}  # fmt: skip
    assert len(dense) == 3  # as the class saves them; released files have the other names
    save_file({dense.get(name, name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    source = open_checkpoint(folder)
    source.check()
    assert source.anatomy == plain.anatomy and {"linear_attn_config", "first_k_dense_replace"}.isdisjoint(source.config)
    assert sorted(source) == sorted(plain) and not any("block_sparse_moe.up_proj" in name for name in source)
    assert_close(logits(load_model(folder, torch.float32, "eager")), logits(model))


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
    with pytest.raises(ValueError, match="layer 3 of .* must stay"):
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


@pytest.mark.parametrize("field", ["num_experts", "top_k_experts"])
@pytest.mark.parametrize("value", [None, True, [], "4"])
def test_a_mixture_whose_config_does_not_state_its_experts_is_refused(field, value):
    config = config_of(model := tiny_model("gemma4_text-experts")) | {field: value}
    with pytest.raises(ValueError, match=rf"^config\.json: {field} is .*, not a whole number"):
        anatomy_of(config, tensors_of(model))
