"""The training engine: DeepSpeed under ZeRO 0 to 3. Only this module and optimizer_state.py import DeepSpeed.

Checkpoints hold what determines the rest of the run under the parameters' own names: float32 master weights and both
Adam moments, whole. They are read without unpickling anything, and a training resumes from them bit for bit, or at
another number of ranks or ZeRO stage.

Gradients are accumulated over micro-batches in the compute type, DeepSpeed's default and the one choice that all four
stages have; `extra: {data_types: {grad_accum_dtype: fp32}}` changes it for stages 2 and 3.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.runtime import training_checkpoints
from pipeline.runtime.device import Device
from pipeline.runtime.optimizer_state import FUSED_ADAM, MASTER, States
from pipeline.runtime.ranks import Ranks

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}  # DeepSpeed's setting -> type of the parameters


class Engine:
    """Trains a module whose forward returns (loss, parts) and whose `parameters_by_name` yields what is trained.

    Every method is called by all ranks in the same order. The module is whole on every rank's host, in the compute type
    or in float32, so each process holds teacher and student there once. Under ZeRO-3 its parameters are partitioned
    here, one after another: a device never holds more than its parts and what is gathered for the module that runs. (A
    Hugging Face model built under DeepSpeed's own partitioning is mis-initialised.)
    """

    def __init__(
        self,
        module: Any,
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
        """Build the engine. Parameters of one axis (gains, scales, biases) have no weight decay.

        `extra`: raw DeepSpeed settings, which replace those written here.
        """
        named = list(module.parameters_by_name())
        groups = [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,  # DeepSpeed may take a step on zero gradients to create the moments, which must not decay weights
            betas=betas,
            fused=device.kind in FUSED_ADAM,
        )
        self._named, self._device, self._ranks = dict(named), device, ranks
        self._accumulation, self._pending = accumulation, 0
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": bf16},
        }
        settings = _merged(settings, extra)
        stage, bf16 = settings["zero_optimization"]["stage"], settings["bf16"]["enabled"]
        self._clip = settings["gradient_clipping"]
        self._clips_itself = stage == 0 and not bf16  # DeepSpeed does not return the norm there
        if self._clips_itself:
            settings["gradient_clipping"] = 0.0
        self._sets_rank = "LOCAL_RANK" not in os.environ
        if self._sets_rank:  # DeepSpeed reads it during training, also without a launcher
            os.environ["LOCAL_RANK"] = str(ranks.local_rank)
        try:
            self._engine = _initialize(module, device, optimizer, settings)
        except BaseException:
            self._unset_rank()
            raise
        self._optimizer = self._engine.optimizer
        self._states = States(self._named, self._engine, stage, device, ranks)

    def backward(self, batch: Tensor, weight: float = 1.0) -> dict[str, Tensor]:
        """Add one micro-batch's gradients times a weight; return its loss and parts on this rank, detached."""
        loss, parts = self._engine(batch.to(self._device.torch))
        self._engine.backward(loss if weight == 1.0 else loss * weight)
        self._pending += 1
        if self._pending < self._accumulation:
            self._engine.step()  # DeepSpeed counts micro-batches here; it updates at the last one
        return {"loss": loss.detach(), **parts}

    def step(self, learning_rate: float) -> float:
        """Update the weights; return the gradient norm before clipping, not finite where nothing was updated."""
        if self._pending != self._accumulation:
            raise RuntimeError(f"a step after {self._pending} of {self._accumulation} micro-batches")
        self._pending = 0
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        clipped = None
        if self._clips_itself:
            clipped = torch.nn.utils.clip_grad_norm_(self._named.values(), self._clip)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() if clipped is None else clipped)
        return norm if norm >= 0.0 else float("nan")

    def measure(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the parts of the module's evaluation mode, without gradients; the training is unchanged."""
        _, parts = self.predict(batch)
        return parts

    def predict(self, tokens: Tensor, *further: Any) -> Any:
        """Return what the module's evaluation mode computes of tokens and further arguments, without gradients."""
        self._engine.eval()
        with torch.no_grad():
            result = self._engine(tokens.to(self._device.torch), *further)
        self._engine.train()
        return result

    def average(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean over ranks of scalars, the same on every rank."""
        packed = torch.stack([value.detach().float() for value in values.values()])
        self._ranks.sum_([packed])
        return dict(zip(values, (packed / self._ranks.world).tolist()))

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these weights by name, in float32, which the compute type would have rounded."""
        missing = [name for name in self._named if name not in weights]
        if missing:
            raise ValueError(f"the initial student lacks the trained tensor {missing[0]}; make the student again")
        with self._states.rewriting():
            for name in self._named:
                self._states.write(name, MASTER, weights[name].to(self._device.torch, torch.float32))

    def student_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained weights one by one, whole, float32, on the host."""
        for name in self._named:
            yield name, self._states.read(name, MASTER).cpu()

    def save(self, folder: Path, step: int, keep: int, best: int | None) -> None:
        """Write the state after `step` optimizer steps as folder/step-<n>; keep the last `keep` and the `best`."""
        if self._ranks.rank == 0:
            training_checkpoints.write(folder, step, self._states.items())
            training_checkpoints.prune(folder, keep, best)
        else:
            for _ in self._states.items():
                pass
        self._ranks.wait("checkpoint")

    def newest_sound(
        self, folder: Path, steps: int, usable: training_checkpoints.Usable
    ) -> tuple[int | None, list[str]]:
        """Return the step to resume a training of `steps` from, and a line for every damaged checkpoint.

        As `training_checkpoints.newest_sound`, the same on every rank; rank 0 alone reads the checkpoints.
        """
        result = None
        if self._ranks.rank == 0:
            result = training_checkpoints.newest_sound(folder, self._states.shapes(), steps, usable)
        step, lines = self._ranks.share(result)
        return step, lines

    def load(self, folder: Path, step: int) -> None:
        """Continue from the checkpoint of a step."""
        self._states.restore(training_checkpoints.opened(folder, step), step)

    def close(self) -> None:
        """Release what DeepSpeed holds; the engine cannot be used afterwards."""
        self._engine.destroy()
        self._unset_rank()

    def _unset_rank(self) -> None:
        if self._sets_rank:
            os.environ.pop("LOCAL_RANK", None)


def _initialize(module: nn.Module, device: Device, optimizer: torch.optim.Optimizer, settings: dict[str, Any]):
    """Return a DeepSpeed engine on the process group that exists."""
    import deepspeed  # not at the top: it chooses its accelerator on import, which must come after `open_device`

    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)  # its calls
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled by a C++ compiler at run time
    deepspeed.init_distributed(dist_init_required=False)
    if settings["zero_optimization"]["stage"] == 3:
        _partition(module, device, settings)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _partition(module: nn.Module, device: Device, settings: Mapping[str, Any]) -> None:
    """Partition every parameter onto the devices in the compute type, and move the buffers there whole.

    One whole parameter is on the device at a time, with rank 0's values. DeepSpeed's `initialize` would move all of
    them there before it partitions; it neither moves nor casts what is partitioned already.
    """
    from deepspeed import zero

    kind = next((kind for name, kind in COMPUTE.items() if settings.get(name, {}).get("enabled")), torch.float32)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(kind)
    zero.Init(module=module, config_dict_or_path=settings)
    module.to(device.torch)  # only buffers: the parameters are empty now


def _merged(settings: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which those of `extra` replace the own ones, mapping by mapping."""
    merged = dict(settings)
    for key, value in extra.items():
        inner = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if inner else value
    return merged
