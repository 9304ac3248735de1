"""Where a model comes from: a folder, a GGUF file (also in parts, also inside an installed package), a hub id."""

import importlib.util
import json
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from pipeline.model.hub import hub_reason
from pipeline.runtime.checkpoint import Checkpoint, open_checkpoint
from pipeline.runtime.checkpoint_writer import GENERATION, carried, write_checkpoint, write_wrapper_parts
from pipeline.runtime.described import read_mapping
from pipeline.runtime.disk import need_space
from pipeline.runtime.gguf_model import check_parts, unpack
from pipeline.runtime.hashing import digest, fingerprint
from pipeline.runtime.weight_files import weight_files
from pipeline.runtime.wrapper import FOLDER

TOKENIZER_CONFIG = "tokenizer_config.json"
CODE = "*.py"
WAYS = "give a model folder, a .gguf file or a hub id"
PART = re.compile(r"(.+-)(\d{5})-of-(\d{5})\.gguf")  # as a GGUF is split by llama.cpp's tools


@dataclass(frozen=True)
class ModelSource:
    """A located model: a model folder, or a GGUF file, its parts or pieces in order."""

    folder: Path | None
    parts: tuple[Path, ...]
    allow_pickle: bool = False

    def digest(self) -> str:
        """Return the digest of the files that determine the model; generation_config.json is not one of them."""
        if self.folder is None:
            return "-".join(fingerprint(part) for part in self.parts)
        names = carried(self.folder) | {path.name for path in self.folder.glob(CODE) if path.is_file()}
        names |= {path.name for path in weight_files(self.folder, self.allow_pickle)} | {"config.json"}
        names |= {f"{FOLDER}/{path.name}" for path in (self.folder / FOLDER).glob("*")}
        return digest({name: fingerprint(self.folder / name) for name in sorted(names - {GENERATION})})

    def bytes(self) -> int:
        """Return the size of the files."""
        folder = self.folder
        inside = () if folder is None else tuple(path for path in folder.iterdir() if path.is_file())
        files = self.parts or inside
        return sum(path.stat().st_size for path in files)


def locate(path: str, field: str = "model.path", allow_pickle: bool = False) -> ModelSource:
    """Find the model that a setting names; ValueError, naming the setting, if there is none.

    From the hub, what a model needs is fetched, its own code with it (which runs only if it is trusted), and pickled
    weights only if they are allowed.
    """
    if path.startswith("package:"):
        return ModelSource(None, _packaged(path.removeprefix("package:"), field))
    try:
        place = Path(path).expanduser()
        folder, file = place.is_dir(), place.is_file()
    except (RuntimeError, OSError) as fault:  # the home of an unknown user; a name that no file can have
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise ValueError(f"{field}: {path:.80} cannot be read ({reason}); {WAYS}, or package:NAME") from None
    if folder:
        if not (place / "config.json").exists() and not (place / "config.json").is_symlink():
            raise ValueError(f"{field}: {place} has no config.json; {WAYS}")
        return ModelSource(place, (), allow_pickle)
    if file:
        if ".gguf" not in place.name:
            raise ValueError(f"{field}: {place} is a file but not a .gguf; give a model folder or a .gguf file")
        return ModelSource(None, _parts(place, field))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
        return ModelSource(_fetched(path, field, allow_pickle), (), allow_pickle)
    raise ValueError(f"{field}: {path} does not exist; {WAYS}, or package:NAME")


def model_folder(path: str, allow_pickle: bool) -> Path | None:
    """Return the model folder that model.path names, for checks before any work; None for a GGUF."""
    return locate(path, allow_pickle=allow_pickle).folder


def inspect(source: ModelSource, field: str) -> Checkpoint | None:
    """Check a located model by its headers; return a folder's checkpoint, None for a GGUF.

    Raise ValueError, naming the setting, where it is damaged or incomplete, or of no known family.
    """
    try:
        if source.folder is None:
            check_parts(source.parts)
            return None
        checkpoint = open_checkpoint(source.folder, source.allow_pickle)
        checkpoint.check()
    except ValueError as fault:
        raise ValueError(f"{field}: {fault}") from fault
    return checkpoint


