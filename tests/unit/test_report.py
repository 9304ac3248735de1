"""The report's figures say what the blueprint says, and its page is whole, safe and self-contained."""

import json
import re
import struct
from xml.etree import ElementTree

import pytest

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, LayerPlan, everything
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.report.anatomy_map import anatomy_map, fate
from pipeline.report.axes import Scale, number, scale
from pipeline.report.comparison import rows, summary
from pipeline.report.drawing import Box, Dot, Drawing, Line, save_png, svg
from pipeline.report.exported import export_section
from pipeline.report.facts import cut_facts, perplexity_of, recovery_curves, recovery_facts, start_of
from pipeline.report.figures import curve, duration, perplexities, thinned
from pipeline.report.local_distill import errors_by_layer
from pipeline.report.page import page
from pipeline.report.removed import removed_section
from pipeline.report.rounds import cuts, layers_by_round, round_facts, rounds_section
from tests.reports import (
    BLUEPRINTS,
    CURVES,
    EXPORT,
    GGUF,
    SIZES,
    STAGES,
    Balanced,
    donating,
    example_drawings,
    example_report,
    example_scores,
)
from tests.tiny import config_of, tensors_of, tiny_model


@pytest.mark.parametrize("blueprint", BLUEPRINTS.values(), ids=BLUEPRINTS)
def test_the_map_shows_every_head_once_in_the_state_the_blueprint_gives_it(blueprint):
    drawn = anatomy_map(SIZES, blueprint, example_scores())
    heads = [mark for mark in drawn.marks if isinstance(mark, Box) and mark.tip and ", head " in mark.tip]
    assert len(heads) == sum(w.heads for w in SIZES.layers)
    taken = [(g, plan.host) for plan in blueprint.layers for g in plan.groups]
    own = sum(len(g.heads) for g, host in taken if g.layer == host)
    given = sum(len(g.heads) for g, host in taken if g.layer != host)
    assert sum(mark.role == "kept" for mark in heads) == own
    assert sum(mark.role == "donated" for mark in heads) == given
    assert sum(mark.role == "removed" for mark in heads) == len(heads) - own - given


def test_a_donation_is_told_with_its_donor_host_and_number_of_groups():
    assert fate(donating()).donations == {(2, 1): 1}
    drawn = anatomy_map(SIZES, donating(), example_scores())
    assert "layer 2 gives 1 KV group to layer 1" in drawn.alt
    assert any(isinstance(mark, Dot) and mark.tip == "layer 2 gives 1 KV group to layer 1" for mark in drawn.marks)
    tips = [mark.tip for mark in drawn.marks if isinstance(mark, Box) and mark.role == "donated" and mark.tip]
    assert all(tip.startswith("layer 2, head ") and tip.endswith("donated to layer 1") for tip in tips)


def test_the_facts_of_a_cut_count_what_the_blueprint_keeps():
    scores = example_scores()
    facts = cut_facts(SIZES, donating(), scores)
    assert facts["dropped_layers"] == [2]
    assert facts["donations"] == [{"from": 2, "to": 1, "groups": 1}]
    assert (facts["heads_kept"], facts["heads"]) == (10, 16)
    assert (facts["neurons_kept"], facts["neurons"]) == (24 + 12 + 24, 96)
    half = float(scores.neurons[1][::2].sum() / scores.neurons[1].sum())
    assert facts["neuron_score_kept"] == pytest.approx((1 + half + 1) / 3)
    assert facts["channel_score_kept"] == pytest.approx(float(scores.channels[:24].sum() / scores.channels.sum()))
    assert cut_facts(SIZES, everything(SIZES), scores)["neuron_score_kept"] == pytest.approx(1)


