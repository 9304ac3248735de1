"""The report's figures say what the blueprint says, and its page is whole, safe and self-contained."""

import json
import struct
from xml.etree import ElementTree

import pytest

from pipeline.model.blueprint import everything
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.report.anatomy_map import anatomy_map, fate
from pipeline.report.axes import Scale, number, scale
from pipeline.report.comparison import rows, summary
from pipeline.report.drawing import Box, Dot, Drawing, svg
from pipeline.report.facts import cut_facts, recovery_curves, recovery_facts
from pipeline.report.figures import duration, thinned
from pipeline.report.page import page
from pipeline.report.picture import save_png
from pipeline.report.removed import removed_section
from tests.reports import (
    BLUEPRINTS,
    SIZES,
    donating,
    example_drawings,
    example_report,
    example_scores,
)


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
