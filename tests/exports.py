"""Students exported in a form, and when two are the same function."""

import torch

from pipeline.model import decilm
from pipeline.prune.surgery.pad import pad
from pipeline.runtime import configuration_decilm
from pipeline.runtime.checkpoint_writer import write_checkpoint
from tests.tiny import tokens


def assert_close(one, other):
    """Equal up to the float32 in which the classes' norms and softmax compute, even inside a float64 model."""
    assert (one - other).norm() / other.norm() < 1e-6, (one - other).abs().max()


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def exported(form, source, folder):
    config, wide = form(source.config, source.anatomy)
    write_checkpoint(folder, config, pad(source.anatomy, wide, source.items()), 1e9)
    return folder


def served(source, folder):
    exported(decilm.decilm, source, folder)
    with open(configuration_decilm.__file__) as code:
        (folder / decilm.CONFIGURATION_FILE).write_text(code.read())
    return folder
