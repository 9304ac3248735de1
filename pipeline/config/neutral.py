"""Settings that change no artifact: speed, memory, places and what is kept while work is in progress.

A stage may read them without naming them in its `settings`; every other setting that a stage reads determines its
artifact, or one of those that it is made from.
"""

from collections.abc import Iterable
from typing import Any

from pipeline.config import Config

TRAINING_SECTIONS = ("teacher_correction", "regularize", "distill", "onpolicy")
TRAINING_NEUTRAL = frozenset(("micro_batch_size", "save_steps", "save_total_limit", "gradient_checkpointing"))
NEUTRAL = frozenset(
    {
        "runs",
        "artifacts",
        "stages",
        "dry_run",
        "track",
        "verify",
        "recipe.reason",
        "output",
        "model.allow_pickle",  # permits a file format; what is read from it is the same
        "calibration.batch_size",
        "logits.chunk",
        "checkpoint.shard_bytes",
        "restore.memory",
        "evaluate.batch_size",
        "evaluate.vllm_python",
        "distill.loss.kernel",  # every implementation computes the same loss
        "deepspeed.stage",
        "device.kernels",  # every implementation computes the same layers, up to rounding
        "device.layer_streaming",
        "device.timeout",
        "calibrate",
        "export.gguf_converter",  # a place; the converter's code is part of what names the GGUF
    }
    | {f"{section}.{name}" for section in TRAINING_SECTIONS for name in TRAINING_NEUTRAL}
)


def is_neutral(setting: str) -> bool:
    """Return whether a setting, by its dotted name, or a section that holds it, is neutral."""
    parts = setting.split(".")
    return any(".".join(parts[: length + 1]) in NEUTRAL for length in range(len(parts)))


def determining(config: Config) -> dict[str, Any]:
    """Return every setting that is not neutral, as nested JSON values."""
    return _without(config.model_dump(mode="json"), NEUTRAL)


def _without(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    result = dict(values)
    nested: dict[str, list[str]] = {}
    for name in names:
        section, _, rest = name.partition(".")
        if rest:
            nested.setdefault(section, []).append(rest)
        else:
            result.pop(section, None)
    for section, inner in nested.items():
        if section in result:
            result[section] = _without(result[section], inner)
    return result
