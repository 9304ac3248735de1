"""A simulated `torch_npu`: importing it gives PyTorch the device `npu` and the process-group backend `hccl`.

Tensors lie in host memory and operators run on the CPU, but the device is another one to PyTorch: a tensor left behind
on the CPU, a hard-coded `cuda`, a reduction HCCL has not are refused as on a real NPU. The fused operators the
project calls are there in plain PyTorch; autocast and speed are not.
"""

import torch
import torch.distributed as distributed

from . import npu, ops

npu_fusion_attention = ops.npu_fusion_attention  # transformers imports it by this name wherever there is an NPU
__version__ = "0.0.0+simulated"

torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend()


def _hccl(store, rank: int, size: int, timeout):
    return npu._device.Hccl(distributed.ProcessGroupGloo(store, rank, size, timeout))


distributed.Backend.register_backend("hccl", _hccl, devices=["npu"])
