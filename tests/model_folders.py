"""Model folders on disk: changed by hand, refused by name, or read as transformers reads them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.runtime.model_loader import load_model
from pipeline.runtime.model_source import inspect, locate
from tests.students import imported
from tests.tiny import tokens


def edit(folder, file="config.json", without=(), **fields):
    kept = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({k: v for k, v in (kept | fields).items() if k not in without}))


def change(folder, **tensors):
    """Replace tensors of a folder, or remove those that are None."""
    weights = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({k: t for k, t in weights.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def refused(folder, *names):
    """Check that a folder is refused as model.path, in one line with these names, and that its copy is refused too."""
    with pytest.raises(ValueError) as checked:
        inspect(locate(str(folder)), "model.path")
    with pytest.raises(ValueError):
        imported(folder, folder.with_name("copy"))
    message = str(checked.value)
    assert message.startswith("model.path: ") and "\n" not in message, message
    assert all(name in message for name in names), message


def assert_read_as_by_transformers(folder, copy):
    """Check that what the stages read, what they load and what transformers reads are the same network."""
    checkpoint = imported(folder, copy)
    options = {"local_files_only": True, "dtype": torch.float32, "attn_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    ours = load_model(copy, torch.float32, "eager")
    assert torch.equal(logits(ours), logits(theirs))
    stock = AutoModelForCausalLM.from_pretrained(copy, **options).eval()
    assert torch.equal(logits(stock), logits(theirs))
    own = dict(ours.named_parameters())
    assert own.keys() == checkpoint.keys() == checkpoint.anatomy.shapes().keys()
    assert all(torch.equal(own[name], checkpoint[name]) for name in own)
    return checkpoint
