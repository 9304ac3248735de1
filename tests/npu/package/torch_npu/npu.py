"""The part of `torch.npu` that PyTorch, DeepSpeed and Hugging Face ask of a device module."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from .build import extension

_device = extension()
device_count = _device.device_count
current_device = _device.current_device
TOTAL_MEMORY = int(os.environ.get("SIMULATED_NPU_MEMORY", 64 * 2**30))


class device:
    """A context in which `index` is the current NPU."""

    def __init__(self, index):
        self.index = _index(index)

    def __enter__(self):
        self.outer = current_device()
        set_device(self.index)

    def __exit__(self, *fault):
        set_device(self.outer)


def _index(device=None) -> int:
    index = device.index if isinstance(device, torch.device) else device
    if isinstance(index, str):
        index = torch.device(index).index
    return current_device() if index is None else index


def set_device(device) -> None:
    _device.set_device(_index(device))


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None:
    pass


def synchronize(device=None) -> None:
    pass


def empty_cache() -> None:
    pass


def _is_in_bad_fork() -> bool:
    return False


def _lazy_call(call, **_) -> None:
    call()


def get_device_name(device=None) -> str:
    return "Simulated NPU"


def get_device_properties(device=None) -> SimpleNamespace:
    return SimpleNamespace(name=get_device_name(), total_memory=TOTAL_MEMORY)


def mem_get_info(device=None) -> tuple[int, int]:
    return TOTAL_MEMORY - memory_allocated(device), TOTAL_MEMORY


def memory_allocated(device=None) -> int:
    return _device.memory(_index(device))[0]


def max_memory_allocated(device=None) -> int:
    return _device.memory(_index(device))[1]


def reset_peak_memory_stats(device=None) -> None:
    _device.reset_peak_memory(_index(device))


memory_reserved = memory_cached = memory_allocated
max_memory_reserved = max_memory_cached = max_memory_allocated
reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats


def memory_stats(device=None) -> dict[str, int]:
    now, peak = _device.memory(_index(device))
    return {"allocated_bytes.all.current": now, "allocated_bytes.all.peak": peak}


default_generators = tuple(_device.default_generator(index) for index in range(device_count()))


def manual_seed(seed: int) -> None:
    default_generators[current_device()].manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for generator in default_generators:
        generator.manual_seed(seed)


def initial_seed() -> int:
    return default_generators[current_device()].initial_seed()


def get_rng_state(device="npu") -> torch.Tensor:
    return default_generators[_index(device)].get_state()


def set_rng_state(state: torch.Tensor, device="npu") -> None:
    default_generators[_index(device)].set_state(state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [generator.get_state() for generator in default_generators]


def set_rng_state_all(states) -> None:
    for generator, state in zip(default_generators, states):
        generator.set_state(state)


def Stream(device=None, priority=0) -> torch.Stream:
    return torch.Stream(f"npu:{_index(device)}")


def Event(enable_timing=False, **_) -> torch.Event:
    return torch.Event("npu", enable_timing=enable_timing)


def current_stream(device=None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


default_stream = current_stream


def set_stream(stream) -> None:
    pass


def stream(stream):
    return nullcontext()


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def _typed(dtype: torch.dtype):
    return lambda data: torch.tensor(data, dtype=dtype, device="npu")


BFloat16Tensor, HalfTensor = _typed(torch.bfloat16), _typed(torch.float16)
FloatTensor, DoubleTensor = _typed(torch.float32), _typed(torch.float64)
ByteTensor, IntTensor, LongTensor = _typed(torch.uint8), _typed(torch.int32), _typed(torch.int64)
