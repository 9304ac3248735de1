"""Targets: files of a model folder, and a GGUF."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.data.encoding import frame
from pipeline.data.packing import Domain, build
from pipeline.data.sources import Piece
from pipeline.runtime.checkpoint import Checkpoint
from pipeline.runtime.model_loader import load_model, load_tokenizer
from pipeline.runtime.tokenizer_check import check_fits
from pipeline.runtime.weight_files import INDEX
from tests.fuzz import Target
from tests.fuzz.values import as_json, damaged, mutated, mutated_text
from tests.gguf_files import write_gguf
from tests.students import imported, student
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import DOCUMENTS, byte_tokenizer

Contents = dict[str, bytes]


class Folder:
    """A folder whose files each case replaces, and their sound contents by name."""

    def __init__(self, place: Path):
        self.place, self.copy = place, place.with_name("copy")
        self.sound = {path.name: path.read_bytes() for path in place.iterdir()}

    def fill(self, contents: Contents) -> None:
        """Replace all files, none of them in place: an earlier case may have one open."""
        for path in self.place.iterdir():
            path.unlink()
        for name, content in contents.items():
            (self.place / name).write_bytes(content)

    def read(self, contents: Contents) -> Checkpoint:
        """Import the folder with some files replaced."""
        self.fill(self.sound | contents)
        shutil.rmtree(self.copy, ignore_errors=True)
        return imported(self.place, self.copy)

    def verify(self, contents: Contents, checkpoint: Checkpoint) -> None:
        """Check that the copy loads with every weight as safetensors reads it."""
        weights = {}
        for path in self.place.glob("*.safetensors"):
            weights |= load_file(path)
        loaded = dict(load_model(self.copy, torch.float32, "eager").named_parameters())
        assert loaded.keys() == checkpoint.keys()
        names = {name.removeprefix("model."): name for name in loaded}
        for name, tensor in weights.items():
            own = names.get(name.removeprefix("model."))
            assert own is None or torch.equal(loaded[own], tensor.float()), name

    def target(self, cases: st.SearchStrategy[Contents]) -> Target:
        return Target(cases, self.read, self.verify)


def _model(folder: Path) -> Folder:
    return Folder(save_tiny(tiny_model("llama-tied", dtype=torch.float32), folder / "model"))


def config(folder: Path) -> Target:
    model = _model(folder)
    texts = mutated_text(json.loads(model.sound["config.json"]))
    return model.target(texts.map(lambda text: {"config.json": text}))


def config_of_layers(folder: Path) -> Target:
    """A config.json with fields of single layers, layers that read others' keys, layer embeddings and experts."""
    model = Folder(save_tiny(tiny_model("gemma4_text-all", dtype=torch.float32), folder / "model"))
    texts = mutated_text(json.loads(model.sound["config.json"]))

    def verify(contents: Contents, checkpoint: Checkpoint) -> None:
        loaded = load_model(model.copy, torch.float32, "eager").state_dict()
        assert all(torch.equal(loaded[name], checkpoint[name]) for name in checkpoint)

    return Target(texts.map(lambda text: {"config.json": text}), model.read, verify)


def config_of_a_student(folder: Path) -> Target:
    pruned = Folder(student("llama", folder / "s", dtype=torch.float32).folder)
    fields = json.loads(pruned.sound["config.json"])
    whole = mutated(fields)
    inner = mutated(fields["pruned"]).map(lambda value: fields | {"pruned": value})
    return pruned.target(st.one_of(whole, inner).map(lambda value: {"config.json": as_json(value)}))


def safetensors_header(folder: Path) -> Target:
    model = _model(folder)
    content = model.sound["model.safetensors"]
    length = int.from_bytes(content[:8], "little")

    def stored(header: Any) -> bytes:
        text = as_json(header)
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    headers = mutated(json.loads(content[8 : 8 + length])).map(stored)
    return model.target(st.one_of(headers, damaged(content, 8 + length)).map(lambda each: {"model.safetensors": each}))


def index(folder: Path) -> Target:
    model = _model(folder)
    content = model.sound["model.safetensors"]
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    names = [name for name in header if name != "__metadata__"]
    value = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    return model.target(mutated_text(value).map(lambda text: {INDEX: text}))


def gguf_header(folder: Path) -> Target:
    place = folder / "gguf"
    place.mkdir()
    write_gguf(place / "tiny.gguf", tiny_model("llama-tied", dtype=torch.float32))
    source = Folder(place)
    content = source.sound["tiny.gguf"]

    def read(case: bytes) -> Checkpoint:
        source.fill({"tiny.gguf": case})
        shutil.rmtree(source.copy, ignore_errors=True)
        return imported(place / "tiny.gguf", source.copy)

    def verify(case: bytes, copy: Checkpoint) -> None:
        loaded = dict(load_model(copy.folder, torch.bfloat16, "eager").named_parameters())
        assert all(torch.equal(loaded[name], copy[name]) for name in copy) and loaded.keys() == copy.keys()

    return Target(damaged(content, int(content.index(b"output_norm.weight")) + 64), read, verify)


def tokenizer(folder: Path) -> Target:
    """The files of a tokenizer, read and then run over text as the stages `teacher` and `tokens` do."""
    place, vocabulary = folder / "tokenizer", 300
    byte_tokenizer(bos=True).save_pretrained(place)
    source = Folder(place)
    names = [name for name in ("tokenizer.json", "tokenizer_config.json") if name in source.sound]
    cases = st.one_of(
        *(mutated_text(json.loads(source.sound[name])).map(lambda text, name=name: {name: text}) for name in names)
    )

    def read(case: Contents) -> np.ndarray:
        source.fill(source.sound | case)
        loaded = load_tokenizer(place)
        check_fits(loaded, vocabulary)
        shutil.rmtree(folder / "rows", ignore_errors=True)
        pieces = [Piece(text, True) for text in DOCUMENTS]
        build(
            folder / "rows", [Domain("texts", pieces, None)], loaded, frame(loaded), 16, vocabulary, 1 << 20,
            lambda items, total, label: items,
        )  # fmt: skip
        return np.concatenate([np.load(path) for path in sorted((folder / "rows").glob("*.npy"))])

    def verify(case: Contents, rows: np.ndarray) -> None:
        assert rows.size and rows.min() >= 0 and rows.max() < vocabulary

    return Target(cases, read, verify)
