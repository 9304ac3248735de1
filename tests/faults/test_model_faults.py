"""Model folders as they are found: what is read is what transformers reads, or refused by name before any work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline import runner
from pipeline.model.hf_config import with_scales
from pipeline.prune.surgery.reinit import absorb_post_norms, post_norm_modules
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.described import read_config
from pipeline.runtime.model_loader import load_model, load_tokenizer
from pipeline.runtime.model_source import generation_of, inspect, locate
from pipeline.runtime.tokenizer_check import check_fits, difference
from pipeline.stages.deliver import export
from pipeline.stages.prepare import teacher
from tests.students import imported, machine, student
from tests.tiny import save_tiny, tiny_model, tokenizer_folder, tokens
from tests.tiny_text import byte_tokenizer, configured
from tests.world import make_world, settings

EMBEDDING, HEAD, DOWN = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Return a sound tied Llama in a folder."""
    return save_tiny(tiny_model("llama-tied", dtype=torch.float32), tmp_path / "model")


def edit(folder, file="config.json", without=(), **fields):
    kept = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({k: v for k, v in (kept | fields).items() if k not in without}))


def change(folder, **tensors):
    """Replace tensors of a folder, or remove those that are None."""
    weights = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({k: t for k, t in weights.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def refused(folder, *names):
    """Check that a folder is refused as model.path, in one line with these names, and that its copy is refused too."""
    with pytest.raises(ValueError) as checked:
        inspect(locate(str(folder)), "model.path")
    with pytest.raises(ValueError):
        imported(folder, folder.with_name("copy"))
    message = str(checked.value)
    assert message.startswith("model.path: ") and "\n" not in message, message
    assert all(name in message for name in names), message


def assert_read_as_by_transformers(folder, copy):
    """Check that what the stages read, what they load and what transformers reads are the same network."""
    checkpoint = imported(folder, copy)
    options = {"local_files_only": True, "dtype": torch.float32, "attn_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    ours = load_model(copy, torch.float32, "eager")
    assert torch.equal(logits(ours), logits(theirs))
    stock = AutoModelForCausalLM.from_pretrained(copy, **options).eval()
    assert torch.equal(logits(stock), logits(theirs))
    own = dict(ours.named_parameters())
    assert own.keys() == checkpoint.keys() == checkpoint.anatomy.shapes().keys()
    assert all(torch.equal(own[name], checkpoint[name]) for name in own)
    return checkpoint


# Files


def test_two_sets_of_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in weights.items()}, folder / "other.safetensors")
    edit(folder, INDEX, weight_map=dict.fromkeys(weights, "other.safetensors"))
    refused(folder, "model.safetensors", INDEX)


@pytest.mark.parametrize("single", [False, True])
def test_an_index_without_metadata_is_read(folder, single):
    file = "model.safetensors" if single else "part.safetensors"
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / file)
    edit(folder, INDEX, weight_map=dict.fromkeys(names, file))
    assert imported(folder, folder.with_name("copy")).keys() == open_checkpoint(folder).keys()


def test_a_tensor_in_two_files_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    refused(folder, "a.safetensors", "b.safetensors")


def test_an_adapter_beside_the_weights_is_refused(folder):
    edit(folder, "adapter_config.json", peft_type="LORA")
    refused(folder, "adapter_config.json")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_broken_links_and_git_lfs_pointers_are_named(folder, file):
    (folder / file).unlink()
    (folder / file).symlink_to("/nowhere/blob")
    refused(folder, f"{folder / file} is a link")
    (folder / file).unlink()
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1\n")
    refused(folder, f"{folder / file} is a git-lfs pointer")


def test_a_pointer_among_tokenizer_files_is_named(tmp_path):
    tokenizer_folder(tmp_path, "text of a tokenizer")
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="tokenizer.json is a git-lfs pointer"):
        load_tokenizer(tmp_path)


def test_the_teacher_does_not_change_with_its_source(folder):
    copy = imported(folder, folder.with_name("copy"))
    before = {name: tensor.clone() for name, tensor in copy.items()}
    zeros = {name: torch.zeros_like(t) for name, t in load_file(folder / "model.safetensors").items()}
    with (folder / "model.safetensors").open("r+b") as file:
        save_file(zeros, folder.with_name("zeros.safetensors"), {"format": "pt"})
        file.write(folder.with_name("zeros.safetensors").read_bytes())
    assert not open_checkpoint(folder)[EMBEDDING].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in open_checkpoint(copy.folder).items())


