"""DeepSpeed, with states.py and nowhere else: one engine that trains a module under ZeRO 0 to 3.

Checkpoints hold what determines the rest of the run under the parameters' own names: float32 master weights and both
Adam moments, whole. So they are read without unpickling anything, and training goes on from them digit for digit, or
at another number of ranks or ZeRO stage.

Gradients are accumulated over micro-batches in the compute type, DeepSpeed's default, the one choice that all four
stages know; `extra: {data_types: {grad_accum_dtype: fp32}}` changes it for stages 2 and 3.
"""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.runtime.checkpoint import open_checkpoint, write_checkpoint
from pipeline.runtime.device import Device
from pipeline.runtime.optimizer_state import FUSED_ADAM, MASTER, States
from pipeline.runtime.ranks import Ranks

SHARD_BYTES = 1 << 30       # of a checkpoint: also what rank 0 holds in memory while writing one
COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}  # DeepSpeed's setting -> type of the parameters


class Engine:
    """Trains a module whose forward gives (loss, parts) and whose `parameters_by_name` gives what is trained.

    Every method is called by all ranks in the same order. The module comes whole on every rank's host, in the compute
    type or in float32, so that each process holds teacher and student there once. Under ZeRO-3 its parameters are
    partitioned here, one after another: a device never holds more than its parts and what is gathered for the module
    that runs. (A Hugging Face model built under DeepSpeed's own partitioning is mis-initialised.)
    """

    def __init__(
        self,
        module: nn.Module,
        device: Device,
        ranks: Ranks,
        *,
        stage: int,
        bf16: bool,
        micro_batch: int,
        accumulation: int,
        clip: float,
        betas: tuple[float, float],
        weight_decay: float,
        extra: Mapping[str, Any],
    ):
        """Build the engine; weight decay spares what has one axis (gains, scales, biases).

        `extra`: raw DeepSpeed settings, laid over those written here.
        """
        named = list(module.parameters_by_name())
        groups = [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,  # DeepSpeed may take a step on zero gradients to make the moments: it must not decay weights
            betas=betas,
            fused=device.kind in FUSED_ADAM,
        )
        self._named, self._device, self._ranks = dict(named), device, ranks
        self._accumulation, self._pending = accumulation, 0
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": bf16},
        }
        settings = _laid_over(settings, extra)
        stage, bf16 = settings["zero_optimization"]["stage"], settings["bf16"]["enabled"]
        self._clip = settings["gradient_clipping"]
        self._clips_itself = stage == 0 and not bf16  # there DeepSpeed clips and does not tell the norm
        if self._clips_itself:
            settings["gradient_clipping"] = 0.0
        self._lent_rank = "LOCAL_RANK" not in os.environ
        if self._lent_rank:  # DeepSpeed asks for it, also where no launcher set it, as long as it trains
            os.environ["LOCAL_RANK"] = str(ranks.local_rank)
        try:
            self._engine = _initialize(module, device, optimizer, settings)
        except BaseException:
            self._take_rank_back()
            raise
        self._optimizer = self._engine.optimizer
        self._states = States(self._named, self._engine, stage, device, ranks)

    def backward(self, batch: Tensor) -> dict[str, Tensor]:
        """Add one micro-batch's gradients; give its loss and parts, detached, of this rank alone."""
        loss, parts = self._engine(batch.to(self._device.torch))
        self._engine.backward(loss)
        self._pending += 1
        if self._pending < self._accumulation:
            self._engine.step()  # DeepSpeed counts micro-batches here; it updates at the last one
        return {"loss": loss.detach(), **parts}

    def step(self, learning_rate: float) -> float:
        """Update the weights; give the gradient norm before clipping, not finite where nothing was updated."""
        if self._pending != self._accumulation:
            raise RuntimeError(f"a step after {self._pending} of {self._accumulation} micro-batches")
        self._pending = 0
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self._clips_itself:
            norm = torch.nn.utils.clip_grad_norm_(self._named.values(), self._clip)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() if norm is None else norm)
        return norm if norm >= 0.0 else float("nan")

    def measure(self, batch: Tensor) -> dict[str, Tensor]:
        """Give the parts of the module's evaluation mode; no gradient, nothing of the training changes."""
        self._engine.eval()
        with torch.no_grad():
            _, parts = self._engine(batch.to(self._device.torch))
        self._engine.train()
        return parts

    def average(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Give the mean over ranks of scalars, the same on every rank."""
        packed = torch.stack([value.detach().float() for value in values.values()])
        self._ranks.sum_([packed])
        return dict(zip(values, (packed / self._ranks.world).tolist()))

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these weights by name, in float32: building the engine rounded them to the compute type."""
        missing = [name for name in self._named if name not in weights]
        if missing:
            raise ValueError(f"the start has no tensor {missing[0]}, which the student trains; make the start again")
        with self._states.rewriting():
            for name in self._named:
                self._states.write(name, MASTER, weights[name].to(self._device.torch, torch.float32))

    def student_state(self) -> Iterator[tuple[str, Tensor]]:
        """Give the trained weights one by one, whole, float32, on the host."""
        for name in self._named:
            yield name, self._states.read(name, MASTER).cpu()

    def save(self, folder: Path, step: int, keep: int) -> Path:
        """Write the state after `step` optimizer steps as folder/step-<n>, whole or not; keep the last `keep`."""
        final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
        if self._ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            write_checkpoint(partial, {"step": step}, self._states.items(), SHARD_BYTES)
            for path in partial.iterdir():
                _sync(path)
            _sync(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _sync(folder)
            for old in _checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
        else:
            for _ in self._states.items():
                pass
        self._ranks.wait("checkpoint")
        return final

    def load(self, folder: Path) -> int | None:
        """Go on from the newest checkpoint in the folder; give the number of steps done, None where there is none.

        ValueError where it is damaged or of another model.
        """
        found = self._ranks.share([path.name for path in _checkpoints(folder)][-1:])
        if not found:
            return None
        saved = open_checkpoint(folder / found[0])
        wanted = set(self._states.names())
        if wanted != set(saved):
            odd = sorted(wanted ^ set(saved))[0]
            raise ValueError(f"{saved.folder} is a checkpoint of another model ({odd}); delete {folder} to start anew")
        step = saved.config["step"]
        self._states.restore(saved, step)
        return step

    def close(self) -> None:
        """Release what DeepSpeed holds; the engine cannot be used afterwards."""
        self._engine.destroy()
        self._take_rank_back()

    def _take_rank_back(self) -> None:
        if self._lent_rank:
            os.environ.pop("LOCAL_RANK", None)


def _initialize(module: nn.Module, device: Device, optimizer: torch.optim.Optimizer, settings: dict[str, Any]):
    """Give a DeepSpeed engine on the process group that exists."""
    import deepspeed  # here, not above: it chooses its accelerator when imported, after the device was opened

    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)  # its calls
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled by a C++ compiler at run time
    deepspeed.init_distributed(dist_init_required=False)
    if settings["zero_optimization"]["stage"] == 3:
        _partition(module, device, settings)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _partition(module: nn.Module, device: Device, settings: Mapping[str, Any]) -> None:
    """Keep of every parameter this rank's part on the device, in the compute type; put buffers there whole.

    One parameter is on the device at a time, as rank 0 has it. DeepSpeed's `initialize` would put all of them there
    before it partitions; what comes partitioned it neither moves nor casts.
    """
    from deepspeed import zero

    kind = next((kind for name, kind in COMPUTE.items() if settings.get(name, {}).get("enabled")), torch.float32)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(kind)
    zero.Init(module=module, config_dict_or_path=settings)
    module.to(device.torch)  # only buffers: the parameters are empty now


def _laid_over(settings: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Give settings with those of `extra` in their place, mapping by mapping."""
    merged = dict(settings)
    for key, value in extra.items():
        inner = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _laid_over(merged[key], value) if inner else value
    return merged


def _checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
