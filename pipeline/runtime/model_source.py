"""Where a model comes from: a folder, a GGUF file (also in parts, also inside an installed package), a hub id."""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pipeline.model.families import FAMILIES
from pipeline.model.hf_config import PER_LAYER_LISTS
from pipeline.runtime.checkpoint import CARRIED, Checkpoint, open_checkpoint, write_checkpoint
from pipeline.runtime.described import read_config, read_mapping
from pipeline.runtime.hashing import fingerprint
from pipeline.runtime.log import bars_on_terminals_only

TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Origin:
    """A located model: a model folder, or the parts of one GGUF file in order."""

    folder: Path | None
    parts: tuple[Path, ...]

    def digest(self) -> str:
        """Give a cheap digest of the files."""
        return fingerprint(self.folder) if self.folder else "-".join(fingerprint(part) for part in self.parts)

    def bytes(self) -> int:
        files = self.parts or tuple(p for p in self.folder.iterdir() if p.is_file())
        return sum(path.stat().st_size for path in files)


def locate(path: str, field: str = "model.path", allow_pickle: bool = False) -> Origin:
    """Find the model that a setting names; ValueError, naming the setting, if there is none.

    Of a hub id what a model needs is fetched, its own code with it (that runs only where it is trusted), and pickled
    weights only where they are allowed.
    """
    if path.startswith("package:"):
        return Origin(None, _packaged(path.removeprefix("package:"), field))
    place = Path(path).expanduser()
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise ValueError(f"{field}: {place} has no config.json; give a model folder, a .gguf file or a hub id")
        return Origin(place, ())
    if place.is_file():
        if ".gguf" not in place.name:
            raise ValueError(f"{field}: {place} is a file but not a .gguf; give a model folder or a .gguf file")
        return Origin(None, (place,))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
        return Origin(_fetched(path, field, allow_pickle), ())
    raise ValueError(f"{field}: {path} does not exist; give a model folder, a .gguf file, a hub id or package:NAME")


def model_folder(path: str, allow_pickle: bool) -> Path | None:
    """The model folder that model.path names, for checks before any work; None for a GGUF, whose config is inside."""
    return locate(path, allow_pickle=allow_pickle).folder


def inspect(folder: Path, field: str, allow_pickle: bool) -> Checkpoint:
    """Open the model folder that a setting names, its weights held against its config and table.

    ValueError, naming the setting, where it is damaged or incomplete, or of no known family.
    """
    try:
        checkpoint = open_checkpoint(folder, allow_pickle)
        checkpoint.check()
    except ValueError as fault:
        raise ValueError(f"{field}: {fault}") from fault
    return checkpoint


def _packaged(name: str, field: str) -> tuple[Path, ...]:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{field}: package {name} is not installed; `make setup` installs the demo's model")
    home = Path(spec.submodule_search_locations[0])
    siblings = [home, *sorted(home.parent.glob(f"{name}_part*"))]
    files = (path for folder in siblings for path in folder.rglob("*.gguf*") if path.is_file())
    found = tuple(sorted(files, key=lambda path: path.name))
    whole = tuple(path for path in found if path.suffix == ".gguf")
    if len(whole) > 1 or not found:
        raise ValueError(f"{field}: package {name} holds {len(whole)} GGUF files; give the path of one of them")
    return whole or found


@cache
def _fetched(name: str, field: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.model", "merges.txt", "*.jinja", "vocab*", "*.py"]
    wanted += ["*.bin"] if allow_pickle else []
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        reason = str(fault).splitlines()[0]
        raise ValueError(f"{field}: {name} is no folder here and no reachable hub id ({reason:.160})") from None


def adopt(origin: Origin, folder: Path, trusted: bool = False) -> None:
    """Make `folder` a model folder of a located model: links to its own files, or the weights of its GGUF, unpacked.

    Code of its own (`*.py`, and the `auto_map` that names it) comes along only where it is `trusted`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if origin.folder is not None:
        _link(origin.folder, folder, trusted)
    else:
        _unpack(origin.parts, folder)


def _link(origin: Path, folder: Path, trusted: bool) -> None:
    for pattern in (*CARRIED, "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py"):
        for path in origin.glob(pattern):
            if path.suffix == ".py" and not trusted:
                continue
            link = folder / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    config = read_config(origin)
    written = {"config.json": config | _by_layer(config)}
    if not trusted and (origin / TOKENIZER_CONFIG).is_file():
        written[TOKENIZER_CONFIG] = read_mapping(origin / TOKENIZER_CONFIG)
    for name, fields in written.items():
        kept = fields if trusted else {field: value for field, value in fields.items() if field != "auto_map"}
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _by_layer(config: dict[str, Any]) -> dict[str, list]:
    """Give what the class says of each layer where the config does not (Gemma 2 and 3: which see a window only).

    The class counts layers from the first, so a student without some of them has to say it.
    """
    if config.get("model_type") not in FAMILIES:  # refused where its weights are read
        return {}
    whole = AutoConfig.for_model(**config)
    said = {field: getattr(whole, field, None) for field in PER_LAYER_LISTS if config.get(field) is None}
    return {field: value for field, value in said.items() if isinstance(value, list)}


def _unpack(parts: tuple[Path, ...], folder: Path) -> None:
    """Write the weights of a GGUF as safetensors in bfloat16, without the quantisation they were stored in."""
    file = parts[0]
    if len(parts) > 1:
        file = folder / "whole.gguf"
        with file.open("wb") as whole:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, whole)
    asked = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **asked)
        with bars_on_terminals_only():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **asked
            )
    except (OSError, ValueError, KeyError) as fault:
        given = " and ".join(map(str, parts))  # not what they were joined to
        raise ValueError(f"{given} cannot be read as GGUF ({str(fault).splitlines()[0]:.160})") from fault
    config = model.config.to_dict()
    for field in ("quantization_config", "_name_or_path"):
        config.pop(field, None)
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_checkpoint(folder, config, _stored(model), 5e9)
    if len(parts) > 1:
        file.unlink()


def _stored(model) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        yield name, tensor.to(torch.bfloat16)
