"""The environment of programs that run beside this project and must not see it."""

import os

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "GROUP_", "ROLE_", "PYTHONPATH")


def quiet_environment(scratch: str) -> dict[str, str]:
    """Return the environment without the launcher's variables, the hub offline, code cached in the scratch folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TRANSFORMERS_VERBOSITY": "error"}
