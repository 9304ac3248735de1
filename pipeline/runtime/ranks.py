"""Ranks: the processes of one run, how they add tensors and how they wait for each other.

Small values and waits use the key-value store, never an accelerator collective: a wait in the store can name the
missing rank, and holds no device queue that a watchdog would end during a long single-rank stage.
"""

import atexit
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runtime.faults import REPORTER, PeerFailed
from pipeline.runtime.heartbeat import FAILED, Pulse, alive

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
LOOK = 0.5  # most seconds between two looks of a waiting rank at the others
COLLECTIVES = ("gloo/transport", "Connection closed by peer", "NCCL", "HCCL", "ProcessGroup")  # in their errors
CHUNK = 1 << 24  # elements of a host tensor that travel through an accelerator at once


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world` processes. Every method is called by all ranks in the same order."""

    rank: int
    world: int
    local_rank: int
    timeout: float = 0.0  # seconds without a heartbeat after which a rank counts as dead
    device: torch.device = field(default=torch.device("cpu"), repr=False)
    store: dist.Store | None = field(default=None, repr=False)
    calls: Iterator[int] = field(default_factory=count, repr=False, compare=False)

    @property
    def keys(self) -> dist.Store:
        """The key-value store of several ranks."""
        if self.store is None:
            raise RuntimeError("a single rank has no store")
        return self.store

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over ranks; the result is the same on every rank, bit for bit.

        Host tensors under an accelerator's backend, and float64 under HCCL, which cannot add it, travel as bits and are
        added on the host in their own type.
        """
        if self.world == 1:
            return
        for tensor in tensors:
            # What inference mode made may only change in that mode.
            with self._peers("the sum over ranks"), torch.inference_mode(tensor.is_inference()):
                refused = self.device.type == "npu" and tensor.dtype == torch.float64
                if tensor.device.type != self.device.type or refused:
                    self._sum_as_bits(tensor)
                else:
                    _sum_on_device(tensor)

    def share(self, value: Any) -> Any:
        """Return rank 0's value, anything JSON can hold, on every rank."""
        if self.world == 1:
            return json.loads(json.dumps(value))
        key = f"share/{next(self.calls)}"
        if self.rank == 0:
            text = json.dumps(value)
            with self._peers("sharing a value"):
                self.keys.set(key, text)
            return json.loads(text)
        self._await({0: key}, "a value it shares")
        return json.loads(self.keys.get(key))

    def wait(self, name: str) -> None:
        """Return when every rank has called this; PeerFailed, naming the missing ranks, where one failed or died.

        A rank that is alive and busy is waited for without a limit.
        """
        if self.world == 1:
            return
        prefix = f"wait/{next(self.calls)}/{name}"
        with self._peers(f"`{name}`"):
            self.keys.set(f"{prefix}/{self.rank}", "here")
        self._await({rank: f"{prefix}/{rank}" for rank in range(self.world)}, f"`{name}`")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Report a failure of the block to the other ranks, so that they stop at once with its reason.

        An error of a collective, also of one inside a library, becomes PeerFailed: another rank stopped.
        """
        try:
            yield
        except PeerFailed:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if self.world == 1:
                raise
            lost = _of_a_collective(error)
            with _store_may_be_gone():
                if lost and self.keys.check([FAILED]):
                    raise PeerFailed(self.keys.get(FAILED).decode()) from error
                if not lost:
                    REPORTER.prints()  # before the others learn of it: this rank knows most
                    self.keys.set(FAILED, f"rank {self.rank} failed: {type(error).__name__}: {error}")
            if lost:
                raise PeerFailed(_lost(self.rank, "a collective", error)) from error
            raise

    def _await(self, keys: dict[int, str], what: str) -> None:
        """Wait for the key of every rank in `keys`."""
        pulses: dict[int, bytes] = {}
        heard = dict.fromkeys(keys, time.monotonic())
        pause = 0.001
        while True:
            with self._peers(f"the wait for {what}"):
                missing = [rank for rank, key in keys.items() if not self.keys.check([key])]
                if not missing:
                    return
                if self.keys.check([FAILED]):
                    raise PeerFailed(self.keys.get(FAILED).decode())
                for rank in missing:
                    pulse = self.keys.get(alive(rank)) if self.keys.check([alive(rank)]) else b""
                    if pulses.get(rank) != pulse:
                        pulses[rank], heard[rank] = pulse, time.monotonic()
            silent = [rank for rank in missing if time.monotonic() - heard[rank] > self.timeout]
            if silent:
                raise PeerFailed(
                    f"{_names(missing)} did not reach {what}, and {_names(silent)} sent no heartbeat for"
                    f" {self.timeout:g} s; see the output of that process"
                )
            time.sleep(pause)
            pause = min(2 * pause, LOOK)

    def _sum_as_bits(self, tensor: Tensor) -> None:
        flat = tensor.detach().cpu().reshape(-1).contiguous()
        total = torch.empty_like(flat)
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            bits = part.view(torch.uint8).to(self.device)
            gathered = [torch.empty_like(bits) for _ in range(self.world)]
            dist.all_gather(gathered, bits)
            total[start : start + CHUNK] = sum(piece.cpu().view(part.dtype) for piece in gathered)
        tensor.copy_(total.reshape(tensor.shape))

    @contextmanager
    def _peers(self, what: str) -> Iterator[None]:
        try:
            yield
        except PeerFailed:
            raise
        except RuntimeError as error:  # every error of torch's collectives and stores is one
            with _store_may_be_gone():
                if self.keys.check([FAILED]):  # the other rank left its reason before it stopped
                    raise PeerFailed(self.keys.get(FAILED).decode()) from error
            raise PeerFailed(_lost(self.rank, what, error)) from error


_joined: Ranks | None = None
_pulse: Pulse | None = None


def place() -> tuple[int, int, int]:
    """Return this process's (rank, world, local rank) from torchrun's environment; (0, 1, 0) without one."""
    present = [name for name in TORCHRUN if name in os.environ]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(present):
        return 0, 1, 0
    absent = [name for name in TORCHRUN if name not in present]
    if absent:
        raise ValueError(f"{', '.join(present)} set without {', '.join(absent)}: start with torchrun, or unset them")
    for name in NUMBERS:
        if not re.fullmatch("[0-9]{1,9}", os.environ[name]):
            raise ValueError(f"{name} is {os.environ[name]!r}, not a number; unset what the scheduler set")
    rank, world, local, port = (int(os.environ[name]) for name in NUMBERS)
    if not (local <= rank < world and 0 < port < 1 << 16):
        values = ", ".join(f"{name}={os.environ[name]}" for name in NUMBERS)
        raise ValueError(f"{values} name no place among the ranks of a run; start with torchrun, or unset them")
    return rank, world, local


def join(device, timeout: float) -> Ranks:
    """Make this process a member of the run's process group, once; later calls return the same Ranks.

    `device`: this rank's Device; `timeout`: seconds without a heartbeat after which another rank counts as dead,
    also the limit of one collective. Without torchrun the group has one member and opens no port.
    """
    global _joined, _pulse
    if _joined is not None and dist.is_initialized():
        return _joined
    rank, world, local_rank = place()
    limit = timedelta(seconds=timeout)
    if "RANK" in os.environ:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        store = _of_this_attempt(store, rank, world, timeout)
    else:
        store = dist.HashStore()
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=world, timeout=limit)
    ours: Any = dist.PrefixStore("pipeline", store)
    _joined = Ranks(rank, world, local_rank, timeout, device.torch, ours)
    if world == 1:
        atexit.register(_close)
    else:
        REPORTER.meet(ours)
        _pulse = Pulse(ours.clone(), rank, world, timeout)
        atexit.register(_pulse.end)
    return _joined


def _of_this_attempt(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """Return a view of the store that no earlier attempt wrote to, the same one on every rank.

    torchrun keeps one store over its restarts and counts them per node: none of its numbers names the attempt. So every
    process stores a name of its own, rank 0 stores the list of names under its name until all have answered, and a
    process answers a list that holds its name: those of earlier attempts hold other names.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"name/{rank}", name)
    while time.monotonic() < deadline:
        if rank == 0 and store.check([f"name/{other}" for other in range(world)]):
            roll = [store.get(f"name/{other}").decode() for other in range(world)]
            store.set(f"roll/{name}", json.dumps(roll))
            if world == 1 or store.check([f"answer/{name}/{other}" for other in roll[1:]]):
                return dist.PrefixStore(name, store)
        elif rank and store.check(["name/0"]):
            caller = store.get("name/0").decode()
            if store.check([f"roll/{caller}"]) and name in json.loads(store.get(f"roll/{caller}")):
                store.set(f"answer/{caller}/{name}", "")
                return dist.PrefixStore(caller, store)
        time.sleep(0.01)
    raise PeerFailed(f"rank {rank}: not all {world} ranks started within {timeout:g} s; see their outputs")


def leave() -> None:
    """Close the process group that `join` opened.

    A group of one rank stays until the process ends: it holds no connection, and DeepSpeed keeps references to it, by
    which a later run of the same process would find it closed.
    """
    global _joined, _pulse
    if _joined is not None and _joined.world == 1:
        return
    if _pulse is not None:
        _pulse.end()
        _pulse = None
    REPORTER.meet(None)
    if _joined is not None and dist.is_initialized():
        dist.destroy_process_group()
    _joined = None


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _sum_on_device(tensor: Tensor) -> None:
    if tensor.is_contiguous():
        dist.all_reduce(tensor)
        return
    dense = tensor.contiguous()
    dist.all_reduce(dense)
    tensor.copy_(dense)


@contextmanager
def _store_may_be_gone() -> Iterator[None]:
    try:
        yield
    except dist.DistError:  # the process that held the store ended: no rank is left that could read it
        return


def _of_a_collective(error: BaseException) -> bool:
    """Return whether an error comes from a process group; gloo raises plain RuntimeErrors, known by their text."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(mark in str(error) for mark in COLLECTIVES)
    )


def _lost(rank: int, what: str, error: BaseException) -> str:
    text = re.sub(r"^\[\S+\] ", "", str(error))  # the place in gloo's own source
    reason = (text.splitlines() or [type(error).__name__])[0].partition(". ")[0]  # without gloo's advice
    return f"rank {rank}: {what} failed; did another rank stop? ({reason:.200})"


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
