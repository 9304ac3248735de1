"""The report's page is balanced, self-contained, safe, and shows what was measured."""

import re
from xml.etree import ElementTree

import pytest

from pipeline.report.comparison import rows, summary
from pipeline.report.drawing import Dot, svg
from pipeline.report.exported import export_section
from pipeline.report.facts import perplexity_of
from pipeline.report.figures import perplexities
from pipeline.report.local_distill import errors_by_layer
from pipeline.report.page import page
from pipeline.report.picture import save_png
from tests.reports import (
    BLUEPRINTS,
    EXPORT,
    GGUF,
    STAGES,
    Balanced,
    example_drawings,
    example_report,
)


@pytest.mark.parametrize("blueprint", BLUEPRINTS.values(), ids=BLUEPRINTS)
@pytest.mark.parametrize("recovered", [True, False])
@pytest.mark.parametrize("speed", [True, False])
def test_a_page_is_balanced_self_contained_and_tells_only_what_was_measured(blueprint, recovered, speed):
    report = example_report(blueprint, recovered, STAGES if speed else {}, texts=("news", "law"), speed=speed)
    text = page(report, example_drawings(report, blueprint))
    seen = Balanced(text)
    assert not seen.faults and not seen.open
    for name, value in seen.attributes:
        assert name not in ("src", "href", "srcset", "data", "action"), (name, value)
    assert not re.search(r"url\(|@import|https?:", text)
    words = " ".join(seen.words)
    assert ("before recovery" in words) == recovered
    assert ("Distillation loss" in words) == recovered
    assert ("Decoding" in words) == ("tokens/s" in words) == speed
    assert ("Time and memory" in words) == bool(report["stages"])
    assert "$" not in words and "None" not in words and "nan" not in words.lower().split()
    for expected in ("20.00", "25.00", "sequence 32, stride 32, 124 predicted tokens", "python -m pipeline run=demo"):
        assert expected in words


def test_the_map_is_shown_where_a_layer_differs_from_another_and_the_headline_says_the_ratio():
    for name, alike, shown in (("width only", True, False), ("width only", False, True), ("depth only", True, True)):
        report = example_report(BLUEPRINTS[name])
        if alike:
            report["shape"]["student"] = report["shape"]["teacher"] | {"neurons": 3}
        text = page(report, example_drawings(report, BLUEPRINTS[name]))
        assert ("Map of the cut" in text) == ("score kept" in text) == shown
        assert "75.0% of the teacher" in text and "Removed parts" in text


def test_what_a_model_wrote_is_shown_as_text_and_never_as_markup():
    report = example_report()
    report["samples"][0]["student"] = "<script>alert(1)</script>"
    text = page(report, example_drawings(report))
    assert text.count("<script>") == 1 and "<b>" not in text
    assert "<script>alert(1)</script>" in "".join(Balanced(text).words)


def test_benchmark_tasks_stand_beside_each_other_with_their_errors():
    report = example_report()
    for who, value in (("teacher", 0.5), ("student", 0.45)):
        report["tasks"][who] = {"arc": {"acc": value, "acc_stderr": 0.01, "questions": 2376}}
    words = " ".join(Balanced(page(report, example_drawings(report))).words)
    assert "0.500 ± 0.010" in words and "0.450 ± 0.010" in words
    assert "Benchmark tasks" in words
    (line,) = (line for line in summary(report).splitlines() if line.startswith("arc, acc"))
    assert line.split() == ["arc,", "acc", "0.500", "±", "0.010", "0.450", "±", "0.010"]
    plain = example_report()
    assert "Benchmark tasks" not in page(plain, example_drawings(plain))


def test_a_perplexity_over_the_teachers_stands_with_its_error_where_there_is_one():
    """Of one sequence there is no error, and no line; without recovery the start has no column."""
    report, alone = example_report(), example_report(recovered=False)
    assert "relative to the teacher" not in page(report, example_drawings(report))
    for each in (report, alone):
        for who, times in (("start", 4.0), ("student", 1.25)):
            if who in each["perplexity"]["news"]:
                each["perplexity"]["news"][who]["over_teacher"] = {"times": times, "error": 0.031}
    for each, cells in ((report, "4.00 ± 0.03 1.25 ± 0.03"), (alone, "1.25 ± 0.03")):
        words = " ".join(" ".join(Balanced(page(each, example_drawings(each))).words).split())
        assert f"relative to the teacher {cells} bits per byte" in words


