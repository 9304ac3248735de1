"""Hugging Face model folders: read lazily, written in shards, loaded as models."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from pipeline.model import decilm
from pipeline.model.anatomy import Anatomy, anatomy_of
from pipeline.model.families import family_of
from pipeline.runtime.described import check_indices, read_config, read_mapping
from pipeline.runtime.modelling import pruned_class

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER = ("tokeniz*", "vocab*", "merges.txt", "*.model")
CARRIED = (*TOKENIZER, "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json")

logging.disable_progress_bar()  # the pipeline shows its own


class Tensors(Mapping[str, Tensor]):
    """The weight files of a folder as a lazy mapping from tensor name to tensor."""

    def __init__(self, folder: Path, allow_pickle: bool):
        self._place = dict(_places(folder, allow_pickle))
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        shard = self._shard(name)
        return shard[name] if isinstance(shard, dict) else shard.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor from its file's header."""
        shard = self._shard(name)
        return tuple(shard[name].shape if isinstance(shard, dict) else shard.get_slice(name).get_shape())

    def _shard(self, name: str) -> Any:
        path = self._place[name]
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]

    def bytes(self) -> int:
        """Give the size of the weight files on disk."""
        return sum(path.stat().st_size for path in set(self._place.values()))


class Checkpoint(Mapping[str, Tensor]):
    """A model folder as a lazy mapping from tensor name to tensor; `.config` is its `config.json`.

    A folder in the DeciLM form is read as what it is to our own modelling code: a stock class with widths per layer.
    """

    def __init__(self, folder: Path, allow_pickle: bool):
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_config(self.folder)
        self._tensors = Tensors(self.folder, allow_pickle)
        if self.config.get("model_type") == decilm.MODEL_TYPE:
            self.config = decilm.plain(self.config, self._tensors)

    @property
    def anatomy(self) -> Anatomy:
        """Give the anatomy; ValueError for an unknown family or a checkpoint that does not match its table."""
        if "model_type" not in self.config:
            told = "give a model folder of transformers, or fetch it again"
            raise ValueError(f"{self.folder / 'config.json'} has no model_type; {told}")
        return anatomy_of(self.config, self)

    def check(self) -> None:
        """Read the headers of all weights; ValueError where one has another shape than the config gives it."""
        for name, shape in self.anatomy.shapes().items():
            found = self._tensors.shape(name)
            if found != shape:
                raise ValueError(
                    f"{self.folder}: {name} is {list(found)}, and by config.json it would be {list(shape)}; they do "
                    "not belong together, fetch both again"
                )

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def bytes(self) -> int:
        """Give the size of the weight files on disk."""
        return self._tensors.bytes()


def open_checkpoint(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    """Open a model folder; ValueError names the file that is missing, truncated or refused."""
    return Checkpoint(folder, allow_pickle)


def open_tensors(folder: Path) -> Mapping[str, Tensor]:
    """Open a folder of *.safetensors as one lazy mapping; ValueError if a file is truncated or none is there."""
    return Tensors(Path(folder), False)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _places(folder: Path, allow_pickle: bool) -> Iterator[tuple[str, Path]]:
    """Give every tensor name with the shard that holds it, shards checked for truncation by their headers."""
    check_indices(folder)
    single = folder / SINGLE  # beside it there may be others, of no weights
    shards = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        listed = read_mapping(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map; fetch it again")
        shards = sorted({folder / file for file in listed.values()})
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise ValueError(f"{folder} lacks {', '.join(absent[:3])}, named in its index; fetch it again")
    for shard in shards:
        yield from ((name, shard) for name in _opened(shard).keys())  # noqa: SIM118
    if shards:
        return
    pickles = sorted(folder.glob("*.bin"))
    if not pickles:
        raise ValueError(f"{folder} holds no *.safetensors weights")
    if not allow_pickle:
        raise ValueError(
            f"{folder} holds only pickled weights ({pickles[0].name}); set model.allow_pickle=true to read "
            "them weights-only, or convert them to safetensors"
        )
    for shard in pickles:
        yield from ((name, shard) for name in _opened(shard))


def _opened(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, "pt")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, EOFError) as fault:
        raise ValueError(f"{path} is corrupt or truncated ({fault}); fetch it again") from fault


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: float,
    copy_from: Path | None = None,
) -> None:
    """Write a model folder from a stream of tensors, holding one shard in memory at a time.

    `copy_from` is a folder whose tokenizer and generation files come along. The index and config are written last, so
    a folder with a `config.json` is a whole one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    total = parameters = 0
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, folder / f"part-{len(shards)}.safetensors", {"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        parameters += sum(tensor.numel() for tensor in shard.values())
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for i, name in enumerate(names):
        os.replace(folder / f"part-{i}.safetensors", folder / name)
    if len(shards) > 1:
        placed = {tensor: names[i] for i, shard in enumerate(shards) for tensor in shard}
        index = {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    if copy_from is not None:
        carry_tokenizer(copy_from, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def carry_tokenizer(origin: Path, folder: Path) -> None:
    """Copy the tokenizer and generation files of a model folder."""
    for pattern in CARRIED:
        for path in Path(origin).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: float) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    if not shard:
        raise ValueError(f"no tensors to write: the model is empty (limit {limit})")
    yield shard


def load_model(folder: Path, dtype: torch.dtype, attention: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a model folder on the CPU, in evaluation mode; a pruned one by this project's own modelling code.

    `attention` is an implementation of transformers, or auto for the one its class prefers.
    ValueError if tensors are missing, unexpected or of another shape than the class needs.
    """
    check_indices(Path(folder))
    config = read_config(folder)
    if config["model_type"] == decilm.MODEL_TYPE:
        config = open_checkpoint(folder).config
    own = "pruned" in config
    loader = pruned_class(family_of(config["model_type"]).architecture) if own else AutoModelForCausalLM
    extra = {"config": loader.config_class(**config)} if own else {"trust_remote_code": trust_remote_code}
    extra |= {} if attention == "auto" else {"attn_implementation": attention}
    model, told = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True, **extra)
    faults = {
        kind: sorted(map(str, told[kind]))[:3]
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if told[kind]
    }
    if faults:
        raise ValueError(f"{folder} does not fit {type(model).__name__}: {faults}")
    return model.eval()


def load_tokenizer(folder: Path, trust_remote_code: bool = False):
    """Load the tokenizer of a model folder; ValueError for none, a damaged one, or untrusted code of its own."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as fault:  # a damaged file raises whatever its reader, in Python or Rust, stumbles over
        if "trust_remote_code" in str(fault):
            raise ValueError(
                f"model.trust_remote_code is false, and the tokenizer in {folder} is code of its own; read it, and set "
                "model.trust_remote_code=true to run it"
            ) from None
        reason = f"{type(fault).__name__}: {str(fault).strip().splitlines()[0] if str(fault).strip() else ''}"
        raise ValueError(
            f"the tokenizer in {folder} is missing or damaged ({reason:.120}); put its files (tokenizer.json or "
            "tokenizer.model, tokenizer_config.json) there again"
        ) from fault
