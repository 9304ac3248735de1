"""Figures of the documents are those of the files in benchmarks/results, and every table of figures names its origin.

A table is marked by a comment on the line before it, `<!-- figures: SOURCE removed=25 state=before -->`: SOURCE is a
file of benchmarks/results without its ending, its rows begin with the row's name in backticks, and columns are headed
by a text, a state (before, after) and a share, each of which holds until another is named. `<!-- figures: none,
REASON -->` marks a table whose figures are in no file.
"""

import json
import re
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

from tests.composing import ROOT, composed

RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ("settings.md", "models.md")  # compared with their sources by the tests that generate them
FILES = (ROOT / "README.md", *(file for file in sorted((ROOT / "docs").glob("*.md")) if file.name not in GENERATED))
MARK = re.compile(r"<!-- figures: (\w+)(.*)-->")
MEASURED = re.compile(r"\W{0,3}\d+\.\d+(?![.\d])")  # whole numbers are often settings, shapes or versions
STATES = ("before", "after")
TEXTS = ("readmes", "jargon", "topics", "docstrings", "finance", "constellations")


class Table:
    """One table of a document: the source of its figures, the options of its mark, its header and its rows."""

    def __init__(self, file: Path, mark: str | None, lines: list[str]):
        found = MARK.fullmatch(mark.strip()) if mark else None
        self.file, self.source = file, found[1] if found else None
        self.options = dict(re.findall(r"(\w+)=(\S+)", found[2])) if found else {}
        cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
        self.header, self.rows = cells[0], cells[2:]

    def figures(self):
        """Yield (row name, column heading, cell) of every cell that a source must confirm."""
        for row in self.rows:
            name = re.match(r"`(\w+)`", row[0])
            assert name, f"{self.file.name}: the row {row[0]!r} names no row of {self.source}.json"
            for heading, cell in zip(self.header[1:], row[1:], strict=True):
                yield name[1], heading, cell


def tables(file: Path) -> list[Table]:
    """Return the tables of a document outside of code blocks."""
    lines = re.sub(r"(?ms)^```.*?^```", "", file.read_text()).splitlines()
    found, start = [], None
    for number, line in enumerate([*lines, ""]):
        if line.startswith("|") and start is None:
            start = number
        elif not line.startswith("|") and start is not None:
            above = next((each for each in reversed(lines[:start]) if each.strip()), "")
            found.append(Table(file, above if above.startswith("<!--") else None, lines[start:number]))
            start = None
    return found


EVERY = [table for file in FILES for table in tables(file)]
MARKED = [table for table in EVERY if table.source not in (None, "none")]


def place(heading: str, now: dict[str, str]) -> str | None:
    """Move to the share, text and state that a heading names; return the heading of any other column."""
    parts = [part.strip() for part in heading.split(":")]
    for part in parts:
        if part in STATES:
            now["state"] = part
        elif part in TEXTS:
            now["text"] = part
        elif share := re.fullmatch(r"([\d.]+) %", part):
            now["removed"] = share[1]
        else:
            return part
    return None


@cache
def saved(source: str) -> list[dict]:
    return json.loads((RESULTS / f"{source}.json").read_text())


def of_quality(row: str, now: dict[str, str], other: str | None) -> list[float] | None:
    """Return a figure of the side-by-side table, seeds in the mean; None where the runs have none."""
    runs = [each for each in saved("quality") if each["row"] == row and each["removed"] == float(now["removed"])]
    assert runs, f"quality.json has no row {row} at {now['removed']} %"
    sizes = [[each["models"][who] for who in ("teacher", "student")] for each in runs]
    if other == "removed":
        inner = "non_embedding_parameters"
        return [mean(100.0 * (1.0 - student[inner] / teacher[inner]) for teacher, student in sizes)]
    if other == "KV bytes":
        return [mean(student["kv_bytes_per_token"] for _, student in sizes)]
    if other == "recovery":
        return [mean(each["recovery_tokens"] for each in runs) / 1000.0]
    states = [each["texts"][now["text"]] for each in runs]
    if not all(now["state"] in each for each in states):
        return None
    return [mean(each[now["state"]]["perplexity"] / each["dense"]["perplexity"] for each in states)]


