"""The side-by-side table: its rows are configurations, its cells what runs measured; mergekit drops layers as we do."""

import argparse
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

from pipeline import runner
from pipeline.config import validate
from pipeline.data.sources import locate, read
from pipeline.model.blueprint import Blueprint, everything
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import open_checkpoint
from tests.tiny import save_tiny, tiny_model
from tests.world import ROOT, environment, make_world, settings

pytestmark = pytest.mark.slow  # a row is a run of the pipeline

QUALITY = ROOT / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))  # its scripts import each other as scripts do

import broad  # noqa: E402
import drawing  # noqa: E402
import results  # noqa: E402
import rows  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402
import texts  # noqa: E402

PEERS = os.environ.get(
    "QUALITY_PEERS_PYTHON"
)  # the Python of the environment that benchmarks/quality/peers.py describes


OF_A_RECIPE = {row.settings[0]: name for name, row in rows.ROWS.items() if row.group != "ablations"}.values()


@pytest.mark.parametrize(
    ("name", "recovery"),
    [*((name, True) for name in rows.ROWS), *((name, False) for name in sorted({*OF_A_RECIPE, "trsp", "adapt_even"}))],
)
def test_every_row_is_a_line_that_nothing_refuses(name, recovery, tmp_path):
    row = rows.ROWS[name]
    save_tiny(tiny_model("llama"), tmp_path / "start")
    (tmp_path / "jargon.txt").write_text("word " * 999)
    start = run.text_settings(tmp_path)
    start += [f"model.start={tmp_path / 'start'}"] if row.peer else []
    for each in ("written", *broad.SETS):
        (tmp_path / f"{each}.jsonl").write_text(json.dumps({"text": "word " * 999}) + "\n")
    start += run.mix(row, argparse.Namespace(texts=tmp_path, written=tmp_path / "written.jsonl"), [])
    config = validate(
        run.composed(run.row_settings(row, 37.5, recovery, [*start, "data.evaluation.path=builtin:topics"]))
    )
    stages = runner.check(config)
    requested = {
        "distill": True,
        "regularize": config.regularize.norm != "none",
        "teacher_correction": config.teacher_correction.tokens > 0,
    }
    trains = {stage for stage, does in requested.items() if does and stage in stages}
    early = {"trsp_recovered": {"regularize"}, "best_all_by_layer_corrected_longer": {"teacher_correction"}}.get(
        name, set()
    )
    assert trains == ({row.trains} | early if recovery else set())
    spent = sum(getattr(config, stage).tokens for stage in trains)
    assert spent == ((120000 if name.endswith("_longer") else 60000) if recovery else 0)
    assert (config.score.tokens, config.rotate.tokens) == (16384, 32768)
    assert row.peer or config.restore.tokens == (131072 if row.kinds and row.kinds[0] != "broad" else 32768)
    assert config.budget.parameters == (None if row.peer else 0.625)
    paths = 2 + bool(row.writes) + bool(row.kinds)
    assert len(config.data.recovery.paths) == len(config.data.calibration.paths) == paths


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("quality"))


def small(world):
    """The settings of a tiny world without a shape of its own; two texts that no row sees, and one that it does."""
    chosen = settings(world, shape__layers=None, shape__neurons=None, distill__tokens=512, evaluate__words=8)
    unseen = [world / "evaluation.txt", world / "texts" / "jargon.txt"]
    return [*(each for each in chosen if not each.startswith(("runs=", "data.evaluation"))), seen(unseen)]


def seen(paths):
    return f"data.evaluation.path=[{','.join(map(str, paths))}]"


