"""Make large language models smaller without making them worse."""

import os

# torch would import torch_npu by itself and fail as a whole without CANN; runtime/device.py imports it guarded.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
