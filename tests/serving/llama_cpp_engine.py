"""Run by the Python of llama.cpp's environment: the greedy tokens of models and the log-probabilities of these.

Arguments: a JSON file of requests, [{"model": path, "prompts": [[id, ...], ...], "new": count}, ...], and the file for
the answers: for each model and prompt {"ids": [...], "logprobs": [...]}.
"""

import json
import sys
from pathlib import Path

import xllamacpp

CONTEXT = 128  # tokens


def serve(path: str) -> xllamacpp.Server:
    """Load a GGUF file on one thread of the CPU, with keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_batch, params.n_parallel = CONTEXT, CONTEXT, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    return xllamacpp.Server(params)


def answer(server: xllamacpp.Server, prompt: list[int], new: int) -> dict[str, list]:
    """Return the greedy tokens that follow a prompt, and their log-probabilities."""
    request = {"prompt": prompt, "max_tokens": new, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
    done = server.handle_completions(request | {"cache_prompt": False})
    entries = done["choices"][0]["logprobs"]["content"]
    return {"ids": [entry["id"] for entry in entries], "logprobs": [entry["logprob"] for entry in entries]}


def main() -> None:
    requests, out = sys.argv[1:]
    answers = []
    for request in json.loads(Path(requests).read_text()):
        server = serve(request["model"])
        answers.append([answer(server, prompt, request["new"]) for prompt in request["prompts"]])
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
