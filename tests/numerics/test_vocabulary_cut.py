"""The law of the axis `v`: a student with a part of the vocabulary has its teacher's logits of the kept tokens."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import compose, everything
from pipeline.model.hf_config import student_config
from pipeline.model.token_ids import Renumbering, used_ids
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.wrapper import wrapped_config
from tests.laws import plan_of
from tests.tiny import TINY, config_of, tensors_of, tiny_model
from tests.tiny_wrappers import TINY_WRAPPERS, eager, image_inputs, tiny_wrapper

KEPT = (0, 1, 2, 3, 4, *range(6, 90, 3))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def kept_ids() -> torch.Tensor:
    return torch.randint(0, len(KEPT), (2, 12), generator=torch.Generator().manual_seed(0))


def loaded(model, blueprint, folder):
    """Return what a blueprint takes from a model, written as a folder and loaded by its class."""
    source, config = tensors_of(model), config_of(model)
    config["architectures"] = [type(model).__name__]
    anatomy = anatomy_of(config, source)
    tensors = dict(cut(anatomy, blueprint, source))
    assert {name: tuple(each.shape) for name, each in tensors.items()} == blueprint.student(anatomy).shapes()
    write_checkpoint(folder, student_config(config, anatomy, blueprint), tensors.items(), 1e9)
    student = load_model(folder, model.dtype, "eager")
    if anatomy.family.experts:
        student.set_experts_implementation("eager")  # the others refuse float64
    return student


@pytest.mark.parametrize("kind", TINY)
def test_a_student_with_fewer_tokens_has_the_logits_of_those_it_has(kind, tmp_path):
    model, ids = tiny_model(kind), kept_ids()
    whole = everything(anatomy_of(config_of(model), tensors_of(model)).sizes)
    teacher, student = (
        loaded(model, blueprint, tmp_path / name)
        for name, blueprint in (("teacher", whole), ("student", replace(whole, vocabulary=KEPT)))
    )
    expected = logits(teacher, torch.tensor(KEPT)[ids])[..., list(KEPT)]
    assert student.config.vocab_size == len(KEPT)
    exact = 1e-12 if model.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logits(student, ids), expected, rtol=exact, atol=exact)


@pytest.mark.parametrize("kind", TINY_WRAPPERS)
def test_an_image_text_model_with_fewer_tokens_has_the_logits_of_those_it_has(kind, tmp_path):
    tiny_wrapper(kind).save_pretrained(tmp_path / "teacher")
    source, inputs = open_checkpoint(tmp_path / "teacher"), image_inputs(kind)
    read = set(inputs["input_ids"].flatten().tolist())
    kept = tuple(sorted({*KEPT, *read, *used_ids(source.wrapper_parts.config)} & set(range(96))))
    new, blueprint = Renumbering.of(kept, 96), replace(everything(source.anatomy.sizes), vocabulary=kept)
    wrapper_parts = source.wrapper_parts.renumbered(new)
    written = wrapped_config(wrapper_parts.config, student_config(source.config, source.anatomy, blueprint), 32)
    write_checkpoint(tmp_path / "student", written, wrapper_parts.stored(cut(source.anatomy, blueprint, source)), 1e9)
    teacher, student = (
        eager(
            AutoModelForImageTextToText.from_pretrained(
                tmp_path / name, dtype=torch.float64, attn_implementation="eager"
            )
        )
        for name in ("teacher", "student")
    )
    assert student.config.text_config.vocab_size == len(kept)
    ids = torch.tensor([[new[int(number)] for number in row] for row in inputs["input_ids"]])
    with torch.no_grad():
        expected = teacher(**inputs).logits[..., list(kept)]
        found = student(**inputs | {"input_ids": ids}).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama-tied", "gemma2", "phi"])
def test_cutting_the_vocabulary_and_the_other_axes_commutes(kind):
    source = tiny_model(kind)
    anatomy = anatomy_of(config_of(source), tensors_of(source))
    narrow = plan_of(anatomy, "all")
    tokens = replace(everything(anatomy.sizes), vocabulary=KEPT)
    both = replace(narrow, vocabulary=KEPT)
    assert compose(tokens, narrow) == both
    further = tuple(range(0, len(KEPT), 2))
    assert compose(both, replace(everything(both.sizes(anatomy.sizes)), vocabulary=further)).vocabulary == KEPT[::2]
    first = dict(cut(anatomy, tokens, tensors_of(source)))
    for name, tensor in cut(tokens.student(anatomy), narrow, first):
        assert torch.equal(tensor, dict(cut(anatomy, both, tensors_of(source)))[name]), name


def test_no_list_of_tokens_keeps_all():
    model = tiny_model("llama")
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    whole = everything(anatomy.sizes)
    assert whole.vocabulary == ()
    assert student_config(config_of(model), anatomy, whole)["vocab_size"] == 96
    listed = dict(cut(anatomy, replace(whole, vocabulary=tuple(range(96))), tensors_of(model)))
    assert all(torch.equal(tensor, listed[name]) for name, tensor in tensors_of(model).items())


def test_a_repeated_token_is_refused():
    model = tiny_model("llama")
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    with pytest.raises(ValueError, match="blueprint vocabulary"):
        replace(everything(anatomy.sizes), vocabulary=(1, 1)).check(anatomy)


def test_fields_with_ids_are_renumbered():
    fields = {
        "vocab_size": 10,
        "bos_token_id": 2,
        "eos_token_id": [4, 8],
        "pad_token_id": -1,
        "image_token_index": 11,
        "forced_eos_token_id": None,
        "suppress_tokens": [3, 4],
        "begin_suppress_tokens": [3],
        "bad_words_ids": [[2, 4], [2, 3]],
        "forced_decoder_ids": [[1, 4], [2, 5]],
        "sequence_bias": [[[2, 8], -1.0], [[5], 2.0]],
        "temperature": 0.6,
    }
    assert used_ids(fields) == {2, 4, 8, -1, 11}
    assert Renumbering.of((2, 4, 8), 10).fields(fields) == fields | {
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "image_token_index": 4,
        "suppress_tokens": [1],
        "begin_suppress_tokens": [],
        "bad_words_ids": [[0, 1]],
        "forced_decoder_ids": [[1, 1]],
        "sequence_bias": [[[0, 2], -1.0]],
    }
    with pytest.raises(ValueError, match="eos_token_id"):
        Renumbering.of((2, 4), 10).fields(fields)
