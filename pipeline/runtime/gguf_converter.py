"""A model folder as a GGUF file: written by convert_hf_to_gguf.py of llama.cpp, then compared with the folder."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from pipeline.model.anatomy import Anatomy
from pipeline.runtime.checkpoint import Checkpoint
from pipeline.runtime.disk import size
from pipeline.runtime.fresh_process import quiet_environment
from pipeline.runtime.gguf_header import Header
from pipeline.runtime.hashing import digest, file_digest, files_of

BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}  # of a weight, by type
PARTS = ("conversion", "gguf-py/gguf")  # what the script imports from beside it
EVERY = 30.0  # seconds between two lines on the progress
LAYER = "blk.{layer}."
EMBEDDINGS = ("token_embd.weight", "output.weight")  # the second is absent where it is tied to the first
BESIDE = ("rope_", *EMBEDDINGS)  # names that begin so are not counted: frequencies that the converter computes
WIDTHS = {
    "block_count": "layers",
    "embedding_length": "hidden",
    "feed_forward_length": "neurons",
    "attention.head_count": "heads",
    "attention.head_count_kv": "groups",
    "attention.key_length": "head_size",
}  # fields of the header -> widths of the model


def converter_digest(script: Path) -> str:
    """Return the digest of the converter's code; raise ValueError where the script is not there."""
    if not script.is_file():
        raise ValueError(
            f"export.gguf_converter: {script} is not there; run `make serving ENGINES=converter`, or name "
            "convert_hf_to_gguf.py in a copy of llama.cpp's source"
        )
    files = {script.name: file_digest(script)}
    for part in PARTS:
        if (script.parent / part).is_dir():
            code = (entry for entry in files_of(script.parent / part) if entry[1].suffix == ".py")
            files |= {f"{part}/{name}": file_digest(path) for name, path in code}
    return digest(files)


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError for a folder with Python files, which the converter would run to read the tokenizer."""
    code = sorted(path.name for path in folder.glob("*.py"))
    if code:
        raise ValueError(
            f"export.gguf: {folder} has code of its own ({', '.join(code[:3])}), which llama.cpp's converter runs; set "
            "export.gguf=null, or remove these files after reading them"
        )


def convert(
    script: Path, folder: Path, kind: str, path: Path, whole: float, say: Callable[[str], None], every: float = EVERY
) -> None:
    """Write the model of a folder to `path` as GGUF of a type of BITS, in a process of its own.

    `whole`: the expected number of bytes, for the lines on the progress, one in `every` seconds. Raise ValueError where
    the converter fails.
    """
    path = path.resolve()  # the converter runs in another folder
    command = [sys.executable, str(script.resolve()), str(folder.resolve()), "--outfile", str(path), "--outtype", kind]
    log = path.with_suffix(".log")
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, env=quiet_environment(str(path.parent)), cwd=path.parent, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=every)
                    break
                except subprocess.TimeoutExpired:
                    written = path.stat().st_size if path.exists() else 0
                    say(f"gguf: {size(written)} of about {size(int(whole))} written")
        finally:
            process.kill()
            process.wait()
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if status or not path.is_file():
        raise ValueError(
            f"export.gguf: llama.cpp's converter failed ({lines[-1] if lines else f'exit status {status}'}); set "
            "export.gguf=null, or export.gguf_converter to a version of llama.cpp that reads this model"
        )


def check_written(header: Header, model: Checkpoint) -> None:
    """Compare the header of a GGUF with the model folder that it was made from.

    The widths are those of the config, each layer and the rest have as many elements as in the folder, and there is a
    row of the embedding for each token. Raise ValueError where they differ.
    """
    faults = [*_widths(header, model.anatomy), *_elements(header, model.anatomy), *_embeddings(header, model.anatomy)]
    if faults:
        raise ValueError(
            f"export.gguf: what llama.cpp's converter wrote is not the student ({'; '.join(faults[:3])}); set "
            "export.gguf=null, or export.gguf_converter to another version"
        )


def _widths(header: Header, anatomy: Anatomy) -> Iterator[str]:
    sizes, kind = anatomy.sizes, header.fields.get("general.architecture")
    expected: dict[str, int | None] = {
        "layers": len(sizes.layers),
        "hidden": sizes.hidden,
        "head_size": sizes.head_size,
    }
    expected |= sizes.layers[0].entry
    for field, width in WIDTHS.items():
        stated = header.fields.get(f"{kind}.{field}", expected[width])
        if stated != expected[width]:
            yield f"{width} {stated}, not {expected[width]}"


def _elements(header: Header, anatomy: Anatomy) -> Iterator[str]:
    """Yield where a layer, or what is in no layer and no embedding, has another number of elements."""
    family = anatomy.family
    ends = {f"{family.embedding}.weight", f"{family.head}.weight"}
    expected = {name: prod(shape) for name, shape in anatomy.shapes().items() if name not in ends}
    written = {tensor.name: tensor.elements for tensor in header.tensors if not tensor.name.startswith(BESIDE)}
    parts = {
        f"layer {i}": (LAYER.format(layer=i), family.prefix.format(layer=i)) for i in range(len(anatomy.sizes.layers))
    }
    for part, (own, prefix) in parts.items():
        yield from _compared(part, _taken(written, own), _taken(expected, prefix))
    yield from _compared("what is in no layer", sum(written.values()), sum(expected.values()))


def _taken(elements: dict[str, int], prefix: str) -> int:
    """Remove the tensors under a prefix; return how many elements they have."""
    return sum(elements.pop(name) for name in [name for name in elements if name.startswith(prefix)])


def _compared(part: str, written: int, expected: int) -> Iterator[str]:
    if written != expected:
        yield f"{written} elements in {part}, not {expected}"


def _embeddings(header: Header, anatomy: Anatomy) -> Iterator[str]:
    """Yield a fault unless the embedding, and the output matrix unless tied, have a row for each token."""
    sizes, kind = anatomy.sizes, header.fields.get("general.architecture")
    tokens = header.fields.get("tokenizer.ggml.tokens", header.fields.get(f"{kind}.vocab_size", 0))
    names = EMBEDDINGS if f"{anatomy.family.head}.weight" in anatomy.shapes() else EMBEDDINGS[:1]
    found = {tensor.name: tensor.dimensions for tensor in header.tensors if tensor.name in EMBEDDINGS}
    if found != dict.fromkeys(names, (sizes.hidden, tokens)) or tokens > sizes.vocabulary:
        yield f"embeddings {found} for {tokens} tokens of {sizes.vocabulary}"


def kinds_of(header: Header) -> dict[str, int]:
    """Return the number of tensors by their type."""
    return dict(sorted(Counter(GGMLQuantizationType(tensor.kind).name for tensor in header.tensors).items()))
