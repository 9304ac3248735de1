"""Models and checkpoints as every stage reads them."""

from pathlib import Path

from pipeline.config import Config
from pipeline.model.causal import CausalModel
from pipeline.runtime.checkpoint import Checkpoint, open_checkpoint
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model


def load(folder: Path, machine: Machine) -> CausalModel:
    """Return the model of a folder on the host, in the type and with the attention that the device computes with."""
    device = machine.device
    return load_model(folder, device.compute_dtype, device.attention)


def checkpoint(config: Config, folder: Path) -> Checkpoint:
    """Return the checkpoint of a folder, whose tensors are read one at a time."""
    return open_checkpoint(folder, config.model.allow_pickle)