@pytest.mark.parametrize(("message", "shown"), [(None, "∞"), (1e304, "1.0e+304")])
def test_a_model_that_is_gone_is_told_and_drawn_without_a_row_of_digits(message, shown, tmp_path):
    report = example_report()
    text = report["perplexity"]["news"]
    for who in ("start", "student"):
        text[who] |= {"perplexity": message, "over_teacher": {"times": message, "error": None}}
    (row,) = (row for row in rows(report) if row.label.startswith("perplexity"))
    assert (row.student, row.change) == (shown, "×∞" if message is None else "×5.0e+302")
    assert f"{shown}" in summary(report).splitlines()[-1]
    drawing = perplexities(perplexity_of(report))
    assert f"student {shown}" in drawing.alt
    whole = page(report, example_drawings(report))
    assert whole.count(shown) > 4 and "nan" not in svg(drawing) and "0" * 30 not in whole and "None" not in whole
    save_png(drawing, tmp_path / "drawn.png")


def test_the_page_tells_what_each_ffn_learnt_where_it_did():
    report, errors = example_report(), [
        {"layer": 0, "before": 0.5, "after": 0.25},
        {"layer": 1, "before": 0.3, "after": 0.3},
    ]  # fmt: skip
    drawings = example_drawings(report)
    assert "Local distillation" not in page(report, drawings)
    report["blocks"], drawings["blocks"] = errors, errors_by_layer(errors)
    ElementTree.fromstring(svg(drawings["blocks"]))
    dots = [mark for mark in drawings["blocks"].marks if isinstance(mark, Dot) and mark.tip]
    assert [mark.tip for mark in dots[::2]] == ["layer 0: 0.5 → 0.25", "layer 1: 0.3 → 0.3"]
    (one, learnt), (other, same) = (dots[:2], dots[2:])
    assert learnt.y > one.y and same.y == other.y and (one.x, other.x) == (learnt.x, same.x)
    seen = Balanced(page(report, drawings))
    words = " ".join(seen.words)
    assert not seen.faults and not seen.open
    assert "Local distillation" in words and "from 0.4 to 0.28" in words


def test_the_page_says_what_recovery_took_back_but_not_of_a_teacher_that_was_corrected():
    """A part of what the cut added is then in no figure: start and student come from a nearer teacher."""
    report = example_report()
    assert "84% on news" in page(report, example_drawings(report))  # log(80 / 25) / log(80 / 20)
    corrected = report | {"correction": {}}
    assert "84% on news" not in page(corrected, example_drawings(corrected))


def test_the_time_of_stages_is_told_of_every_device_that_ran_one():
    report = example_report()
    one = page(report, example_drawings(report))
    assert "took 5.0 min on chip (cpu, float32, 2 threads). Peak memory is the resident" in one
    cut = STAGES["cut"] | {"devices": ["another chip", "chip"]}
    report = example_report(stages=STAGES | {"cut": cut})
    several = page(report, example_drawings(report))
    assert "took 5.0 min on another chip and chip. Peak memory is the device memory, on a CPU the resident" in several


PADDED = {"parameters": [1000, 1500], "kv_values_per_token": [40, 50], "layers": [{"layer": 0, "neurons": [1, 2]}] * 3}


@pytest.mark.parametrize(
    ("changed", "expected", "absent"),
    [
        ({}, ["stock LlamaForCausalLM", "without trust_remote_code", "are equal"], ["=True", "zeros"]),
        (
            {"form": "own", "class": "PrunedForCausalLM"},
            ['student", trust_remote_code=True)'],
            ["without trust", "zeros"],
        ),
        (
            {"form": "padded", "padded": PADDED},
            ["without trust_remote_code", "+50.0%", "+25.0%", "layers: 3"],
            ["=True"],
        ),
        (
            {"form": "decilm", "class": "DeciLMForCausalLM, by our reader of its rules", "padded": PADDED},
            ["as DeciLMForCausalLM (", "vllm serve runs/demo/student --trust-remote-code", "+50.0%"],
            ["from_pretrained", "by our reader"],
        ),
        ({"difference": 2e-5, "folded": True}, ["by at most 2.0e-05", "folded into"], ["are equal"]),
    ],
)
def test_the_page_says_in_which_form_the_student_leaves_and_how_it_is_loaded(changed, expected, absent):
    report = example_report()
    assert export_section(report, {}) == ""
    report["export"] = EXPORT | changed
    seen = Balanced(export_section(report, {}))
    words = "".join(seen.words)
    assert not seen.faults and not seen.open
    assert all(message in words for message in expected) and not any(message in words for message in absent), words
    if "padded" not in changed and changed.get("form") != "decilm":
        compile("".join(word for word in seen.words if "from_pretrained" in word), "snippet", "exec")


def test_the_page_shows_how_the_gguf_is_used():
    report = example_report() | {"export": EXPORT, "gguf": GGUF}
    seen = Balanced(export_section(report, {}))
    assert not seen.faults and not seen.open
    assert "llama-cli -m runs/demo/student/model.gguf" in "".join(seen.words)
