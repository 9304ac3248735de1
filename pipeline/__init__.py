"""Make large language models smaller without making them worse."""

import importlib.util
import os
import sys
from pathlib import Path

# torch would import torch_npu by itself and fail as a whole without CANN; runtime/device.py imports it guarded.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# A checkout runs without being installed: its source root `kernels` holds the package `fused`.
if importlib.util.find_spec("fused") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
