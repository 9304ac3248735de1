"""Laws of the export forms: students whose layers differ, padded or in the DeciLM form, are the same function."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.model.blueprint import Group, LayerPlan, everything
from pipeline.model.export_forms import own, padded, stock
from pipeline.model.hf_config import student_config, with_scales
from pipeline.prune.surgery.cut import cut
from pipeline.prune.surgery.pad import pad
from pipeline.prune.surgery.reinit import absorb_post_norms, post_norm_modules
from pipeline.runtime import decilm_reader, modelling
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from pipeline.stages.deliver import export
from tests.cut_models import anatomy
from tests.exports import assert_close, exported, logits, served
from tests.students import MIXED, SUBLAYERS, machine, student
from tests.tiny import CLASSES, tiny_model, tokens
from tests.tiny_text import configured

CACHE = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
SERVED = ("llama", "llama-biases", "llama-tied", "mistral", "qwen2")


@pytest.fixture(autouse=True)
def _code_of_checkpoints_is_cached_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(CACHE, str(tmp_path / "modules"))


@pytest.mark.parametrize("plans", [MIXED, SUBLAYERS], ids=["widths", "sublayers"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_padded_student_is_the_same_function_in_the_stock_class(kind, plans, tmp_path):
    source = student(kind, tmp_path / "s", plans)
    folder = exported(padded, source, tmp_path / "p")
    assert not {"pruned", "auto_map"} & json.loads((folder / "config.json").read_text()).keys()
    model = load_model(folder, torch.float64, "eager")
    assert type(model).__name__ == CLASSES[kind][1]
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 24)
    assert_close(logits(model), logits(load_model(source.folder, torch.float64, "eager")))


def test_layers_of_two_stated_widths_are_padded_to_these(tmp_path):
    whole = everything(anatomy(tiny_model("gemma4_text")).sizes)
    plans = tuple(replace(plan, neurons=plan.neurons[: 10 + 3 * place]) for place, plan in enumerate(whole.layers))
    source = student("gemma4_text", tmp_path / "s", plans)
    model = load_model(exported(padded, source, tmp_path / "p"), torch.float64, "eager")
    assert type(model).__name__ == "Gemma4ForCausalLM" and model.config.intermediate_size == 16
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [16, 16, 16, 32, 32, 32]
    assert_close(logits(model), logits(load_model(source.folder, torch.float64, "eager")))


@pytest.mark.parametrize("plans", [MIXED, SUBLAYERS], ids=["widths", "sublayers"])
@pytest.mark.parametrize("kind", SERVED)
def test_the_decilm_form_is_the_same_function_to_a_reader_of_its_rules_and_to_our_loader(kind, plans, tmp_path):
    source = student(kind, tmp_path / "s", plans)
    folder = served(source, tmp_path / "d")
    wanted = logits(load_model(source.folder, torch.float64, "eager"))
    read = [decilm_reader.logits(folder, ids.tolist(), torch.float64) for ids in tokens()]
    assert_close(torch.stack(read), wanted)
    assert_close(logits(load_model(folder, torch.float64, "eager")), wanted)
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [not plan.groups for plan in plans]
    assert [block["ffn"]["no_op"] for block in blocks] == [not plan.neurons for plan in plans]


def test_own_code_runs_a_student_without_some_sublayers_and_caches_what_is_left(tmp_path):
    source = student("qwen2", tmp_path / "s", SUBLAYERS)
    folder = exported(own, source, tmp_path / "o")
    shutil.copyfile(modelling.__file__, folder / "modeling_pruned.py")
    with (folder / "modeling_pruned.py").open("a") as code:
        code.write('PrunedForCausalLM = pruned_class("Qwen2ForCausalLM")\n')
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    assert_close(logits(model), logits(load_model(source.folder, torch.float64, "eager")))
    cache = model(tokens(), use_cache=True).past_key_values
    assert sum(layer.keys is not None for layer in cache.layers if hasattr(layer, "keys")) == 3
    assert cache.get_seq_length() == tokens().shape[1]
    whole = model.generate(tokens(), max_new_tokens=6, do_sample=False)
    assert torch.equal(whole, model.generate(tokens(), max_new_tokens=6, do_sample=False, use_cache=False))


def run_export(source, out, form, **changed):
    """Run the stage on a student and return export.json."""
    settings = {"form": form, "dtype": "float32", "tolerance": 1e-4} | changed
    config = configured(*(f"export.{key}={value}" for key, value in settings.items()))
    export.run(config, {"initial_student": source.folder}, out, machine())
    return json.loads((out / "export.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, expected",
    [
        ("auto", ("own", "PrunedForCausalLM")),
        ("padded", ("padded", "LlamaForCausalLM")),
        ("decilm", ("decilm", "DeciLMForCausalLM, by our reader of its rules")),
    ],
)
def test_the_stage_writes_and_verifies_each_form_and_records_the_cost_of_padding(form, expected, tmp_path):
    source = student("llama", tmp_path / "s", dtype=torch.float32)
    found = run_export(source, tmp_path / "out", form)
    assert (found["form"], found["class"]) == expected and found["difference"] < 1e-5
    read = open_checkpoint(tmp_path / "out")
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    before, after = source.anatomy.parameters()[0], read.anatomy.parameters()[0]
    if form == "auto":
        assert found["padded"] is None and before == after
    else:
        assert found["padded"]["parameters"] == [before, after] and before < after
        assert found["padded"]["kv_values_per_token"] == [2 * 8 * 5, 2 * 8 * (8 if form == "padded" else 5)]
        assert found["padded"]["layers"][3]["heads"] == [1, 4 if form == "padded" else 2]


def test_own_code_takes_a_student_whose_layers_are_alike_too(tmp_path):
    alike = tuple(LayerPlan(i, (Group(i, 0, (0, 1)),), tuple(range(16))) for i in range(4))
    source = student("llama", tmp_path / "s", alike)
    folder = exported(own, source, tmp_path / "o")
    model = load_model(folder, torch.float64, "eager")
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    assert type(model).__name__ == "PrunedForCausalLM"
    assert torch.equal(logits(model), logits(load_model(source.folder, torch.float64, "eager")))


@pytest.mark.parametrize("form", [stock, padded])
def test_a_student_of_a_model_of_our_own_code_does_not_ask_for_that_code(form, tmp_path):
    source = open_checkpoint(exported(own, student("llama", tmp_path / "s"), tmp_path / "o"))
    blueprint = everything(source.anatomy.sizes)
    blueprint = replace(blueprint, layers=blueprint.layers[:1]) if form is stock else blueprint
    config = student_config(source.config, source.anatomy, blueprint)
    write_checkpoint(tmp_path / "again", config, cut(source.anatomy, blueprint, source), 1e9)
    folder = exported(form, open_checkpoint(tmp_path / "again"), tmp_path / "e")
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    assert not {"pruned", "auto_map"} & json.loads((folder / "config.json").read_text()).keys()


def scaled(kind, folder):
    """A student of layers of their own widths whose post-norms are static scales."""
    source = student(kind, folder / "cut", dtype=torch.float32)
    means = {module: 0.5 + i / 9 for i, module in enumerate(post_norm_modules(source.anatomy))}
    frozen = absorb_post_norms(source.anatomy, source, means)
    write_checkpoint(folder / "scaled", with_scales(source.config, source.anatomy), frozen, 1e9)
    return open_checkpoint(folder / "scaled")


@pytest.mark.slow
def test_scales_are_folded_before_padding(tmp_path):
    found = run_export(scaled("glm4", tmp_path), tmp_path / "out", "padded")
    assert found["class"] == "GlmForCausalLM" and found["folded"] and found["padded"] and found["difference"] < 1e-5


def test_scales_that_cannot_be_folded_are_refused_by_the_stage_and_before_any_work(tmp_path):
    source = scaled("gemma3_text", tmp_path)
    with pytest.raises(ValueError, match="export.form is padded.*reinit.absorb=false"):
        run_export(source, tmp_path / "out", "padded")
    teacher = tmp_path / "cut"
    with pytest.raises(ValueError, match="export.form is padded.*reinit.absorb=false"):
        export.check(configured(f"model.path={teacher}", "export.form=padded"))
    export.check(configured(f"model.path={teacher}", "export.form=padded", "reinit.absorb=false"))
    with pytest.raises(ValueError, match="model_type 'gemma3_text' is not one of llama, mistral, qwen2"):
        export.check(configured(f"model.path={teacher}", "export.form=decilm", "reinit.absorb=false"))


def test_padding_changes_no_kept_weight_and_adds_only_zeros(tmp_path):
    source = student("phi3", tmp_path / "s")
    before, wide = source.anatomy, padded(source.config, source.anatomy)[1]
    for name, tensor in pad(before, wide, source.items()):
        assert tensor.shape == before.narrowed(wide, before.layer_types).shapes()[name]
        assert torch.equal(tensor[tensor != 0], source[name][source[name] != 0]), name


def test_a_norm_over_all_heads_is_padded_exactly_whatever_its_epsilon(tmp_path):
    source = student("olmo2", tmp_path / "s", rms_norm_eps=0.5)
    model = load_model(exported(padded, source, tmp_path / "p"), torch.float64, "eager")
    assert_close(logits(model), logits(load_model(source.folder, torch.float64, "eager")))


def test_heads_are_padded_up_to_a_number_that_the_class_takes(tmp_path):
    wide = {"num_attention_heads": 8, "num_key_value_heads": 2}
    triple = (LayerPlan(0, (Group(0, 0, (0, 1, 3)),), tuple(range(24))),)
    twice = (LayerPlan(1, (Group(1, 0, (0, 1)), Group(1, 1, (4, 6))), tuple(range(24))),)
    source = student("gemma2", tmp_path / "s", triple + twice, **wide)
    model = load_model(exported(padded, source, tmp_path / "p"), torch.float64, "eager")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (8, 2)  # 6 do not divide 32
    assert_close(logits(model), logits(load_model(source.folder, torch.float64, "eager")))


def test_a_llama_whose_padded_heads_do_not_divide_its_width_becomes_a_mistral(tmp_path):
    triple = (LayerPlan(0, (Group(0, 0, (0, 1, 3)),), tuple(range(24))),)
    twice = (LayerPlan(1, (Group(1, 0, (0, 1)), Group(1, 1, (4, 6))), tuple(range(24))),)
    source = student("llama", tmp_path / "s", triple + twice, num_attention_heads=8)
    model = load_model(exported(padded, source, tmp_path / "p"), torch.float64, "eager")
    assert type(model).__name__ == "MistralForCausalLM" and model.config.num_attention_heads == 6
    assert_close(logits(model), logits(load_model(source.folder, torch.float64, "eager")))


def test_padding_is_refused_where_no_number_of_heads_suits_the_class(tmp_path):
    four = LayerPlan(0, tuple(Group(0, k, (2 * k,)) for k in range(4)), tuple(range(24)))
    pair = LayerPlan(1, (Group(1, 0, (0, 1)),), tuple(range(24)))
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    source = student("gemma2", tmp_path / "s", (four, pair), channels=4, **heads)
    with pytest.raises(ValueError, match="4 KV groups of 2 heads.*divide the hidden size 4; set export.form=own"):
        padded(source.config, source.anatomy)
