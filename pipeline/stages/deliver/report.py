"""report: the settings, figures and costs of a run, as report.json, as one page and as pictures."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config
from pipeline.config.neutral import determining
from pipeline.costmodel.search_result import SearchResult
from pipeline.distill.layer_errors import LayerErrors
from pipeline.distill.selection import RecoveryFacts
from pipeline.evaluation.results import Evaluation
from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.model.exported import Converted, Exported
from pipeline.model.scores import Scores
from pipeline.model.shape import Budgeted, StreamEnergy
from pipeline.report.axes import number
from pipeline.report.card import card
from pipeline.report.comparison import summary
from pipeline.report.drawing import Drawing
from pipeline.report.facts import Curve, cut_facts, gather, perplexity_of, recovery_curves, recovery_facts, start_of
from pipeline.report.figures import curve, cut_figures, perplexities, shapes_searched, stage_costs, thinned
from pipeline.report.local_distill import errors_by_layer
from pipeline.report.page import page
from pipeline.report.rounds import cuts, layers_by_round, round_facts
from pipeline.runtime.artifacts import LIBRARIES, code_revision, library_versions
from pipeline.runtime.machine import Machine
from pipeline.runtime.manifest import MANIFEST
from pipeline.runtime.model_source import locate, model_folder
from pipeline.runtime.source_card import CARD, source_facts
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage
from pipeline.training import METRICS

SEEN = "tokens"  # the horizontal axis of training curves
HELD_OUT, POINTS = "held_out_kl", 120  # the curve that report.json holds for comparisons, and its most points
RECOVERY = {
    "loss": ("loss", "Distillation loss"),
    "kl": ("held_out_kl", "Held-out KL to the teacher, nats per token"),
    "rate": ("learning_rate", "Learning rate"),
}  # figure -> metric, title
ON_POLICY = {
    "onpolicy": ("loss", "Divergence from the teacher on the student's own answers"),
    "onpolicy_kl": ("held_out_kl", "Held-out KL to the teacher, nats per token"),
}
CORRECTION = {"correction": ("held_out_cross_entropy", "Teacher, next-token loss, held-out text, nats")}
REGULARIZATION = {
    "settling": ("loss", "Regularization loss"),
    "settling_change": ("held_out_change", "Output of the layers to be removed, held-out text"),
    "settling_entropy": ("held_out_cross_entropy", "Next-token loss, held-out text, nats"),
}


def settings(config: Config) -> dict[str, Any]:
    """Return every setting that determines a result, and what the model card takes from the source."""
    source = _source(config)
    return determining(config) | ({"source": source} if source else {})


def _source(config: Config) -> dict[str, Any]:
    """Return what the source of the student's weights says of itself, for the model card; empty where nothing."""
    path = config.model.start or config.model.path
    return source_facts(path, model_folder(path, config.model.allow_pickle))


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write report.json, report.html, figures/*.png and the student's model card, and print the comparison."""
    anatomy = checkpoint(config, inputs["reference"]).anatomy
    sizes = anatomy.sizes
    blueprint = Blueprint.load(inputs["blueprint"])
    scores = _scores(inputs)
    evaluation = Evaluation.load(inputs["evaluation"]).to_json()
    stages = _stages(inputs)
    distilled = _distilled(inputs)
    curves = recovery_curves(_metrics(distilled), SEEN) if distilled else None
    report = gather(
        evaluation,
        cut_facts(sizes, blueprint, scores),
        recovery_facts(curves, SEEN) if curves else None,
        stages,
        _made_with(config, inputs),
    )
    if distilled and (distilled / RecoveryFacts.FILE).is_file():
        report["recovery"]["selection"] = RecoveryFacts.load(distilled).to_json()
    if curves and HELD_OUT in curves:
        report["recovery"]["curves"][HELD_OUT]["points"] = thinned(curves[HELD_OUT], POINTS)
    drawings = cut_figures(sizes, blueprint, scores)
    if "shape" in inputs and (inputs["shape"] / Budgeted.FILE).is_file():
        report["budget"] = Budgeted.load(inputs["shape"]).to_json()
    if "shape" in inputs and (inputs["shape"] / SearchResult.FILE).is_file():
        report["search"] = SearchResult.load(inputs["shape"]).to_json()
        drawings["shapes"] = shapes_searched(report["search"])
    rounds = _rounds(anatomy, inputs, distilled)
    if rounds:
        report["rounds"], drawings["rounds"] = rounds, layers_by_round(rounds)
    drawings["perplexity"] = perplexities(perplexity_of(report), start_of(report))
    if "corrected_teacher" in inputs:
        corrected = recovery_curves(_metrics(inputs["corrected_teacher"]), SEEN)
        report["correction"] = recovery_facts(corrected, SEEN)
        drawings |= _training_figures(corrected, CORRECTION, [])
    if "restored" in inputs and (inputs["restored"] / METRICS).is_file():
        regularized = recovery_curves(_metrics(inputs["restored"]), SEEN)
        report["settling"] = recovery_facts(regularized, SEEN)
        drawings |= _training_figures(regularized, REGULARIZATION, [])
    if "onpolicy_student" in inputs:
        own = recovery_curves(_metrics(inputs["onpolicy_student"]), SEEN)
        selection = RecoveryFacts.load(inputs["onpolicy_student"]).to_json()
        report["onpolicy"] = recovery_facts(own, SEEN) | {"selection": selection}
        drawings |= _training_figures(own, ON_POLICY, [])
    trained_by_layer = _nearest(inputs["initial_student"], "initial_student", LayerErrors.FILE)
    if trained_by_layer:
        report["blocks"] = LayerErrors.load(trained_by_layer).to_json()["layers"]
        drawings["blocks"] = errors_by_layer(report["blocks"])
    if (inputs["student"] / Exported.FILE).is_file():
        place = {"folder": str(Path(config.runs) / config.run / "student")}
        report["export"] = Exported.load(inputs["student"]).to_json() | place
    if "gguf" in inputs:
        report["gguf"] = Converted.load(inputs["gguf"]).to_json()
    drawings |= _training_figures(curves or {}, RECOVERY, cuts(rounds, SEEN) if rounds else [])
    if stages:
        drawings["stages"] = stage_costs(stages)
    from pipeline.report.picture import save_png  # imports matplotlib

    (out / "figures").mkdir(exist_ok=True)
    for name, drawing in drawings.items():
        save_png(drawing, out / "figures" / f"{name}.png")
    (out / "report.html").write_text(page(report, drawings), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / CARD).write_text(card(report, _source(config)), encoding="utf-8")
    machine.say(summary(report))


def _scores(inputs: Mapping[str, Path]) -> Scores:
    """Return the scores by which the student was cut: of channels their energy where the stream was rotated."""
    scores = Scores.load(inputs["scores"])
    if "rotated" not in inputs:
        return scores
    energy = StreamEnergy.load(inputs["rotated"]).energy
    return replace(scores, channels=torch.tensor(energy, dtype=torch.float64))


def _made_with(config: Config, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the run was made with: model, settings, versions and artifacts."""
    versions = {"revision": code_revision(), "python": platform.python_version()}
    return {
        "model": _name(config.model.path),
        "run": config.run,
        "recipe": config.recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "pipeline", *sys.argv[1:]]),
        "settings": determining(config),
        "versions": versions | library_versions(("pangu-light", *LIBRARIES)),
        "artifacts": {name: folder.name for name, folder in inputs.items()},
    }


def _name(path: str) -> str:
    """Return the model's name: that of its folder, file or hub entry."""
    place = locate(path).parts[0] if path.startswith("package:") else Path(path)
    return place.name.removesuffix(".gguf")


def _stages(inputs: Mapping[str, Path]) -> dict[str, dict]:
    """Return seconds, peak memory in bytes and devices of every stage behind the inputs, by name; rounds are summed.

    Read from manifests; an input without one, such as one written by hand, has no entry.
    """
    costs: dict[str, dict[str, Any]] = {}
    seen: set[Path] = set()

    def follow(folder: Path) -> None:
        path = folder / MANIFEST
        if folder in seen or not path.is_file():
            return
        seen.add(folder)
        facts = json.loads(path.read_text(encoding="utf-8"))
        for name in facts["inputs"].values():
            follow(folder.parent / name)
        cost = costs.setdefault(facts["stage"], {"seconds": 0.0, "peak_memory": 0, "devices": []})
        cost["seconds"] += facts["seconds"]
        cost["peak_memory"] = max(cost["peak_memory"], facts["peak_memory"])
        cost["devices"] = sorted({*cost["devices"], *filter(None, [facts.get("device")])})

    for folder in inputs.values():
        follow(folder)
    return costs


def _distilled(inputs: Mapping[str, Path]) -> Path | None:
    """Return the folder of recovery, from which on-policy distillation may have started; None where there was none."""
    last = inputs.get("onpolicy_student")
    if last is None:
        return inputs.get("recovered")
    before = _inputs(last).get("recovered")
    return last.parent / before if before else None


def _rounds(teacher: Anatomy, inputs: Mapping[str, Path], distilled: Path | None) -> dict[str, Any] | None:
    """Return the facts of each round, read along the manifests; None where there was one."""
    plans = _chain(inputs["blueprint"], "previous_blueprint")
    if len(plans) == 1:
        return None
    students = _chain(distilled, "previous_student") if distilled else []
    metrics = [_metrics(folder) for folder in students] if len(students) == len(plans) else []
    alone = [rows[len(before) :] for before, rows in zip([[], *metrics], metrics)]
    return round_facts(teacher, [Blueprint.load(plan) for plan in plans], alone, SEEN)


def _chain(folder: Path, link: str) -> list[Path]:
    """Return an artifact and those of its kind in earlier rounds, the first round first; `link` names the input."""
    known = _inputs(folder)
    earlier = _chain(folder.parent / known[link], link) if link in known else []
    return [*earlier, folder]


def _nearest(folder: Path, link: str, name: str) -> Path | None:
    """Return the folder of an artifact that has a file, or of the last one behind it that does; `link` names the
    input."""
    if (folder / name).is_file():
        return folder
    known = _inputs(folder)
    return _nearest(folder.parent / known[link], link, name) if link in known else None


def _inputs(folder: Path) -> dict[str, str]:
    """Return the names of the artifacts that one was made from, by input; none where it was written by hand."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8"))["inputs"] if path.is_file() else {}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


def _training_figures(
    curves: Mapping[str, Curve], titles: Mapping[str, tuple[str, str]], cuts: Sequence[tuple[float, str]]
) -> dict[str, Drawing]:
    drawings = {}
    for name, (metric, title) in titles.items():
        if metric in curves:
            points = curves[metric]
            ends = f"{number(points[0][1])} → {number(points[-1][1])}"
            drawings[name] = curve(title, points, SEEN, ends, dots=len(points) <= 24, cuts=cuts)
    return drawings


STAGE = Stage(
    name="report",
    makes="report",
    run=run,
    settings=settings,
    needs=("reference", "scores", "blueprint", "initial_student", "student", "evaluation"),
    optional=("corrected_teacher", "recovered", "onpolicy_student", "shape", "rotated", "restored", "gguf"),
    all_ranks=False,
    shows={"report.json": "report.json", "report.html": "report.html", "figures": "figures", f"student/{CARD}": CARD},
    delivers=True,
)
