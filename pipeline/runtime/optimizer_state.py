"""What determines the rest of a training under DeepSpeed: master weights and Adam moments, by parameter name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.runtime.device import Device
from pipeline.runtime.ranks import Ranks

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
FUSED_ADAM = ("cpu", "cuda")  # kinds of device where torch has AdamW in one pass


class States:
    """Float32 master weights and moments of a DeepSpeed engine, each read and written whole, shaped as its parameter.

    `named`: the trained parameters by name. From ZeRO stage 1 on every method is a collective, called in the same
    order on all ranks.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], engine: Any, stage: int, device: Device, ranks: Ranks):
        """Create every moment, zero, at step 0."""
        self._named, self._adam, self._optimizer = named, engine.basic_optimizer, engine.optimizer
        self._stage, self._device, self._ranks = stage, device, ranks
        self._masters = self._own_masters() if stage == 0 else {}
        self._open_moments()

    def names(self) -> Iterator[str]:
        """Yield KIND/NAME of every tensor, one kind after another."""
        return (f"{kind}/{name}" for kind in (MASTER, *MOMENTS) for name in self._named)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by its KIND/NAME."""
        whole = {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in self._named.items()}
        return {each: whole[each.partition("/")[2]] for each in self.names()}

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by its KIND/NAME, on the host."""
        for each in self.names():
            kind, _, name = each.partition("/")
            yield each, self.read(name, kind).cpu()

    def restore(self, saved: Mapping[str, Tensor], step: int) -> None:
        """Write back what `items` yielded after `step` steps."""
        with self.rewriting():
            for name in self._named:
                for kind in (MASTER, *MOMENTS):
                    self.write(name, kind, saved[f"{kind}/{name}"].to(self._device.torch))
            for state in self._adam.state.values():
                state["step"].fill_(step)

    def read(self, name: str, kind: str) -> Tensor:
        """Return a master weight or a moment, whole, float32."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._named[name]
        if self._stage == 0:
            master = self._masters[id(parameter)]
            return (master if kind == MASTER else self._adam.state[master][kind]).detach()
        if kind == MASTER:
            return safe_get_full_fp32_param(parameter).detach()
        return safe_get_full_optimizer_state(parameter, kind)

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Replace a master weight or a moment by a whole one; each rank takes the part it owns."""
        from deepspeed import utils

        parameter = self._named[name]
        if self._stage == 0:
            self.read(name, kind).copy_(value)
        elif self._stage < 3 and kind == MASTER:
            utils.safe_set_full_fp32_param(parameter, value)
        elif self._stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value, kind)
        elif kind == MASTER:
            utils.safe_set_local_fp32_param(parameter, self._partition(value, _shard_of(parameter).numel()))
        else:
            part = self._partition(value, _shard_of(parameter).numel())
            utils.safe_set_local_optimizer_state(parameter, part, kind)

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Update the compute weights from the master weights that the block writes."""
        if self._stage == 3:
            self._optimizer.checkpoint_event_prologue()
        yield
        if self._stage == 3:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._optimizer.checkpoint_event_epilogue()
        elif self._stage:
            self._optimizer.update_lp_params()
        else:
            for parameter in self._named.values():
                parameter.data.copy_(self._masters[id(parameter)].data)

    def _own_masters(self) -> dict[int, Tensor]:
        """Return the float32 weights without ZeRO, by the identity of their parameter."""
        if self._optimizer is self._adam:
            return {id(parameter): parameter for parameter in self._named.values()}
        pairs = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups)
        return {id(low): master for lows, masters in pairs for low, master in zip(lows, masters)}

    def _open_moments(self) -> None:
        """Create every Adam state at step 0: some stages would do so at the first step, and some have taken one."""
        owned = [each for group in self._adam.param_groups for each in group["params"]]
        for tensor in self._optimizer.fp32_partitioned_groups_flat if self._stage == 3 else owned:
            state = self._adam.state[tensor]
            for moment in MOMENTS:
                state[moment] = state[moment].zero_() if moment in state else torch.zeros_like(tensor)
            place = tensor.device if self._device.kind in FUSED_ADAM else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _partition(self, whole: Tensor, size: int) -> Tensor:
        """Return this rank's part of a tensor that ZeRO-3 cut into equal ones, the last padded with zeros."""
        part = whole.new_zeros(size)
        mine = whole.flatten()[self._ranks.rank * size : (self._ranks.rank + 1) * size]
        part[: mine.numel()] = mine
        return part


def _shard_of(parameter: Any) -> Tensor:
    """Return the part of a parameter that this rank holds under ZeRO-3."""
    return parameter.ds_tensor
