"""The table of post-norms: rows differ in nothing but what becomes of post-norms, cells are what runs measured."""

import json
import subprocess
import sys

import pytest
import torch

from pipeline import runner
from pipeline.config import validate
from pipeline.runner import STAGES
from tests.composing import composed
from tests.tiny import save_tiny, tiny_model
from tests.tiny_tokenizers import tokenizer_folder
from tests.world import ROOT, environment, make_world, settings

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its scripts import each other as scripts do

import ablation  # noqa: E402
import absorption  # noqa: E402
import reinit_ablation  # noqa: E402


def configuration(row, *more):
    return validate(composed(*absorption.row_settings(row, 4096, ROOT, ["data.evaluation.path=builtin:topics", *more])))


def test_rows_differ_only_in_what_becomes_of_post_norms(tmp_path):
    sizes = {"num_hidden_layers": 18, "intermediate_size": 2048, "layer_types": None, "max_position_embeddings": 512}
    model = save_tiny(tiny_model("gemma3_text", dtype=torch.bfloat16, **sizes), tmp_path / "model")
    tokenizer_folder(model, "Some words to learn from.")
    found = {row: configuration(row, f"model.path={model}") for row in absorption.ROWS}
    for config in found.values():
        runner.check(config)
        assert config.distill.tokens == 4096
    ways = {row: config.reinit.absorb for row, config in found.items()}
    assert ways == {"keep": False, "removed": "removed", "absorbed": "auto", "fitted": "fitted"}
    bare = [config.model_dump() for config in found.values()]
    for values in bare:
        del values["reinit"]["absorb"]
    assert bare.count(bare[0]) == len(absorption.ROWS)
    for stage in ("importance", "plan", "cut", "distill"):
        assert len({json.dumps(STAGES[stage].settings(config), default=str) for config in found.values()}) == 1


def test_settings_of_the_command_win_over_those_of_a_row():
    assert configuration("keep", "shape.layers=12", "distill.tokens=8").distill.tokens == 8


@pytest.mark.parametrize("module", [absorption, reinit_ablation])
def test_a_row_that_is_not_there_is_refused_by_its_name(module, capsys):
    with pytest.raises(SystemExit):
        ablation.parser("", module.ROWS).parse_args(["--rows", "keep,none,neither"])
    assert "neither" in capsys.readouterr().err


def report(place, state, tokens=4096):
    """A run's report as far as the tables read it: a perplexity and a share of words for every model."""
    place.mkdir(parents=True)
    result = {who: {"perplexity": value, "next_word": share} for who, (value, share) in state.items()}
    (place / "report.json").write_text(
        json.dumps({"perplexity": {"topics": result}, "recovery": {"tokens": float(tokens)}})
    )


def test_the_table_has_a_row_for_each_report_and_the_dense_model(tmp_path):
    dense = (15.34, 0.41)
    report(tmp_path / "absorption-keep-0", {"teacher": dense, "start": (40.0, 0.3), "student": (30.04, 0.335)})
    report(tmp_path / "absorption-absorbed-0", {"teacher": dense, "start": (1.8e6, 0.0), "student": (165.0, None)}, 512)
    report(tmp_path / "absorption-fitted-3", {"teacher": dense, "start": (2.5e30, 0.1), "student": (35.0, 0.3)})
    absorption.write(tmp_path, tmp_path / "results")
    written = (tmp_path / "results" / "absorption.md").read_text().splitlines()
    assert [row for row in written if row.startswith("|")] == [
        "| post-norms | seed | recovery tokens | topics: before | topics: after |",
        "| --- | --- | --- | --- | --- |",
        "| dense | 0 | · | 15.3, 41% | · |",
        "| kept | 0 | 4096 | 40.0, 30% | 30.0, 34% |",
        "| absorbed (Pangu Light) | 0 | 512 | 1,800,000, 0% | 165.0 |",
        "| dense | 3 | · | 15.3, 41% | · |",
        "| fitted one after another | 3 | 4096 | 2.5e+30, 10% | 35.0, 30% |",
    ]
    figures = json.loads((tmp_path / "results" / "absorption.json").read_text())
    assert [(each["row"], each["seed"]) for each in figures] == [("keep", 0), ("absorbed", 0), ("fitted", 3)]
    assert figures[1]["texts"]["topics"]["start"] == {"perplexity": 1.8e6, "next_word": 0.0}


def test_the_table_of_re_initialisation_reads_the_same_reports(tmp_path):
    report(tmp_path / "reinit-slnp-1", {"teacher": (15.0, None), "start": (80.0, None), "student": (24.5, None)})
    reinit_ablation.write(tmp_path, tmp_path)
    assert "| + SLNP | 1 | 15.0 | 80.0 | 24.5 |" in (tmp_path / "reinit_ablation.md").read_text().splitlines()
    [figures] = json.loads((tmp_path / "reinit_ablation.json").read_text())
    assert figures == {"row": "slnp", "seed": 1, "domain": "topics", "teacher": 15.0, "start": 80.0, "student": 24.5}


@pytest.mark.slow
def test_a_row_that_fails_is_reported_and_does_not_stop_the_next(tmp_path):
    world = make_world(tmp_path, "gemma3_text")
    small = settings(world, shape__layers=3, distill__tokens=512, evaluate__words=4, runs=None)
    script = [sys.executable, str(BENCHMARKS / "absorption.py"), "--rows", "fitted,keep", "--runs", "runs"]
    refused = "export.form=padded"  # where scales are to be
    done = subprocess.run(
        [*script, "--results", "results", *small, refused],
        cwd=world, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and "error: 1 runs failed: absorption-fitted-0" in done.stderr, done.stdout[-3000:]
    [figures] = json.loads((world / "results" / "absorption.json").read_text())
    evaluation = json.loads((world / "runs" / "absorption-keep-0" / "evaluation.json").read_text())
    for who, cells in figures["texts"]["evaluation"].items():
        measured = evaluation["texts"]["evaluation"][who]
        assert cells == {what: measured.get(what) for what in ("perplexity", "next_word")} and cells["perplexity"] > 1
    assert (figures["row"], figures["recovery_tokens"]) == ("keep", 512)
