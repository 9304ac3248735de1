"""The table of hidden widths: rows differ in nothing but the hidden axis, cells are what runs measured."""

import json
import sys

import pytest
import torch

from pipeline import runner
from pipeline.config import validate
from tests.composing import composed
from tests.tiny import save_tiny, tiny_model
from tests.tiny_tokenizers import tokenizer_folder
from tests.world import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other as scripts do

import hidden_widths


def test_rows_differ_only_in_the_hidden_axis(tmp_path):
    wide = tiny_model("llama", hidden_size=576, max_position_embeddings=512, dtype=torch.bfloat16)
    model = tokenizer_folder(save_tiny(wide, tmp_path / "model"), "Some words to learn from.")
    more = ["data.evaluation.path=builtin:topics", f"model.path={model}"]
    found = [validate(composed(*hidden_widths.row_settings(row, ROOT, more))) for row in hidden_widths.ROWS]
    for config in found:
        runner.check(config)
    assert len(found) == 12 and {config.shape.hidden for config in found} == set(hidden_widths.WIDTHS)
    bare = [config.model_dump() for config in found]
    for values in bare:
        del values["shape"]["hidden"], values["reinit"]["slnp"], values["plan"]["channels"]
        del values["rotate"]["kind"], values["rotate"]["tie"]
    assert bare.count(bare[0]) == len(bare)


@pytest.fixture
def runs(tmp_path):
    for row, all_, value in (("plain512", 118.5e6, 40.0), ("untied448", 101e6, 20.0)):
        place = tmp_path / f"hidden-{row}-0"
        place.mkdir()
        result = {
            "parameters": {"student": all_},
            "non_embedding_parameters": {"student": 90e6},
            "perplexity": {"topics": {"teacher": {"perplexity": 16.0}, "student": {"perplexity": value}}},
        }
        (place / "report.json").write_text(json.dumps(result))
    return tmp_path


def test_a_line_tells_both_sizes_and_the_ratio_to_dense(runs):
    hidden_widths.write(runs, runs)
    lines = (runs / "hidden_widths.md").read_text().splitlines()
    assert "| 512 | channels by score | 0 | 90.0 M, all 118.5 M | 2.50 |" in lines
    assert "| 448 | principal basis and SLNP, untied | 0 | 90.0 M, all 101.0 M | 1.25 |" in lines
    first, second = json.loads((runs / "hidden_widths.json").read_text())
    assert (first["row"], first["ratios"]) == ("plain512", {"topics": 2.5}) and second["all"] == 101e6