def command(script, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, str(QUALITY / script), *map(str, arguments)],
        cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_a_row_runs_and_the_table_says_what_it_measured(world):
    (world / "texts").mkdir()
    (world / "texts" / "jargon.txt").write_text((world / "recovery.txt").read_text()[::-1])
    arguments = ["--rows", "drop_last", "--removed", "50", "--runs", "runs", "--texts", "texts", *small(world)]
    command("run.py", *arguments, "--no-recovery", "evaluate.speed=false", cwd=world)
    command("run.py", *arguments, cwd=world)
    docs = world / "docs" / "results.md"
    docs.parent.mkdir()
    docs.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    command("table.py", "--runs", "runs", "--saved", "saved.json", "--docs", docs, cwd=world)
    written = docs.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert not (docs.parent / "quality-recipes.png").exists()  # one share removed is no line
    evaluation = json.loads((world / "runs" / "quality" / "drop_last-50-0" / "evaluation.json").read_text())
    cells = [
        cell.strip() for cell in next(line for line in written.splitlines() if "| Last layers |" in line).split("|")
    ]
    text = evaluation["texts"]["evaluation"]
    dense, start, student = (text[who]["perplexity"] for who in ("teacher", "start", "student"))
    assert f"{start:.2f} ({start / dense:.2f}×)" in cells and f"{student:.2f} ({student / dense:.2f}×)" in cells
    assert str(evaluation["models"]["student"]["kv_bytes_per_token"]) in cells and "0.512k" in cells
    command("table.py", "--runs", "nowhere", "--saved", "saved.json", "--docs", docs, cwd=world)
    assert docs.read_text() == written  # saved figures are enough
    (figures,) = json.loads((world / "saved.json").read_text())
    assert not (docs.parent / "quality-ablations.png").exists()
    more = [figures | {"removed": 25.0}, figures | {"row": "pangu_no_clap"}]
    (world / "saved.json").write_text(json.dumps([figures, *more]))
    command("table.py", "--runs", "nowhere", "--saved", "saved.json", "--docs", docs, cwd=world)
    for name in ("quality-recipes.png", "quality-ablations.png"):
        assert (docs.parent / name).read_bytes().startswith(b"\x89PNG")


def test_a_bar_is_the_mean_over_seeds_of_the_ratio_to_dense():
    def row(removed, **states):
        return {"removed": removed, "texts": {"news": {name: {"perplexity": value} for name, value in states.items()}}}

    found = [row(25.0, dense=10.0, before=20.0), row(25.0, dense=10.0, before=30.0), row(12.5, dense=10.0, before=11.0)]
    assert drawing.ratios(found, "news", "before") == {12.5: 1.1, 25.0: 2.5}
    assert drawing.ratios(found, "news", "after") == drawing.ratios(found, "law", "before") == {}


def view(folder, name, dense=10.0, start=20.0, student=12.0, rounds=1, settle="none", speed=None, measured=True):
    """A run's view as the pipeline leaves it, with figures of our own."""
    place, made = folder / "quality" / name, folder / "made"
    stages = {"teacher": {"artifact": "teacher-0"}, "cut": {"artifact": "cut-1"}}
    if not name.endswith("-start"):
        stages["distill"] = {"artifact": "distill-2"}
    if measured:
        stages["evaluate"] = {"artifact": "evaluate-3"}
    for stage, result in stages.items():
        (made / result["artifact"]).mkdir(parents=True, exist_ok=True)
        (made / result["artifact"] / "manifest.json").write_text(
            json.dumps({"seconds": 5.0 if stage == "cut" else 60.0})
        )
    place.mkdir(parents=True)
    (place / "teacher").symlink_to(made / "teacher-0")
    config = {
        "recipe": {"rounds": rounds},
        "regularize": {"norm": settle, "tokens": 1000},
        "distill": {"tokens": 120000},
        "score": {"tokens": 32768},
    }
    (place / "run.json").write_text(json.dumps({"config": config, "stages": stages}))
    size = {"parameters": 8_000_000, "non_embedding_parameters": 4_000_000, "kv_bytes_per_token": 64, "shape": {}}
    quality = {
        who: {"perplexity": None if math.isinf(perplexity) else perplexity, "next_word": 5.0 / perplexity}
        for who, perplexity in {"teacher": dense, "start": start, "student": student}.items()
    }
    rate = {"prefill": 100.0, "decode": 10.0}
    models = {"teacher": size, "student": size | {"non_embedding_parameters": 3_000_000, "kv_bytes_per_token": 48}}
    (place / "evaluation.json").write_text(
        json.dumps(
            {
                "models": models,
                "texts": {"readmes": quality},
                "speed": {"teacher": rate, "student": {**rate, "decode": speed}} if speed else None,
                "device": {"kind": "cpu"},
            }
        )
    )


