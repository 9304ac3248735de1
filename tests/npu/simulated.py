"""Make this process and the ones it starts believe that they have NPUs."""

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).with_name("package")


def install() -> None:
    """Put the simulated `torch_npu` first on the path, here and in child processes, and import it.

    Only for a process of its own: the device stays registered until the process ends.
    """
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(PACKAGE) not in inherited:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(PACKAGE), *inherited])
    if str(PACKAGE) not in sys.path:
        sys.path.insert(0, str(PACKAGE))
    os.environ.setdefault("ASCEND_HOME_PATH", "/nonexistent/ascend")  # DeepSpeed's op builders read it on import
    import torch_npu  # noqa: F401
