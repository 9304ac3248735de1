"""Comparing runs: what differs, which points no other beats, and the files and the page that say so."""

import csv
import json
import re

import pytest

from pipeline.cli.compare import compare, write_comparison
from pipeline.report.compare import ABSENT, as_csv, as_text, as_values, columns, front, points_of
from pipeline.report.compare_page import compare_page, recoveries, trade_off
from pipeline.report.drawing import Dot, Line
from pipeline.runtime.artifacts import Store
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.run_folder import Shown, show
from tests.reports import MADE, Balanced, example_report
from tests.stores import make, of


def report(parameters=1_500_000, perplexity=25.0, decode=60.0, recovered=True, **settings):
    values = example_report(recovered=recovered)
    values |= {"settings": MADE["settings"] | {"shape": settings}}
    values["parameters"] = {"teacher": 2_000_000, "student": parameters}
    values["perplexity"]["news"]["student"]["perplexity"] = perplexity
    values["speed"]["student"]["decode"] = decode
    return values


REPORTS = {
    "large": report(1_800_000, 22.0, 50.0, layers=3),
    "small": report(1_000_000, 40.0, 80.0, layers=2),
    "worse": report(1_800_000, 30.0, 45.0, layers=3, neurons=8),
}


def save(folder, reports=REPORTS, page=True):
    for name, values in reports.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "report.json").write_text(json.dumps(values))
        if page:
            (folder / name / "report.html").write_text("")
    return folder


def test_only_the_settings_that_differ_are_named():
    points = points_of(REPORTS)
    assert [point.name for point in points] == ["small", "large", "worse"]
    assert [dict(point.settings) for point in points] == [
        {"shape.layers": "2", "shape.neurons": ABSENT},
        {"shape.layers": "3", "shape.neurons": ABSENT},
        {"shape.layers": "3", "shape.neurons": "8"},
    ]
    assert columns(points)[-2:] == ["shape.layers", "shape.neurons"] and columns(points)[0] == "parameters"
    (alone,) = points_of({"one": REPORTS["small"]})
    assert alone.settings == {}


def test_the_front_holds_what_no_other_beats_in_both():
    points = points_of(REPORTS)
    assert front(points, "parameters") == front(points, "speedup") == {"large", "small"}
    same = points_of({"a": REPORTS["large"], "b": REPORTS["large"]})
    assert front(same, "parameters") == {"a", "b"}


def test_figures_are_relative_to_the_teacher():
    small = points_of(REPORTS)[0]
    assert small.quality == pytest.approx(2.0) and small.ratios == {"news": 2.0}
    assert (small.size_ratio, small.speedup, small.kv_ratio) == (0.5, 2.0, 0.75)
    values = {each["run"]: each for each in as_values(points_of(REPORTS))}
    assert values["small"]["perplexity_over_teacher"] == {"news": 2.0}
    rows = list(csv.DictReader(as_csv(points_of(REPORTS)).splitlines()))
    assert [float(row["perplexity_over_teacher.news"]) for row in rows] == [2.0, 1.1, 1.5]
    assert rows[0]["settings.shape.layers"] == "2"


def test_what_was_not_measured_is_absent():
    values = report(recovered=False)
    values["speed"] = None
    points = points_of({"a": values, "b": values})
    assert not any("decode" in column for column in columns(points)) and recoveries(points) is None
    page = compare_page(points, {}, "t")
    assert "Recovery" not in page and page.count("<svg") == 1
    gone = report(perplexity=None)
    (point,) = as_values(points_of({"gone": gone}))
    assert point["perplexity"] == {"news": None}
    trade_off(points_of({"gone": gone}), "parameters")


def test_drawings_show_every_run_and_the_whole_recovery_where_it_is_recorded():
    points = points_of(REPORTS)
    dots = [mark for mark in trade_off(points, "parameters").marks if isinstance(mark, Dot)]
    assert [dot.hollow for dot in dots] == [False, False, True]
    values = report()
    values["recovery"]["curves"]["held_out_kl"]["points"] = [[0.0, 2.5], [64.0, 1.5], [128.0, 1.0]]
    (drawn,) = (mark for mark in recoveries(points_of({"a": values})).marks if isinstance(mark, Line) and mark.tip)
    assert len(drawn.points) == 3
    ends = points_of(REPORTS)[0].recovery
    assert ends == [(0.0, 2.5), (128.0, 1.0)]


