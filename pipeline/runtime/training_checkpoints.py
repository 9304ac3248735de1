"""Resumable checkpoints of a training: folders step-<n> with a digest of every file, and which of them are sound."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from pipeline.runtime.checkpoint import Checkpoint, open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.described import read_config
from pipeline.runtime.hashing import file_digest
from pipeline.runtime.weight_files import Tensors

DIGESTS = "digests.json"  # file name -> digest of its content
SHARD_BYTES = 1 << 30  # also what the rank that writes holds in memory
Usable = Callable[[int, Callable[[int], bool]], bool]  # (step, whether the checkpoint of a step is sound)


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the finished checkpoints in a folder by their steps, oldest first."""
    paths = (path for path in folder.glob("step-*") if path.name[5:].isdigit())
    return dict(sorted((int(path.name[5:]), path) for path in paths))


def write(folder: Path, step: int, tensors: Iterable[tuple[str, Tensor]]) -> Path:
    """Write folder/step-<n>, all of it or none: a crash leaves a hidden folder that the next attempt replaces."""
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    write_checkpoint(partial, {"step": step}, tensors, SHARD_BYTES)
    digests = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
    (partial / DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in partial.iterdir():
        _sync(path)
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _sync(folder)
    return final


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the last `keep` and that of the step `best`."""
    found = checkpoints(folder)
    for step in list(found)[:-keep]:
        if step != best:
            shutil.rmtree(found[step])


def damage(path: Path, shapes: Mapping[str, tuple[int, ...]], steps: int) -> str | None:
    """Return what is wrong with a checkpoint of tensors of these shapes, of a training of so many steps; None if sound.

    Every file is read and compared with its digest. ValueError where it is sound and of another model.
    """
    try:
        digests = json.loads((path / DIGESTS).read_text(encoding="utf-8"))
        names = {each.name for each in path.iterdir()} - {DIGESTS}
        if not isinstance(digests, dict) or set(digests) != names:
            return "its files are not those it was written with"
        changed = next((name for name in sorted(names) if file_digest(path / name) != digests[name]), None)
        if changed is not None:
            return f"{changed} is not as it was written"
        saved, step = Tensors(path, allow_pickle=False), read_config(path).get("step")
        if type(step) is not int or path.name != f"step-{step:08d}" or not 0 < step <= steps:
            return f"its step is {step!r}, and the training has {steps} steps"
        if set(saved) != set(shapes):
            odd = sorted(set(shapes) ^ set(saved))[0]
            raise _AnotherModel(
                f"{path} is a checkpoint of another model ({odd}); delete {path.parent} to start the training again"
            )
        wrong = next((name for name in shapes if tuple(saved.shape(name)) != tuple(shapes[name])), None)
        return None if wrong is None else f"{wrong} has another shape"
    except _AnotherModel:
        raise
    except (OSError, ValueError, KeyError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def newest_sound(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], steps: int, usable: Usable
) -> tuple[int | None, list[str]]:
    """Return the step to resume from, None for the beginning, and a line for every damaged checkpoint that was met.

    It is the step of the newest sound checkpoint that `usable` accepts.
    """
    found, verdicts = checkpoints(folder), {}

    def is_sound(step: int) -> bool:
        if step not in verdicts:
            verdicts[step] = damage(found[step], shapes, steps) if step in found else "it is missing"
        return verdicts[step] is None

    chosen = next((step for step in reversed(found) if is_sound(step) and usable(step, is_sound)), None)
    lines = [f"{folder / f'step-{step:08d}'}: {why}" for step, why in sorted(verdicts.items()) if why is not None]
    return chosen, lines


def opened(folder: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step."""
    return open_checkpoint(checkpoints(folder)[step])


class _AnotherModel(ValueError):
    """A sound checkpoint of another model: deleting it is for the user to decide."""


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