def cells_of(folder, label):
    """The cells of a row, by the head of their column."""
    written = table.tables(results.collect(folder, folder / "saved.json"))[1].splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in written]
    return dict(zip(split[0], next(cells for cells in split if cells[0] == label)))


def test_cells_are_means_over_seeds_with_half_their_range(tmp_path):
    view(tmp_path, "minitron-25-0", start=20.0, student=12.0)
    view(tmp_path, "minitron-25-1", start=30.0, student=12.0, speed=40.0)
    view(tmp_path, "best-25-0", start=15.0, student=11.0)
    view(tmp_path, "dense_next_longer-25-0", start=10.0, student=9.0)
    cells = cells_of(tmp_path, "Minitron")
    assert cells["readmes: before"] == "25.00 ± 5.00 (2.50 ± 0.50×)" and cells["after"] == "12.00 (1.20×)"
    assert cells["next word"] == "20.8 ± 4.2 % → 41.7 %"
    assert cells["without embeddings"] == "3.0 M (−25.0%)" and cells["KV bytes a token"] == "48"
    assert cells["prefill tokens/s"] == "100 (1.00×)" and cells["decode tokens/s"] == "40 (4.00×)"
    assert cells["seconds to cut"] == "5" and cells["training tokens"] == "120k" and cells["computed on"] == "cpu"
    best = cells_of(tmp_path, "best")
    assert best["readmes: before"] == "**15.00 (1.50×)**" and best["decode tokens/s"] == table.NONE
    assert best["after"] == "**11.00 (1.10×)**"  # the least of what was cut; nothing was cut of the dense model
    assert cells_of(tmp_path, "Dense")["readmes: before"] == "10.00"


def test_a_row_beyond_all_numbers_is_told_and_drawn_beside_the_others(tmp_path):
    view(tmp_path, "minitron-25-0", start=math.inf, student=12.0)
    view(tmp_path, "minitron-25-1", start=30.0, student=1e300)
    view(tmp_path, "minitron-50-0", start=math.inf, student=math.inf)
    view(tmp_path, "best-25-0", start=15.0, student=11.0)
    cells = cells_of(tmp_path, "Minitron")
    assert cells["readmes: before"] == "∞ (∞×)" and cells["after"] == "5.0e+299 ± 5.0e+299 (5.0e+298 ± 5.0e+298×)"
    assert cells_of(tmp_path, "best")["readmes: before"] == "**15.00 (1.50×)**"
    found = results.collect(tmp_path, tmp_path / "saved.json")
    json.dumps(found, allow_nan=False)
    drawing.draw(found, tmp_path / "lines.png")
    drawing.draw_bars(found, tmp_path / "bars.png")


@pytest.mark.parametrize(("after", "low"), [(8.0, 0.9 * 0.8), (9.9, 0.9 * 0.99), (11.0, 1.0)])
def test_bars_begin_at_the_dense_model_and_dots_below_it_stand_inside(after, low, tmp_path, monkeypatch):
    """One that learns the text too may end nearer to it than the dense model is."""
    view(tmp_path, "best-25-0", start=15.0, student=after)
    view(tmp_path, "minitron-25-0", start=30.0, student=20.0)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    drawing.draw_bars(results.collect(tmp_path, tmp_path / "saved.json"), tmp_path / "bars.png")
    for axes in drawn[0].axes:
        left, right = axes.get_xlim()
        dots = [float(x) for line in axes.lines for x in line.get_xdata() if line.get_marker() == "o"]
        assert left == pytest.approx(low) and sorted(dots) == [after / 10.0, 2.0] and right > 3.0


def test_a_row_that_learns_before_its_last_cut_takes_its_state_before_from_a_run_without_recovery(tmp_path):
    view(tmp_path, "adapt_pruner-25-0", start=13.0, student=12.0, rounds=4)
    assert cells_of(tmp_path, "Adapt-Pruner")["readmes: before"] == table.NONE
    view(tmp_path, "adapt_pruner-25-0-start", start=40.0, student=40.0, rounds=4)
    cells = cells_of(tmp_path, "Adapt-Pruner")
    assert cells["readmes: before"].startswith("40.00") and cells["after"].startswith("12.00")
    assert cells["training tokens"] == "120k"


