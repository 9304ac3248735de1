"""Several runs beside each other: what differs in their settings, and what each measured, from their report.json."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.comparison import count, rate, size
from pipeline.report.facts import Curve, Report, perplexity_of, times
from pipeline.report.tables import flat

ABSENT = "–"
SAID_ELSEWHERE = ("runs", "artifacts", "run")  # settings that only say where a run is kept


@dataclass(frozen=True)
class Point:
    """One run: its name, the settings that differ among the runs compared, its figures and its recovery curve."""

    name: str
    settings: Mapping[str, Any]
    parameters: int
    size_ratio: float  # student / teacher, all parameters
    perplexities: Mapping[str, float]  # text -> of the student
    ratios: Mapping[str, float]  # text -> student / teacher
    decode: float | None  # tokens per second of the student
    speedup: float | None  # decode, student / teacher
    prefill_speedup: float | None
    kv_bytes: int  # per token
    kv_ratio: float
    recovery: Curve  # held-out KL over tokens; empty where the student was not recovered
    teacher: str
    device: str

    @property
    def quality(self) -> float:
        """The geometric mean over texts of perplexity over the teacher's: lower is better."""
        logs = [math.log(ratio) for ratio in self.ratios.values()]
        return math.exp(math.fsum(logs) / len(logs))


def points_of(reports: Mapping[str, Report]) -> list[Point]:
    """Return a point for each run, name -> report.json, smallest student first."""
    settings = _differing({name: dict(flat("", report["settings"])) for name, report in reports.items()})
    found = [_point(name, report, settings[name]) for name, report in reports.items()]
    return sorted(found, key=lambda point: (point.parameters, point.quality, point.name))


def _differing(settings: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return, for each run, the settings whose values are not the same in all runs; ABSENT where a run has none."""
    keys = dict.fromkeys(key for values in settings.values() for key in values if key not in SAID_ELSEWHERE)
    several = [key for key in keys if len({values.get(key, ABSENT) for values in settings.values()}) > 1]
    return {name: {key: values.get(key, ABSENT) for key in several} for name, values in settings.items()}


def _point(name: str, report: Report, settings: Mapping[str, str]) -> Point:
    texts = perplexity_of(report)
    speed = report["speed"]
    ratio = {kind: speed["student"][kind] / speed["teacher"][kind] for kind in ("decode", "prefill")} if speed else {}
    cache, parameters = report["kv_bytes_per_token"], report["parameters"]
    return Point(
        name=name,
        settings=settings,
        parameters=parameters["student"],
        size_ratio=parameters["student"] / parameters["teacher"],
        perplexities={text: values["student"] for text, values in texts.items()},
        ratios={text: values["student"] / values["teacher"] for text, values in texts.items()},
        decode=speed["student"]["decode"] if speed else None,
        speedup=ratio.get("decode"),
        prefill_speedup=ratio.get("prefill"),
        kv_bytes=cache["student"],
        kv_ratio=cache["student"] / cache["teacher"],
        recovery=_held_out(report["recovery"]),
        teacher=report["model"],
        device=report["device"]["name"],
    )


def _held_out(recovery: Mapping[str, Any] | None) -> Curve:
    """Return the held-out KL over tokens: all points where the report has them, else the first and the last."""
    if not recovery or "held_out_kl" not in recovery["curves"]:
        return []
    curve = recovery["curves"]["held_out_kl"]
    points = curve.get("points") or [(0.0, curve["first"]), (recovery["tokens"], curve["last"])]
    return [(tokens, value) for tokens, value in points if value is not None and math.isfinite(value)]


def front(points: Sequence[Point], cost: str) -> set[str]:
    """Return the names of the points that no other beats in both quality and `cost` (parameters or speedup)."""
    costs = {point.name: (point.parameters if cost == "parameters" else -(point.speedup or 0.0)) for point in points}
    return {
        point.name
        for point in points
        if not any(
            other.quality <= point.quality
            and costs[other.name] <= costs[point.name]
            and (other.quality, costs[other.name]) != (point.quality, costs[point.name])
            for other in points
        )
    }


def columns(points: Sequence[Point]) -> list[str]:
    """Return the headings of the table: figures, then differing settings; what no run measured has none."""
    return [*_figures(points[0], points), *points[0].settings]


def cells(point: Point, points: Sequence[Point]) -> list[str]:
    """Return the row of a run, one text for each of `columns`."""
    return [*_figures(point, points).values(), *point.settings.values()]


def _figures(point: Point, points: Sequence[Point]) -> dict[str, str]:
    result = {"parameters": count(point.parameters), "of teacher": f"{point.size_ratio:.1%}"}
    for text in dict.fromkeys(text for each in points for text in each.perplexities):
        result[f"perplexity, {text}"] = times(point.perplexities[text]) if text in point.perplexities else ABSENT
        result[f"{text}, × teacher"] = times(point.ratios[text], ".3f") if text in point.ratios else ABSENT
    if any(each.decode is not None for each in points):
        result["decode, tokens/s"] = ABSENT if point.decode is None else rate(point.decode)
        result["decode, × teacher"] = ABSENT if point.speedup is None else f"{point.speedup:.2f}"
        result["prefill, × teacher"] = ABSENT if point.prefill_speedup is None else f"{point.prefill_speedup:.2f}"
    return result | {"KV cache per token": size(point.kv_bytes)}


def as_text(points: Sequence[Point]) -> str:
    """Return the table as plain text for the terminal, one line a run."""
    rows = [["run", *columns(points)], *([point.name, *cells(point, points)] for point in points)]
    wide = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]).rstrip() for row in rows)


def as_values(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the runs as JSON values; null for what was not measured and for an infinite perplexity."""
    return [
        {
            "run": point.name,
            "teacher": point.teacher,
            "device": point.device,
            "settings": dict(point.settings),
            "parameters": point.parameters,
            "parameters_over_teacher": point.size_ratio,
            "perplexity": {text: _finite(value) for text, value in point.perplexities.items()},
            "perplexity_over_teacher": {text: _finite(value) for text, value in point.ratios.items()},
            "decode_tokens_per_second": point.decode,
            "decode_over_teacher": point.speedup,
            "prefill_over_teacher": point.prefill_speedup,
            "kv_bytes_per_token": point.kv_bytes,
            "kv_bytes_over_teacher": point.kv_ratio,
            "on_front": {cost: point.name in front(points, cost) for cost in ("parameters", "speedup")},
        }
        for point in points
    ]


def as_csv(points: Sequence[Point]) -> str:
    """Return the values of `as_values` as CSV with dotted column names; what was not measured is empty."""
    rows = [_unnested("", values) for values in as_values(points)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _unnested(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _unnested(f"{prefix}{key}.", value) if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
