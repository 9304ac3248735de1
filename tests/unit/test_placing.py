"""A model whose layers come to the device as they run computes what the whole one does, and is left as it was."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import runner
from pipeline.evaluation.perplexity import tally
from pipeline.evaluation.samples import continue_greedily
from pipeline.model.anatomy import anatomy_of
from pipeline.model.causal import decoder_of
from pipeline.model.shape import Shape
from pipeline.prune.importance.measure import measure, only_layers
from pipeline.prune.second_order.hessian import gram
from pipeline.prune.second_order.mask import masked, without
from pipeline.runtime.artifacts import PARTIAL
from pipeline.runtime.checkpoint import open_tensors
from pipeline.runtime.device import Device, open_device
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.tracker import Track
from pipeline.stages.analyse import importance, layer_gates
from pipeline.stages.deliver import evaluate
from pipeline.training import need_training_memory
from tests.processes import on_ranks
from tests.tiny import config_of, tensors_of, tiny_model, tokens
from tests.tiny_text import configured
from tests.watching import calls_of, forwards
from tests.world import make_world, settings


def cpu() -> Device:
    return open_device("cpu", "auto", False, 0, 0)


def computed(model, stream) -> list:
    """Return what forward passes compute: logits, sums, Gram matrices, losses without layers and units, text."""
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    batches = [tokens(seed=seed) for seed in range(2)]
    with placed(model, cpu(), stream):
        with torch.no_grad():
            logits = model(tokens()).logits
        sums = measure(decoder_of(model), anatomy, batches)
        grams = gram(decoder_of(model), anatomy, batches, [0, 3], stream=True)
        narrow = without(anatomy, sums.scores(), 2, 1, 8)
        with only_layers(model, 4, [0, 2]), masked(model, anatomy, narrow):
            loss = tally(model, batches, 5)
        text = continue_greedily(model, tokens(1), 6, frozenset())
    return [logits, *sums.tensors(), *grams.tensors(), loss, torch.tensor(text)]


def held(model) -> dict[str, tuple[torch.Tensor, int]]:
    """Return a copy of every tensor, and where it lies."""
    named = chain(model.named_parameters(), model.named_buffers())
    return {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in named}


@pytest.mark.parametrize("kind", ["llama-tied", "llama-biases", "gemma3_text", "glm4", "olmo2", "phi3"])
def test_a_streamed_model_computes_what_the_whole_one_does_and_is_left_as_it_was(kind):
    model = tiny_model(kind)
    before, wanted = held(model), computed(model, False)
    found = computed(model, True)
    assert len(found) == len(wanted) and all(torch.equal(*pair) for pair in zip(found, wanted))
    for name, (tensor, place) in held(model).items():
        assert torch.equal(tensor, before[name][0]) and place == before[name][1], name
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_one_part_of_one_layer_is_away_from_the_host_at_a_time_and_none_after_a_fault():
    model = tiny_model("llama")
    home = {id(weight): weight.data_ptr() for weight in model.parameters()}
    layers, seen = model.model.layers, []

    def away() -> list[tuple[int, str]]:
        parts = ((index, name, part) for index, layer in enumerate(layers) for name, part in layer.named_children())
        return [(i, name) for i, name, part in parts if any(w.data_ptr() != home[id(w)] for w in part.parameters())]

    def look(module, arguments):
        seen.append((id(module), away()))

    with placed(model, cpu(), True), ExitStack() as hooks:
        for module in (module for module in layers.modules() if isinstance(module, nn.Linear)):
            hooks.callback(module.register_forward_pre_hook(look).remove)
        with only_layers(model, 4, [0, 1, 3]), torch.inference_mode():
            model(tokens())
        assert [places for _, places in seen] == [
            [(layer, part)] for layer in (0, 1, 3) for part in ["self_attn"] * 4 + ["mlp"] * 3
        ]
        assert away() == []
        with pytest.raises(RuntimeError), torch.no_grad():
            layers[1].mlp(torch.zeros(1, 5, dtype=torch.float64))
        assert away() == []


@dataclass(frozen=True)
class Limited(Device):
    """A device of which so many bytes are free."""

    free: int = 0

    def free_memory(self) -> int:
        return self.free


def on_npu(ranks) -> dict[str, list]:
    """Return, by way of placing, the bytes on an NPU after placing and at most, and the losses; and weights' bytes."""
    device, result = open_device("npu", "eager", False, 0, 0), {}
    for way, stream in (("whole", "auto"), ("auto", "auto"), ("streamed", True)):
        model = tiny_model("llama-tied", dtype=torch.float32, hidden_size=128, intermediate_size=512)
        weights = sum(weight.nbytes for weight in model.parameters())
        layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
        used = device.total_memory() - device.free_memory()
        tight = Limited(**vars(device), free=weights) if way == "auto" else device
        with placed(model, tight, stream):
            device.reset_peak_memory()
            after = device.total_memory() - device.free_memory() - used
            loss = tally(model, [tokens()], 64)
            result[way] = [after, device.peak_memory() - used, loss.tolist()]
        del model
    return result | {"weights": [weights, layer]}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="building the simulated NPU needs g++")
