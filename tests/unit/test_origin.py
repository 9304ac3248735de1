"""Where a teacher comes from: folders, openPangu, GGUF files whole and in parts, packages; what is refused."""

import io
import json
import sys
from fnmatch import fnmatch

import huggingface_hub
import numpy as np
import pytest
import torch
from tqdm.auto import tqdm

from pipeline.runtime.checkpoint import load_model, load_tokenizer, open_checkpoint, write_checkpoint
from pipeline.runtime.model_source import Origin, adopt, locate
from pipeline.stages.build import absorb_norms
from pipeline.stages.choose import shape
from pipeline.stages.deliver import export
from pipeline.stages.prepare import tokens as text
from tests.tiny import save_tiny, tensors_of, tiny_model, tokens
from tests.tiny_text import configured


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def test_openpangu_is_read_as_the_llama_with_biases_that_it_is(tmp_path):
    model = tiny_model("llama-biases", mlp_bias=False, dtype=torch.float32)
    folder = save_tiny(model, tmp_path / "pangu")
    config = json.loads((folder / "config.json").read_text())
    for field in ("attention_bias", "mlp_bias"):
        config.pop(field)
    config |= {"model_type": "PanguEmbedded", "architectures": ["PanguEmbeddedForCausalLM"], "bias": True}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    adopt(locate(str(folder)), tmp_path / "teacher")
    adopted = load_model(tmp_path / "teacher", torch.float32, "eager")
    assert type(adopted).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(adopted), logits(model))
    assert "self_attn.o_proj.bias" in open_checkpoint(tmp_path / "teacher").anatomy.optional


@pytest.mark.parametrize(("kind", "said"), [("gemma2", {}), ("gemma3_text", {"sliding_window_pattern": 3})])
def test_which_layers_see_a_window_is_written_down_where_a_folder_leaves_it_to_its_class(kind, said, tmp_path):
    """Else a student that lost a layer would count windows from its own first layer."""
    folder = save_tiny(tiny_model(kind, dtype=torch.float32), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config | said))
    adopt(locate(str(folder)), tmp_path / "teacher")
    source, model = open_checkpoint(tmp_path / "teacher"), load_model(tmp_path / "teacher", torch.float32, "auto")
    assert list(source.anatomy.layer_types) == source.config["layer_types"] == model.config.layer_types
    assert source.config["layer_types"] == load_model(folder, torch.float32, "auto").config.layer_types
    assert len(set(source.anatomy.layer_types)) == 2


TOKENIZER = """
from transformers import PreTrainedTokenizer

class PanguTokenizer(PreTrainedTokenizer):
    vocab_size = 96
    def get_vocab(self): return {chr(32 + place): place for place in range(96)}
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return ord(token) - 32
    def _convert_id_to_token(self, index): return chr(32 + index)
    def save_vocabulary(self, save_directory, filename_prefix=None): return ()
"""


def test_a_tokenizer_of_its_own_code_is_run_where_that_is_trusted_and_handed_on(tmp_path):
    folder = save_tiny(tiny_model("llama", dtype=torch.float32), tmp_path / "pangu")
    named = {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}
    told = {"tokenizer_class": "PanguTokenizer", "auto_map": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "tokenization_openpangu.py").write_text(TOKENIZER)
    adopt(locate(str(folder)), tmp_path / "teacher", trusted=True)
    with pytest.raises(ValueError, match="^model.trust_remote_code is false, and the tokenizer .* is code of its own"):
        load_tokenizer(tmp_path / "teacher")
    model = open_checkpoint(tmp_path / "teacher")
    write_checkpoint(tmp_path / "student", model.config, model.items(), 1 << 30, tmp_path / "teacher")
    for place in ("teacher", "student"):
        assert load_tokenizer(tmp_path / place, trust_remote_code=True)("A!")["input_ids"] == [33, 1]


@pytest.mark.parametrize("pickled", [False, True])
def test_a_hub_model_is_fetched_with_its_code_and_pickles_only_where_allowed(pickled, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("somebody/pangu", allow_pickle=pickled).folder == tmp_path
    there = ("model.safetensors", "tokenization_openpangu.py", "pytorch_model.bin")
    fetched = [name for name in there if any(fnmatch(name, pattern) for pattern in asked)]
    assert fetched == list(there[: 2 + pickled])


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize(
    ("stage", "family", "given", "fault"),
    [
        (shape, "llama", "shape.hidden=33", "shape.hidden is 33, outside"),
        (export, "gemma2", "export.form=decilm", "export.form is decilm.*gemma2"),
        (text, "llama", "data.sequence_length=4096", "data.sequence_length is 4096, more than the model's"),
        (absorb_norms, "llama", "reinit.absorb=fitted", "reinit.absorb=fitted puts scales"),
    ],
)
def test_what_a_folder_is_checked_for_before_any_work_a_hub_id_is_too(
    stage, family, given, fault, hub, tmp_path, monkeypatch
):
    folder = save_tiny(tiny_model(family, dtype=torch.float32), tmp_path / "m")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: folder)
    path = f"somebody/{stage.STAGE.name}" if hub else folder
    with pytest.raises(ValueError, match=fault):
        stage.check(configured(f"model.path={path}", given))


