"""Run tiny models on the simulated NPU with the operators that device.kernels=auto chooses; print what they did.

One line of JSON by family: the calls of each torch_npu operator, and how far the logits and the gradients are from
those of the stock class on the CPU, relative to the largest.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "kernels"))

from tests.npu.simulated import install  # noqa: E402

KINDS = ("llama", "gemma2", "glm4", "phi3", "qwen3")


def gradients(model, ids):
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach().cpu(), *(each.grad.cpu().clone() for each in model.parameters())]


def main() -> None:
    from pipeline.runtime.device import open_device
    from pipeline.runtime.fused_layers import operators
    from pipeline.runtime.layer_streaming import placed
    from tests.tiny import tiny_model, tokens

    device = open_device("npu", "auto", False, 0, 0, "auto")
    chosen, facts = operators("auto", "npu"), {"operators": sorted(operators("auto", "npu"))}
    calls: Counter = Counter()
    for name, operator in chosen.items():  # the cached choice that `placed` uses
        chosen[name] = lambda *given, name=name, operator=operator: calls.update([name]) or operator(*given)
    for kind in KINDS:
        calls.clear()
        model, ids = tiny_model(kind, dtype=torch.float32), tokens()
        wanted = gradients(model, ids)
        with placed(model, device, False):
            ours = gradients(model, ids.to(device.torch))
        gaps = [float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, wanted)]
        facts[kind] = {"calls": dict(calls), "layers": len(model.model.layers), "gap": max(gaps)}
    print(json.dumps(facts))


if __name__ == "__main__":
    install()
    main()
