"""Import the real torch_npu over stub CANN libraries and call our Ascend implementations on tensors without memory.

Run by test_wheel.py with the wheel on PYTHONPATH and the stubs on LD_LIBRARY_PATH. Prints one line of JSON.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "kernels"))

from pipeline.runtime.device import missing  # noqa: E402  (first: it imports torch_npu guarded, as a run does)


def shapes() -> dict[str, list]:
    """Shape and type of what each operation gives, by the wheel's own rules for tensors without memory."""
    import torch

    from fused import ascend

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, gain = empty(2, 5, 32), empty(32)
    query, angles = empty(2, 4, 5, 16), empty(2, 5, 16)
    made = {
        "rms_norm": ascend.rms_norm(x, gain, 1e-6, 1.0),
        "swiglu_packed": ascend.swiglu_packed(x),
        "rotary half": ascend.rotary(query, angles, angles, "half"),
        "rotary interleave": ascend.rotary(query, angles, angles, "interleave"),
    }
    return {name: [list(value.shape), str(value.dtype)] for name, value in made.items()}


if __name__ == "__main__":
    import torch

    reason = missing("npu")
    count = sum(schema.name.startswith("npu::") for schema in torch._C._jit_get_all_schemas())
    print(json.dumps({"missing": reason, "schemas": count, "shapes": shapes()}))