def test_the_facts_and_the_page_name_the_layers_that_lost_a_sublayer():
    scores, blueprint = example_scores(), BLUEPRINTS["sublayers"]
    facts = cut_facts(SIZES, blueprint, scores)
    assert (facts["removed_attention"], facts["removed_ffn"], facts["dropped_layers"]) == ([1], [2], [3])
    assert (facts["heads_kept"], facts["neurons_kept"], facts["neuron_score_kept"]) == (8, 48, pytest.approx(1))
    report = example_report() | {"cut": facts}
    section = removed_section(report, example_drawings(report))
    assert "Layers that lost their attention alone: 1." in section and "lost their FFN alone: 2." in section
    tips = {mark.tip for mark in anatomy_map(SIZES, blueprint, scores).marks if isinstance(mark, Box) and mark.tip}
    assert {
        "layer 2: its FFN is removed; its 24 neurons are removed",
        "layer 3: removed; its 24 neurons are removed",
    } <= tips


def test_layers_of_unequal_width_are_drawn_each_with_its_own_heads_and_neurons():
    sizes = Sizes(96, 32, 8, (LayerSizes(4, 2, 24), LayerSizes(2, 1, 10), LayerSizes(6, 2, 16)))
    drawn = anatomy_map(sizes, everything(sizes), example_scores(sizes))
    heads = [mark.tip for mark in drawn.marks if isinstance(mark, Box) and mark.tip and ", head " in mark.tip]
    assert [sum(tip.startswith(f"layer {layer},") for tip in heads) for layer in range(3)] == [4, 2, 6]


@pytest.mark.parametrize("blueprint", BLUEPRINTS.values(), ids=BLUEPRINTS)
def test_every_drawing_is_well_formed_inside_its_canvas_and_the_same_size_as_its_picture(blueprint, tmp_path):
    report = example_report(blueprint)
    for name, drawing in example_drawings(report, blueprint).items():
        root = ElementTree.fromstring(svg(drawing))
        assert root.attrib["aria-label"] == drawing.alt != ""
        for mark in drawing.marks:
            if isinstance(mark, Box):
                assert mark.x >= -1 and mark.x + mark.width <= drawing.width + 1
                assert mark.y >= -1 and mark.y + mark.height <= drawing.height + 1
        save_png(drawing, tmp_path / f"{name}.png", scale=1, margin=10.0)
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        wide, high = struct.unpack(">II", picture[16:24])
        assert abs(wide - drawing.width - 20) <= 1 and abs(high - drawing.height - 20) <= 1


def test_a_picture_shows_a_mark_where_and_in_the_colour_the_drawing_has_it(tmp_path):
    from matplotlib.image import imread

    drawing = Drawing(40, 20, "a box", (Box(10, 5, 20, 10, "kept"),))
    save_png(drawing, tmp_path / "box.png", scale=1, margin=0.0)
    pixels = (imread(tmp_path / "box.png")[..., :3] * 255).round()
    assert pixels[10, 20].tolist() == [0x00, 0x72, 0xB2]
    assert pixels[2, 20].tolist() == pixels[10, 5].tolist() == [0xFF, 0xFD, 0xF9]


def test_a_number_is_short_and_not_rounded_to_another():
    message = {0.0: "0", 1.5e-4: "1.5e-4", 3e-4: "3e-4", 0.00031: "3.1e-4", 0.01: "0.01", 1_234_567.0: "1.23M"}
    assert {value: number(value) for value in message} == message


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [(3.0, 3.0), (0.001, 900.0), (20.0, 26.0), (1e-9, 1e-4), (5e5, 5.1e5)])
def test_ticks_are_a_few_round_values_inside_a_scale_that_keeps_their_order(values, log):
    found = scale(values, 100.0, 0.0, log=log)
    ticks = found.ticks(5)
    assert 1 <= len(ticks) <= 12
    assert all(found.low <= tick <= found.high * 1.000001 for tick in ticks)
    places = [found(value) for value in sorted({*values, *ticks})]
    assert places == sorted(places, reverse=True)
    assert all(0 <= place <= 100.0001 for place in places)
    assert len({number(tick) for tick in ticks}) == len(ticks)


def test_a_scale_maps_its_ends_to_its_pixels():
    assert [Scale(1, 100, 0, 10, log=True)(value) for value in (1, 10, 100)] == pytest.approx([0, 5, 10])
    assert [Scale(0, 4, 10, 0)(value) for value in (0, 1, 4)] == pytest.approx([10, 7.5, 0])