def test_pickled_weights_are_copied_as_safetensors(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.allow_pickle=true")
    copy = imported(folder, folder.with_name("copy"), allow_pickle=True)
    assert not list(copy.folder.glob("*.bin")) and all(torch.equal(copy[name], weights[name]) for name in weights)


# Weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_when_they_are_read(folder, value):
    change(folder, **{EMBEDDING: load_file(folder / "model.safetensors")[EMBEDDING].index_put_(
        (torch.tensor(7), torch.tensor(3)), torch.tensor(value))})  # fmt: skip
    with pytest.raises(ValueError, match=f"^model.path: {folder}: {EMBEDDING} "):
        imported(folder, folder.with_name("copy"))
    assert not (folder.with_name("copy") / "config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_with_a_tensor_that_is_not_finite_is_never_complete(tmp_path, dtype):
    good = torch.ones(40, 40, dtype=dtype)
    for place in (0, 799, 1599):
        bad = good.clone()
        bad.view(-1)[place] = float("nan")
        with pytest.raises(ValueError, match="^b holds"):
            write_checkpoint(tmp_path, {}, [("a", good), ("b", bad)], 1e9)
        assert not (tmp_path / "config.json").exists() and not (tmp_path / "model.safetensors").exists()
    write_checkpoint(tmp_path, {}, [("a", good), ("n", torch.tensor([2**62]))], 1e9)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_without_a_word_in_the_config_are_refused(folder, dtype):
    change(folder, **{DOWN: load_file(folder / "model.safetensors")[DOWN].to(dtype)})
    refused(folder, DOWN, "unquantised")


def test_missing_and_unknown_tensors_and_wrong_shapes_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    for tensors, name in (
        ({DOWN: None}, DOWN),
        ({"model.layers.0.mlp.extra.weight": torch.ones(3)}, "model.layers.0.mlp.extra.weight"),
        ({DOWN: torch.ones(3, 3)}, DOWN),
        ({"model.layers.4.mlp.down_proj.weight": torch.ones(32, 24)}, "model.layers.4.mlp.down_proj.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "self_attn.q_proj.bias"),
    ):
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        change(folder, **tensors)
        refused(folder, name)


def test_a_bias_that_the_config_does_not_name_is_refused(folder):
    biases = {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(4)}
    change(folder, **biases)
    refused(folder, "self_attn.q_proj.bias")


def test_loading_never_draws_a_weight(folder):
    change(folder, **{DOWN: None})
    with pytest.raises(ValueError, match="missing_keys"):
        load_model(folder, torch.float32, "eager")


# Names that transformers accepts


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_saved_alone_is_read(tmp_path, tied):
    model = tiny_model("llama-tied", dtype=torch.float32, tie_word_embeddings=tied)
    folder = save_tiny(model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    assert_read_as_by_transformers(folder, tmp_path / "copy")


PREDICTION = {
    "as GLM and DeepSeek": ["model.layers.4.eh_proj.weight", "model.layers.4.enorm.weight",
                            "model.layers.4.mlp.up_proj.weight", "model.layers.4.embed_tokens.weight"],
    "as Qwen": ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"],
    "as MiMo": ["model.mtp_layers.0.input_proj.weight"],
    "as Ernie": ["model.mtp_block.0.mlp.up_proj.weight"],
}  # fmt: skip


@pytest.mark.parametrize("names", PREDICTION.values(), ids=PREDICTION)
def test_tensors_of_multi_token_prediction_are_left_out_and_reported(folder, names):
    change(folder, **{name: torch.ones(4, 4) for name in names})
    checkpoint = assert_read_as_by_transformers(folder, folder.with_name("copy"))
    assert not set(names) & set(load_file(checkpoint.folder / "model.safetensors"))
    assert [note for note in checkpoint.notes if f"{len(names)} tensors" in note]


def test_buffers_that_old_versions_stored_are_left_out(folder):
    change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert imported(folder, folder.with_name("copy")).notes == []


# The output matrix


def test_an_equal_output_matrix_is_left_out_where_the_config_ties_it(folder):
    count = open_checkpoint(folder).anatomy.parameters()
    change(folder, **{HEAD: load_file(folder / "model.safetensors")[EMBEDDING].clone()})
    checkpoint = assert_read_as_by_transformers(folder, folder.with_name("copy"))
    assert HEAD not in checkpoint and checkpoint.anatomy.tied and checkpoint.anatomy.parameters() == count


def test_another_output_matrix_is_used_as_transformers_does(folder):
    change(folder, **{HEAD: load_file(folder / "model.safetensors")[EMBEDDING].roll(1, 0).contiguous()})
    checkpoint = assert_read_as_by_transformers(folder, folder.with_name("copy"))
    assert HEAD in checkpoint and not checkpoint.anatomy.tied and checkpoint.config["tie_word_embeddings"] is False
    assert len(checkpoint.notes) == 1


def test_an_output_matrix_alone_is_the_embedding_too(folder):
    change(folder, **{HEAD: load_file(folder / "model.safetensors")[EMBEDDING], EMBEDDING: None})
    assert_read_as_by_transformers(folder, folder.with_name("copy"))


def test_an_absent_output_matrix_is_refused_where_the_config_does_not_tie_it(folder):
    edit(folder, tie_word_embeddings=False)
    refused(folder, HEAD)


@pytest.mark.parametrize(("kind", "tied"), [("gemma2", True), ("llama", False)])
def test_a_config_that_does_not_say_is_tied_as_its_class_is(tmp_path, kind, tied):
    folder = save_tiny(tiny_model(kind, dtype=torch.float32), tmp_path / "model")
    edit(folder, without=("tie_word_embeddings",))
    checkpoint = assert_read_as_by_transformers(folder, tmp_path / "copy")
    assert checkpoint.anatomy.tied is tied and checkpoint.config["tie_word_embeddings"] is tied


# config.json


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


def test_a_config_without_architectures_is_of_its_types_class(folder):
    edit(folder, without=("architectures",))
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


# Static scales


@pytest.mark.parametrize("form", ["intermediate", "own"])
def test_static_scales_do_not_load_into_the_stock_class(tmp_path, form):
    model = tiny_model("gemma2", dtype=torch.float32)
    source = open_checkpoint(save_tiny(model, tmp_path / "m"))
    means = {module: 0.5 + i / 9 for i, module in enumerate(post_norm_modules(source.anatomy))}
    frozen = absorb_post_norms(source.anatomy, source, means)
    folder = tmp_path / "scaled"
    write_checkpoint(folder, with_scales(source.config, source.anatomy), frozen, 1e9)
    expected = logits(load_model(folder, torch.float32, "eager"))
    assert not torch.allclose(expected, logits(model), rtol=0.1)
    if form == "own":
        out = tmp_path / "out"
        chosen = configured("export.form=own", "export.dtype=float32", "export.tolerance=1e-4")
        export.run(chosen, {"initial_student": folder}, out, machine())
        folder = out
        assert torch.allclose(logits(load_model(out, torch.float32, "eager")), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="pruned_gemma2|trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    again = imported(folder, tmp_path / "again")
    assert again.config["model_type"] == "gemma2" and again.config["pruned"]["scales"]


# Tokenizers


def grown(token, special):
    tokenizer = byte_tokenizer(entries=300)
    tokenizer.add_tokens([token], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_beyond_the_vocabulary_that_no_text_yields_is_accepted(special):
    tokenizer = grown("<image_soft_token>", special)
    check_fits(tokenizer, len(tokenizer) - 1)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused():
    tokenizer = byte_tokenizer(entries=300)
    with pytest.raises(ValueError, match=f"has id {len(tokenizer) - 3}"):
        check_fits(tokenizer, len(tokenizer) - 3)


def test_an_end_token_beyond_the_vocabulary_is_refused():
    tokenizer = grown("<end>", True)
    tokenizer.eos_token = "<end>"
    with pytest.raises(ValueError, match="eos_token"):
        check_fits(tokenizer, len(tokenizer) - 1)


def test_the_ids_of_two_tokenizers_are_compared(tmp_path):
    one = byte_tokenizer(entries=300)
    assert difference(one, byte_tokenizer(entries=300), 300) is None
    assert difference(one, grown("<more>", True), len(one)) is None
    assert difference(one, byte_tokenizer(entries=299), 300)
    one.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["model"]["merges"] = fields["model"]["merges"][::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert difference(one, load_tokenizer(tmp_path), 300)


# generation_config.json

GENERATION = {"stop_strings": ["User:"], "return_dict_in_generate": True, "penalty_alpha": 0.6, "top_k": 4}
WRONG = [{"num_beams": 4, "temperature": -1.0}, {"cache_implementation": "no such cache"}, {"max_new_tokens": "many"}]


def test_the_export_does_not_depend_on_generation_config(folder):
    edit(folder, "generation_config.json", **GENERATION)
    copy = imported(folder, folder.with_name("copy")).folder
    chosen = configured(f"model.path={folder}", "export.dtype=float32", "export.tolerance=1e-4")
    export.run(chosen, {"initial_student": copy}, folder.with_name("out"), machine())
    assert generation_of(folder.with_name("out")) == generation_of(folder)


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: next(iter(fields)))
def test_a_model_loads_whatever_its_generation_config_says(folder, fields):
    edit(folder, "generation_config.json", **fields)
    copy = imported(folder, folder.with_name("copy")).folder
    assert load_model(copy, torch.float32, "eager").can_generate()


def test_generation_config_names_the_export_and_not_the_teacher(folder):
    chosen = configured(f"model.path={folder}")
    before = teacher.settings(chosen), export.settings(chosen)
    edit(folder, "generation_config.json", temperature=0.5)
    assert teacher.settings(chosen) == before[0] and export.settings(chosen) != before[1]
    edit(folder, rms_norm_eps=1e-3)
    assert teacher.settings(chosen) != before[0]


def test_a_damaged_generation_config_is_left_out_and_reported(folder):
    (folder / "generation_config.json").write_text("{")
    checkpoint = imported(folder, folder.with_name("copy"))
    assert not (checkpoint.folder / "generation_config.json").exists()
    assert any("generation_config.json" in note for note in checkpoint.notes)


def test_pangu_pro_moe_is_refused_by_its_router_before_any_work(tmp_path):
    world = make_world(tmp_path)
    path = world / "model" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "PanguProMoE", "architectures": ["PanguProMoEForCausalLM"]}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="PanguProMoE.* one expert of every group"):
        runner.run(configured(*settings(world)), "a test")
