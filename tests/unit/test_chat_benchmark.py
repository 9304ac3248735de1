"""The rows of the chat benchmark differ in their training alone, and its table shows what runs measured."""

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

import chat


def test_rows_differ_only_in_their_training(tmp_path):
    small = tiny_model("llama", max_position_embeddings=512, dtype=torch.bfloat16)
    model = tokenizer_folder(save_tiny(small, tmp_path / "model"), "Some words to learn from.")
    (model / "chat_template.jinja").write_text(CHATML)
    chats = tmp_path / "chats.jsonl"
    said = json.dumps({"messages": [user("Some words"), assistant("to learn from. " * 40)]}) + "\n"
    chats.write_text(said * 40)
    texts = [f"data.{purpose}.path={chats}" for purpose in ("calibration", "recovery", "evaluation")]
    found = []
    for row in chat.ROWS:
        config = validate(composed(*chat.row_settings(row, [f"model.path={model}", "budget.total=0.9", *texts])))
        check(config)
        found.append(config.model_dump())
    assert ["distill" in values["recipe"]["stages"] for values in found] == [False, True, True, True]
    assert [values["onpolicy"]["tokens"] for values in found] == [0, 0, 0, 8192]
    assert [values["distill"]["tokens"] for values in found[1:]] == [131072, 163840, 131072]
    for values in found:
        del values["distill"]["tokens"], values["onpolicy"]["tokens"], values["regularize"]["tokens"]
        del values["recipe"]["stages"]
    assert found.count(found[0]) == len(found)


def test_a_line_has_what_was_measured_on_answers(tmp_path):
    answers = {"kl": 0.25, "kl_error": 0.01, "agreement": 0.7, "greedy": {"identical": 0.5, "shared": 0.75}}
    answers |= {who: {"perplexity": value} for who, value in (("teacher", 2.0), ("student", 3.0))}
    report = {"perplexity": {"chats": {"assistant": answers}}, "parameters": {"teacher": 1000, "student": 704}}
    trainings = {"cut": {"recovery": None}}
    trainings["on_policy"] = {"recovery": {"tokens": 8192.0}, "onpolicy": {"tokens": 3000.0}}
    for row, trained in trainings.items():
        (tmp_path / f"chat-{row}-0").mkdir()
        (tmp_path / f"chat-{row}-0" / "report.json").write_text(json.dumps(report | trained))
    chat.write(tmp_path, tmp_path)
    rows = (tmp_path / "chat.md").read_text().splitlines()
    assert "| `cut` | none | 0 | 70.4% | 0 | 0 | 0.250 ± 0.010 | 70.0% | 75.0% | 1.50 |" in rows
    assert "| `on_policy` | recovery, then on-policy | 0 | 70.4% | 8,192 | 3,000 |" in "\n".join(rows)
