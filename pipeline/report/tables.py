"""The page's tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pipeline.report.comparison import rows, size, whole, with_error
from pipeline.report.facts import Report, faster, infinite, start_of, times, widths

WHO = ("teacher", "start", "student")
MEASURES = (
    ("perplexity", "perplexity", ".2f"),
    ("bits_per_byte", "bits per byte", ".3f"),
    ("bytes_per_token", "bytes per token", ".2f"),
    ("accuracy", "next-token accuracy", ".1%"),
    ("next_word", "last-word accuracy", ".1%"),
)


def comparison_table(report: Report, caption: str) -> str:
    """Return teacher and student row by row, with the change."""
    body = [
        f'<tr><th scope="row">{escape(row.label)}</th><td>{escape(row.teacher)}</td>'
        f'<td class="student">{escape(row.student)}</td><td class="change">{escape(row.change)}</td></tr>'
        for row in rows(report)
    ]
    return table(("teacher", "student", "change"), body, caption)


def quality_table(report: Report, caption: str) -> str:
    """Return every metric on every text; the heading of a text says how it was measured."""
    first = next(iter(report["perplexity"].values()))
    who = [model for model in WHO if model in first]
    body = []
    for name, text in report["perplexity"].items():
        details = (
            f"sequence {text['sequence']}, stride {text['stride']}, {whole(text['tokens'])} predicted tokens, "
            f"{size(text['bytes'])}"
        )
        body.append(_heading(name, details, len(who)))
        for key, label, form in MEASURES:
            if all(key in text[model] for model in who):
                body.append(line(label, [times(infinite(text[model][key]), form) for model in who], who))
            if key == "perplexity" and "over_teacher" in text["student"]:
                body.append(line("relative to the teacher", ["", *(_times(text[model]) for model in who[1:])], who))
    return table([start_of(report) if model == "start" else model for model in who], body, caption)


def task_table(report: Report, caption: str) -> str:
    """Return every metric of every benchmark task, with its standard error where the harness reports one."""
    teacher, student = report["tasks"]["teacher"], report["tasks"]["student"]
    body = []
    for task, metrics in teacher.items():
        questions = f"{whole(metrics['questions'])} questions" if "questions" in metrics else ""
        body.append(_heading(task, questions, 2))
        for metric in metrics:
            if metric != "questions" and not metric.endswith("_stderr"):
                cells = [with_error(found[task], metric) for found in (teacher, student)]
                body.append(line(metric, cells, ("teacher", "student")))
    return table(("teacher", "student"), body, caption)


def search_table(search: Mapping[str, Any], caption: str) -> str:
    """Return every shape of a search, fastest first, with predictions and measurements."""
    columns = ("parameters kept", "tokens/s", "prefill time", "memory", "speed", "loss")
    body = []
    for each, speed in faster(search):
        label = widths(each["shape"]) + (" (selected)" if each["shape"] == search["picked"] else "")
        cells = [
            f"{each['kept']:.1%}",
            whole(round(each["decode_rate"])),
            f"{each['prefill_seconds']:.3g} s",
            size(each["memory_bytes"]),
            f"×{speed:.2f}",
            f"{each['loss']:.3f}",
        ]
        body.append(line(label, cells, columns))
    return table(columns, body, caption)


def plain_table(values: Mapping[str, Any]) -> str:
    """Return names and values, nested mappings with dotted names."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in flat("", values))
    return f"<table><tbody>{body}</tbody></table>"


def table(columns: Iterable[str], body: Sequence[str], caption: str) -> str:
    """Return a table of these columns with a column of labels; its rows are made by `line`."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _times(figures: Mapping[str, Any]) -> str:
    return " ± ".join(times(infinite(figures["over_teacher"][key])) for key in ("times", "error"))


def _heading(name: str, details: str, columns: int) -> str:
    cell = f'<th scope="rowgroup" colspan="{columns + 1}">{escape(name)} <span>{escape(details)}</span></th>'
    return f'<tr class="text">{cell}</tr>'


def line(label: str, cells: Sequence[str], who: Sequence[str]) -> str:
    """Return a row; the cell of the column `student` is emphasised."""
    marks = (' class="student"' if model == "student" else "" for model in who)
    body = "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, cells))
    return f'<tr><th scope="row">{escape(label)}</th>{body}</tr>'


def flat(prefix: str, values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the values of nested mappings as text, each with its dotted name."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
