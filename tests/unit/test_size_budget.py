"""Budgets of all parameters and of bytes: counted as the checkpoint has them, kept to by every student."""

from dataclasses import replace
from itertools import combinations

import pytest

from pipeline import runner
from pipeline.costmodel.shapes import AXES, Grid, ModelShape, multiples_for
from pipeline.costmodel.size_budget import FREE, Unit, parameters_of, shape_of_size, sizes
from pipeline.model.anatomy import anatomy_of
from pipeline.model.shape import Budgeted, Reachable
from pipeline.model.sizes import LayerSizes
from pipeline.report.budget import budget_of
from pipeline.runtime.checkpoint import open_checkpoint
from tests.tiny import TINY, config_of, tensors_of, tiny_model
from tests.tiny_text import configured
from tests.world import make_world, settings

SIZED = {
    "parameters": {"teacher": 2_000_000, "student": 1_500_000},
    "non_embedding_parameters": {"teacher": 1_000_000, "student": 500_000},
    "checkpoint_bytes": {"teacher": 4_000_000, "student": 3_000_000},
    "kv_bytes_per_token": {"teacher": 400, "student": 200},
}
CUT = "stages=[importance,shape,plan,cut]"
NO_SHAPE = {"shape__layers": None, "shape__neurons": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    wide = {"num_key_value_heads": 4, "intermediate_size": 128}
    return make_world(tmp_path_factory.mktemp("sizes"), **wide)


def made(world, *overrides, **values):
    return runner.run(configured(*settings(world, run="unit", **(NO_SHAPE | values)), *overrides), "a test")


def total(folder):
    return open_checkpoint(folder).anatomy.parameters()[0]


@pytest.mark.parametrize("kind", TINY)
def test_sizes_are_the_parameters_of_the_checkpoint(kind):
    model = tiny_model(kind)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    teacher = ModelShape.of(anatomy)
    grid = Grid(teacher, multiples_for(teacher))
    found = sizes(anatomy, grid, Unit())
    rows, _ = grid.rows(found == found)
    whole = found.reshape(-1)[[tuple(row) == tuple(teacher.axes().values()) for row in rows.tolist()]]
    assert whole.tolist() == [sum(tensor.numel() for tensor in tensors_of(model).values())]
    if anatomy.sizes.uniform and len(set(anatomy.layer_types)) == 1:
        for place in (0, len(rows) // 2):
            layers, hidden, heads, groups, neurons = rows[place].tolist()
            widths = (LayerSizes(heads, groups, neurons),) * layers
            student = anatomy.narrowed(
                replace(anatomy.sizes, hidden=hidden, layers=widths), anatomy.layer_types[:layers]
            )
            assert found.reshape(-1)[place] == student.parameters()[0]
    assert (sizes(anatomy, grid, Unit(2)) == 2 * found).all()
    inner = sizes(anatomy, grid, Unit(inner=True)).reshape(-1)
    assert inner[found.reshape(-1) == whole].max() == anatomy.parameters()[1]


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind.startswith("gemma4")])
def test_what_is_outside_the_layers_is_counted_for_the_layers_that_stay(kind):
    model = tiny_model(kind)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    grid = Grid(ModelShape.of(anatomy), multiples_for(ModelShape.of(anatomy)))
    for unit in (Unit(), Unit(inner=True)):
        found = sizes(anatomy, grid, unit)[:, -1, -1, -1]
        for place, count in enumerate(grid.layers.tolist()):
            students = []
            for hosts in combinations(range(len(anatomy.sizes.layers)), count):
                types = tuple(anatomy.layer_types[host] for host in hosts)
                of = anatomy.sizes.of_layers(hosts, (anatomy.sizes.layers[host] for host in hosts))
                students.append(anatomy.narrowed(of, types).parameters()[int(unit.inner)])
            assert found[place] == max(students)


@pytest.mark.parametrize("axes", FREE)
@pytest.mark.parametrize("requested", [0.9, 0.7, 0.5])
def test_a_budget_is_kept_to_and_its_neighbours_are_next_to_it(axes, requested):
    model = tiny_model("llama", intermediate_size=512, num_hidden_layers=8)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    teacher, whole = ModelShape.of(anatomy), anatomy.parameters()[0]
    shape, found = shape_of_size(anatomy, teacher, "total", requested, requested * whole, Unit(), axes)
    assert {axis for axis in AXES if getattr(shape, axis) != getattr(teacher, axis)} <= set(FREE[axes])
    assert found.reached == pytest.approx(shape.parameters() / whole, abs=1e-12)
    assert found.reached <= found.within.value <= requested < found.beyond.value
    assert found.reached >= (0.99 * found.within.value if axes == "all" else found.within.value)
    assert found.beyond.value <= min(value for value in _values(teacher, anatomy, axes) if value > requested)


def _values(teacher, anatomy, axes):
    grid = Grid(teacher, multiples_for(teacher))
    rows, _ = grid.rows(grid.accepted)
    shares = sizes(anatomy, grid, Unit())[grid.accepted] / anatomy.parameters()[0]
    fixed = [place for place, axis in enumerate(AXES) if axis not in FREE[axes]]
    own = [getattr(teacher, axis) for axis in AXES]
    return [share for row, share in zip(rows, shares) if all(row[place] == own[place] for place in fixed)]