def test_on_an_npu_that_is_too_small_there_is_a_part_of_a_layer_at_a_time(tmp_path):
    (result,) = on_ranks(on_npu, tmp_path, 1, timeout=120.0, kind="npu")
    weights, layer = result["weights"]
    passing = result["whole"][1] - result["whole"][0]  # beside the weights
    assert result["whole"][0] >= weights
    for way in ("auto", "streamed"):  # as large as the memory is too large
        after, most, loss = result[way]
        assert loss == result["whole"][2]
        assert after <= weights - 4 * layer + 4096
        assert most <= after + layer + passing < result["whole"][1]


MEASURED = [
    "score.kind=fluctuation",
    "plan.depth=evolved",
    "layer_loss.start=loss",
    "layer_loss.generations=2",
    "layer_loss.offspring=2",
    "plan.depth_tokens=256",
    "plan.widths=measured",
    "sensitivity.levels=[0.5]",
    "restore.order=obs",
    "plan.clap=false",
    "evaluate.speed=false",
]
TYR = [
    "recipe=tyr",
    "supernet.rounds=2",
    "supernet.multiple=4",
    "supernet.generations=1",
    "supernet.offspring=2",
    "supernet.tokens=[64]",
    "supernet.survivors=[1]",
    "budget.parameters=0.7",
    "plan.depth=influence",
]
LINES = {  # family, choices, and the stages that place a model
    "measured": (
        "glm4",
        [
            *MEASURED,
            "stages=[importance,shape,layer_loss,hessian,obs_order,sensitivity,plan,cut,absorb_norms,export,evaluate]",
        ],
        {"importance", "layer_loss", "hessian", "sensitivity", "absorb_norms", "evaluate_reference", "evaluate"},
    ),
    "searched": ("llama", [*TYR, "stages=[importance,shape,supernet]"], {"importance", "supernet"}),
    "turned": (
        "llama-tied",
        [
            "rotate.kind=principal",
            "plan.channels=leading",
            "plan.clap=false",
            "recipe.shape=search",
            "shape_search.tokens=256",
            "shape_search.candidates=2",
            "stages=[importance,shape_search,rotate]",
        ],
        {"importance", "shape_search", "rotate"},
    ),
    "written": (
        "llama",
        ["recipe=generate", "self_generate.tokens=64", "self_generate.length=8", "self_generate.batch_size=4"],
        {"self_generate"},
    ),
}


def contents(folder: Path) -> dict:
    """Return what an artifact says, by file."""
    read = {".json": lambda path: json.loads(path.read_text()), ".jsonl": Path.read_text}
    files = {path.name: read[path.suffix](path) for path in folder.iterdir() if path.suffix in read}
    files.pop("manifest.json")
    tensors = open_tensors(folder) if list(folder.glob("*.safetensors")) else {}
    return files | {name: tensors[name].tolist() for name in tensors}


