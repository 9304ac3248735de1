"""An upcycled mixture without noise computes what the dense model computes, and the rows of the table compose."""

import json
import sys

import torch

from pipeline import runner
from pipeline.config import validate
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.composing import composed
from tests.mixtures import loaded
from tests.tiny import save_tiny, tiny_model, tokens
from tests.tiny_tokenizers import tokenizer_folder
from tests.world import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "moe"))  # its scripts import each other as scripts do

import expert_rows as rows
import upcycle


@torch.no_grad()
def test_copies_without_noise_are_the_dense_model(tmp_path):
    dense = save_tiny(tiny_model("llama-tied"), tmp_path / "dense")
    upcycle.write_upcycled(open_checkpoint(dense), tmp_path / "same", 4, 2, 0.0)
    upcycle.write_upcycled(open_checkpoint(dense), tmp_path / "noisy", 4, 2, 0.1)
    wanted = load_model(dense, torch.float64, "eager")(tokens()).logits
    torch.testing.assert_close(loaded(tmp_path / "same")(tokens()).logits, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(loaded(tmp_path / "noisy")(tokens()).logits, wanted, rtol=1e-2)
    assert open_checkpoint(tmp_path / "noisy").anatomy.sizes.carried["e"] == 4


def test_routers_are_trained_and_training_resumes(tmp_path, monkeypatch, capsys):
    dense = save_tiny(tiny_model("llama", dtype=torch.float32), tmp_path / "dense")
    text = "Some words to learn from, again and again. " * 300
    (tmp_path / "text.txt").write_text(text)
    tokenizer_folder(dense, text)
    out = tmp_path / "out"
    for count in (64, 128):  # two steps, then four
        arguments = [str(out), "--source", str(dense), "--experts", "4", "--text", str(tmp_path / "text.txt")]
        arguments += ["--length", "16", "--batch", "2", "--save-steps", "2"]
        monkeypatch.setattr(sys, "argv", ["upcycle.py", *arguments, "--tokens", str(count)])
        (out / "config.json").unlink(missing_ok=True)
        upcycle.main()
    steps = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert steps == ["step 1", "step 2", "step 3", "step 4"]
    facts = json.loads((out / upcycle.FACTS).read_text())
    assert facts["router_tokens"] == 128 and rows.facts(out) == facts and "128 tokens" in rows.caption(facts)
    before, after = open_checkpoint(out / "start"), open_checkpoint(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(upcycle.ROUTER)}


def test_the_rows_compose_and_the_table_shows_what_was_measured(tmp_path):
    model = save_tiny(tiny_model("mixtral", dtype=torch.float32), tmp_path / "model")
    tokenizer_folder(model, "Some words to learn from.")
    for choice in rows.CHOICES:
        more = ["data.sequence_length=32", "data.evaluation.path=builtin:topics"]
        more += ["evaluate.speed=false", "report.samples=0"]  # the model has 64 positions
        config = validate(composed(*rows.row_settings(model, tmp_path, 3, choice), *more))
        runner.check(config)
        assert config.shape.experts == 3
    perplexity = {who: {"perplexity": value} for who, value in (("teacher", 10.0), ("start", 40.0), ("student", 12.0))}
    reports = {(4, "reap"): {"perplexity": {"news": perplexity}, "parameters": {"teacher": 8, "student": 4}}}
    assert "| 4 | reap | 4.000 → 1.200 |" in rows.table(reports)
    rows.write(tmp_path / "results", reports, {})
    (figures,) = json.loads((tmp_path / "results" / "experts.json").read_text())
    assert figures["row"] == "reap_4" and figures["texts"]["news"]["before"]["perplexity"] == 40.0
    assert "4.000 → 1.200" in (tmp_path / "results" / "experts.md").read_text()
