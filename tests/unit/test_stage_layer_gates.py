"""The gates stage: it resumes after the last choice, measures each as the model without its layers, and says kept."""

from dataclasses import replace

import pytest
import torch

from pipeline.costmodel.shapes import ModelShape, depth_for
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.evaluation.perplexity import tally
from pipeline.model.shape import Depth, Shape
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.prune.importance.measure import only_layers
from pipeline.runtime.device import open_device
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.tracker import Track
from pipeline.stages.analyse import layer_gates
from pipeline.stages.analyse.layer_gates import pick
from pipeline.stages.build import regularize
from pipeline.stages.prepare import tokens
from tests.tiny import anatomy_with
from tests.tiny_text import configured
from tests.world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A configuration, the inputs of a choice of 2 of 4 layers, and the folder of a straight run."""
    folder = tmp_path_factory.mktemp("gates")
    make_world(folder)
    config = configured(
        *(f"data.{use}.path={folder / use}.txt" for use in ("calibration", "recovery", "evaluation")),
        "plan.depth=gates",
        "layer_gates.tokens=256",
        "layer_gates.guard=null",
        "plan.depth_tokens=256",
        "plan.keep_first=1",
    )
    (folder / "shape").mkdir()
    Shape(layers=2, hidden=32, heads=4, groups=2, neurons=24).save(folder / "shape")
    made = {"teacher": folder / "model", "subject": folder / "model", "shape": folder / "shape"}
    (folder / "tokens").mkdir()
    tokens.run(config, made, folder / "tokens", machine())
    made["tokens"] = folder / "tokens"
    return config, made, chosen(config, made, folder / "straight")


def machine() -> Machine:
    """The real machine, computing in float32."""
    device = replace(open_device("cpu", "auto", False, 0, 0), compute_dtype=torch.float32)
    return Machine(device, Ranks(0, 1, 0), Track())


def rounds_of(folder):
    return Ledger(folder / layer_gates.LEDGER, layer_gates.Round).entries


def chosen(config, made, out):
    out.mkdir()
    layer_gates.run(config, made, out, machine())
    return out


def test_every_choice_is_the_smallest_gate_and_is_measured_without_its_layers(world):
    config, made, folder = world
    depth, rounds = Depth.load(folder), rounds_of(folder)
    model = load_model(made["teacher"], torch.float32, "sdpa")
    text = beginning(Packed(made["tokens"] / "calibration"), 256, config.calibration.batch_size, 0, 1, config.seed)
    left = [0, 1, 2, 3]
    for each, tried in zip(rounds, depth.tried, strict=True):
        assert each.picked == min(left[1:], key=lambda layer: abs(each.gates[layer]))
        left.remove(each.picked)
        with only_layers(model, 4, left):
            sums = tally(model, text, 64)
        assert list(tried.kept) == left and tried.loss == pytest.approx(float(sums[0] / sums[2]), rel=1e-6)
    assert list(depth.kept) == left and depth.loss == depth.tried[-1].loss


def test_the_guard_passes_over_small_gates_whose_layers_lose_too_much():
    losses = {3: 9.0, 1: 3.2, 2: 3.0}  # in the order of their gates
    assert [pick(losses, guard) for guard in (None, 3.0, 1.1, 1.0)] == [3, 3, 1, 2]


@pytest.mark.parametrize("guard", [1.0, 1.0001, 100.0])
def test_no_layer_is_picked_that_loses_more_than_the_guard_allows(world, tmp_path, guard):
    """Losses without each layer are measured here by plain runs of the model of the others."""
    config, made, _ = world
    options = config.layer_gates.model_copy(update={"guard": guard})
    config = config.model_copy(update={"layer_gates": options})
    chosen(config, made, tmp_path / "guarded")
    model = load_model(made["teacher"], torch.float32, "sdpa")
    text = beginning(Packed(made["tokens"] / "calibration"), 256, config.calibration.batch_size, 0, 1, config.seed)
    left = [0, 1, 2, 3]
    for each in rounds_of(tmp_path / "guarded"):
        losses = {}
        for layer in left[1:]:
            with only_layers(model, 4, [other for other in left if other != layer]):
                sums = tally(model, text, 64)
            losses[layer] = float(sums[0] / sums[2])
        assert dict(each.losses) == pytest.approx(losses, rel=1e-6)
        within = [layer for layer in losses if losses[layer] <= guard * min(losses.values()) * (1 + 1e-9)]
        assert each.picked == min(within, key=lambda layer: abs(each.gates[layer]))
        if guard == 1.0:
            assert each.picked == min(losses, key=losses.get)
        left.remove(each.picked)


def test_an_interrupted_choice_goes_on_after_the_last_layer_digit_for_digit(world, tmp_path):
    config, made, folder = world
    first, second = (folder / layer_gates.LEDGER).read_text().splitlines(keepends=True)
    half = tmp_path / "half"
    half.mkdir()
    (half / layer_gates.LEDGER).write_text(first + second[:7])
    layer_gates.run(config, made, half, machine())
    for file in (layer_gates.LEDGER, Depth.FILE):
        assert (half / file).read_text() == (folder / file).read_text()


def test_layers_that_stay_anyway_and_too_short_texts_are_told_at_once(world, tmp_path):
    _, made, _ = world
    with pytest.raises(ValueError, match=r"shape.layers is 2; it must lie between 3 and 4"):
        chosen(configured("plan.depth=gates", "plan.keep_first=3"), made, tmp_path / "kept")
    with pytest.raises(
        ValueError, match=r"layer_gates.tokens is 10, less than one step of layer_gates.batch_size \(2\)"
    ):
        layer_gates.check(configured("plan.depth=gates", "layer_gates.tokens=10"))
    with pytest.raises(ValueError, match=r"regularize.global_batch_size: 3 .*regularize.micro_batch_size"):
        regularize.check(
            configured(
                "plan.depth=gates",
                "regularize.norm=l1",
                "regularize.global_batch_size=3",
                "regularize.micro_batch_size=2",
            )
        )
    with pytest.raises(ValueError, match=r"regularize\.norm: .*plan\.depth"):
        configured("regularize.norm=l2")


@pytest.mark.parametrize(("fraction", "layers"), [(1.0, 8), (0.75, 5), (0.5, 3), (0.2, 1)])
def test_whole_layers_keep_the_most_within_the_fraction(fraction, layers):
    teacher = ModelShape.of(anatomy_with(Sizes(96, 32, 8, (LayerSizes(4, 2, 24),) * 8)))
    shape = depth_for(teacher, fraction)
    whole = teacher.non_embedding_parameters()
    assert shape == replace(teacher, layers=layers) and shape.non_embedding_parameters() <= fraction * whole
    if layers < 8:
        assert replace(teacher, layers=layers + 1).non_embedding_parameters() > fraction * whole
