"""The DeciLM form: its rules for widths, its configuration code, its reader, and what it refuses."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig

from pipeline.model import decilm
from pipeline.model.blueprint import Group, LayerPlan, everything
from pipeline.model.hf_config import student_config
from pipeline.prune.surgery.cut import cut
from pipeline.runtime import decilm_reader
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from pipeline.stages.deliver import export
from tests.exports import assert_close, logits, served
from tests.students import MIXED, student
from tests.tiny import config_of, tiny_model, tokens

CACHE = "transformers.dynamic_module_utils.HF_MODULES_CACHE"


@pytest.fixture(autouse=True)
def _code_of_checkpoints_is_cached_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(CACHE, str(tmp_path / "modules"))


def test_the_decilm_form_needs_attention_in_its_first_layer(tmp_path):
    source = student("llama", tmp_path / "s", (LayerPlan(0, (), tuple(range(8))), *MIXED[1:]))
    with pytest.raises(ValueError, match="export.form is decilm, whose first layer must have attention"):
        decilm.decilm(source.config, source.anatomy)


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
