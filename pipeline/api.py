"""The pipeline from Python: prune a model in one call, or measure, plan and cut a model in memory.

    from pipeline import api

    run = api.prune("HuggingFaceTB/SmolLM2-135M-Instruct", budget=0.75, recipe="best", data="text.jsonl", run="smaller")
    run.student.generate(...)

The same settings, checks and errors as on the command line: a bad setting raises ValueError before any work. `measure`,
`plan` and `cut` write nothing to disk. See docs/python.md.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import runner
from pipeline.cli.compose import composed
from pipeline.config import validate
from pipeline.model.anatomy import Anatomy, anatomy_of
from pipeline.model.blueprint import Blueprint
from pipeline.model.causal import decoder_of
from pipeline.model.hf_config import student_config
from pipeline.model.scores import Scores
from pipeline.model.sizes import LayerSizes
from pipeline.prune import plan as planning
from pipeline.prune.importance.measure import measure as sums_of
from pipeline.prune.surgery.initial_student import begun
from pipeline.runtime.class_parameters import tensors_of
from pipeline.runtime.model_loader import load_model, model_of

PURPOSES = ("calibration", "recovery", "evaluation")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the folders of its artifacts by name, and what people look at."""

    folder: Path
    artifacts: Mapping[str, Path]

    @property
    def student_folder(self) -> Path:
        """The folder of the student, an ordinary Hugging Face checkpoint."""
        return self.artifacts["student"]

    @cached_property
    def student(self) -> PreTrainedModel:
        """The student, loaded on the CPU in the type it is stored in, in evaluation mode."""
        return load_model(self.student_folder, "auto", "auto")

    @cached_property
    def blueprint(self) -> Blueprint:
        """The plan: for each layer its source layer, its KV groups with their heads, its neurons; the channels."""
        return Blueprint.load(self.artifacts["blueprint"])

    @cached_property
    def report(self) -> dict[str, Any]:
        """report.json: sizes, perplexities, speeds, what was removed, what each stage cost."""
        return json.loads((self.artifacts["report"] / "report.json").read_text(encoding="utf-8"))


def prune(
    model: str | Path,
    *,
    budget: float | Mapping[str, float] | None = None,
    recipe: str | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    run: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Run a recipe and return the run; finished stages are reused, an interrupted run resumes.

    Args:
        model: a model folder, a .gguf file, a hub id or package:NAME, as `model.path`.
        budget: fraction of the parameters outside the embeddings to keep, as `budget.parameters`; or the names and
            values of settings of `budget`, e.g. ``{"total": 0.7}``, ``{"bytes": 8e9, "context": 8192}``.
        recipe: the name of a file in conf/recipe/.
        data: one text or several for calibration, recovery and evaluation, which share no passage of it.
        run: the name of the run folder.
        settings: any other setting by its full name, e.g. ``{"distill.tokens": 100_000, "shape.layers": 26}``.

    Raises:
        ValueError: for a setting that does not exist, a value that is refused, or input that cannot be used.
    """
    words: dict[str, Any] = {"model.path": str(model)}
    limits = budget if isinstance(budget, Mapping) else {"parameters": budget}
    chosen = {"recipe": recipe, "run": run} | {f"budget.{name}": value for name, value in limits.items()}
    words |= {key: value for key, value in chosen.items() if value is not None}
    if data is not None:
        paths = [str(path) for path in data] if isinstance(data, Sequence) and not isinstance(data, str) else str(data)
        words |= {f"data.{purpose}.path": paths for purpose in PURPOSES}
    words |= settings or {}
    config = validate(composed([f"{key}={_as_typed(value)}" for key, value in words.items()]))
    made = runner.run(config, f"pipeline.api.prune({str(model)!r}, settings={words!r})")
    return Run(Path(config.runs) / config.run, made)


def token_batches(
    tokenizer: PreTrainedTokenizerBase, text: str, *, length: int = 512, size: int = 8, limit: int | None = None
) -> Iterator[Tensor]:
    """Yield batches [at most `size`, `length`] of token ids of a text, cut into rows; `limit` counts rows.

    The rest of the text that fills no row is left out. Raise ValueError where the text fills none.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = len(ids) // length if limit is None else min(limit, len(ids) // length)
    if not rows:
        raise ValueError(f"text: {len(ids)} tokens, fewer than one row of {length}; give a longer text or lower length")
    yield from ids[: rows * length].view(rows, length).split(size)


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Return the named axes of a model: its widths, its tensors and what each dimension of each of them runs over.

    Raise ValueError for a class without a table of families.
    """
    return anatomy_of(model.config.to_dict(), tensors_of(model))


def measure(
    model: PreTrainedModel, batches: Iterable[Tensor], *, aggregation: str = "sum", norms: str = "all"
) -> Scores:
    """Return the importance of channels, heads, neurons and layers (Pangu Light, arXiv 2505.20155, eq. 1-4), and of
    experts (REAP, arXiv 2510.13999).

    `batches` hold token ids [batch, sequence]; one forward pass, no gradients. `aggregation` is `sum` or `minitron`,
    `norms` is `all` or `pre`, as `score.aggregation` and `score.norms`.
    """
    return sums_of(decoder_of(model), anatomy(model), batches, aggregation, norms).scores()


def plan(
    model: PreTrainedModel,
    scores: Scores,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    groups: int | None = None,
    neurons: int | None = None,
    experts: int | None = None,
    expert_neurons: int | None = None,
    shared_neurons: int | None = None,
    clap: bool = True,
) -> Blueprint:
    """Return the plan of a student of this shape; what is None stays as it is in the model.

    Layers of least block influence are removed; with `clap` their KV groups compete with those of the layer below
    (cross-layer attention pruning). Raise ValueError for a shape that cannot be cut from the model.
    """
    source = anatomy(model)
    own = source.sizes.layers
    widths = [
        LayerSizes(heads or layer.heads, groups or layer.groups, neurons or layer.neurons).within(layer)
        for layer in own
    ]
    hosts = planning.kept_layers(scores.layers, layers or len(own), "influence", source.protected_layers(1))
    chosen = [widths[host] for host in hosts]
    blueprint = planning.plan(
        source,
        scores,
        hosts,
        chosen,
        hidden or source.sizes.hidden,
        clap=clap,
        experts=experts,
        expert_neurons=expert_neurons,
        shared_neurons=shared_neurons,
    )
    blueprint.check(source)
    return blueprint


def cut(
    model: PreTrainedModel, blueprint: Blueprint, *, slnp: bool = True, gain_compensation: bool = False
) -> PreTrainedModel:
    """Return the student that a plan describes, in the model's type, on the CPU, in evaluation mode.

    With `slnp` every narrowed norm keeps the L2 norm of its gain (stabilised layer-norm pruning). A plan that keeps
    everything returns the same weights bit for bit. The model is not changed.
    """
    source, tensors = anatomy(model), tensors_of(model)
    config = model.config.to_dict()
    weights = begun(source, blueprint, tensors, config, slnp=slnp, gain_compensation=gain_compensation)
    return model_of(
        student_config(config, source, blueprint), dict(weights), model.dtype, model.config._attn_implementation
    )


def _as_typed(value: Any) -> str:
    """Return a value as a word of a command."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Sequence):
        return "[" + ",".join(map(_quoted, value)) + "]"
    return json.dumps(value)


def _quoted(value: Any) -> str:
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'" if isinstance(value, str | Path) else json.dumps(value)
