"""The table of sub-layers: every row runs at the same budget on the same text, cells are what runs measured."""

import json
import sys

import torch

from pipeline import runner
from pipeline.config import validate
from tests.composing import composed
from tests.tiny import save_tiny, tiny_model
from tests.tiny_tokenizers import tokenizer_folder
from tests.world import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other as scripts do

import sublayers


def test_rows_differ_only_in_what_is_removed_and_what_replaces_it(tmp_path):
    model = save_tiny(
        tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=12, max_position_embeddings=1024), tmp_path / "m"
    )
    tokenizer_folder(model, "Some words to learn from.")
    configs = {
        row: validate(composed(*sublayers.COMMON, *own, f"model.path={model}"))
        for row, (_, own) in sublayers.ROWS.items()
    }
    for config in configs.values():
        runner.check(config)
    bare = [config.model_dump() for config in configs.values()]
    for values in bare:
        del values["budget"]["axes"], values["plan"]["depth"], values["plan"]["clap"]
        del values["reinit"]["bypass"], values["sublayers"]["score"]
    assert bare.count(bare[0]) == len(bare)
    assert {row for row, config in configs.items() if config.removes_sublayers} == {"sublayers", "sublayers_kl"}


def test_the_table_holds_what_the_reports_hold(tmp_path):
    folder = tmp_path / "sublayers-bypass-3"
    folder.mkdir()
    states = {"teacher": {"perplexity": 15.0}, "start": {"perplexity": None}, "student": {"perplexity": 20.5}}
    report = {
        "non_embedding_parameters": {"teacher": 100, "student": 80},
        "kv_bytes_per_token": {"teacher": 60, "student": 48},
        "cut": {"dropped_layers": [4, 5], "removed_attention": [], "removed_ffn": [7]},
        "perplexity": {"topics": states},
    }
    (folder / "report.json").write_text(json.dumps(report))
    sublayers.write(tmp_path, tmp_path)
    [row] = [line for line in (tmp_path / "sublayers.md").read_text().splitlines() if "linear map" in line]
    assert row.split(" | ")[1:] == ["3", "80.0%", "48", "2, 0, 1", "15.0", "inf", "20.5 |"]
    [figures] = json.loads((tmp_path / "sublayers.json").read_text())
    assert (figures["kept"], figures["ffn"], figures["texts"]["topics"]["start"]) == (0.8, [7], None)