def of_absorption(row: str, now: dict[str, str], other: str | None) -> list[float]:
    who = {"before": "start", "after": "student"}[now["state"]]
    return [each["texts"][now["text"]][who]["perplexity"] for each in saved("absorption") if each["row"] == row]


def of_hidden(row: str, now: dict[str, str], other: str | None) -> list[float]:
    return [each["ratios"][now["text"]] for each in saved("hidden_widths") if each["row"] == row]


def of_vocabulary(row: str, now: dict[str, str], other: str | None) -> list[float]:
    (figures,) = (each for each in saved("vocabulary") if each["row"] == row)
    sizes = {"M parameters": "parameters", "MB": "checkpoint_bytes"}
    if other in sizes:
        return [figures[sizes[other]] / 1e6]
    return [figures["texts"][now["text"]][str(other).replace(" ", "_")]]


def of_experts(row: str, now: dict[str, str], other: str | None) -> list[float]:
    (figures,) = (each for each in saved("experts") if each["row"] == row)
    if other == "M parameters":
        return [figures["parameters"]["student"] / 1e6]
    text = figures["texts"][now["text"]]
    return [text[now["state"]]["perplexity"] / text["dense"]["perplexity"]]


def of_serving(row: str, now: dict[str, str], other: str | None) -> list[float]:
    """Return the equal tokens of all, or the largest difference of a log-probability in thousandths."""
    rows = json.loads((RESULTS / "serving.json").read_text())["rows"]
    (figures,) = (each for each in rows if (each["engine"], each["student"]) == (now["engine"], row))
    if other == "equal tokens":
        return [figures["equal"], figures["tokens"]]
    return [1000.0 * figures["difference"]]


def of_equal_terms(row: str, now: dict[str, str], other: str | None) -> list[float] | None:
    """Return the ratio of each seed and the largest standard error; None where the row has no such state."""
    runs = sorted((each for each in saved("equal_terms") if each["row"] == row), key=lambda each: each["seed"])
    if other == "removed":
        return [mean(100.0 * (1.0 - each["kept"]) for each in runs)]
    if other == "KV bytes":
        return [mean(each["kv_bytes_per_token"] for each in runs)]
    states = [each["texts"][now["text"]].get(now["state"]) for each in runs]
    if None in states:
        return None
    return [*(each["times"] for each in states), max(each["error"] for each in states)]


def of_onpolicy(row: str, now: dict[str, str], other: str | None) -> list[float]:
    (figures,) = (each for each in saved("onpolicy") if each["row"] == row)
    if other == "KL on answers":
        return [figures["kl"], figures["kl_error"]]
    return [100.0 * (figures["agreement"] if other == "equal first choices" else figures["greedy"]["shared"])]


def of_chat(row: str, now: dict[str, str], other: str | None) -> list[float]:
    (figures,) = (each for each in saved("chat") if each["row"] == row)
    if other == "KL on answers":
        return [figures["kl"], figures["kl_error"]]
    if other == "perplexity ratio":
        return [figures["perplexity"]["student"] / figures["perplexity"]["teacher"]]
    shares = {"equal first choices": figures["agreement"], "greedy answers agree for": figures["greedy"]["shared"]}
    return [100.0 * (shares | {"parameters kept": figures["kept"]})[str(other)]]


def of_sublayers(row: str, now: dict[str, str], other: str | None) -> list[float]:
    """Return the perplexity over the teacher's, or a size."""
    (figures,) = (each for each in saved("sublayers") if each["row"] == row)
    if other == "parameters kept":
        return [100.0 * figures["kept"]]
    if other == "KV bytes":
        return [figures["kv_bytes_per_token"]["student"]]
    text = figures["texts"][now["text"]]
    return [text[{"before": "start", "after": "student"}[now["state"]]] / text["teacher"]]


