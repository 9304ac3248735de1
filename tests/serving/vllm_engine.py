"""Run by the Python of vLLM's environment: the greedy tokens of models and the log-probabilities of these.

Arguments as of llama_cpp_engine.py, with the folder of a model. vLLM runs on the CPU in this process, in float32.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

CONTEXT = 128  # tokens


def answers(request: dict) -> list[dict[str, list]]:
    """Return for each prompt the greedy tokens that follow it, and their log-probabilities."""
    model = LLM(
        request["model"], dtype="float32", enforce_eager=True, max_model_len=CONTEXT, max_num_seqs=4, seed=0,
        skip_tokenizer_init=True, trust_remote_code=request["code"], enable_prefix_caching=False,
    )  # fmt: skip
    options = SamplingParams(temperature=0.0, max_tokens=request["new"], logprobs=1, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    found = [done.outputs[0] for done in model.generate(prompts, options, use_tqdm=False)]
    result = []
    for each in found:
        ids = list(each.token_ids)
        result.append({"ids": ids, "logprobs": [step[token].logprob for step, token in zip(each.logprobs, ids)]})
    return result


def main() -> None:
    requests, out = sys.argv[1:]
    found = []
    for request in json.loads(Path(requests).read_text()):
        found.append(answers(request))
        cleanup_dist_env_and_memory()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
