"""Model folders are written: weights in shards, config.json last, the tokenizer's files carried along."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.model.families import FAMILIES, WRAPPERS
from pipeline.runtime import wrapper
from pipeline.runtime.described import stored_config
from pipeline.runtime.weight_files import INDEX, SINGLE
from pipeline.runtime.wrapper import WrapperParts

TOKENIZER = ("tokeniz*", "vocab*", "merges.txt", "*.model")
GENERATION = "generation_config.json"
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TEMPLATES = ("chat_template*", "additional_chat_templates/*.jinja")
BOUND = re.compile(r"\.(input|output)_(min|max)$")  # of clipped layers; infinite where nothing is clipped
CARRIED = (*TOKENIZER, "special_tokens_map.json", "added_tokens.json", *TEMPLATES, *PROCESSOR, GENERATION)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: float,
    copy_from: Path | None = None,
) -> None:
    """Write a model folder from a stream of tensors, under their names in files, one shard in memory at a time.

    `copy_from` is a folder whose tokenizer and generation files are copied. The index and config are written last, so
    a folder with a `config.json` is complete. Raise ValueError, naming the tensor, for values that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SINGLE, INDEX):  # of an earlier attempt, whose shards may be other ones
        (folder / name).unlink(missing_ok=True)
    shards: list[list[str]] = []
    total = parameters = 0
    # our own code reads the names of the class
    family = None if "pruned" in config else FAMILIES.get(config.get("model_type", ""))
    stored = ((family.stored(name) if family else name, tensor) for name, tensor in finite(tensors))
    for shard in _shards(stored, shard_bytes):
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
        file_of = {tensor: names[i] for i, shard in enumerate(shards) for tensor in shard}
        index = {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    if copy_from is not None:
        carry_tokenizer(Path(copy_from), folder)
        wrapper_parts = Path(copy_from) / wrapper.FOLDER
        if wrapper_parts.is_dir() and config.get("model_type") not in WRAPPERS:
            shutil.copytree(wrapper_parts, folder / wrapper.FOLDER, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stored_config(config), indent=2) + "\n", encoding="utf-8")


def write_wrapper_parts(
    folder: Path, parts: WrapperParts, tensors: Iterable[tuple[str, Tensor]], shard_bytes: float
) -> None:
    """Write the wrapper parts of a text model with these tensors, in place of those that its folder has."""
    shutil.rmtree(folder / wrapper.FOLDER, ignore_errors=True)
    write_checkpoint(folder / wrapper.FOLDER, parts.facts(), tensors, shard_bytes)


def finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield named tensors; ValueError, naming it, at the first that holds NaN, or an infinity and is no clipping bound.

    One pass over the values: the least and the greatest are NaN where any value is.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            ends = torch.stack(torch.aminmax(tensor))
            if ends.isnan().any() or not (ends.isfinite().all() or BOUND.search(name)):
                raise ValueError(f"{name} holds values that are not finite (NaN or infinity); nothing is written of it")
        yield name, tensor


def carry_tokenizer(source: Path, folder: Path, generation: bool = True) -> None:
    """Copy the tokenizer files of a model folder, and its generation_config.json if `generation`."""
    for name in carried(source):
        if generation or name != GENERATION:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def carried(folder: Path) -> set[str]:
    """Return the files of a model folder that are copied with its weights, relative to it."""
    found = (path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found}


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
