"""Do on the simulated NPU what a real one refuses; print each error as JSON, null where nothing was refused."""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path[0] = str(Path(__file__).parents[2])

from tests.npu.simulated import install  # noqa: E402


def sabotage() -> dict:
    x = torch.randn(3, 4, device="npu")
    layer = torch.nn.Linear(4, 4).to("npu")
    return {
        "sum with a tensor left on the CPU": lambda: x + torch.ones(4),
        "matmul with a weight left on the CPU": lambda: functional.linear(x, torch.ones(4, 4)),
        "input left on the CPU": lambda: layer(torch.ones(3, 4)),
        "token ids left on the CPU": lambda: functional.embedding(torch.tensor([1]), x),
        "labels left on the CPU": lambda: functional.cross_entropy(x, torch.tensor([1, 2, 3])),
        "mask left on the CPU": lambda: x.masked_fill(torch.zeros(3, 4, dtype=torch.bool), 0.0),
        "concatenation with a tensor left on the CPU": lambda: torch.cat([x, torch.ones(1, 4)]),
        "in-place sum with a tensor left on the CPU": lambda: x.add_(torch.ones(4)),
        "two NPUs mixed": lambda: torch.ones(3, device="npu:0") + torch.ones(3, device="npu:1"),
        "an NPU that is not there": lambda: torch.ones(3, device="npu:8"),
        "a hard-coded cuda method": lambda: x.cuda(),
        "a hard-coded cuda device": lambda: torch.ones(3, device="cuda"),
        "a CPU generator for NPU numbers": lambda: torch.randn(3, device="npu", generator=torch.Generator()),
        "numpy without a copy to the host": lambda: x.numpy(),
    }


def permitted() -> dict:
    x = torch.arange(12.0, device="npu").reshape(3, 4)
    return {
        "a zero-dimensional CPU tensor": lambda: (x * torch.tensor(2.0)).sum().item() == 132.0,
        "CPU indices": lambda: x[torch.tensor([2, 0])].tolist() == [[8.0, 9.0, 10.0, 11.0], [0.0, 1.0, 2.0, 3.0]],
        "a copy from the CPU": lambda: torch.empty_like(x).copy_(torch.ones(3, 4)).sum().item() == 12.0,
        "a cast to double gives float": lambda: x.double().dtype == torch.float32,
        "seeding the NPU repeats its numbers": _repeats,
        "Module.to keeps its parameters": _keeps,
        "memory is counted": _counts,
    }


def _repeats() -> bool:
    torch.manual_seed(3)
    first = torch.randn(5, device="npu")
    torch.manual_seed(3)
    return torch.equal(first, torch.randn(5, device="npu"))


def _keeps() -> bool:
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    return layer.to("npu").weight is weight and weight.is_npu


def _counts() -> bool:
    before = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    block = torch.empty(1 << 20, device="npu")
    held = torch.npu.memory_allocated() - before == block.nbytes
    del block
    return held and torch.npu.memory_allocated() == before and torch.npu.max_memory_allocated() == before + (4 << 20)


def outcome(attempt) -> str | None:
    """Return the error's one line; null when the attempt went through."""
    try:
        attempt()
    except (RuntimeError, TypeError, AssertionError) as fault:
        return f"{type(fault).__name__}: {str(fault).splitlines()[0]}"
    return None


if __name__ == "__main__":
    install()
    answer = {"refused": {name: outcome(attempt) for name, attempt in sabotage().items()}}
    answer["permitted"] = {name: bool(attempt()) for name, attempt in permitted().items()}
    print(json.dumps(answer))
