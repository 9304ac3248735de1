"""The weight files of a folder: which ones count, opened lazily, and what each holds by its header."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.runtime.config_bounds import TENSORS, one_line
from pipeline.runtime.described import check_file, read_mapping

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED = "pytorch_model.bin"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
HEADER = 32 << 20  # the longest header of a safetensors file that is read, in bytes
FLOATING = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}  # how safetensors names the types that weights may have, and torch


class Tensors(Mapping[str, Tensor]):
    """The weight files of a folder as a lazy mapping from tensor name to tensor."""

    def __init__(self, folder: Path, allow_pickle: bool):
        self.files = weight_files(folder, allow_pickle)
        self._allow_pickle = allow_pickle
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in self.files:
            names = list(_open(path, allow_pickle).keys())
            if len(names) + len(self._file_of) > TENSORS:
                raise ValueError(f"{path} brings the model to more than {TENSORS} tensors; fetch it again")
            for name in names:
                if name in self._file_of:
                    raise ValueError(
                        f"{folder}: {name} is in {self._file_of[name].name} and in {path.name}; keep one set of weights"
                    )
                self._file_of[name] = path

    def __getitem__(self, name: str) -> Tensor:
        file = self._file(name)
        return file[name] if isinstance(file, dict) else file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor from its file's header."""
        file = self._file(name)
        return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the type of a tensor from its file's header, under the name that torch has for it."""
        file = self._file(name)
        if isinstance(file, dict):
            return str(file[name].dtype).removeprefix("torch.")
        stored = file.get_slice(name).get_dtype()
        return FLOATING.get(stored, stored)

    def bytes(self) -> int:
        """Return the size of the weight files on disk."""
        return sum(path.stat().st_size for path in self.files)

    def _file(self, name: str) -> Any:
        path = self._file_of[name]
        if path not in self._open:
            self._open[path] = _open(path, self._allow_pickle)
        return self._open[path]


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """Return the files that hold the weights of a folder.

    Raise ValueError, naming the file, where there are none, two sets, an incomplete one, one with files outside the
    folder, an adapter beside them, a broken link or a git-lfs pointer; and for pickled weights unless `allow_pickle`.
    """
    folder = Path(folder)
    adapters = [name for name in ADAPTERS if (folder / name).exists()]
    if adapters:
        raise ValueError(f"{folder} has an adapter beside its weights ({adapters[0]}); merge or remove it")
    files = _set_of(folder, SINGLE, INDEX, "*.safetensors")
    for path in files:
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{folder / INDEX}: weight_map names {path.name}, not a *.safetensors file; fetch the weights as "
                "safetensors, or remove the index"
            )
    if not files:
        files = _set_of(folder, PICKLED, PICKLED_INDEX, "*.bin")
        if not files:
            raise ValueError(f"{folder} holds no *.safetensors weights")
        if not allow_pickle:
            raise ValueError(
                f"{folder} holds only pickled weights ({files[0].name}); set model.allow_pickle=true to read them "
                "weights-only, or convert them to safetensors"
            )
    for path in files:
        check_file(path)
        if not path.is_file():
            raise ValueError(f"{path} is a folder, not a file of weights; remove or rename it, or fetch the file again")
    return files


def _set_of(folder: Path, single: str, index: str, pattern: str) -> list[Path]:
    """Return one set of weight files: the one of the index, else the single file, else all of a pattern."""
    for path in (folder / single, folder / index):
        check_file(path)
    if not (folder / index).is_file():
        return [folder / single] if (folder / single).is_file() else sorted(folder.glob(pattern))
    files = _listed(folder / index)
    if (folder / single).is_file() and files != [folder / single]:
        raise ValueError(
            f"{folder} holds two sets of weights, {single} and the {len(files)} files of {index}; remove the one that "
            "is not the model"
        )
    absent = [path.name for path in files if not path.exists() and not path.is_symlink()]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent[:3])}, named in its index; fetch it again")
    return files


def _listed(index: Path) -> list[Path]:
    """Return the files that an index names, each a file of its folder, which may be a link as in a hub cache."""
    listed = read_mapping(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} has no weight_map; fetch it again")
    for file in listed.values():
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\") or not file.isprintable():
            raise ValueError(
                f"{index}: weight_map names {json.dumps(file):.60}, not a file of the folder itself; put the shards "
                "beside the index, or fetch it again"
            )
    return sorted({index.parent / file for file in listed.values()})


def _open(path: Path, allow_pickle: bool) -> Any:
    """Return a weight file opened lazily, a pickle as a dictionary.

    Raise ValueError, naming the file, where it is damaged, and for a pickle unless `allow_pickle`.
    """
    if path.suffix != ".safetensors":
        if not allow_pickle:
            raise ValueError(f"{path} is a pickle; set model.allow_pickle=true to read it weights-only")
        return _unpickled(path)
    _check_header(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, RuntimeError, EOFError) as fault:
        raise _corrupt(path, fault) from fault


def _check_header(path: Path) -> None:
    """Raise ValueError where the header of a safetensors file would be longer than the file, or than HEADER."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if length > min(HEADER, size - 8):
        raise ValueError(f"{path} is corrupt or truncated (a header of {length} bytes in {size}); fetch it again")


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, read weights-only; one of the format before torch 1.6 is read as a whole."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as fault:  # a damaged pickle raises whatever its operations lead to
        raise _corrupt(path, fault) from fault
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{path} holds something else than tensors by name; fetch it again")
    for name, tensor in content.items():
        if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
            kind = "without values (meta)" if tensor.is_meta else f"sparse or nested ({tensor.layout})"
            found = f"{path}: {one_line(name):.80} is {kind}, not a dense tensor"
            raise ValueError(f"{found}; store the weights as dense tensors")
    return {name: tensor.detach() for name, tensor in content.items()}


def _corrupt(path: Path, fault: Exception) -> ValueError:
    reason = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
    return ValueError(f"{path} is corrupt or truncated ({reason:.160}); fetch it again")
