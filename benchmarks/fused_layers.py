"""Time of a forward and backward pass by the operators of kernels/fused beside the stock classes.

    python benchmarks/fused_layers.py [--device cpu] [--tokens 512] [--rounds 5]

The model has SmolLM2's widths with few layers and random bfloat16 (float32 where the device has no bfloat16) weights.
Variants: `stock`, one for each operator alone, and `all`, in turn, the shortest of `--rounds` each. On a CPU, where the
table names no operator, the references run in their place: what device.kernels=auto would do if it replaced layers
there. Writes benchmarks/results/fused_layers-<device>.json.
"""

import json
import sys
import time
from pathlib import Path

import torch
from arguments import at_least, described

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import fused  # noqa: E402
from pipeline.runtime.device import missing, open_device  # noqa: E402
from pipeline.runtime.fused_layers import LAYER_OPERATORS, fused_layers, operators  # noqa: E402

LAYERS = 4


def build(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(dtype)


def seconds(model: torch.nn.Module, ids: torch.Tensor, device) -> float:
    """Return the time of one forward and backward pass: processor time on a CPU, elapsed time elsewhere."""
    clock = time.process_time if device.kind == "cpu" else time.perf_counter
    model.zero_grad()
    device.synchronise()
    began = clock()
    model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    device.synchronise()
    return clock() - began


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu")
    parser.add_argument("--tokens", type=at_least(1), default=512)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    options = parser.parse_args()
    if fault := missing(options.device):
        parser.error(f"--device: {options.device} cannot run here: {fault}; or choose cpu")
    device = open_device(options.device, "sdpa", False, 0, 0, "auto")
    model = build(device.compute_dtype).to(device.torch)
    ids = torch.randint(0, 1024, (1, options.tokens), device=device.torch)
    chosen = operators("auto", device.kind) or {n: fused.op(n, "cpu") for n in LAYER_OPERATORS if n != "swiglu_packed"}
    variants = {"stock": {}, **{name: {name: operator} for name, operator in chosen.items()}, "all": chosen}
    shortest: dict[str, float] = {}
    for number in range(options.rounds + 1):  # the first warms up
        for name, own in variants.items():
            with fused_layers(model, own):
                taken = seconds(model, ids, device)
            if number:
                shortest[name] = min(taken, shortest.get(name, taken))
    for name, taken in shortest.items():
        print(f"{name:14} {taken * 1e3:9.1f} ms  {taken / shortest['stock']:.2f} of stock")
    facts = vars(options) | {"device_name": device.name, "dtype": str(device.compute_dtype), "layers": LAYERS}
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": shortest}
    path = ROOT / "benchmarks/results" / f"fused_layers-{options.device}.json"
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