def test_the_parameters_of_a_budget_name_their_neighbours_too():
    teacher = ModelShape(30, 576, 9, 3, 64, 1536, 49152, True)
    found = parameters_of(teacher, 0.75, teacher.changed(teacher.axes() | {"neurons": 1024}), "neurons")
    assert found.requested == 0.75 and found.within.shape["neurons"] == 1024 and found.beyond.shape["neurons"] == 1152


@pytest.mark.parametrize("axes", FREE)
def test_the_student_has_no_more_parameters_than_the_budget(world, axes):
    folders = made(world, "budget.total=0.7", f"budget.axes={axes}", CUT)
    kept = total(folders["initial_student"]) / total(folders["teacher"])
    found = Budgeted.load(folders["shape"])
    assert kept == pytest.approx(found.reached, abs=1e-12) and found.reached <= 0.7 < found.beyond.value


@pytest.mark.parametrize("widths", ["threshold", "measured"])
def test_layers_of_their_own_widths_keep_to_a_total(world, widths):
    chosen = ["plan.clap=false", f"plan.widths={widths}", "stages=[importance,shape,sensitivity,plan,cut]"]
    folders = made(world, "budget.total=0.8", "sensitivity.length=32", "plan.depth_tokens=512", *chosen)
    assert 0.7 < total(folders["initial_student"]) / total(folders["teacher"]) <= 0.8


def test_bytes_count_the_exported_type_the_cache_and_an_untied_matrix(world):
    whole = total(world / "model")
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        folders = made(world, f"budget.bytes={0.6 * whole * size}", CUT, export__dtype=dtype)
        assert 0.5 * whole < total(folders["initial_student"]) <= 0.6 * whole
    requested, context = 4 * whole, 64
    folders = made(world, f"budget.bytes={requested}", f"budget.context={context}", CUT, export__dtype="float32")
    student = open_checkpoint(folders["initial_student"]).anatomy
    cache = sum(2 * layer.groups * student.sizes.head_size * 4 * context for layer in student.sizes.layers)
    found = Budgeted.load(folders["shape"])
    assert found.reached == student.parameters()[0] * 4 + cache <= requested and found.context == context
    rotation = ["rotate.kind=principal", "plan.channels=leading", "reinit.slnp=false", "reinit.absorb=false"]
    tied = make_world(world / "tied", "llama-tied")
    rotated = ["stages=[importance,shape,rotate,plan,cut]", "budget.total=0.9", *rotation]
    folders = made(tied, *rotated)
    assert open_checkpoint(folders["initial_student"]).anatomy.parameters()[0] <= 0.9 * total(tied / "model")


def test_a_speed_says_what_it_reaches_and_what_is_next_to_it(world):
    config = configured(*settings(world, **NO_SHAPE), "device/chip=910B1", "budget.speedup=1.3", CUT)
    found = Budgeted.load(runner.run(config, "a test")["shape"])
    assert found.beyond.value < 1.3 <= found.within.value <= found.reached


REACHED = {
    "parameters": (0.5, 0, "50.00%"),
    "total": (0.75, 0, "75.00%"),
    "bytes": (3.1e6, 500, "0.0031 GB"),
    "speedup": (1.25, 0, "1.250 x"),
}


@pytest.mark.parametrize("budget", REACHED)
def test_the_report_shows_what_was_asked_beside_what_the_exported_student_has(budget):
    reached, context, shown = REACHED[budget]
    report = {key: dict(pair) for key, pair in SIZED.items()}
    report["budget"] = Budgeted(budget, reached, reached, Reachable(reached, {}), None, context).to_json()
    label, value, note = budget_of(report)
    assert (label, value) == (f"budget.{budget}", shown) and note.startswith(f"{shown} requested")
    assert budget_of(SIZED) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget.total=0.7", "budget.parameters=0.7"], r"^budget: parameters and total are given"),
        (["budget.bytes=1e6", "budget.speedup=1.5"], r"^budget: bytes and speedup are given"),
        (["budget.total=0.7", "shape.layers=3"], r"^shape: .*\['total'\]"),
        (["budget.context=128"], r"^budget\.context: .*budget\.bytes"),
        (
            ["budget.bytes=1e6", "budget.context=8", "plan.widths=threshold"],
            r"^budget\.context: plan\.widths=threshold",
        ),
        (["budget.total=0.0001"], r"^budget\.total: 0\.0001 cannot be reached; this model reaches 0\.\d+ to 1$"),
        (["budget.total=0.0001", "plan.widths=threshold", "plan.clap=false"], r"^budget\.total: cannot be reached"),
        (["budget.bytes=10"], r"^budget\.bytes: 10 cannot be reached; this model reaches"),
        (["budget.total=0.7", "recipe.shape=search", "device/chip=910B1"], r"^budget\.total: .*budget\.memory_gb"),
        (["budget.total=1.7"], r"^budget\.total: 1\.7 is not valid"),
    ],
)
def test_what_cannot_be_met_is_refused_before_any_work(world, overrides, message):
    with pytest.raises(ValueError, match=message) as refused:
        runner.check(configured(*settings(world, **NO_SHAPE), *overrides))
    assert "\n" not in str(refused.value)


def test_an_unreachable_speed_names_what_is_reachable(world):
    config = configured(*settings(world, **NO_SHAPE), "device/chip=910B1", "budget.speedup=1e6", CUT)
    with pytest.raises(ValueError, match=r"^budget\.speedup: 1e\+06 cannot be reached on .*; at most [\d.]+ is"):
        runner.run(config, "a test")
