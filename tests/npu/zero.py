"""Train one tiny Llama in bf16 under DeepSpeed ZeRO 1, 2 and 3; rank 0 prints the loss curves as one line of JSON.

Run by torchrun; the argument names the device: cpu or npu.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as distributed

sys.path[0] = str(Path(__file__).parents[2])

from tests.npu.simulated import install  # noqa: E402
from tests.npu.train import batches, tiny  # noqa: E402


def losses(stage: int, device: str, rank: int, steps: int = 3) -> list[float]:
    """Return the loss, averaged over ranks, before each step; every rank trains on its own row of each batch."""
    import deepspeed

    model = tiny("llama", "eager")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    curve = []
    for batch in batches(steps):
        tokens = batch[rank : rank + 1].to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        distributed.all_reduce(mean)
        curve.append(mean.item() / distributed.get_world_size())
    where = {str(parameter.device.type) for parameter in model.parameters()}
    assert where == {device}, where
    engine.destroy()
    return curve


if __name__ == "__main__":
    device, rank = sys.argv[1], int(os.environ["LOCAL_RANK"])
    os.environ["DS_ACCELERATOR"] = device
    if device == "npu":
        install()
        torch.npu.set_device(rank)
    distributed.init_process_group({"npu": "hccl", "cpu": "gloo"}[device])
    curves = {f"zero{stage}": losses(stage, device, rank) for stage in (1, 2, 3)}
    if rank == 0:
        print("\n" + json.dumps(curves))
    distributed.destroy_process_group()