def test_a_folder_is_adopted_by_links_and_never_changed(tmp_path):
    folder = save_tiny(tiny_model("qwen3", dtype=torch.float32), tmp_path / "m")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adopt(locate(str(folder)), tmp_path / "teacher")
    assert (tmp_path / "teacher" / "model.safetensors").is_symlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def write_gguf(path, model):
    """Write a tiny tied Llama with a byte-level tokenizer as an unquantised GGUF file."""
    import gguf

    config, state = model.config, tensors_of(model)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "</s>", "!!", *(chr(33 + i) for i in range(92))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * 93)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
        name = name.replace("model.norm", "output_norm")
        if "attn_q." in name or "attn_k." in name:  # GGUF keeps the two halves of a rotary head interleaved
            tensor = tensor.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_model("llama-tied", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # the teacher is kept in bfloat16
    write_gguf(folder / "tiny.gguf", model)
    return folder / "tiny.gguf", model


def test_a_gguf_file_gives_the_model_it_was_made_of(gguf_model, tmp_path):
    path, model = gguf_model
    adopt(locate(str(path)), tmp_path / "teacher")
    read = open_checkpoint(tmp_path / "teacher")
    assert "quantization_config" not in read.config
    for name, tensor in tensors_of(model).items():
        assert torch.equal(read[name].float(), tensor), name


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_gguf_is_unpacked_under_a_bar_on_a_terminal_and_silently_elsewhere(gguf_model, tmp_path, monkeypatch):
    said = {kind: kind() for kind in (Terminal, io.StringIO)}
    for kind, stderr in said.items():
        monkeypatch.setattr(sys, "stderr", stderr)
        adopt(locate(str(gguf_model[0])), tmp_path / kind.__name__)
    assert "GGUF tensors" in said[Terminal].getvalue() and said[io.StringIO].getvalue() == ""
    list(tqdm([1], desc="afterwards"))
    assert "afterwards" in said[io.StringIO].getvalue(), "bars elsewhere are what they were"


def test_a_gguf_in_the_parts_of_installed_packages_is_put_together(gguf_model, tmp_path, monkeypatch):
    path, model = gguf_model
    whole = path.read_bytes()
    for number, piece in enumerate((whole[: len(whole) // 2], whole[len(whole) // 2 :])):
        package = tmp_path / f"tinymodel_part{number + 1}"
        (package / "data").mkdir(parents=True)
        (package / "data" / f"tiny.gguf.part0{number}").write_bytes(piece)
    (tmp_path / "tinymodel").mkdir()
    (tmp_path / "tinymodel" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    adopt(locate("package:tinymodel"), tmp_path / "teacher")
    read = open_checkpoint(tmp_path / "teacher")
    assert all(torch.equal(read[name].float(), tensor) for name, tensor in tensors_of(model).items())
    assert not list((tmp_path / "teacher").glob("*.gguf"))


def test_of_damaged_parts_the_error_names_what_was_given(tmp_path):
    parts = tuple(tmp_path / f"tiny.gguf.part0{number}" for number in range(2))
    for part in parts:
        part.write_bytes(b"GGUF" + b"\0" * 32)
    with pytest.raises(ValueError, match=f"^{parts[0]} and {parts[1]} cannot be read as GGUF"):
        adopt(Origin(None, parts), tmp_path / "teacher")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("package:not_a_package", "package not_a_package is not installed"),
        ("nowhere/at/all/deep", "does not exist"),
        ("{tmp}/empty", "has no config.json"),
        ("{tmp}/notes.txt", "is a file but not a .gguf"),
        ("{tmp}/broken.gguf", None),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(path, told, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    path = path.format(tmp=tmp_path)
    if told is None:
        with pytest.raises(ValueError, match="cannot be read as GGUF"):
            adopt(locate(path), tmp_path / "t")
    else:
        with pytest.raises(ValueError, match=told):
            locate(path)
