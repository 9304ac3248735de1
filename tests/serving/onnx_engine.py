"""Run by the Python of ONNX Runtime's environment: the greedy tokens of models and the log-probabilities of these.

Arguments: a JSON file of requests, [{"model": path, "prompts": [[id, ...], ...], "new": count}, ...], and the file for
the answers: for each model and prompt {"ids": [...], "logprobs": [...]}. `path` is a folder of the model builder's.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai


def answer(model: onnxruntime_genai.Model, prompt: list[int], new: int) -> dict[str, list]:
    """Return the greedy tokens that follow a prompt, and their log-probabilities."""
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + new, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(prompt)
    ids: list[int] = []
    logprobs: list[float] = []
    for _ in range(new):
        logits = generator.get_logits().reshape(-1).astype(np.float64)
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits.max() - np.logaddexp.reduce(logits)))
        generator.append_tokens(ids[-1:])
    return {"ids": ids, "logprobs": logprobs}


def main() -> None:
    requests, out = sys.argv[1:]
    answers = []
    for request in json.loads(Path(requests).read_text()):
        model = onnxruntime_genai.Model(request["model"])
        answers.append([answer(model, prompt, request["new"]) for prompt in request["prompts"]])
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
