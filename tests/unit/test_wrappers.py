"""Image-text models: the text half is cut, the rest carried; the whole computes what the masked whole computes."""

import copy
import json

import pytest
import torch
import transformers

from pipeline.model.blueprint import Blueprint, everything
from pipeline.model.families import WRAPPERS
from pipeline.model.hf_config import student_config
from pipeline.prune.surgery.cut import cut
from pipeline.prune.surgery.projector import check_layers, kept_units, narrowed, rotated_tensors
from pipeline.prune.surgery.rotate import rotate, rotated_anatomy
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import finite, write_checkpoint
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.model_source import import_model, locate
from pipeline.runtime.wrapper import wrapped_config
from pipeline.stages.deliver import export
from tests.laws import masked, plan_of
from tests.tiny import tokens
from tests.tiny_text import configured
from tests.tiny_wrappers import IMAGE, TINY_WRAPPERS, eager, image_inputs, text_half, tiny_wrapper


def saved(kind, folder, **text):
    model = tiny_wrapper(kind, **text)
    model.save_pretrained(folder)
    return model, open_checkpoint(folder)


def logits(model, kind=None):
    with torch.no_grad():
        text = {"input_ids": tokens(vocabulary=IMAGE)}
        return model(**(image_inputs(kind) if kind else text), use_cache=False).logits


def written(source, config, text, carried, hidden, folder):
    """Write the whole model around a text half, as export does, and return it as its class loads it."""
    whole = wrapped_config(source.wrapper_parts.config, config, hidden)
    tensors = dict(source.wrapper_parts.stored(iter(text))) | dict(carried)
    write_checkpoint(folder, whole, tensors.items(), 1e9)
    cls = getattr(transformers, source.wrapper_parts.wrapper.architecture)
    options = {"dtype": torch.float64, "attn_implementation": "eager", "output_loading_info": True}
    model, info = cls.from_pretrained(folder, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return eager(model).eval()


def assert_close(one, other):
    assert (one - other).norm() / other.norm() < 1e-5, (one - other).abs().max()


def test_every_wrapper_has_a_tiny_model():
    assert TINY_WRAPPERS.keys() == WRAPPERS.keys()


@pytest.mark.parametrize("kind", TINY_WRAPPERS)
def test_the_text_half_is_read_as_its_own_class_and_keeping_everything_is_bit_identical(kind, tmp_path):
    model, source = saved(kind, tmp_path / "m")
    source.check()
    text = eager(load_model(tmp_path / "m", torch.float64, "eager"))
    assert_close(logits(text), logits(model))
    kept = cut(source.anatomy, everything(source.anatomy.sizes), source)
    again = written(source, source.config, kept, source.wrapper_parts.tensors, 32, tmp_path / "s")
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert_close(logits(again, kind), logits(model, kind))


@pytest.mark.parametrize("kind", TINY_WRAPPERS)
def test_cutting_equals_masking_for_text_and_for_text_with_an_image(kind, tmp_path):
    model, source = saved(kind, tmp_path / "m")
    of, wrapper_parts = source.anatomy, source.wrapper_parts
    blueprint = plan_of(of, "all")
    config = student_config(source.config, of, blueprint)
    carried = dict(narrowed(wrapper_parts.wrapper, wrapper_parts.tensors, blueprint))
    hidden = len(blueprint.channels)
    student = written(source, config, cut(of, blueprint, source), carried, hidden, tmp_path / "s")
    teacher = masked(text_half(model), of, blueprint, tmp_path / "masked")
    if of.family.experts:  # whose masked model is another one
        take_text_half(model, teacher)
    mask_projector(model, wrapper_parts, blueprint)
    assert_close(logits(student), logits(model))
    assert_close(logits(student, kind), logits(model, kind))
    assert (logits(student, kind) - logits(student)[:1, :1]).abs().max() > 0


def take_text_half(model, text):
    """Make a text model the text half of an image-text model."""
    if hasattr(model, "model"):
        model.model.language_model, model.lm_head = text.model, text.lm_head
    else:
        model.language_model = text


@torch.no_grad()
def mask_projector(model, wrapper_parts, blueprint):
    """Set to zero what the projector writes to dropped channels, and its dropped units, in place."""
    channels = torch.tensor(blueprint.channels)
    kept = {"h": channels, "u": kept_units(wrapper_parts.wrapper, wrapper_parts.tensors, channels)}
    for name, tensor in model.named_parameters():
        for dimension, axis in enumerate(wrapper_parts.wrapper.axes(name) or ()):
            if axis in kept and len(kept[axis]):
                gone = torch.ones(tensor.shape[dimension], dtype=torch.bool)
                gone[kept[axis]] = False
                tensor.movedim(dimension, 0)[gone] = 0.0


def test_projector_units_that_read_nothing_or_write_nothing_to_kept_channels_are_removed():
    reads, writes = (torch.ones(6, width, dtype=torch.float64) for width in (4, 6))
    reads[5], writes[:4, 2], writes[4:, 2] = 0.0, 0.0, 10.0
    tensors = {"multi_modal_projector.linear_1.weight": reads, "multi_modal_projector.linear_2.weight": writes}
    assert kept_units(WRAPPERS["llava"], tensors, torch.arange(4)).tolist() == [0, 1, 3, 4]
    assert kept_units(WRAPPERS["llava"], tensors, torch.arange(6)).tolist() == list(range(6))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3"])
def test_turning_the_channels_of_text_and_projector_changes_no_logits(kind, tmp_path):
    model, source = saved(kind, tmp_path / "m")
    basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))).Q
    text = rotate(source.anatomy, basis, source)
    carried = rotated_tensors(source.wrapper_parts.wrapper, source.wrapper_parts.tensors, basis)
    config = source.config | {"tie_word_embeddings": rotated_anatomy(source.anatomy).tied}
    student = written(source, config, text.items(), carried, 32, tmp_path / "s")
    assert_close(logits(student, kind), logits(model, kind))