@contextmanager
def streaming_stages(artifacts: Path) -> Iterator[set[str]]:
    """Yield a set that grows by the stages in which a module's weights are elsewhere while it runs."""
    homes, stages = {}, set()

    def places(module):
        return [weight.data_ptr() for weight in module.parameters()]

    def before(module, inputs):
        homes[module] = places(module)

    def after(module, inputs, output):
        if homes[module] != places(module):
            stages.update(each.name.rpartition("-")[0] for each in (artifacts / PARTIAL).iterdir() if each.is_dir())

    with forwards(before, after):
        yield stages


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_stages_leave_the_same_artifacts_streamed_or_not(name, tmp_path):
    kind, chosen, placing = LINES[name]
    world = make_world(tmp_path, kind)
    made = {}
    free = {} if name == "measured" else {"shape__layers": None, "shape__neurons": None}
    for way, stream in (("whole", False), ("streamed", True)):
        for exported in (world / "whole").glob("export-*"):  # by a process of its own, from the same start
            shutil.copytree(exported, world / "streamed" / exported.name)
        given = settings(world, artifacts=world / way, run=way, **free)
        with streaming_stages(world / way) as streaming:
            made[way] = runner.run(configured(*given, *chosen, f"device.layer_streaming={stream}"), "a test")
        assert streaming == (placing if stream else set())
    for artifact, folder in made["whole"].items():
        assert contents(folder) == contents(made["streamed"][artifact]), artifact


@dataclass(frozen=True)
class Small(Device):
    """A device of so many bytes."""

    bytes: int = 0

    def total_memory(self) -> int:
        return self.bytes


def machine(memory: int, world: int = 1) -> Machine:
    device = cpu()
    values = {each.name: getattr(device, each.name) for each in fields(device)}
    return Machine(Small(**values | {"compute_dtype": torch.float32}, bytes=memory), Ranks(0, world, 0), Track())


def test_what_needs_the_whole_model_on_a_device_that_is_too_small_is_refused_before_it_is_loaded(tmp_path):
    world = make_world(tmp_path)
    Shape(layers=2, hidden=32, heads=4, groups=2, neurons=24).save(world)
    inputs = dict.fromkeys(("subject", "reference", "student"), world / "model") | {"shape": world, "tokens": world}
    for stage, choice, remedy in (
        (importance, "score.kind=taylor", "set score.kind=activation"),
        (layer_gates, "plan.depth=gates", "set plan.depth=influence"),
        (evaluate, "evaluate.speed=true", "set evaluate.speed=false"),
    ):
        result = rf"{choice} needs 0\.1 MB of weights.* on one device, which has 0\.0 MB; {remedy}"
        with pytest.raises(ValueError, match=result), calls_of(load_model) as loads:
            stage.run(configured(choice, "device.layer_streaming=true"), inputs, tmp_path, machine(10_000))
        assert loads == []


class Trained(nn.Module):
    """Ten parameters that are trained and a hundred that are not."""

    def __init__(self):
        super().__init__()
        self.own, self.teacher = nn.Linear(10, 1, False), nn.Linear(100, 1, False)

    def parameters_by_name(self):
        return self.own.named_parameters()


@pytest.mark.parametrize(("stage", "world", "needed"), [(0, 2, 400), (2, 2, 310), (3, 1, 400), (3, 2, 200)])
def test_weights_gradients_and_optimizer_that_are_more_than_a_device_has_are_refused(stage, world, needed):
    """In bf16 a trained parameter takes 2 bytes, its gradient 2 and the optimizer 16; a teacher's takes 2."""
    config = configured(f"deepspeed=zero{stage}")
    need_training_memory("distill", config, Trained(), "bf16", machine(needed, world))
    with pytest.raises(ValueError, match=rf"distill under ZeRO {stage} on {world} rank.*; raise deepspeed.stage"):
        need_training_memory("distill", config, Trained(), "bf16", machine(needed - 1, world))
    offloading = config.deepspeed.model_copy(update={"extra": {"zero_optimization": {"offload_optimizer": {}}}})
    free = config.model_copy(update={"deepspeed": offloading})
    need_training_memory("distill", free, Trained(), "bf16", machine(1, world))
