"""Laws of the export forms: students whose layers differ, padded or in the DeciLM form, are the same function."""

import copy
import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model import decilm
from pipeline.model.blueprint import Group, LayerPlan, everything
from pipeline.model.export_forms import own, padded, stock
from pipeline.model.hf_config import student_config, with_scales
from pipeline.prune.surgery.cut import cut
from pipeline.prune.surgery.pad import pad
from pipeline.prune.surgery.reinit import absorb_post_norms, post_norm_modules
from pipeline.runtime import configuration_decilm, decilm_reader, modelling
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from pipeline.stages.deliver import export
from tests.students import MIXED, SUBLAYERS, machine, student
from tests.tiny import CLASSES, config_of, tiny_model, tokens
from tests.tiny_text import configured

CACHE = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
SERVED = ("llama", "llama-biases", "llama-tied", "mistral", "qwen2")


@pytest.fixture(autouse=True)
def _code_of_checkpoints_is_cached_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(CACHE, str(tmp_path / "modules"))


def assert_close(one, other):
    """Equal up to the float32 in which the classes' norms and softmax compute, even inside a float64 model."""
    assert (one - other).norm() / other.norm() < 1e-6, (one - other).abs().max()


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def exported(form, source, folder):
    config, wide = form(source.config, source.anatomy)
    write_checkpoint(folder, config, pad(source.anatomy, wide, source.items()), 1e9)
    return folder


def served(source, folder):
    exported(decilm.decilm, source, folder)
    with open(configuration_decilm.__file__) as code:
        (folder / decilm.CONFIGURATION_FILE).write_text(code.read())
    return folder


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


def test_the_decilm_form_needs_attention_in_its_first_layer(tmp_path):
    source = student("llama", tmp_path / "s", (LayerPlan(0, (), tuple(range(8))), *MIXED[1:]))
    with pytest.raises(ValueError, match="export.form is decilm, whose first layer must have attention"):
        decilm.decilm(source.config, source.anatomy)


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


@pytest.mark.parametrize(
    "changed, fault",
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "mistral", "sliding_window": 8}, "attention slides over a window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type 'dynamic'"),
    ],
)
def test_the_decilm_form_refuses_what_its_class_would_compute_otherwise(changed, fault):
    config = config_of(tiny_model("llama"))
    decilm.check(config)
    with pytest.raises(ValueError, match=f"export.form is decilm, and {fault}"):
        decilm.check(config | changed)


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


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 3.0}, {"rope_type": "llama3", "factor": 4.0}])
def test_the_reader_turns_as_the_stock_class_does(rope, tmp_path):
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    rope |= {"rope_theta": 100.0} | (scaling if rope["rope_type"] == "llama3" else {})
    source = student("llama", tmp_path / "s", rope_parameters=rope)
    read = decilm_reader.logits(served(source, tmp_path / "d"), tokens()[0].tolist(), torch.float64)
    assert_close(read, logits(load_model(source.folder, torch.float64, "eager"))[0])


def test_heads_that_fit_no_common_grid_take_the_cheapest_one_that_holds_every_layer(tmp_path):
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    plans = (
        LayerPlan(0, (Group(0, 0, (0,)), Group(0, 1, (4,)), Group(0, 2, (8,))), tuple(range(24))),
        LayerPlan(1, (Group(1, 1, (3, 5)), Group(1, 2, (6, 7))), tuple(range(4))),
        LayerPlan(2, (Group(2, 2, (6, 7, 8)),), tuple(range(9))),
    )
    source = student("mistral", tmp_path / "s", plans, **heads)
    folder = served(source, tmp_path / "d")
    written = json.loads((folder / "config.json").read_text())
    assert [(w.heads, w.groups) for w in decilm.block_widths(written)] == [(4, 4), (4, 2), (4, 1)]
    read = decilm_reader.logits(folder, tokens()[0].tolist(), torch.float64)
    assert_close(read, logits(load_model(source.folder, torch.float64, "eager"))[0])


@pytest.mark.parametrize("mult, neurons", [(5.25, 28672), (2.625, 14336), (1.3125, 7168), (1.0, 5632)])
def test_the_rule_of_ffn_mult(mult, neurons):
    block = {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": mult}}
    config = {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 1, "block_configs": [block]}
    (widths,) = decilm.block_widths(config)
    assert (widths.heads, widths.groups, widths.neurons) == (64, 8, neurons)


def test_blocks_that_the_class_would_not_build_are_refused(tmp_path):
    folder = served(student("llama", tmp_path / "s"), tmp_path / "d")
    path = folder / "config.json"
    good = json.loads(path.read_text())
    for change, fault in (
        (lambda c: c["block_configs"].pop(), "block_configs has 3 blocks; num_hidden_layers is 4"),
        (lambda c: c["block_configs"][2]["ffn"].update(replace_with_linear=True), r"\[2\].ffn is linear"),
        (lambda c: c["block_configs"][0]["attention"].update(n_heads_in_group=3), "is 3, no divisor of 2"),
    ):
        config = json.loads(json.dumps(good))
        change(config)
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=fault):
            open_checkpoint(folder)


def test_the_configuration_code_gives_blocks_as_objects_that_copy_and_serialise(tmp_path):
    folder = served(student("qwen2", tmp_path / "s"), tmp_path / "d")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    block = pickle.loads(pickle.dumps(copy.deepcopy(config.block_configs[3])))
    assert block.attention.no_op is False and not hasattr(block.ffn, "hidden_act")
    assert config.num_attention_heads // block.attention.n_heads_in_group == 1
    again = json.loads(config.to_json_string())["block_configs"]
    assert again == json.loads((folder / "config.json").read_text())["block_configs"]
    assert (config.qkv_bias, config.attention_bias, config.rope_theta) == (True, False, 10000.0)


def test_a_damaged_decilm_folder_fails_verification(tmp_path):
    source = student("llama", tmp_path / "s", dtype=torch.float32)
    folder = served(source, tmp_path / "d")
    weights = dict(open_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    weights["model.layers.3.mlp.down_proj.weight"] = weights["model.layers.3.mlp.down_proj.weight"].roll(1, 0)
    write_checkpoint(folder, config, weights.items(), 1e9)
    with pytest.raises(RuntimeError, match="logits differ by"):
        export.prove(source.folder, folder, torch.float32, 1e-4, "decilm")
    del weights["model.layers.3.mlp.down_proj.weight"]
    write_checkpoint(folder, config, weights.items(), 1e9)
    with pytest.raises(ValueError, match="layers.3.mlp.down_proj.weight is absent"):
        decilm_reader.logits(folder, [3, 4], torch.float32)


def test_a_decilm_folder_can_be_cut_again(tmp_path):
    folder = served(student("llama-biases", tmp_path / "s"), tmp_path / "d")
    teacher = open_checkpoint(folder)
    blueprint = everything(teacher.anatomy.sizes)
    config = student_config(teacher.config, teacher.anatomy, blueprint)
    write_checkpoint(tmp_path / "c", config, cut(teacher.anatomy, blueprint, teacher), 1e9)
    wanted = logits(load_model(folder, torch.float64, "eager"))
    assert_close(logits(load_model(tmp_path / "c", torch.float64, "eager")), wanted)
