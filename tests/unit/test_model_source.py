"""Sources of a model: folders, openPangu, GGUF files whole and in parts, packages; what is refused."""

import io
import json
import sys
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from tqdm.auto import tqdm

from pipeline.model.hub import hub_reason
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model, load_tokenizer
from pipeline.runtime.model_source import ModelSource, import_model, locate
from pipeline.stages.build import absorb_norms
from pipeline.stages.choose import shape
from pipeline.stages.deliver import export
from pipeline.stages.prepare import tokens as text
from tests.gguf_files import write_gguf
from tests.students import imported
from tests.tiny import save_tiny, tensors_of, tiny_model, tokens
from tests.tiny_text import configured
from tests.tiny_tokenizers import tokenizer_folder


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def test_openpangu_is_read_as_a_llama_with_biases(tmp_path):
    model = tiny_model("llama-biases", mlp_bias=False, dtype=torch.float32)
    folder = save_tiny(model, tmp_path / "pangu")
    config = json.loads((folder / "config.json").read_text())
    for field in ("attention_bias", "mlp_bias"):
        config.pop(field)
    config |= {"model_type": "PanguEmbedded", "architectures": ["PanguEmbeddedForCausalLM"], "bias": True}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    imported(folder, tmp_path / "teacher")
    read = load_model(tmp_path / "teacher", torch.float32, "eager")
    assert type(read).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(read), logits(model))
    assert "self_attn.o_proj.bias" in open_checkpoint(tmp_path / "teacher").anatomy.optional


@pytest.mark.parametrize(("kind", "fields"), [("gemma2", {}), ("gemma3_text", {"sliding_window_pattern": 3})])
def test_layer_types_that_a_folder_leaves_to_its_class_are_written_down(kind, fields, tmp_path):
    """A student that lost a layer would otherwise count windows from its own first layer."""
    folder = save_tiny(tiny_model(kind, dtype=torch.float32), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config | fields))
    imported(folder, tmp_path / "teacher")
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


def test_a_tokenizer_with_code_of_its_own_runs_where_trusted_and_is_carried_to_the_student(tmp_path):
    folder = save_tiny(tiny_model("llama", dtype=torch.float32), tmp_path / "pangu")
    named = {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}
    fields = {"tokenizer_class": "PanguTokenizer", "auto_map": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "tokenization_openpangu.py").write_text(TOKENIZER)
    imported(folder, tmp_path / "teacher", trusted=True)
    with pytest.raises(ValueError, match="^model.trust_remote_code is false, and the tokenizer .* is code of its own"):
        load_tokenizer(tmp_path / "teacher")
    model = open_checkpoint(tmp_path / "teacher")
    write_checkpoint(tmp_path / "student", model.config, model.items(), 1 << 30, tmp_path / "teacher")
    for place in ("teacher", "student"):
        assert load_tokenizer(tmp_path / place, trust_remote_code=True)("A!")["input_ids"] == [33, 1]


@pytest.mark.parametrize("pickled", [False, True])
def test_a_hub_model_is_fetched_with_its_code_and_pickles_only_where_allowed(pickled, tmp_path, monkeypatch):
    patterns = []

    def snapshot(name, allow_patterns):
        patterns.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("somebody/pangu", allow_pickle=pickled).folder == tmp_path
    there = ("model.safetensors", "tokenization_openpangu.py", "pytorch_model.bin")
    fetched = [name for name in there if any(fnmatch(name, pattern) for pattern in patterns)]
    assert fetched == list(there[: 2 + pickled])


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize(
    ("stage", "family", "given", "fault"),
    [
        (shape, "llama", "shape.hidden=33", "shape.hidden is 33, outside"),
        (export, "gemma2", "export.form=decilm", "export.form.*decilm"),
        (text, "llama", "data.sequence_length=4096", "data.sequence_length is 4096, more than the model's"),
        (absorb_norms, "llama", "reinit.absorb=fitted", "^reinit.absorb.*fitted"),
    ],
)
def test_a_hub_id_is_checked_before_any_work_as_a_folder_is(stage, family, given, fault, hub, tmp_path, monkeypatch):
    folder = save_tiny(tiny_model(family, dtype=torch.float32), tmp_path / "m")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: folder)
    path = f"somebody/{stage.STAGE.name}" if hub else folder
    with pytest.raises(ValueError, match=fault):
        stage.check(configured(f"model.path={path}", given))


