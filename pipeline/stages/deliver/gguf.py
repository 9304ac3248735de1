"""gguf: the exported student as one GGUF file, written by llama.cpp's converter and compared with the student."""

import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.model.exported import Converted, Exported
from pipeline.model.gguf_form import SCALAR, WINDOWS, folded, graph_of, query_factor, windows_of
from pipeline.runtime.checkpoint import Checkpoint, open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.disk import need_space, size
from pipeline.runtime.gguf_converter import BITS, check_tokenizer, check_written, convert, converter_digest, kinds_of
from pipeline.runtime.gguf_header import flags, join, read_header
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_class import stock_config
from pipeline.runtime.model_source import model_folder
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.student_config import is_image_text, student_config

FILE = "model.gguf"
SCRATCH = "scratch"
FROM_CLASS = (SCALAR, "sliding_window")


def enabled(config: Config) -> bool:
    """Return whether a GGUF is requested."""
    return config.export.gguf is not None


def settings(config: Config) -> dict[str, Any]:
    """Return the type of the weights and the digest of the converter's code; nothing where no GGUF is requested."""
    if not enabled(config):
        return {}
    return {"type": config.export.gguf, "converter": converter_digest(Path(config.export.gguf_converter))}


def check(config: Config) -> None:
    """Refuse a missing converter, and a model that llama.cpp does not compute as transformers does."""
    if config.export.gguf is None:
        return
    converter_digest(Path(config.export.gguf_converter))
    if is_image_text(config):
        raise ValueError(
            "export.gguf: llama.cpp keeps the two halves of an image-text model in two files, which is not supported; "
            "set export.gguf=null"
        )
    student = student_config(config)
    if student is None:
        return
    graph_of(student)
    if "pruned" in student:
        raise ValueError(
            f"export.gguf: {student['model_type']} has no class without post-norms, and the recipe absorbs them; set "
            "reinit.absorb=false"
        )
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder is not None:
        check_tokenizer(folder)


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write model.gguf, and gguf.json on it.

    Raise ValueError where the student is not of a stock class, the converter fails, or what it wrote is not the
    student.
    """
    kind = config.export.gguf
    assert kind is not None
    student = inputs["student"]
    form = Exported.load(student).form
    if form not in ("stock", "padded"):
        raise ValueError(
            f"export.gguf: the student is exported in the form {form}, which llama.cpp does not read; set "
            "export.form=padded"
        )
    source = open_checkpoint(student)
    if source.wrapped:
        raise ValueError("export.gguf: the student is an image-text model; set export.gguf=null")
    check_tokenizer(student)
    described = _described(source)
    graph = graph_of(described)
    whole = source.anatomy.parameters()[0] * BITS[kind] / 8
    need_space(out, int(3 * whole))
    scratch = out / SCRATCH
    scratch.mkdir()
    factor, windows = query_factor(described, graph), windows_of(described, graph)
    folder = student
    if factor != 1.0:
        folder = scratch / "folded"
        adapted, tensors = folded(described, graph, source.items())
        write_checkpoint(folder, adapted, tensors, config.checkpoint.shard_bytes, student)
    machine.say(f"gguf: writing about {size(int(whole))} as {kind}")
    convert(Path(config.export.gguf_converter), folder, kind, scratch / FILE, whole, machine.say)
    added = _place(scratch / FILE, out / FILE, windows)
    header = read_header(out / FILE)
    check_written(header, source)
    shutil.rmtree(scratch)
    architecture, length = str(header.fields["general.architecture"]), (out / FILE).stat().st_size
    Converted(FILE, kind, architecture, kinds_of(header), length, factor, added).save(out)
    machine.say(f"gguf: {architecture}, {kind}, {size(length)}; widths and elements are those of the student")


def _described(source: Checkpoint) -> dict[str, Any]:
    """Return the config of a checkpoint with what its class assumes where the file is silent."""
    whole = stock_config(source.config, source.folder)
    silent = {name: getattr(whole, name) for name in FROM_CLASS if name not in source.config and hasattr(whole, name)}
    return source.config | silent


def _place(written: Path, path: Path, windows: list[bool] | None) -> bool:
    """Move the file to its place; return whether the order of sliding-window layers was added to it.

    Raise ValueError where the file states another order than the student has.
    """
    header = read_header(written)
    field = WINDOWS.format(architecture=header.fields.get("general.architecture"))
    if windows is not None:
        stated, expected = header.stored.get(field), flags(field, windows)
        if stated is None:
            join([header], path, [expected])
            return True
        if stated != expected:
            raise ValueError(
                f"export.gguf: the converter wrote another {field} than the student has; set export.gguf=null"
            )
    os.replace(written, path)
    return False


STAGE = Stage(
    name="gguf",
    makes="gguf",
    run=run,
    settings=settings,
    needs=("student",),
    enabled=enabled,
    check=check,
    all_ranks=False,
    shows={f"student/{FILE}": FILE},
    delivers=True,
)
