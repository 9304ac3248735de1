"""What the LM Evaluation Harness is tested with: a task file, and a stand-in for a Python that has vLLM.

The right answers of the task are a model's own, but for one.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PROMPTS = ("The old", "Nobody had", "the wind went", "a hill stood")
CHOICES = ("house", "years")
ACCURACY = 1.0 - 1.0 / len(PROMPTS)  # of the model that the answers come from


def own_task(folder: Path, model: torch.nn.Module, tokenizer: Any) -> Path:
    """Write questions with two choices each, and the task file `own.yaml`; return its path."""
    requested: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        scores = []
        for choice in CHOICES:
            head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logits[i - 1, ids[i]].item() for i in range(len(head), len(ids))))
        requested.append({"question": prompt, "choices": list(CHOICES), "answer": scores.index(max(scores))})
    requested[-1]["answer"] = 1 - requested[-1]["answer"]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in requested))
    task = folder / "own.yaml"
    task.write_text(
        f"""task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return task


def stand_in(
    folder: Path, known: Sequence[str] = ("arc_easy",), missing: Sequence[str] = (), fails: bool = False
) -> str:
    """Return a stand-in for a Python with vLLM, which answers as harness.py does and keeps the request."""
    answer = {"missing": list(missing), "known": list(known)}
    program = folder / "python"
    program.write_text(
        f"""#!{sys.executable}
import json, os, sys
question, reply = sys.argv[-2:]
request = json.load(open(question))
json.dump([request, sys.argv[1], "RANK" in os.environ], open({str(folder / "request.json")!r}, "w"))
if {fails} and "model" in request:
    sys.exit("first line\\nno memory left")
json.dump({{"arc_easy": {{"acc": 0.5}}}} if "model" in request else {answer}, open(reply, "w"))
"""
    )
    program.chmod(0o755)
    return str(program)
