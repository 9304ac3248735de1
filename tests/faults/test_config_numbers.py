"""Numbers and names in a config.json that no model has are refused or left out before a class of transformers acts."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from pipeline.model.families import FAMILIES
from pipeline.runtime.config_bounds import check_experts
from pipeline.runtime.described import read_config, wrapper_config
from tests.model_folders import edit, refused
from tests.students import imported
from tests.tiny import save_tiny, tiny_model


def written(folder, kind, **fields):
    """Write the config.json of a type as its class has it, with other fields."""
    config = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v is not None} | fields))
    return folder


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen3_moe", {"num_experts": 10**8}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 10**9]]}),
        ("gpt_neo", {"attention_types": [[["global"] * 5000, 1]]}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 2500], [["global"], -5000]]}),
        ("gpt_neo", {"attention_types": [[["global"], "12"]]}),
        ("gpt_neo", {"attention_types": 7}),
        ("gpt_neo", {"max_position_embeddings": 10**6}),
        ("gptj", {"n_positions": 10**8}),
        ("gptj", {"max_position_embeddings": 10**8}),  # another name of n_positions
        ("ctrl", {"n_positions": 10**8}),
        ("xglm", {"max_position_embeddings": 10**8}),
        ("mpt", {"max_seq_len": 10**9}),
        ("llama", {"max_position_embeddings": 10**12}),
        ("nemotron_h", {"chunk_size": 10**8}),
        ("llama", {"pretraining_tp": -(10**9)}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 10**9}}),
        ("llama", {"attention_dropout": -1}),
        ("llama", {"attention_dropout": 1.5}),
        ("gpt2", {"attn_pdrop": math.nan}),
        ("llama", {"rms_norm_eps": math.nan}),
        ("llama", {"rms_norm_eps": -1}),
        ("llama", {"rms_norm_eps": 0}),
        ("gpt2", {"layer_norm_epsilon": {"__float__": "Infinity"}}),
        ("llama", {"initializer_range": math.nan}),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{next(iter(value.items()))}"[:40],
)
def test_numbers_that_no_model_has_are_refused_by_field(tmp_path, kind, fields):
    with pytest.raises(ValueError) as fault:
        read_config(written(tmp_path, kind, **fields))
    assert str(fault.value).startswith(f"{tmp_path / 'config.json'}: {next(iter(fields))}")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"max_position_embeddings": 100_000_000}),
        ("nemotron_h", {"max_position_embeddings": 1 << 20}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10**10}}),
        ("llama", {"vocab_size": 1 << 20, "eos_token_id": [128001, 128008]}),
        ("llama", {"seed": 2**63, "total_parameters": 8 * 10**9, "notes": {"tokens": 15 * 10**12}}),
        ("mistral", {"sliding_window": 1 << 20}),
        ("llama", {"attention_dropout": 0, "rms_norm_eps": 1e-5}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 12]]}),
    ],
    ids=str,
)
def test_numbers_of_real_models_are_accepted(tmp_path, kind, fields):
    assert fields.items() <= read_config(written(tmp_path, kind, **fields)).items()


@pytest.mark.parametrize("fields", [{"num_experts_per_tok": 5}, {"num_experts_per_tok": 0}])
def test_a_token_is_sent_to_an_expert_and_to_no_more_than_there_are(tmp_path, fields):
    folder = save_tiny(tiny_model("qwen3_moe", dtype=torch.float32), tmp_path / "model")
    edit(folder, **fields)
    refused(folder, "config.json", *fields, "num_experts")


LEFT_OUT = {
    "return_dict": False,
    "output_hidden_states": True,
    "num_labels": 10**8,
    "id2label": {"0": "a"},
    "to_json_string": 1,
    "to_dict": 1,
    "attribute_map": {"hidden_size": "vocab_size"},
}


def test_fields_that_hide_a_method_or_are_not_used_are_left_out(tmp_path):
    folder = save_tiny(tiny_model("gpt_neo", dtype=torch.float32), tmp_path / "model")
    before = read_config(folder)
    edit(folder, **LEFT_OUT, expand_attention_types_params=1)
    assert read_config(folder) == before
    assert imported(folder, tmp_path / "copy").config.keys() >= before.keys() - {"attention_types"}


def test_fields_of_sections_that_are_not_used_are_left_out():
    sections = {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}
    plain = wrapper_config({"model_type": "llava", **sections}, Path("config.json"))
    hostile = {name: section | LEFT_OUT for name, section in sections.items()}
    assert wrapper_config({"model_type": "llava", **hostile, **LEFT_OUT}, Path("config.json")) == plain


def test_a_field_with_a_name_of_two_lines_is_refused_in_one(tmp_path):
    folder = save_tiny(tiny_model("llama", dtype=torch.float32), tmp_path / "model")
    edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "a\nb\ud800": 1 << 31})
    with pytest.raises(ValueError, match=r"rope_parameters\.a.nb.* is 2147483648") as fault:
        read_config(folder)
    assert "\n" not in str(fault.value) and str(fault.value).isascii()


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize("fields", [{"num_hidden_layers": 10**8}, {"attention_dropout": 2}, {"image_size": 10**9}])
def test_numbers_of_sections_are_refused_by_field(section, fields):
    stored = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    with pytest.raises(ValueError, match=next(iter(fields))):
        wrapper_config(stored | {section: stored[section] | fields}, Path("config.json"))


def test_experts_of_all_layers_are_no_more_than_the_tensors_of_a_model():
    config = {"num_experts": 1 << 13, "num_experts_per_tok": 1, "num_hidden_layers": 64}
    with pytest.raises(ValueError, match="num_experts is 8192"):
        check_experts(config, FAMILIES["qwen3_moe"], Path("config.json"))
    check_experts(config | {"num_experts": 1 << 12}, FAMILIES["qwen3_moe"], Path("config.json"))
