"""Tiny models cut in memory and on disk, their logits, and when two of these are equal."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.anatomy import anatomy_of
from pipeline.model.families import family_of
from pipeline.model.hf_config import student_config
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.tiny import config_of, tensors_of, tokens


def assert_close(one, other):
    """Assert equality up to the float32 in which the classes' norms and softmax compute, also inside float64 models."""
    assert (one - other).norm() / other.norm() < 1e-5, (one - other).abs().max()


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def anatomy(model):
    return anatomy_of(config_of(model), tensors_of(model))


def export(model, blueprint, folder):
    config = student_config(config_of(model), anatomy(model), blueprint)
    write_checkpoint(folder, config, cut(anatomy(model), blueprint, tensors_of(model)), 20_000)
    return folder


def built(model, blueprint):
    """Return the student as its class computes it, without a folder on disk."""
    config = AutoConfig.for_model(**student_config(config_of(model), anatomy(model), blueprint))
    student = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(model.dtype).eval()
    tensors = dict(cut(anatomy(model), blueprint, tensors_of(model)))
    if config.tie_word_embeddings:
        family = family_of(model.config.model_type)
        tensors[f"{family.head}.weight"] = tensors[f"{family.embedding}.weight"]
    student.load_state_dict(tensors)
    return student


def student_of(model, blueprint, folder):
    """Return the student as its class loads it, which refuses missing and unexpected tensors."""
    student = load_model(export(model, blueprint, folder), model.dtype, "eager")
    if family_of(model.config.model_type).experts:
        student.set_experts_implementation("eager")  # the others refuse float64
    return student
