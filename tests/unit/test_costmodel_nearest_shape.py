"""Requested shapes: refused by name where they cannot be, with the nearest that can."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from pipeline.costmodel.nearest_shape import given_shape, possible_near
from pipeline.costmodel.shapes import AXES, ModelShape
from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, everything
from pipeline.model.hf_config import student_config
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.prune.surgery.bias import biased_anatomy, biased_config
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model

SMOLLM2 = ModelShape(30, 576, 9, 3, 64, 1536, 49152, True)
PANGU_1B = ModelShape(26, 1536, 12, 6, 128, 6144, 153376, False, even_heads=True)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"heads": 8}, r"shape\.heads is 8, not a multiple of shape\.groups \(3\)\. Nearest .*heads=9 groups=3"),
        ({"heads": 6, "groups": 1}, r"shape\.heads is 6 for 1 groups; a group has at most the teacher's 3 query heads"),
        ({"layers": 31}, r"shape\.layers is 31, outside 1\.\.30"),
        ({"widht": 3}, r"shape has no axis \['widht'\]"),
    ],
)  # fmt: skip
def test_an_impossible_request_is_refused_by_name_with_the_nearest_possible_ones(request_, message):
    with pytest.raises(ValueError, match=message):
        given_shape(SMOLLM2, request_)


@pytest.mark.parametrize(
    "request_", [{"heads": 8}, {"layers": 99, "neurons": 5000}, {"heads": 7, "groups": 2}, {"heads": 40, "groups": 9}]
)
def test_the_nearest_possible_shapes_are_possible(request_):
    near = possible_near(SMOLLM2, request_)
    assert len(near) == 3
    for shape in near:
        assert given_shape(SMOLLM2, shape.axes()) == shape


def test_a_possible_request_is_its_own_nearest_and_a_null_keeps_the_teacher():
    request = {"layers": 26, "hidden": 500, "heads": None, "groups": 1, "neurons": None} | {"heads": 3}
    shape = given_shape(SMOLLM2, request)
    assert possible_near(SMOLLM2, request, count=1) == [shape]
    assert given_shape(SMOLLM2, dict.fromkeys(AXES)) == SMOLLM2


def test_a_hidden_size_that_the_class_refuses_is_refused_with_the_next_it_takes():
    with pytest.raises(ValueError, match=r"^shape.hidden is 1408; .* of its query heads \(12\)\. Nearest .*=1392 "):
        given_shape(PANGU_1B, {"hidden": 1408})
    near = possible_near(PANGU_1B, {"hidden": 1408})
    assert [(shape.hidden, shape.heads) for shape in near] == [(1392, 12), (1440, 12), (1536, 12)]
    for request in ({"hidden": 1408}, {"hidden": 1409, "heads": 10}, {"hidden": 7}, {"heads": 5}, {"hidden": 9999}):
        near = possible_near(PANGU_1B, request, count=10)
        assert len(near) == 10 and all(given_shape(PANGU_1B, shape.axes()) == shape for shape in near)
    assert given_shape(PANGU_1B, {"hidden": 1408, "heads": 8, "groups": 4}).hidden == 1408
    assert given_shape(replace(PANGU_1B, even_heads=False), {"hidden": 1408}).heads == 12


@pytest.mark.parametrize("kind", [*CLASSES, "flap"])
def test_a_shape_is_refused_where_no_class_would_take_the_student(kind):
    """`flap`: a Llama that gets biases where units go."""
    model = tiny_model("llama" if kind == "flap" else kind)
    anatomy, config = anatomy_of(config_of(model), tensors_of(model)), config_of(model)
    teacher = ModelShape.of(anatomy, biased=kind == "flap")
    if kind == "flap":
        anatomy, config = biased_anatomy(anatomy), biased_config(config)
    for hidden, refused in ((30, kind in ("llama-biases", "gemma2", "gemma3_text", "flap")), (28, False)):
        blueprint = Blueprint(tuple(range(hidden)), everything(anatomy.sizes).layers)
        if refused:
            with pytest.raises(Exception, match=r"hidden size \(30\) is not a multiple"):
                AutoConfig.for_model(**config | {"hidden_size": hidden})
            with pytest.raises(ValueError, match="shape.hidden is 30, not a multiple of shape.heads"):
                student_config(config, anatomy, blueprint)
            with pytest.raises(ValueError, match=r"shape.hidden is 30; .* only multiples of its query heads \(4\)"):
                given_shape(teacher, {"hidden": hidden})
        else:
            made = AutoConfig.for_model(**student_config(config, anatomy, blueprint))
            assert given_shape(teacher, {"hidden": hidden}).hidden == made.hidden_size == hidden


def test_where_layers_differ_the_class_is_told_one_number_of_heads_that_it_takes():
    own = (LayerSizes(4, 2, 24), LayerSizes(3, 3, 24), LayerSizes(4, 2, 20), LayerSizes(3, 3, 24))
    model = tiny_model("llama-biases")
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    anatomy = anatomy.narrowed(Sizes(96, 32, 8, own), anatomy.layer_types)
    teacher = ModelShape.of(anatomy)
    for hidden in range(20, 33):
        refused = hidden % 4 != 0 and hidden % 3 != 0
        assert replace(teacher, hidden=hidden).accepted is not refused
        blueprint = Blueprint(tuple(range(hidden)), everything(anatomy.sizes).layers)
        if refused:
            with pytest.raises(ValueError, match=f"shape.hidden is {hidden}, not a multiple"):
                student_config(config_of(model), anatomy, blueprint)
        else:
            assert hidden % student_config(config_of(model), anatomy, blueprint)["num_attention_heads"] == 0
    alike = replace(teacher, heads=2, groups=2)
    assert [each.heads for each in alike.each()] == [2] * 4
    assert replace(alike, hidden=26).accepted and not replace(alike, hidden=27).accepted  # 27: a multiple of 3 alone