def test_thinning_a_curve_keeps_its_mean_and_a_short_one_whole():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    short = thinned(points, 100)
    assert len(short) == 100
    assert sum(value for _, value in short) / 100 == pytest.approx(sum(value for _, value in points) / 1000)
    assert thinned(points[:50], 100) == points[:50]


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


def test_the_comparison_gives_both_sides_and_their_relation():
    found = {row.label: row for row in rows(example_report())}
    assert (found["parameters"].teacher, found["parameters"].student) == ("2.00\xa0M", "1.50\xa0M")
    assert found["parameters"].change == "−25.0%"
    assert (found["query heads"].student, found["query heads"].change) == ("2–4, mean 3.333", "−16.7%")
    assert found["hidden channels"].change == "–"
    assert found["perplexity, news"].change == "×1.25"
    assert (found["decode, tokens/s"].student, found["decode, tokens/s"].change) == ("60.0", "×1.50")
    assert not any("tokens/s" in row.label for row in rows(example_report(speed=False)))


def test_the_summary_is_a_plain_table_with_the_same_rows():
    report = example_report()
    lines = summary(report).splitlines()
    assert lines[0].split() == ["teacher", "student", "change"]
    assert [line.split("  ")[0] for line in lines[1 : len(rows(report)) + 1]] == [row.label for row in rows(report)]
    assert lines[-1].startswith("perplexity on news before recovery") and lines[-1].endswith("80.00")
    assert "before recovery" not in summary(example_report(recovered=False))


def test_speeds_that_were_not_steady_are_said_to_be_rough():
    report = example_report()
    assert "noisy" not in summary(report) and "noisy" not in page(report, example_drawings(report))
    report["speed"]["student"]["decode_runs"] = [20.0, 60.0, 50.0]
    message = "differ by up to ×3.0"
    assert message in summary(report) and message in page(report, example_drawings(report))


