"""Teacher and student row by row, as readable text; the page and the terminal show the same rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.report.answers import answer_lines
from pipeline.report.budget import budget_of
from pipeline.report.facts import MODELS, Report, infinite, perplexity_of, start_of, times

MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Row:
    """One line of the comparison, ready to print."""

    label: str
    teacher: str
    student: str
    change: str


def rows(report: Report) -> list[Row]:
    """Return the comparison: size, shape, quality, speed; what was not measured has no row."""
    found = [
        Row(label, show(pair["teacher"]), show(pair["student"]), change(pair["teacher"], pair["student"]))
        for label, show, pair in (
            ("parameters", count, report["parameters"]),
            ("without embeddings", count, report["non_embedding_parameters"]),
            ("checkpoint", size, report["checkpoint_bytes"]),
            ("KV cache per token", size, report["kv_bytes_per_token"]),
        )
    ]
    teacher, student = report["shape"]["teacher"], report["shape"]["student"]
    if "experts" in teacher:
        active = report["active_parameters"]
        before, after = active["teacher"], active["student"]
        found.insert(1, Row("used by a token", count(before), count(after), change(before, after)))
    for label, key in (
        ("layers", "layers"),
        ("hidden channels", "hidden"),
        ("query heads", "heads"),
        ("KV groups", "groups"),
        ("FFN neurons", "neurons"),
        ("vocabulary", "vocabulary"),
    ):
        before, after = teacher[key], student[key]
        found.append(Row(label, widths(before), widths(after), change(mean(before), mean(after))))
    if "experts" in teacher:
        before, after = teacher["experts"], student["experts"]
        found.append(Row("experts per layer", widths(before), widths(after), change(before, after)))
    for name, values in perplexity_of(report).items():
        ratio = f"×{times(values['student'] / values['teacher'])}"
        found.append(Row(f"perplexity, {name}", times(values["teacher"]), times(values["student"]), ratio))
        before, after = (infinite(report["perplexity"][name][who]["bits_per_byte"]) for who in MODELS)
        found.append(Row(f"bits per byte, {name}", times(before, ".3f"), times(after, ".3f"), change(before, after)))
    for name, text in report["perplexity"].items():
        if "assistant" in text:
            found += [Row(*line) for line in answer_lines(name, text["assistant"])]
        if "draft" in text:
            share = f"{text['draft']['acceptance']:.1%}"
            gain = f"{text['draft']['tokens_per_pass']:.2f} a pass"
            found.append(Row(f"accepted drafts, {name}", "", share, gain))
    for kind in ("prefill", "decode") if report["speed"] else ():
        before, after = (report["speed"][who][kind] for who in ("teacher", "student"))
        found.append(Row(f"{kind}, tokens/s", rate(before), rate(after), f"×{after / before:.2f}"))
    return found


def task_rows(report: Report) -> list[Row]:
    """Return a row for each metric of each benchmark task, with its standard error."""
    found = []
    for task, metrics in report["tasks"].get("teacher", {}).items():
        for metric in metrics:
            if metric != "questions" and not metric.endswith("_stderr"):
                before, after = (with_error(report["tasks"][who][task], metric) for who in MODELS)
                found.append(Row(f"{task}, {metric}", before, after, ""))
    return found


def summary(report: Report) -> str:
    """Return the comparison as a plain-text table for the terminal."""
    lines = [Row("", "teacher", "student", "change"), *rows(report), *task_rows(report)]
    wide = [max(len(getattr(row, column)) for row in lines) for column in ("label", "teacher", "student", "change")]
    table = [
        f"{row.label:<{wide[0]}}  {row.teacher:>{wide[1]}}  {row.student:>{wide[2]}}  {row.change:>{wide[3]}}".rstrip()
        for row in lines
    ]
    requested = budget_of(report)
    if requested:
        table.append(f"{requested[0]}: {requested[1]}; {requested[2]}")
    for name, values in perplexity_of(report).items():
        if "start" in values:
            table.append(f"perplexity on {name} {start_of(report)}: {times(values['start'])}")
    return "\n".join([*table, *filter(None, [unsteady(report)])])


def unsteady(report: Report) -> str:
    """Return a note on the spread of repeated speed measurements of one model, if it exceeds 20 %."""
    speed = report["speed"]
    runs = [speed[who][f"{kind}_runs"] for who in MODELS for kind in ("prefill", "decode")] if speed else []
    spread = max((max(some) / min(some) for some in runs), default=1.0)
    return (
        f"speed measurements are noisy: repeated runs of one model differ by up to ×{spread:.1f}"
        if spread > 1.2
        else ""
    )


def count(value: float) -> str:
    """Return a count as text, 1234567 as 1.23 M."""
    return scaled(value, "")


def size(value: float) -> str:
    """Return bytes as text in decimal units."""
    return scaled(value, "B")


def scaled(value: float, unit: str) -> str:
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power * 0.9995:
            shown = value / 10**power
            return f"{shown:.{1 if shown >= 10 else 2}f}{SPACE}{letter}{unit}"
    return f"{value:g}{SPACE}{unit}".rstrip()


def whole(value: float) -> str:
    """Return a whole number with separated thousands."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def rate(value: float) -> str:
    return whole(value) if value >= 100 else f"{value:.1f}"


def mean(value: Any) -> float:
    return sum(value) / len(value) if isinstance(value, list) else float(value)


def widths(value: Any) -> str:
    """Return the width of a layer, or the range of widths with their mean where layers differ."""
    return f"{min(value)}–{max(value)}, mean {mean(value):.4g}" if isinstance(value, list) else str(value)


def change(before: float, after: float) -> str:
    """Return the relative change in percent, with its sign; a dash where unchanged."""
    return "–" if before == after else percent(after / before - 1)


def percent(value: float) -> str:
    return f"{MINUS if value < 0 else '+'}{abs(value) * 100:.1f}%"


def with_error(metrics: Mapping[str, float], metric: str) -> str:
    """Return a metric of a task as text, with its standard error where the harness reports one."""
    error = metrics.get(f"{metric}_stderr")
    return f"{metrics[metric]:.4g}" if error is None else f"{metrics[metric]:.3f} ± {error:.3f}"
