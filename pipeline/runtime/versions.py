"""Every version that this project names: what it is tested with, and the sets in which Ascend's software is released.

A test compares pyproject.toml, docker/, docs/ and requirements/lock.txt with this file.
"""

from dataclasses import dataclass

PYTHON = "3.11"
PYTHON_IMAGE = "3.11.13-slim-bookworm"
TORCH = {"cpu": "2.13.0", "cuda": "2.13.0", "npu": "2.12.0"}  # what the images and `make setup` install
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu128"
SCHEMAS = "2.13.0"  # the torch_npu wheel whose operator schemas kernels/fused/ascend.py was compared with

AS_OF = "2026-11-29"  # when the tables below were read from the published matrices
ASCEND_INDEX = "https://mirrors.huaweicloud.com/ascend/repos/pypi"
TORCH_NPU, CANN = "2.12.0", "9.1.0"  # what docker/npu.Dockerfile installs: one of the sets below
CANN_IMAGES = tuple(f"quay.io/ascend/cann:{CANN}-{chip}-ubuntu22.04-py{PYTHON}" for chip in ("910b", "a3"))  # A2, A3


@dataclass(frozen=True)
class Release:
    """One release of TorchNPU: wheels of torch_npu, for the torch of the same number, and the CANN they go with."""

    name: str
    cann: str  # a version, or the beginning of one ("9.1" for every 9.1.x)
    torch_npu: tuple[str, ...]

    def fits(self, cann: str) -> bool:
        """Return whether a CANN version is the one of this release."""
        return cann == self.cann or cann.startswith(f"{self.cann}.")


RELEASES = (
    Release("26.1.1", "9.1", ("2.12.0.post2", "2.11.0.post2", "2.10.0.post6", "2.9.0.post8", "2.7.1.post10")),
    Release("26.1.0", "9.1.0", ("2.12.0", "2.11.0", "2.10.0.post4", "2.9.0.post6")),
    Release("26.0.0", "9.0.0", ("2.10.0", "2.9.0.post2")),
    Release("7.3.0", "8.5.0", ("2.9.0",)),
)
TRITON_ASCEND = {"9.1": "3.2.2", "8.5": "3.2.0"}  # CANN -> triton-ascend; no release is known for others
SERVING = {"vllm-ascend": "0.23.0", "torch": "2.10", "transformers": "5.14.1", "cann": "9.1.0"}  # its own environment


def torch_of(torch_npu: str) -> str:
    """Return the torch version that a torch_npu wheel is made for."""
    return torch_npu.partition(".post")[0]


def install_lines(torch_npu: str) -> list[str]:
    """Return the commands that install a torch_npu with its torch.

    torch comes from the CPU index on every machine: the default index has CUDA builds for aarch64, with a triton that
    hides triton-ascend, and not the `+cpu` builds that torch_npu 2.9 and 2.10 require on x86_64.
    """
    return [
        f"pip install --index-url {CPU_INDEX} torch=={torch_of(torch_npu)}",
        f"pip install --extra-index-url {ASCEND_INDEX} torch_npu=={torch_npu}",
    ]
