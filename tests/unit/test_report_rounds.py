"""What the report shows of pruning in rounds."""

import json
from xml.etree import ElementTree

import pytest

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, LayerPlan, everything
from pipeline.report.comparison import summary
from pipeline.report.drawing import Box, Line, svg
from pipeline.report.facts import perplexity_of, start_of
from pipeline.report.figures import curve, perplexities
from pipeline.report.page import page
from pipeline.report.rounds import cuts, layers_by_round, round_facts, rounds_section
from tests.reports import (
    CURVES,
    Balanced,
    donating,
    example_drawings,
    example_report,
)
from tests.tiny import config_of, tensors_of, tiny_model


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
