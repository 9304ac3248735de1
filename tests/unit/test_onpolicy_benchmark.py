"""The rows of the on-policy benchmark differ in their training alone, and its table shows what runs measured."""

import json
import sys

import torch

from pipeline.config import validate
from pipeline.graph import check
from tests.chat_templates import CHATML, assistant, user
from tests.composing import composed
from tests.tiny import save_tiny, tiny_model
from tests.tiny_tokenizers import tokenizer_folder
from tests.world import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other as scripts do

import onpolicy


def test_rows_differ_only_in_their_training(tmp_path):
    deep = tiny_model("llama", num_hidden_layers=30, max_position_embeddings=512, dtype=torch.bfloat16)
    model = tokenizer_folder(save_tiny(deep, tmp_path / "model"), "Some words to learn from.")
    (model / "chat_template.jinja").write_text(CHATML)
    chats = tmp_path / "chats.jsonl"
    said = json.dumps({"messages": [user("Some words"), assistant("to learn from. " * 40)]}) + "\n"
    chats.write_text(said * 40)
    found = []
    for row in onpolicy.ROWS:
        config = validate(composed(*onpolicy.row_settings(row, chats, [f"model.path={model}"])))
        check(config)
        found.append(config.model_dump())
    assert [values["onpolicy"]["tokens"] for values in found] == [0, 0, 2304]
    assert [values["distill"]["tokens"] for values in found] == [6144, 12288, 6144]
    for values in found:
        del values["distill"]["tokens"], values["onpolicy"]["tokens"], values["regularize"]["tokens"]
    assert found.count(found[0]) == len(found)


def test_chats_are_paragraphs_that_an_assistant_continues():
    chats = list(onpolicy.written("topics"))
    assert len(chats) > 200 and all([turn["role"] for turn in chat] == ["user", "assistant"] for chat in chats)
    assert all(80 < len(chat[1]["content"]) <= 500 for chat in chats)


def test_a_line_has_what_was_measured_on_answers(tmp_path):
    answers = {"kl": 0.25, "kl_error": 0.01, "agreement": 0.7}
    answers |= {"greedy": {"answers": 24, "tokens": 24, "identical": 0.5, "shared": 0.75}}
    answers |= {who: {"perplexity": value} for who, value in (("teacher", 2.0), ("student", 3.0))}
    report = {"perplexity": {"chats": {"assistant": answers}}, "recovery": {"tokens": 8192.0}}
    report |= {"stages": {"distill": {"seconds": 60.0}, "onpolicy": {"seconds": 30.0}}, "onpolicy": {"tokens": 3000.0}}
    (tmp_path / "onpolicy-on_policy-0").mkdir()
    (tmp_path / "onpolicy-on_policy-0" / "report.json").write_text(json.dumps(report))
    onpolicy.write(tmp_path, tmp_path)
    line = "8,192 | 3,000 | 1.5 | 0.2500 ± 0.0100 | 70.0% | 50.0% of 24 | 75.0% |"
    rows = (tmp_path / "onpolicy.md").read_text().splitlines()
    assert f"| `on_policy` | recovery, then on-policy | 0 | {line}" in rows
    (figures,) = json.loads((tmp_path / "onpolicy.json").read_text())
    assert figures["perplexity"] == {"teacher": 2.0, "student": 3.0} and figures["greedy"]["shared"] == 0.75