def test_an_imported_wrapper_is_a_text_model_with_the_rest_beside_it(tmp_path):
    model, source = saved("qwen2_5_vl", tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text("{}")
    copy_ = import_model(locate(str(tmp_path / "m")), tmp_path / "t", "model.path", 1e9, False)
    assert not copy_.wrapped and dict(copy_.wrapper_parts.config) == dict(source.wrapper_parts.config)
    carried, stored = copy_.wrapper_parts.tensors, source.wrapper_parts.tensors
    assert carried.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in carried.items())
    assert (tmp_path / "t" / "preprocessor_config.json").is_file()
    text = load_model(tmp_path / "t", torch.float64, "eager")
    assert type(text).__name__ == "Qwen2ForCausalLM"
    assert_close(logits(text), logits(model))
    assert locate(str(tmp_path / "t")).digest() != locate(str(tmp_path / "m")).digest()


def test_an_old_file_with_the_text_half_s_fields_outside_is_read_alike(tmp_path):
    model, source = saved("qwen2_vl", tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    stored = json.loads(path.read_text())
    flat = {name: value for name, value in stored.pop("text_config").items() if name != "model_type"}
    flat.pop("rope_parameters")
    flat |= {"rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    path.write_text(json.dumps(flat | stored | {"torch_dtype": "float64"}))
    old = open_checkpoint(tmp_path / "m")
    assert old.anatomy == source.anatomy
    assert old.config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


def test_layers_that_image_features_enter_at_stay_first(tmp_path):
    _, source = saved("qwen3_vl", tmp_path / "m")
    whole = everything(source.anatomy.sizes)
    wrapper_parts = source.wrapper_parts
    assert wrapper_parts.injected() == 1
    check_layers(wrapper_parts.wrapper, wrapper_parts.injected(), Blueprint(whole.channels, whole.layers[:2]))
    with pytest.raises(ValueError, match="plan.keep_first=1"):
        check_layers(wrapper_parts.wrapper, wrapper_parts.injected(), Blueprint(whole.channels, whole.layers[1:]))


def test_a_text_half_without_a_table_and_one_that_transformers_refuses_are_refused(tmp_path):
    saved("llava", tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    stored = json.loads(path.read_text())
    strange = copy.deepcopy(stored)
    strange["text_config"]["model_type"] = "mamba"
    path.write_text(json.dumps(strange))
    with pytest.raises(ValueError, match="text_config is of model_type 'mamba'"):
        open_checkpoint(tmp_path / "m")
    stored["text_config"]["num_hidden_layers"] = 10**9
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000"):
        open_checkpoint(tmp_path / "m")


def test_a_form_that_only_our_code_computes_is_refused_before_any_work(tmp_path):
    saved("gemma3", tmp_path / "m")
    path = f"model.path={tmp_path / 'm'}"
    export.check(configured(path, "reinit.absorb=false"))
    for changed in ([], ["reinit.absorb=false", "export.form=own"]):
        with pytest.raises(ValueError, match=r"export\.form is own"):
            export.check(configured(path, *changed))


def test_clipping_bounds_may_be_infinite_and_no_other_value():
    open_end, hole = torch.tensor(torch.inf), torch.tensor(torch.nan)
    bound = "model.audio_tower.layers.0.feed_forward1.ffw_layer_1.input_max"
    assert list(finite([(bound, open_end)])) == [(bound, open_end)]
    for name, value in ((bound, hole), ("model.norm.weight", open_end), ("model.layers.0.layer_scalar", open_end)):
        with pytest.raises(ValueError, match=f"^{name} holds values that are not finite"):
            list(finite([(name, value)]))
