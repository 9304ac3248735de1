"""Model folders as they are found: what is read is what transformers reads, or refused by name before any work."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.model.hf_config import with_scales
from pipeline.prune.surgery.reinit import absorb_post_norms, post_norm_modules
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model, load_tokenizer
from pipeline.runtime.model_source import inspect, locate
from pipeline.stages.deliver import export
from tests.model_folders import assert_read_as_by_transformers, change, edit, logits, refused
from tests.students import imported, machine
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import configured
from tests.tiny_tokenizers import tokenizer_folder

EMBEDDING, HEAD, DOWN = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Return a sound tied Llama in a folder."""
    return save_tiny(tiny_model("llama-tied", dtype=torch.float32), tmp_path / "model")


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


@pytest.mark.parametrize("index", ["other.index.json", "pytorch_model.bin.index.json"])
def test_an_index_of_another_set_is_not_read(folder, index):
    (folder / index).write_text('{"weight_map": {"a": "../')
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


def test_pickles_of_the_format_before_archives_are_read(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    copy = imported(folder, folder.with_name("copy"), allow_pickle=True)
    assert all(torch.equal(copy[name], weights[name]) for name in weights)


TENSORS = {
    "coo": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", TENSORS)
def test_pickled_tensors_that_are_not_dense_are_refused(folder, kind, old):
    weights = load_file(folder / "model.safetensors")
    weights[DOWN] = TENSORS[kind](weights[DOWN])
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"^model.path: .*pytorch_model.bin: {DOWN} is "):
        inspect(locate(str(folder), allow_pickle=True), "model.path")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"cos\nsystem\n", b"\x80\x02\x8a\x0al"])
def test_damaged_pickles_are_refused(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"^model.path: .*pytorch_model.bin [^\n]*$"):
        inspect(locate(str(folder), allow_pickle=True), "model.path")


@pytest.mark.parametrize(
    ("make", "file"),
    [
        *((os.mkfifo, file) for file in ("part.safetensors", "model.safetensors", INDEX, "config.json")),
        *((os.mkdir, file) for file in ("part.safetensors", "model.safetensors", "config.json")),
    ],
)
def test_a_path_that_is_no_regular_file_is_refused_before_it_is_opened(folder, make, file):
    if file.endswith("safetensors"):
        (folder / "model.safetensors").unlink()
    (folder / file).unlink(missing_ok=True)
    make(folder / file)
    refused(folder, file)


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


def test_two_stored_names_of_one_tensor_are_refused(tmp_path):
    folder = save_tiny(tiny_model("gpt_neox", dtype=torch.float32), tmp_path / "model")
    change(folder, **{HEAD: load_file(folder / "model.safetensors")["embed_out.weight"] + 1})
    refused(folder, "embed_out.weight", HEAD)


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
