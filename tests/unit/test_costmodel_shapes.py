"""Shapes: exact sizes, only possible and aligned ones, balanced within the budget."""

import time
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.costmodel.nearest_shape import given_shape
from pipeline.costmodel.pareto import Limits, Serving, shape_within
from pipeline.costmodel.shapes import (
    ModelShape,
    Multiples,
    depth_for,
    multiples_for,
    neurons_for,
    possible_shapes,
    possible_values,
    shape_for,
)
from pipeline.model.anatomy import anatomy_of
from pipeline.model.sizes import LayerSizes, Sizes
from tests.chips import chip
from tests.tiny import anatomy_with, config_of, tensors_of, tiny_model

SMOLLM2 = ModelShape(30, 576, 9, 3, 64, 1536, 49152, True)
LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, False)
LLAMA_70B = ModelShape(80, 8192, 64, 8, 128, 28672, 128256, False)
TEACHERS = [SMOLLM2, LLAMA_8B, LLAMA_70B, ModelShape(24, 896, 14, 2, 64, 4864, 151936, True)]


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_hugging_face_class(tied):
    shape = ModelShape(3, 48, 6, 2, 8, 80, 101, tied)
    config = LlamaConfig(
        vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    assert shape.parameters() == sum(sizes.values())
    vocabulary = sum(size for name, size in sizes.items() if "embed_tokens" in name or "lm_head" in name)
    assert shape.non_embedding_parameters() == shape.parameters() - vocabulary


def test_smollm2_has_its_published_size():
    assert SMOLLM2.parameters() == 134_515_008


def test_three_quarters_of_smollm2_take_something_from_every_wide_axis():
    assert shape_for(SMOLLM2, 0.75).axes() == {"layers": 28, "hidden": 512, "heads": 9, "groups": 3, "neurons": 1280}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("fraction", [0.9, 0.75, 0.5, 0.25])
def test_a_shape_for_a_budget_is_possible_aligned_and_just_below_the_budget(teacher, fraction):
    shape, values = shape_for(teacher, fraction), possible_values(teacher, multiples_for(teacher))
    assert 0.95 * fraction <= shape.non_embedding_parameters() / teacher.non_embedding_parameters() <= fraction
    assert shape.layers in values["layers"] and shape.hidden in values["hidden"] and shape.neurons in values["neurons"]
    assert (shape.heads, shape.groups) in values["attention"]
    assert given_shape(teacher, shape.axes()) == shape
    assert shape == shape_for(teacher, fraction)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_deep_cut_is_not_taken_from_one_axis(teacher):
    shape = shape_for(teacher, 0.5)
    kept = {axis: getattr(shape, axis) / getattr(teacher, axis) for axis in ("layers", "hidden", "neurons")}
    assert all(0.6 < share < 0.95 for share in kept.values()), kept


def test_the_whole_budget_keeps_the_teacher_and_an_impossible_one_is_refused():
    assert shape_for(SMOLLM2, 1.0) == SMOLLM2
    with pytest.raises(ValueError, match=r"budget\.parameters is 1e-06; the smallest possible shape keeps 0\.00"):
        shape_for(SMOLLM2, 1e-6)
    with pytest.raises(ValueError, match=r"budget\.parameters is 1\.5"):
        shape_for(SMOLLM2, 1.5)


def test_a_large_teacher_takes_well_under_a_second():
    start = time.process_time()
    shape_for(LLAMA_70B, 0.6)
    assert time.process_time() - start < 1.0


def test_multiples_grow_with_the_width_and_never_fall_below_the_cube():
    assert multiples_for(SMOLLM2) == Multiples(hidden=64, neurons=128, tensor_parallel=1)
    assert multiples_for(LLAMA_8B) == Multiples(hidden=512, neurons=512, tensor_parallel=1)
    assert multiples_for(ModelShape(2, 24, 2, 1, 8, 40, 50, True)).hidden == 16


def test_every_shard_of_a_tensor_parallel_student_is_aligned():
    multiples = multiples_for(LLAMA_8B, tensor_parallel=4)
    for shape in possible_shapes(LLAMA_8B, 0.70, 0.705, multiples):
        assert shape.neurons // 4 * 4 == shape.neurons and (shape.neurons // 4) % 256 == 0
        assert shape.heads % 4 == 0 and (shape.groups % 4 == 0 or 4 % shape.groups == 0)
    with pytest.raises(ValueError, match="tensor_parallel is 5"):
        multiples_for(LLAMA_8B, tensor_parallel=5)


def test_possible_shapes_are_exactly_those_in_the_window():
    teacher = ModelShape(3, 48, 4, 2, 8, 64, 100, True)
    whole = teacher.non_embedding_parameters()
    every = list(possible_shapes(teacher, 0.0, 1.0))
    assert len(set(every)) == len(every) == 3 * 3 * 4 * 4  # attention: (4,2) (2,2) (2,1) (1,1)
    window = [shape for shape in every if 0.3 * whole <= shape.non_embedding_parameters() <= 0.6 * whole]
    assert list(possible_shapes(teacher, 0.3, 0.6)) == window
    sizes = [shape.non_embedding_parameters() for shape in every]
    assert sizes == sorted(sizes)


def test_query_heads_are_a_multiple_of_groups_and_no_group_grows():
    for heads, groups in possible_values(LLAMA_8B, multiples_for(LLAMA_8B))["attention"]:
        assert heads % groups == 0 and heads // groups <= 4 and 8 % groups == 0


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_ffn_alone_is_as_wide_as_the_budget_and_alignment_admit(teacher):
    step, whole = multiples_for(teacher).neurons, teacher.non_embedding_parameters()
    for fraction in (0.9, 0.75, 0.6):
        shape = neurons_for(teacher, fraction)
        assert shape.axes() == teacher.axes() | {"neurons": shape.neurons} and shape.neurons % step == 0
        wider = teacher.changed(teacher.axes() | {"neurons": shape.neurons + step})
        assert shape.non_embedding_parameters() <= (fraction + 5e-4) * whole < wider.non_embedding_parameters()
    assert neurons_for(teacher, 1.0) == teacher and neurons_for(SMOLLM2, 0.75).neurons == 1024  # a third of 1536
    with pytest.raises(ValueError, match=r"budget.parameters is 0.01; .* narrowest FFN keeps 0\."):
        neurons_for(teacher, 0.01)


PANGU_1B = ModelShape(26, 1536, 12, 6, 128, 6144, 153376, False)  # openPangu-Embedded, a Llama with biases


def test_a_class_that_takes_only_multiples_of_the_heads_is_asked_for_no_other():
    even = replace(PANGU_1B, even_heads=True)
    assert shape_for(PANGU_1B, 0.75).hidden % shape_for(PANGU_1B, 0.75).heads
    window = [replace(shape, even_heads=True) for shape in possible_shapes(PANGU_1B, 0.70, 0.75)]
    taken = [shape for shape in window if shape.hidden % shape.heads == 0]
    assert 0 < len(taken) < len(window) and list(possible_shapes(even, 0.70, 0.75)) == taken
    for fraction in (0.9, 0.75, 0.5, 0.25):
        shape = shape_for(even, fraction)
        assert shape.hidden % shape.heads == 0 and given_shape(even, shape.axes()) == shape
        assert 0.95 * fraction <= shape.non_embedding_parameters() / even.non_embedding_parameters() <= fraction
    three = multiples_for(even, tensor_parallel=3)  # 3 heads at least, so that the narrowest stream, 128, is refused
    smallest = next(possible_shapes(even, 0.0, 1.0, three))
    kept = smallest.non_embedding_parameters() / even.non_embedding_parameters()
    with pytest.raises(ValueError, match=f"the smallest possible shape keeps {kept:.4f}"):
        shape_for(even, 1e-6, three)
    assert smallest.hidden == 384


UNEQUAL = Sizes(96, 32, 8, (LayerSizes(4, 2, 24), LayerSizes(2, 1, 40), LayerSizes(4, 2, 20), LayerSizes(2, 1, 24)))


def test_layers_that_differ_count_as_they_are_and_as_a_shape_leaves_them():
    """By the tensors of a checkpoint: every shape holds what the largest choice of layers would leave of it."""
    model = tiny_model("llama")
    anatomy = anatomy_of(config_of(model), tensors_of(model)).narrowed(UNEQUAL, ("full_attention",) * 4)
    teacher = ModelShape.of(anatomy)
    assert (teacher.heads, teacher.groups, teacher.neurons) == (4, 2, 40)
    assert (teacher.parameters(), teacher.non_embedding_parameters()) == anatomy.parameters()
    every = list(possible_shapes(teacher, 0.0, 1.0))
    assert len(every) == 4 * 2 * 4 * 3
    for shape in every:
        widest = LayerSizes(shape.heads, shape.groups, shape.neurons)
        students = (
            replace(UNEQUAL, hidden=shape.hidden, layers=tuple(widest.within(UNEQUAL.layers[host]) for host in hosts))
            for hosts in combinations(range(4), shape.layers)
        )
        counts = [anatomy.narrowed(sizes, ("full_attention",) * shape.layers).parameters()[1] for sizes in students]
        assert shape.non_embedding_parameters() == max(counts)
    whole = teacher.non_embedding_parameters()
    window = [shape for shape in every if 0.4 * whole <= shape.non_embedding_parameters() <= 0.6 * whole]
    assert list(possible_shapes(teacher, 0.4, 0.6)) == window


@pytest.mark.parametrize("choose", [shape_for, depth_for, neurons_for])
def test_a_budget_is_of_what_layers_that_differ_really_hold(choose):
    teacher = ModelShape.of(anatomy_with(UNEQUAL, tied=False))
    shape = choose(teacher, 0.8)
    assert 0.5 < shape.non_embedding_parameters() / teacher.non_embedding_parameters() <= 0.8005


def test_no_speed_is_predicted_of_layers_that_differ():
    serving = Serving(1, 16, 32, "bf16", 1, "decode")
    with pytest.raises(ValueError, match="the chip model takes all to be alike"):
        shape_within(chip("910B4"), ModelShape.of(anatomy_with(UNEQUAL)), serving, Limits(parameters=0.8))
    shape_within(chip("910B4"), SMOLLM2, serving, Limits(parameters=0.8))