def test_report_json_holds_no_number_that_was_not_measured():
    report = example_report(recovered=False, speed=False)
    assert report["recovery"] is None and report["speed"] is None
    assert set(report["perplexity"]["news"]) >= {"teacher", "student", "sequence", "stride", "tokens"}
    assert "start" not in report["perplexity"]["news"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_recovery_curves_take_what_each_row_has():
    rows_ = [{"step": 0, "tokens": 0, "held_out_kl": 2.0}, {"step": 1, "tokens": 64, "loss": 3.0, "learning_rate": 0.1}]
    curves = recovery_curves(rows_, "tokens")
    assert curves["held_out_kl"] == [(0.0, 2.0)] and curves["loss"] == [(64.0, 3.0)]
    facts = recovery_facts(curves, "tokens")
    assert facts["tokens"] == 64 and facts["curves"]["loss"] == {"first": 3.0, "last": 3.0}


def test_durations_read_as_one_would_say_them():
    assert [duration(s) for s in (0.01, 0.25, 42, 100, 7200)] == ["< 0.1 s", "0.2 s", "42 s", "1.7 min", "2.0 h"]


def in_rounds(recovered=True):
    """Two rounds: neurons of layer 1 go, then more of them, a head, channels and all of layer 2."""
    model = tiny_model("llama")
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    whole = everything(anatomy.sizes)
    first = Blueprint(whole.channels, (whole.layers[0], LayerPlan(1, whole.layers[1].groups, tuple(range(12))),
                                       *whole.layers[2:]))  # fmt: skip
    rows_ = [
        [{"step": 0, "tokens": 0, "held_out_kl": 3.0}, {"step": 1, "tokens": 64, "loss": 1.0, "held_out_kl": 2.0}],
        [{"step": 1, "tokens": 64, "held_out_kl": 4.0}, {"step": 3, "tokens": 192, "loss": 1.0, "held_out_kl": 1.5}],
    ]
    message = round_facts(anatomy, [first, donating()], rows_ if recovered else [], "tokens")
    return anatomy, [first, donating()], message


def test_the_facts_of_rounds_are_the_sizes_of_what_each_blueprint_makes():
    anatomy, blueprints, message = in_rounds()
    assert message["teacher"]["parameters"] == anatomy.parameters()[0] and len(message["rounds"]) == 2
    for blueprint, each in zip(blueprints, message["rounds"], strict=True):
        student = blueprint.student(anatomy)
        assert (each["parameters"], each["non_embedding_parameters"]) == student.parameters()
        assert sum(each["left"]) == student.parameters()[1] - student.sizes.hidden, "all but the final norm"
    first, last = message["rounds"]
    assert first["neurons"] == [12, 24] and first["heads"] == [4, 4] and last["heads"] == [2, 4]
    assert last["layers"] == [3, 3] and last["hidden"] == [24, 24] and last["left"][2] == 0
    assert (first["tokens"], first["held_out_kl"]) == (64, [3.0, 2.0])
    assert (last["tokens"], last["held_out_kl"]) == (192, [4.0, 1.5])
    assert cuts(message, "tokens") == [(64.0, "round 2")] and cuts(in_rounds(False)[2], "tokens") == []


def test_a_column_of_the_rounds_is_a_whole_layer_of_what_stays_and_what_each_round_took():
    _, _, message = in_rounds()
    drawn = layers_by_round(message)
    ElementTree.fromstring(svg(drawn))
    boxes = [mark for mark in drawn.marks if isinstance(mark, Box) and mark.tip]
    full = next(mark.height for mark in drawn.marks if isinstance(mark, Box) and mark.role == "paper")
    for layer in range(4):
        column = [mark for mark in boxes if mark.tip.startswith(f"layer {layer}")]
        stays = [mark for mark in column if mark.tip.endswith("remains")]
        assert sum(mark.height for mark in column) == pytest.approx(full)
        share = message["rounds"][-1]["left"][layer] / message["teacher"]["left"][layer]
        assert sum(mark.height for mark in stays) == pytest.approx(share * full)
        assert len(stays) == (layer != 2) and all(mark.opacity == 1 for mark in stays)
    assert sum(", round 1:" in mark.tip for mark in boxes) == 1, "the first round took from layer 1 alone"


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


def test_the_page_tells_of_rounds_each_on_a_line_and_of_their_cuts_where_there_were_rounds():
    report = example_report()
    drawings = example_drawings(report)
    assert "round\xa01" not in page(report, drawings)
    _, _, message = in_rounds()
    assert start_of(report) == "before recovery"
    report["rounds"] = message
    drawings["rounds"] = layers_by_round(message)
    drawings["perplexity"] = perplexities(perplexity_of(report), start_of(report))
    drawings["loss"] = curve("Distillation loss", CURVES["loss"], "tokens", "", cuts=cuts(message, "tokens"))
    (dashed,) = (mark for mark in drawings["loss"].marks if isinstance(mark, Line) and mark.dashed)
    assert dashed.points[0][0] == pytest.approx(46.0 + 0.5 * (348 - 46 - 10)) and dashed.tip == "round 2 begins"
    seen = Balanced(page(report, drawings))
    words = " ".join(seen.words)
    assert not seen.faults and not seen.open
    for expected in (
        "round\xa01",
        "round\xa02",
        "4\xa0→\xa01.5",
        "After each round of pruning",
        "after the last cut",
        "12–24",
        "channels",
    ):
        assert expected in words, expected
    assert "before recovery" not in words and "84% on news" not in words
    assert summary(report).splitlines()[-1] == "perplexity on news after the last cut: 80.00"
    assert json.loads(json.dumps(message)) == message
    alone = rounds_section({"rounds": in_rounds(False)[2]}, drawings)
    assert "held-out" not in alone and "tokens" not in alone and "scored and pruned by one part" in alone


def test_the_page_shows_how_the_gguf_is_used():
    report = example_report() | {"export": EXPORT, "gguf": GGUF}
    seen = Balanced(export_section(report, {}))
    assert not seen.faults and not seen.open
    assert "llama-cli -m runs/demo/student/model.gguf" in "".join(seen.words)


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
