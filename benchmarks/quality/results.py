"""What the runs of the table left behind, as figures: read from evaluation.json and run.json, kept in one JSON file."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAME = re.compile(r"(?P<row>\w+)-(?P<removed>\d+(\.\d+)?)-(?P<seed>\d+)(?P<bare>-start)?")
GIVEN = ("teacher", "tokens", "external_student")  # stages that prune nothing: what they read is the same for all rows
TRAINING = ("teacher_correction", "regularize", "distill")
TOLD = ("export", "evaluate_reference", "evaluate", "report")
QUALITY = ("perplexity", "next_word")
SAME = 0.01  # relative difference of the dense model's perplexity between rows that were measured on one text
Figures = dict[str, Any]


def collect(runs: Path, saved: Path) -> list[Figures]:
    """Return the figures of every row: those saved before, and in their place those of the runs that are there."""
    known = {key(each): each for each in (json.loads(saved.read_text()) if saved.is_file() else [])}
    fresh: dict[tuple, Figures] = {}
    for path in sorted((runs / "quality").glob("*/evaluation.json")):
        name = NAME.fullmatch(path.parent.name)
        run = json.loads((path.parent / "run.json").read_text())
        if name and "evaluate" in run["stages"]:  # else started again, and what was measured is of the run before
            here = figures(path.parent, name, run)
            fresh[key(here)] = merged(fresh.get(key(here)), here)
    found = known | {which: merged(known.get(which), here) for which, here in fresh.items()}
    _check_one_text(found.values())
    return [found[which] for which in sorted(found)]


def key(figures: Figures) -> tuple[str, float, int]:
    return figures["row"], figures["removed"], figures["seed"]


def figures(view: Path, name: re.Match, run: Figures) -> Figures:
    """Return the figures of one run that was measured.

    A run without recovery has the figures `before` it. One with recovery has those `after` it, and also
    what it was before, unless weights were trained before the last cut (rounds, TRSP, a corrected teacher).
    """
    evaluation = json.loads((view / "evaluation.json").read_text())
    config, recovered = run["config"], not name["bare"]
    settles, corrects = config["regularize"]["norm"] != "none", "teacher_correction" in run["stages"]
    trained_early = recovered and (config["recipe"]["rounds"] > 1 or settles or corrects)
    texts = {name: _states(measured, recovered, trained_early) for name, measured in evaluation["texts"].items()}
    seconds = _seconds(view, run["stages"])
    trains = {"distill": "distill" in seconds, "regularize": settles, "teacher_correction": corrects}
    trained = sum(config[stage]["tokens"] for stage, does in trains.items() if does)
    spent = {"cut_seconds": sum(time for stage, time in seconds.items() if stage not in (*TRAINING, *TOLD))}
    if recovered:
        spent["recovery_seconds"] = sum(time for stage, time in seconds.items() if stage in TRAINING)
        spent["recovery_tokens"] = trained
    kept = {"parameters", "non_embedding_parameters", "kv_bytes_per_token", "shape", "speed"}
    models = {who: {fact: value for fact, value in each.items() if fact in kept} for who, each in _models(evaluation)}
    return {
        "row": name["row"],
        "removed": float(name["removed"]),
        "seed": int(name["seed"]),
        "models": models,
        "texts": texts,
        "calibration_tokens": config["score"]["tokens"],
        "device": evaluation["device"],
        **spent,
    }


def _models(evaluation: Figures) -> Iterable[tuple[str, Figures]]:
    for who, facts in evaluation["models"].items():
        speed = evaluation["speed"][who] if evaluation["speed"] else {}
        yield who, facts | {"speed": {way: speed[way] for way in ("prefill", "decode")} if speed else None}


def _states(measured: Figures, recovered: bool, trained_early: bool) -> Figures:
    who = ("teacher", "start" if "start" in measured else "student", "student")  # not recovered, it is the start still
    dense, start, student = ({what: measured[each].get(what) for what in QUALITY} for each in who)
    states = {"dense": dense}
    if not trained_early:
        states["before"] = start
    if recovered:
        states["after"] = student
    return states


def _seconds(view: Path, stages: Mapping[str, Figures]) -> dict[str, float]:
    """Return the seconds that each stage took when it was made, rounds together."""
    made = (view / "teacher").resolve().parent
    seconds: dict[str, float] = {}
    for name, stage in stages.items():
        manifest = json.loads((made / stage["artifact"] / "manifest.json").read_text())
        plain = name.partition(",")[0]
        if plain not in GIVEN:
            seconds[plain] = seconds.get(plain, 0.0) + manifest["seconds"]
    return seconds


def perplexity(state: Figures) -> float:
    """Return a state's perplexity; null, as JSON has it, is one beyond all numbers."""
    return math.inf if state["perplexity"] is None else state["perplexity"]


def over_dense(states: Figures, state: str) -> float:
    """Return a state's perplexity over the dense model's."""
    return perplexity(states[state]) / perplexity(states["dense"])


def merged(old: Figures | None, new: Figures) -> Figures:
    """Return the figures of two runs of one row; where both have one, that with recovery, else the newer."""
    if old is None:
        return new
    first, last = (new, old) if "recovery_tokens" in old and "recovery_tokens" not in new else (old, new)
    texts = {text: old["texts"].get(text, {}) | states for text, states in new["texts"].items()}
    return first | last | {"texts": old["texts"] | texts, "models": _with_speeds(last["models"], first["models"])}


def _with_speeds(models: Figures, others: Figures) -> Figures:
    """Return models with the speed that others of the row were measured to have, where they were not."""
    return {who: facts | {"speed": facts["speed"] or others[who]["speed"]} for who, facts in models.items()}


def _check_one_text(found: Iterable[Figures]) -> None:
    """Refuse rows whose dense model does not agree: they were measured on other text, or more or less of it."""
    first: dict[str, tuple[Figures, float]] = {}
    for each in found:
        for text, states in each["texts"].items():
            dense = perplexity(states["dense"])
            reference, value = first.setdefault(text, (each, dense))
            if abs(dense / value - 1.0) > SAME:
                raise ValueError(
                    f"on {text} the dense model has a perplexity of {dense:.3f} in {key(each)} and of {value:.3f} in "
                    f"{key(reference)}; measure both with the same data.evaluation and evaluate.tokens"
                )