def test_saved_figures_stay_until_a_run_replaces_them(tmp_path):
    view(tmp_path / "old", "minitron-25-0", start=20.0, student=12.0, speed=40.0)
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(results.collect(tmp_path / "old", saved)))
    view(tmp_path / "new", "minitron-25-0-start", start=18.0, student=18.0)
    (found,) = results.collect(tmp_path / "new", saved)
    assert found["texts"]["readmes"]["before"]["perplexity"] == 18.0
    assert found["texts"]["readmes"]["after"]["perplexity"] == 12.0 and found["recovery_tokens"] == 120000
    assert found["models"]["student"]["speed"]["decode"] == 40.0


def test_a_run_begun_anew_and_not_yet_measured_keeps_what_was_saved(tmp_path):
    view(tmp_path / "whole", "minitron-25-0", student=12.0)
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(results.collect(tmp_path / "whole", saved)))
    view(tmp_path / "again", "minitron-25-0", student=99.0, measured=False)  # what it shows is of the run before
    (found,) = results.collect(tmp_path / "again", saved)
    assert found["texts"]["readmes"]["after"]["perplexity"] == 12.0


def test_rows_measured_on_different_text_are_not_put_side_by_side(tmp_path):
    view(tmp_path, "minitron-25-0", dense=10.0)
    view(tmp_path, "best-25-0", dense=11.0)
    with pytest.raises(ValueError, match="on readmes the dense model has a perplexity"):
        results.collect(tmp_path, tmp_path / "saved.json")


def test_the_start_of_a_row_that_cuts_nothing_is_the_dense_model(monkeypatch, tmp_path):
    requested = []
    monkeypatch.setattr(
        subprocess, "run", lambda given: requested.append(given) or subprocess.CompletedProcess(given, 0)
    )
    start = run.peer_start(rows.ROWS["dense_next_longer"].peer, 25.0, tmp_path, None, ["seed=0"])
    assert start == tmp_path / "quality" / "teacher" / "teacher"
    assert [each[2:5] for each in requested] == [["pipeline", "run=quality/teacher", "stages=[]"]]


def test_a_frozen_text_is_read_in_place_of_the_installations_own(tmp_path):
    assert run.located("topics", tmp_path) == "builtin:topics"
    with pytest.raises(SystemExit, match="has no jargon; .*texts.py writes it"):
        run.located("jargon", tmp_path)
    file = texts.frozen("topics", tmp_path)
    assert run.located("topics", tmp_path) == str(file)
    pieces = [list(read(locate(path), "text")) for path in ("builtin:topics", str(file))]
    assert pieces[0] == pieces[1] and len(pieces[0]) > 10


def test_the_jargon_file_becomes_paragraphs_without_marks():
    entry = ":foo: /foo/, n.\n\n   A {bar} of\n   two lines."
    assert (
        texts.cleaned(f"Contents\n\n   foo\n\n   {entry}\n\n   {texts.AFTER}\n\n   Last\n")
        == "foo, n.\n\nA bar of two lines.\n"
    )
    with pytest.raises(ValueError, match="no entry"):
        texts.cleaned("plain text")


@pytest.mark.skipif(not PEERS, reason="QUALITY_PEERS_PYTHON names no Python that has the other tools")
@pytest.mark.parametrize("drop", [[1], [0, 2]], ids=str)
def test_mergekit_drops_layers_as_we_do_bit_for_bit(drop, tmp_path):
    """A passthrough merge and our cut by the blueprint that keeps the other layers give the same tensors and sizes."""
    save_tiny(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "teacher")
    teacher = open_checkpoint(tmp_path / "teacher")
    arguments = ["--teacher", tmp_path / "teacher", "--peer", "mergekit", "--keep", "0.5", "--out", tmp_path / "theirs"]
    dropped = ["--drop", ",".join(map(str, drop))]
    subprocess.run([PEERS, QUALITY / "peers.py", *arguments, *dropped], check=True, env=environment())
    theirs = open_checkpoint(tmp_path / "theirs")
    whole = everything(teacher.anatomy.sizes)
    kept = tuple(plan for layer, plan in enumerate(whole.layers) if layer not in drop)
    ours = dict(cut(teacher.anatomy, Blueprint(whole.channels, kept), teacher))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
