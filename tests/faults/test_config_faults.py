"""A config.json as it is found: completed as its class does, or refused by name before any work."""

import json

import pytest
import torch

from pipeline import runner
from pipeline.runtime.described import read_config
from tests.model_folders import assert_read_as_by_transformers, edit, refused
from tests.students import imported, student
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import configured
from tests.world import make_world, settings

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    """Return a sound tied Llama in a folder."""
    return save_tiny(tiny_model("llama-tied", dtype=torch.float32), tmp_path / "model")


@pytest.mark.parametrize(("kind", "tied"), [("gemma2", True), ("llama", False)])
def test_a_config_that_does_not_say_is_tied_as_its_class_is(tmp_path, kind, tied):
    folder = save_tiny(tiny_model(kind, dtype=torch.float32), tmp_path / "model")
    edit(folder, without=("tie_word_embeddings",))
    checkpoint = assert_read_as_by_transformers(folder, tmp_path / "copy")
    assert checkpoint.anatomy.tied is tied and checkpoint.config["tie_word_embeddings"] is tied


@pytest.mark.parametrize(("kind", "field"), [("llama-tied", "head_dim"), ("llama", "num_key_value_heads")])
def test_fields_that_a_config_leaves_to_its_class_are_filled_in(tmp_path, kind, field):
    changed = {} if field == "head_dim" else {"num_key_value_heads": 4}
    folder = save_tiny(tiny_model(kind, dtype=torch.float32, **changed), tmp_path / "model")
    edit(folder, without=(field,))
    assert assert_read_as_by_transformers(folder, tmp_path / "copy").config[field]


def test_the_old_name_of_the_type_is_replaced(folder):
    edit(folder, torch_dtype="float32", without=("dtype",))
    checkpoint = imported(folder, folder.with_name("copy"))
    stored = json.loads((checkpoint.folder / "config.json").read_text())
    assert stored["dtype"] == "float32" and "torch_dtype" not in stored


@pytest.mark.parametrize("fields", [{"without": ("architectures",)}, {"architectures": None}])
def test_a_config_without_architectures_is_of_its_types_class(folder, fields):
    edit(folder, **fields)
    assert imported(folder, folder.with_name("copy")).config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("entries", [3, 5])
def test_a_list_for_other_layers_than_the_models_is_refused(tmp_path, entries):
    folder = save_tiny(tiny_model("gemma3_text", dtype=torch.float32), tmp_path / "model")
    edit(folder, layer_types=["full_attention"] * entries)
    refused(folder, "layer_types", f"{entries} entries", "num_hidden_layers is 4")


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": "small"},
        {"hidden_act": "no such activation"},
        {"rope_parameters": {"rope_type": "no such type", "rope_theta": 1e4}},
        {"rope_parameters": [1]},
        {"pad_token_id": 10_000},
        {"attention_bias": True},
    ],
)
def test_a_config_that_its_class_refuses_is_named_and_not_the_tokenizer(folder, fields):
    edit(folder, **fields)
    refused(folder, "config.json")


def test_a_section_of_pruned_layers_that_contradicts_itself_is_refused(tmp_path):
    source = student("llama", tmp_path / "s", dtype=torch.float32)
    pruned = source.config["pruned"]
    for changed in (
        {"shapes": {}},
        {"shapes": pruned["shapes"] | {EMBEDDING: [1 << 30, 1 << 30]}},
        {"attention": pruned["attention"] | {"model.layers.0.self_attn": {"num_attention_heads": 1}}},
        {"scales": ["model.layers.0.mlp"]},
        {"layers": pruned["layers"][:-1]},
        {"layers": [{"heads": "2", "groups": 1, "neurons": 3}] * 4},
    ):
        edit(source.folder, pruned=pruned | changed)
        refused(source.folder, "config.json", "pruned")


HOSTILE = [
    {"num_hidden_layers": 300_000_000},
    {"vocab_size": 10**12},
    {"hidden_size": 10**9},
    {"head_dim": 10**9},
    {"num_key_value_heads": 0},
    {"num_attention_heads": True},
    {"intermediate_size": 1e9},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda fields: next(iter(fields)))
def test_counts_beyond_any_model_are_refused_before_anything_is_built(folder, fields):
    edit(folder, **fields)
    refused(folder, "config.json", *fields)


NO_OBJECTS = ["[" * 10_000_000, '{"a":' * 1_000_000, "{", "", "\x00", "[1]", '{"a": ' + "9" * 9999 + "}"]


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: text[:4])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_is_too_deep_too_large_or_none_is_refused(folder, file, text):
    (folder / file).write_text(text)
    refused(folder, file)


@pytest.mark.parametrize("depth", [150, 900, 3000])
@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":[', "]}")])
def test_json_of_a_depth_that_exceeds_the_stack_of_python_is_refused(folder, depth, opened, closed):
    nested = f'{{"model_type": "llama", "rope_parameters": {opened * depth}{closed * depth}}}'
    (folder / "config.json").write_text(nested)
    refused(folder, "config.json is nested too deeply")


@pytest.mark.parametrize("length", [1 << 62, 1 << 30, 7])
def test_a_header_of_an_impossible_length_is_refused(folder, length):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
    refused(folder, "model.safetensors")


def test_a_config_cannot_choose_kernels_or_files(folder):
    fields = {"_attn_implementation", "attn_implementation", "transformers_weights"}
    edit(folder, **dict.fromkeys(fields, "someone/kernel"))
    assert not fields & read_config(folder).keys()
    copy = imported(folder, folder.with_name("copy")).folder
    assert not fields & json.loads((copy / "config.json").read_text()).keys()


def test_pangu_pro_moe_is_refused_by_its_router_before_any_work(tmp_path):
    world = make_world(tmp_path)
    path = world / "model" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "PanguProMoE", "architectures": ["PanguProMoEForCausalLM"]}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="PanguProMoE.* one expert of every group"):
        runner.run(configured(*settings(world)), "a test")