def import_model(source: ModelSource, folder: Path, field: str, shard_bytes: float, trusted: bool) -> Checkpoint:
    """Write a located model into `folder` as an artifact of its own, and return its checkpoint.

    Every weight is read once, checked and copied: later changes of the source do not change the artifact. It has the
    table's tensors only, in safetensors; its config.json is completed by what the class assumes. Code of the source
    (`*.py` and `auto_map`) is copied for a tokenizer, and only if it is `trusted`. `notes` of the checkpoint says what
    differs from the source. Raise ValueError, naming the setting, where the model is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        need_space(folder, source.bytes())
        if source.folder is None:
            unpack(source.parts, folder, shard_bytes)
            notes = []
        else:
            notes = _copy(source.folder, source.allow_pickle, folder, shard_bytes, trusted)
        checkpoint = open_checkpoint(folder)
        checkpoint.check()
    except ValueError as fault:
        raise ValueError(f"{field}: {fault}") from fault
    checkpoint.notes[:0] = notes
    return checkpoint


def _copy(origin: Path, allow_pickle: bool, folder: Path, shard_bytes: float, trusted: bool) -> list[str]:
    """Copy a model folder and return what differs in the copy."""
    checkpoint = open_checkpoint(origin, allow_pickle)
    checkpoint.check()
    try:
        write_checkpoint(folder, checkpoint.config, checkpoint.items(), shard_bytes, origin)
        if checkpoint.wrapper_parts is not None:
            write_wrapper_parts(folder, checkpoint.wrapper_parts, checkpoint.wrapper_parts.tensors.items(), shard_bytes)
    except ValueError as fault:
        raise ValueError(f"{origin}: {fault}") from fault
    notes = list(checkpoint.notes)
    if checkpoint.wrapped and checkpoint.wrapper_parts is not None:
        kind, count = checkpoint.wrapper_parts.wrapper.architecture, len(checkpoint.wrapper_parts.tensors)
        notes.append(f"the text half of {kind} is pruned; its {count} other tensors are carried to the export")
    if trusted:
        for path in origin.glob(CODE):
            shutil.copyfile(path, folder / path.name)
    else:
        _remove_code(folder)
    if generation_of(origin) is None:
        (folder / GENERATION).unlink(missing_ok=True)
        if (origin / GENERATION).exists():
            notes.append(f"{GENERATION} is not one that transformers reads, and is left out")
    if "auto_map" in read_mapping(origin / "config.json") and "pruned" not in checkpoint.config:
        kind = checkpoint.config["architectures"][0]
        notes.append(f"the folder's modelling code is not used; the model is transformers' {kind}")
    return notes


def _remove_code(folder: Path) -> None:
    """Remove code, and what names it, from copied tokenizer files."""
    for path in folder.glob(CODE):
        path.unlink()
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        fields = {field: value for field, value in read_mapping(path).items() if field != "auto_map"}
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def generation_of(folder: Path) -> dict[str, Any] | None:
    """Return the generation_config.json of a model folder, None where there is none that transformers reads."""
    path = Path(folder) / GENERATION
    if not path.is_file():
        return None
    try:
        fields = read_mapping(path)
        GenerationConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    return fields


def _packaged(name: str, field: str) -> tuple[Path, ...]:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{field}: {name!r:.80} is no name of a package; {WAYS}")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a package around it is absent, or it is the program itself
        spec = None
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
    wanted += ["README.md", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*"]
    wanted += ["*.bin"] if allow_pickle else []
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        raise ValueError(f"{field}: {name} is no folder, and not fetched from the hub: {hub_reason(fault)}") from None


def _parts(path: Path, field: str) -> tuple[Path, ...]:
    """Return all parts of a GGUF that is one part of several by its name; else the file alone."""
    named = PART.fullmatch(path.name)
    if not named:
        return (path,)
    count = int(named[3])
    parts = tuple(path.with_name(f"{named[1]}{number:05d}-of-{named[3]}.gguf") for number in range(1, count + 1))
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise ValueError(f"{field}: {path} is one of {count} parts, {absent[0]} is missing; fetch all of them")
    return parts