READERS = {
    "chat": of_chat,
    "sublayers": of_sublayers,
    "onpolicy": of_onpolicy,
    "equal_terms": of_equal_terms,
    "serving": of_serving,
    "quality": of_quality,
    "absorption": of_absorption,
    "hidden_widths": of_hidden,
    "vocabulary": of_vocabulary,
    "experts": of_experts,
}
FACTS = {
    "chat": ("parameters kept", "KL on answers", "equal first choices", "greedy answers agree for", "perplexity ratio"),
    "sublayers": ("parameters kept", "KV bytes"),
    "onpolicy": ("KL on answers", "equal first choices", "greedy answers agree for"),
    "equal_terms": ("removed", "KV bytes"),
    "serving": ("equal tokens", "difference, thousandths"),
    "quality": ("removed", "KV bytes", "recovery"),
    "experts": ("M parameters",),
    "vocabulary": ("M parameters", "MB", "perplexity", "bits per byte", "bytes per token"),
}  # columns that are neither a text nor a description


def agrees(cell: str, values: list[float] | None) -> bool:
    """Return whether a cell states the values, each rounded to as many digits as it has."""
    if values is None:
        return cell in ("·", "")
    written = re.findall(r"[\d.]+", cell)
    places = [len(each.partition(".")[2]) for each in written]
    return [float(each) for each in written] == [round(value, digits) for value, digits in zip(values, places)]


def wrong(table: Table) -> list[str]:
    """Return the cells of a marked table that its source does not confirm."""
    faults, read = [], READERS[table.source]
    now: dict[str, str] = {}
    for row, heading, cell in table.figures():
        now = dict(table.options) if heading == table.header[1] else now
        other = place(heading, now)
        if other is None or other in FACTS.get(str(table.source), ()):
            values = read(row, now, other)
            if not agrees(cell, values):
                faults.append(f"{table.file.name}: {row}, {heading} ({now}): {cell}, the file has {values}")
    return faults


@pytest.mark.parametrize("table", MARKED, ids=lambda table: f"{table.file.name}-{table.rows[0][0][:20]}")
def test_figures_are_those_of_the_file(table):
    assert not wrong(table)


def test_every_table_of_figures_names_its_origin():
    unmarked = [
        f"{table.file.name}: {table.header}"
        for table in EVERY
        if table.source is None and sum(bool(MEASURED.match(cell)) for row in table.rows for cell in row[1:]) > 3
    ]
    assert not unmarked, "put <!-- figures: SOURCE --> or <!-- figures: none, REASON --> before the table"


def test_the_chip_model_has_the_figures_of_its_calibration():
    facts = saved("chip_calibration")
    (held,) = [table for table in EVERY if table.header == ["part", "median", "largest"]]
    for row, part in zip(held.rows, ("fitted", "held_out"), strict=True):
        expected = [round(100.0 * facts["products"][f"{part}_{which}"], 1) for which in ("median", "largest")]
        written = [float(re.sub(r"[^\d.]", "", cell)) for cell in row[1:]]
        assert written[0] == expected[0] and written[1] == round(expected[1])
    (speeds,) = [table for table in EVERY if table.header[:2] == ["student", "prefill measured"]]
    names = {"20 of 30 layers": "20 layers", "half the neurons": "768 neurons"}
    for row in speeds.rows:
        of_row = [each for each in facts["models"] if each["model"] == names.get(row[0], row[0])]
        ordered = sorted(of_row, key=lambda each: each["pass"], reverse=True)  # prefill, decode
        expected = [round(each[key], 2) for each in ordered for key in ("speedup", "predicted_speedup")]
        assert [float(cell) for cell in row[1:]] == expected, row[0]


def test_presets_have_the_values_that_the_guide_lists():
    (presets,) = [table for table in EVERY if table.header[0] == "`experiment=`"]
    names = {row[0].strip("`") for row in presets.rows}
    assert names | {"none"} == {file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")}
    for row in presets.rows:
        config = composed(f"experiment={row[0].strip('`')}")
        for heading, cell in zip(presets.header, row, strict=True):
            section, _, field = heading.strip("`").partition(".")
            if field:
                assert float(cell) == config[section][field], (row[0], heading)


def test_a_wrong_figure_is_found():
    lines = [
        "| row | removed | topics: before | after |",
        "|---|---|---|---|",
        "| `pangu_light` | 27.4 % | 3.33 | 1.57 |",
    ]
    table = Table(Path("x.md"), "<!-- figures: quality removed=25 -->", lines)
    (fault,) = wrong(table)
    assert "1.57" in fault and "after" in fault
    assert len(MARKED) >= 8 and sum(len(table.rows) for table in MARKED) > 50