def test_the_page_is_balanced_escaped_and_links_to_the_reports():
    points = points_of({"a<b>": REPORTS["small"], "c": REPORTS["large"]})
    page = compare_page(points, {"a<b>": "x y/report.html"}, "two <runs>")
    seen = Balanced(page)
    assert not seen.faults and not seen.open and "<b>" not in page
    assert [value for name, value in seen.attributes if name == "href"] == ["x%20y/report.html"]
    assert "two <runs>" in " ".join(seen.words)
    assert '<div class="scroll runs wide">' in page and "${" not in page


def test_a_sweep_folder_stands_for_the_runs_below_it(tmp_path, capsys):
    save(tmp_path / "sweep")
    assert compare([str(tmp_path / "sweep")]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "sweep"
    assert str(folder / "compare.html") in printed and printed.index("small") < printed.index("large")
    values = json.loads((folder / "compare.json").read_text())
    assert [each["run"] for each in values] == ["small", "large", "worse"]
    assert 'href="small/report.html"' in (folder / "compare.html").read_text()
    assert (folder / "compare.csv").read_text().count("\n") == 4
    write_comparison([folder])  # what it wrote is no run
    assert json.loads((folder / "compare.json").read_text()) == values


def test_runs_are_named_by_their_paths_and_the_output_can_be_elsewhere(tmp_path):
    save(tmp_path / "one", {"x": REPORTS["small"]})
    save(tmp_path / "two", {"x": REPORTS["large"]}, page=False)
    write_comparison([tmp_path / "one/x", tmp_path / "two/x"], tmp_path / "out/here")
    page = (tmp_path / "out/here/compare.html").read_text()
    assert "one/x" in page and "two/x" in page and re.findall('href="([^"]*)"', page) == ["../../one/x/report.html"]
    write_comparison([tmp_path / "one/x", tmp_path / "two/x", tmp_path / "two"])
    assert len(json.loads((tmp_path / "compare.json").read_text())) == 2


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: None, "absent"),
        (lambda folder: (folder / "absent").mkdir(), "report.json"),
        (lambda folder: save(folder, {"absent": {"model": "m"}}), "settings"),
        (lambda folder: (save(folder, {"absent": {}}) / "absent/report.json").write_text("{"), "damaged"),
        (lambda folder: save(folder, {"absent": []}), "dictionary"),
        (lambda folder: save(folder, {"absent": report() | {"parameters": {"teacher": 0}}}), "parameters"),
        (lambda folder: save(folder, {"absent": report() | {"perplexity": {}}}), "perplexity"),
        (lambda folder: save(folder, {"absent": report() | {"speed": "x"}}), "speed"),
        (lambda folder: save(folder, {"absent": report() | {"recovery": 5}}), "recovery"),
        (lambda folder: (save(folder, {"absent": {}}) / "absent/report.json").write_text("[" * 100_000), "damaged"),
    ],
)
def test_a_run_without_a_report_is_refused_in_one_line(make, named, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=named) as refused:
        compare([str(tmp_path / "absent")])
    assert str(tmp_path / "absent") in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("compare.*"))


def test_a_figure_that_was_not_finite_is_left_out_of_its_curve(tmp_path):
    values = report()
    values["recovery"]["curves"]["held_out_kl"]["points"] = [[0.0, None], [8.0, 0.5]]
    write_comparison([save(tmp_path, {"one": values})])
    (point,) = points_of({"one": values})
    assert point.recovery == [(8.0, 0.5)]


def test_a_report_that_was_changed_after_its_run_is_refused(tmp_path):
    store = Store(tmp_path / "artifacts", Ranks(0, 1, 0), "r1")
    made = make(store, "report", text=json.dumps(report()))
    shown = {"report.json": Shown(made, "scores.txt", delivered=True)}
    view = show(tmp_path / "runs", "one", of(made), shown)
    assert "one" in write_comparison([view])
    path = view / "report.json"
    path.write_text(path.read_text().replace("25.0", "24.0"))
    with pytest.raises(ValueError, match=r"report.json was changed after its run"):
        write_comparison([view])


@pytest.mark.parametrize("words", [[], ["--output"], ["--other", "x"]])
def test_a_mistake_in_the_command_is_answered_with_its_usage(words):
    with pytest.raises(ValueError, match="usage"):
        compare(words)


def test_the_table_of_the_terminal_has_a_line_for_each_run():
    points = points_of(REPORTS)
    lines = as_text(points).splitlines()
    assert len(lines) == 4 and lines[0].startswith("run") and all(point.name in "\n".join(lines) for point in points)
