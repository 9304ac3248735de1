"""recipe=trsp on tiny models by the real command: layers picked by gates, emptied, deleted, and nothing afterwards."""

import json

import pytest
import torch

from pipeline.runtime.checkpoint import open_checkpoint
from tests.world import make_world, pipeline, settings

STAGES = "stages=[shape,layer_gates,regularize]"


def requested(world, **changed):
    small = {
        "recipe": "trsp",
        "shape__neurons": None,
        "layer_gates__tokens": 192,
        "layer_gates__batch_size": 3,
        "regularize__weight": 0.1,
    }
    return settings(world, **(small | changed))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("trsp"))


def rows(world, artifacts):
    (folder,) = (world / artifacts).glob("regularize-*")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rounds(world, artifacts):
    (folder,) = (world / artifacts).glob("layer_gates-*")
    return [json.loads(line)["entry"] for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_one_command_deletes_the_picked_layers_of_the_settled_model_and_reports(world):
    said = pipeline("run=trsp", *requested(world), cwd=world).stdout
    view = world / "runs" / "trsp"
    depth, report = (json.loads((view / f"{name}.json").read_text()) for name in ("depth", "report"))
    assert depth["kept"] == depth["tried"][-1]["kept"] and len(depth["kept"]) == 3 and 0 in depth["kept"]
    settled, start, student = (open_checkpoint(view / name) for name in ("restored", "initial_student", "student"))
    for name, tensor in start.items():
        layer = name.split(".")[2] if ".layers." in name else None
        origin = name if layer is None else name.replace(f".{layer}.", f".{depth['kept'][int(layer)]}.", 1)
        assert torch.equal(tensor, settled[origin]) and torch.equal(student[name], tensor), name
    assert student.config["model_type"] == "llama" and student.config["num_hidden_layers"] == 3
    teacher = open_checkpoint(world / "model")
    assert not any(torch.equal(settled[name], teacher[name]) for name in teacher), "all weights are trained"
    assert report["recovery"] is None and report["cut"]["dropped_layers"] == [({0, 1, 2, 3} - set(depth["kept"])).pop()]
    for text in report["perplexity"].values():
        assert set(text) & {"teacher", "start", "student"} == {"teacher", "student"}
    assert {"layer_gates", "regularize", "cut"} <= set(report["stages"]) and "distill" not in report["stages"]
    assert "<html" in (view / "report.html").read_text() and "held-out change" in said
    changes = [row["held_out_change"] for row in rows(world, "artifacts") if "held_out_change" in row]
    assert changes[-1] < changes[0]
    assert report["settling"]["curves"]["held_out_change"] == {"first": changes[0], "last": changes[-1]}
    page = (view / "report.html").read_text()
    assert "Regularisation of removed layers" in page and "Recovery</h2>" not in page and "Rounds</h2>" not in page
    assert {"settling.png", "settling_change.png", "settling_entropy.png"} <= {
        p.name for p in (view / "figures").iterdir()
    }
    assert report["export"]["form"] == "stock" and "trust_remote_code=True" not in page


def test_two_ranks_pick_and_settle_as_one(world):
    """The gates' batch of 3 is shared unevenly; regularisation runs under ZeRO-3."""
    for name, ranks, micro in (("one", 0, 8), ("two", 2, 4)):
        chosen = requested(world, artifacts=world / name, regularize__micro_batch_size=micro, shape__layers=2)
        pipeline(f"run={name}", *chosen, "deepspeed=zero3", STAGES, cwd=world, ranks=ranks)
    for one, two in zip(rounds(world, "one"), rounds(world, "two"), strict=True):
        assert one["picked"] == two["picked"]
        torch.testing.assert_close(torch.tensor(one["gates"]), torch.tensor(two["gates"]), rtol=1e-3, atol=1e-3)
        for (layer, alone), (same, together) in zip(one["losses"], two["losses"], strict=True):
            assert layer == same and alone == pytest.approx(together, rel=1e-4)
    one, two = (rows(world, name) for name in ("one", "two"))
    assert len(one) == len(two) == 9
    for key in ("loss", "change", "held_out_cross_entropy"):
        curves = [torch.tensor([row[key] for row in each if key in row]) for each in (one, two)]
        torch.testing.assert_close(*curves, rtol=2e-4, atol=1e-6)