def test_a_folder_is_copied_and_never_changed(tmp_path):
    folder = save_tiny(tiny_model("qwen3", dtype=torch.float32), tmp_path / "m")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    imported(folder, tmp_path / "teacher")
    assert not any(path.is_symlink() for path in (tmp_path / "teacher").iterdir())
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == before["model.safetensors"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_additional_chat_templates_are_carried_and_part_of_the_digest(tmp_path):
    folder = save_tiny(tiny_model("llama", dtype=torch.float32), tmp_path / "m")
    tokenizer_folder(folder, "text of a tokenizer")
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    named = folder / "additional_chat_templates" / "tools.jinja"
    named.write_text("{{ tools }}")
    before = locate(str(folder)).digest()
    imported(folder, tmp_path / "teacher")
    found = load_tokenizer(tmp_path / "teacher").chat_template
    assert found == load_tokenizer(folder).chat_template == {"default": "{{ messages }}", "tools": "{{ tools }}"}
    named.write_text("{{ tool }}")
    assert locate(str(folder)).digest() != before


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_model("llama-tied", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # the teacher is kept in bfloat16
    write_gguf(folder / "tiny.gguf", model)
    return folder / "tiny.gguf", model


def test_a_gguf_file_gives_the_model_that_was_written(gguf_model, tmp_path):
    path, model = gguf_model
    imported(path, tmp_path / "teacher")
    read = open_checkpoint(tmp_path / "teacher")
    assert "quantization_config" not in read.config
    for name, tensor in tensors_of(model).items():
        assert torch.equal(read[name].float(), tensor), name


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_gguf_is_unpacked_with_a_progress_bar_on_a_terminal_only(gguf_model, tmp_path, monkeypatch):
    streams = {kind: kind() for kind in (Terminal, io.StringIO)}
    for kind, stderr in streams.items():
        monkeypatch.setattr(sys, "stderr", stderr)
        imported(gguf_model[0], tmp_path / kind.__name__)
    assert "GGUF tensors" in streams[Terminal].getvalue() and streams[io.StringIO].getvalue() == ""
    list(tqdm([1], desc="afterwards"))
    assert "afterwards" in streams[io.StringIO].getvalue(), "other bars are unchanged"


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
    imported("package:tinymodel", tmp_path / "teacher")
    read = open_checkpoint(tmp_path / "teacher")
    assert all(torch.equal(read[name].float(), tensor) for name, tensor in tensors_of(model).items())
    assert not list((tmp_path / "teacher").glob("*.gguf"))


def test_an_error_in_damaged_parts_names_the_parts(tmp_path):
    parts = tuple(tmp_path / f"tiny.gguf.part0{number}" for number in range(2))
    for part in parts:
        part.write_bytes(b"GGUF" + b"\0" * 32)
    with pytest.raises(ValueError, match=f"^model.path: {parts[0]} and {parts[1]} cannot be read as GGUF"):
        import_model(ModelSource(None, parts), tmp_path / "teacher", "model.path", 1e9, False)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("package:not_a_package", "package not_a_package is not installed"),
        ("package:nosuch.b.c", "package nosuch.b.c is not installed"),
        ("package:__main__", "package __main__ is not installed"),
        ("package:..", r"'\.\.' is no name of a package"),
        ("package:", "'' is no name of a package"),
        ("nowhere/at/all/deep", "does not exist"),
        ("~nosuch/x", "~nosuch/x cannot be read"),
        ("x" * 305, "too long"),
        ("{tmp}/empty", "has no config.json"),
        ("{tmp}/notes.txt", "is a file but not a .gguf"),
        ("{tmp}/broken.gguf", None),
    ],
)
def test_paths_without_a_model_are_refused_in_one_line(path, fault, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    path = path.format(tmp=tmp_path)
    if fault is None:
        with pytest.raises(ValueError, match="cannot be read as GGUF"):
            imported(path, tmp_path / "t")
    else:
        with pytest.raises(ValueError, match=f"^model.start: [^\n]*{fault}[^\n]*; [^\n]+$"):
            locate(path, "model.start")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE"),
        (errors.GatedRepoError, "hf auth login"),
        (errors.RepositoryNotFoundError, "hf auth login"),
        (ConnectionError, "HF_ENDPOINT"),
    ],
)
def test_a_fault_of_the_hub_says_what_to_do(kind, said):
    inner = kind.__new__(kind)  # its constructor wants a response of the hub
    outer = OSError("Got: ConnectError: [Errno -2]\nName or service not known")
    outer.__cause__ = inner
    assert said in hub_reason(outer) and hub_reason(outer) == hub_reason(inner)
    assert hub_reason(KeyError("a\nb")) == "'a\\nb'"
