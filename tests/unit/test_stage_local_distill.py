"""Local distillation of narrowed FFNs, on tiny models."""

import json
import shutil
import weakref
from collections import Counter
from contextlib import ExitStack

import pytest
import torch

from pipeline import runner
from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.distill.layer_errors import LayerErrors
from pipeline.distill.local import learn
from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint
from pipeline.model.causal import decoder_of
from pipeline.prune.passes import layerwise
from pipeline.prune.passes.layerwise import Step, in_step, recorded
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.model_loader import load_model
from pipeline.stages.build import local_distill
from tests.mixtures import mixture_world
from tests.tiny import config_of, tensors_of, tiny_model, tokens
from tests.tiny_text import configured
from tests.watching import calls_of, watched
from tests.world import make_world, pipeline, settings

FFNS = ("mlp.", "block_sparse_moe.", "shared_mlp.", "feed_forward.")
STAGES = ["importance", "shape", "plan", "cut", "local_distill"]
LEARN = [
    "local_distill.epochs=8",
    "local_distill.tokens=2048",
    "local_distill.batch_tokens=64",
    "local_distill.learning_rate=0.03",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("blocks"), "llama-tied")


def made(world, *overrides, stages=STAGES, **values):
    chosen = settings(world, **values, run="unit", stages="[" + ",".join(stages) + "]")
    return runner.run(configured(*chosen, *overrides), "a test")


def widths(**changed):
    kept = {"layers": "null", "hidden": "null", "heads": "null", "groups": "null", "neurons": 16} | changed
    return {f"shape__{axis}": value for axis, value in kept.items()}


def streams(model, batches):
    """Return the stream [tokens, h] before every layer and after the last."""
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    modules, before = dict(model.named_modules()), {}
    with ExitStack() as hooks, torch.no_grad():
        for layer in range(len(anatomy.sizes.layers)):
            keep = before.setdefault(layer, [])
            layer = modules[f"model.layers.{layer}"]
            hook = layer.register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0]))
            hooks.callback(hook.remove)
        last = before.setdefault(len(anatomy.sizes.layers), [])
        hooks.callback(modules["model.norm"].register_forward_pre_hook(lambda _, x: last.append(x[0])).remove)
        for ids in batches:
            decoder_of(model)(input_ids=ids, use_cache=False)
    return {at: torch.cat([x.flatten(0, 1) for x in rows]) for at, rows in before.items()}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "olmo2", "phi3"])
@pytest.mark.parametrize("hosts", [[0, 1, 2, 3], [0, 3], [1, 2]])
def test_both_streams_are_those_of_the_whole_models(kind, hosts):
    """The teacher's where the next layer that stayed reads it. The student is another model."""
    teacher = tiny_model(kind)
    types = getattr(teacher.config, "layer_types", None)
    changed = {"layer_types": [types[host] for host in hosts]} if types else {}
    student = tiny_model(kind, seed=1, num_hidden_layers=len(hosts), **changed)
    channels = range(teacher.config.hidden_size)
    both = [(decoder_of(model), anatomy_of(config_of(model), tensors_of(model))) for model in (teacher, student)]
    batches = [tokens(), tokens(seed=1)]
    dense = streams(teacher, batches)
    seen = []
    for lesson in in_step(*both, hosts, channels, batches, torch.device("cpu")):
        down = both[1][1].layer_module("h f").format(layer=lesson.layer)
        inner = down.partition(f".{lesson.layer}.")[2]
        for weight in (student.get_submodule(down).weight, lesson.branch.layer.get_submodule(inner).weight):
            weight.data.mul_(1.5)
        with torch.no_grad():
            seen.append((lesson.base + lesson.branch(lesson.read), lesson.wanted))
    thin = streams(student, batches)
    for layer, (reached, wanted) in enumerate(seen):
        torch.testing.assert_close(reached, thin[layer + 1])
        torch.testing.assert_close(wanted, dense[[*hosts, 4][layer + 1]])
    assert len(seen) == len(hosts)


def test_without_a_batch_the_streams_have_no_row():
    """As on a rank beyond the sequences of the text."""
    model = tiny_model("llama")
    known = (decoder_of(model), anatomy_of(config_of(model), tensors_of(model)))
    seen = list(in_step(known, known, range(4), range(24), [], torch.device("cpu")))
    rows = [each for lesson in seen for each in (lesson.read, lesson.base, lesson.wanted)]
    assert [lesson.layer for lesson in seen] == [0, 1, 2, 3] and {each.shape for each in rows} == {(0, 24)}
    assert {each.dtype for each in rows} == {torch.float64}
    others = in_step(known, known, range(4), range(32), [tokens()], torch.device("cpu"))
    for lesson, other in zip(seen, others, strict=True):  # gradients are added over ranks by place
        names = [name for name, _ in lesson.branch.named_parameters()]
        assert names == [name for name, _ in other.branch.named_parameters()]


def test_every_projection_reads_every_batch_once():
    """Those of the student's FFNs, of which a copy reads the batches, read one token: the form of their output."""
    both = [tiny_model("gemma2", seed) for seed in (0, 1)]
    known = [(decoder_of(model), anatomy_of(config_of(model), tensors_of(model))) for model in both]
    read = Counter()
    for model in both:
        for part in model.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_hook(lambda part, given, _: read.update({part: given[0].shape[:-1].numel()}))
    batches = [tokens(seed=seed) for seed in range(3)]
    for _ in in_step(*known, range(4), range(32), batches, torch.device("cpu")):
        pass
    count = sum(ids.numel() for ids in batches)
    assert Counter(read.values()) == {count: 2 * 4 * 7, 1: 4 * 3}


def test_streams_stay_where_they_are_in_memory():
    """New ones a layer and batch leave holes among what layers need meanwhile: twice the memory, measured."""
    model = tiny_model("llama")
    known = (decoder_of(model), anatomy_of(config_of(model), tensors_of(model)))
    places = [set() for _ in range(4)]
    for layer, seen in zip(model.model.layers, places, strict=True):
        layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.add(inputs[0].data_ptr()))
    batches = [tokens(seed=seed) for seed in range(3)]
    first, *_, last = [each.read for each in in_step(known, known, range(4), range(32), batches, torch.device("cpu"))]
    assert all(seen == places[0] for seen in places) and len(places[0]) == 2 * 3
    assert not torch.equal(first, last)


def test_masks_and_rotations_of_batches_are_held_once_where_they_are_alike():
    model = tiny_model("gemma2")  # attention masks of two kinds, made by the model
    layers = layerwise.layers_of(
        dict(decoder_of(model).named_modules(prefix="model")), anatomy_of(config_of(model), tensors_of(model))
    )
    batches = [tokens(seed=seed) for seed in range(3)]

    def held(batches):
        steps = recorded(decoder_of(model), layers, batches)
        return {id(tensor) for step in steps for tensor in layerwise._tensors(step.arguments)}

    one, three = len(held(batches[:1])), len(held(batches))
    assert one < 10 and three == one


def test_what_a_layer_learnt_from_is_free_before_the_next_streams_are_made(world):
    learnt_from, passes = [], []

    def note(given):
        learnt_from.extend(map(weakref.ref, (given["rows"].read, given["rows"].wanted)))

    def look(given):
        passes.append(sum(each() is not None for each in learnt_from))

    with watched({learn: note, Step.advance: look}):
        made(world, *LEARN, "local_distill.tokens=1024", **widths())
    assert len(learnt_from) == 2 * 4 and len(passes) >= 2 * 4 and not any(passes)


@pytest.mark.parametrize(("changed", "layers"), [({}, 4), ({"layers": 3}, 3), ({"hidden": 24}, 4)])
def test_every_ffn_errs_less_and_nothing_else_changes(world, changed, layers):
    start = made(world, stages=STAGES[:-1], **widths(**changed))["initial_student"]
    folder = made(world, *LEARN, **widths(**changed))["initial_student"]
    errors = LayerErrors.load(folder).layers
    assert [each.layer for each in errors] == list(range(layers))
    assert all(each.after < each.before for each in errors)
    assert not (folder / local_distill.TRAINED).exists()
    before, after = open_checkpoint(start), open_checkpoint(folder)
    assert list(before) == list(after) and before.config == after.config
    for name in before:
        assert torch.equal(before[name], after[name]) == (".mlp." not in name), name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text", "granitemoeshared"])
def test_experts_learn_with_their_router_and_the_shared_ones(kind, tmp_path):
    world = mixture_world(tmp_path, kind, dtype=torch.float32)
    chosen = widths(neurons="null") | {"shape__experts": 3}
    start = made(world, stages=STAGES[:-1], **chosen)["initial_student"]
    folder = made(world, *LEARN, **chosen)["initial_student"]
    errors = LayerErrors.load(folder).layers
    assert len(errors) == 4 and all(each.after <= each.before for each in errors)
    assert sum(each.after for each in errors) < 0.98 * sum(each.before for each in errors)
    before, after = open_checkpoint(start), open_checkpoint(folder)
    assert list(before) == list(after) and before.config == after.config
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    sparse = {name.format(layer=layer) for name in before.anatomy.routed for layer in range(4)} & set(before)
    assert changed and all(name.partition(".layers.")[2][2:].startswith(FFNS) for name in changed)
    assert sparse & changed  # of the layers whose error on held-out tokens fell
    others = [before.anatomy.router, f"{before.anatomy.shared_writer}.weight"]
    for name in others if before.anatomy.shared_writer else others[:1]:
        assert changed & {name.format(layer=layer) for layer in range(4)}, name
    assert not any(name.endswith("bias") for name in changed)
    load_model(folder, torch.float32, "eager")


def test_layers_whose_stream_is_multiplied_by_weights_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"local_distill\.epochs: .*'doge'"):
        runner.check(configured(*settings(make_world(tmp_path, "doge"), shape__groups="null"), *LEARN))


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_last_distance_told_is_that_of_the_whole_student(world, tmp_path, rounds):
    """Every layer read what the layers before it, as trained, really give; the original teaches every round."""
    changed = {}
    if rounds > 1:
        world, changed = make_world(tmp_path, "llama-tied", hidden_size=64), {"layers": 2, "hidden": 32}
    line_ = [f"recipe.{part}=[{','.join(STAGES)}]" for part in ("stages", "repeat")]
    folders = made(world, *LEARN, *line_, f"recipe.rounds={rounds}", **widths(**changed))
    channels = list(Blueprint.load(folders["blueprint"]).channels)
    assert open_checkpoint(folders["teacher"]).anatomy.sizes.hidden == (32 if rounds == 1 else 64)
    models = [load_model(folders[name], torch.float32, "eager") for name in ("teacher", "initial_student")]
    text = beginning(Packed(folders["tokens"] / "calibration"), 2048, 8, 0, 1, 0)
    wanted, given = (streams(model, text)[len(model.model.layers)][15::16] for model in models)
    wanted = wanted[:, channels]
    distance = ((given - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    assert LayerErrors.load(folders["initial_student"]).layers[-1].after == pytest.approx(float(distance), rel=0.02)


def test_a_student_that_misses_nothing_stays_as_it_is(world):
    """Of the teacher's widths, in the type that is computed in: no error can fall."""
    start = made(world, stages=STAGES[:-1], **widths(neurons=24))["initial_student"]
    folder = made(world, *LEARN, **widths(neurons=24))["initial_student"]
    assert all(each.before == each.after < 1e-4 for each in LayerErrors.load(folder).layers)
    before, after = open_checkpoint(start), open_checkpoint(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_cut_off_it_goes_on_where_it_was_and_two_ranks_learn_what_one_learns(world):
    whole = open_checkpoint(made(world, *LEARN, **widths())["initial_student"])
    apart = f"artifacts={world / 'apart'}"
    with pytest.raises(KeyboardInterrupt), calls_of(learn, KeyboardInterrupt(), at=3):
        made(world, *LEARN, apart, **widths())
    with calls_of(learn) as calls:
        again = dict(open_checkpoint(made(world, *LEARN, apart, **widths())["initial_student"]))
    assert len(calls) == 2, "two layers were trained, two were left"
    shutil.rmtree(world / "apart")
    stages = f"stages=[{','.join(STAGES)}]"
    chosen = settings(world, **widths(), artifacts=world / "two")
    pipeline("run=two", *LEARN, "calibration.batch_size=4", stages, *chosen, cwd=world, ranks=2)
    both = open_checkpoint(world / "runs" / "two" / "initial_student")
    for name in whole:
        assert torch.equal(whole[name], again[name]), name
        torch.testing.assert_close(both[name], whole[name], rtol=2e-2, atol=2e-2)


def test_experts_learn_on_two_ranks_what_they_learn_on_one(tmp_path):
    world = mixture_world(tmp_path, "mixtral", dtype=torch.float32)
    chosen = widths(neurons="null") | {"shape__experts": 3}
    text = ["local_distill.epochs=1", "local_distill.tokens=512"]
    one = open_checkpoint(made(world, *LEARN, *text, **chosen)["initial_student"])
    given = settings(world, **chosen, artifacts=world / "two")
    stages = f"stages=[{','.join(STAGES)}]"
    pipeline("run=two", *LEARN, *text, "calibration.batch_size=4", stages, *given, cwd=world, ranks=2)
    two = open_checkpoint(world / "runs" / "two" / "initial_student")
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=2e-2, atol=2e-2)


def test_the_report_tells_what_ffns_learnt_before_post_norms_became_scales(tmp_path):
    world = make_world(tmp_path, "gemma3_text")
    rest = ["absorb_norms", "export", "evaluate", "report"]
    made(world, *LEARN, "evaluate.speed=false", "report.samples=0", stages=[*STAGES, *rest])
    (learnt,) = (world / "artifacts").glob("local_distill-*")
    view = world / "runs" / "unit"
    assert "scales" in open_checkpoint(view / "initial_student").config["pruned"]
    errors = LayerErrors.load(learnt)
    assert LayerErrors.load(view) == errors
    expected = json.loads(json.dumps(errors.to_json()["layers"]))
    assert json.loads((view / "report.json").read_text())["blocks"] == expected
    assert "Local distillation" in (view / "report.html").read_text()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["restore.sequential=true"], r"local_distill\.epochs: .*restore\.sequential=true"),
        (["recipe=tyr"], r"local_distill\.epochs: .*plan\.widths=evolved"),
        (["plan.depth=gates", "regularize.norm=l2"], r"local_distill\.epochs: .*regularize\.norm=l2"),
    ],
)
def test_the_teacher_of_a_turned_student_is_not_one_that_was_changed_before(chosen, message):
    """Which would make the distance that FFNs are to reduce look smaller than it is."""
    turned, common = ["rotate.kind=principal", "plan.channels=leading"], ["plan.clap=false", "recipe.rounds=1"]
    for learns, basis in (([], turned), (LEARN, [])):
        configured(*chosen, *common, *learns, *basis)
    with pytest.raises(ValueError, match=message):
        configured(*chosen, *common, *LEARN, *turned)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"local_distill": {"tokens": 15}}, r"local_distill\.tokens: 15"),
        ({"recipe": {"stages": ["importance", "shape", "plan", "cut"]}}, r"recipe\.stages: .*local_distill"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(world, changed, message):
    settings_ = configured(*settings(world), *LEARN).model_dump()
    for section, values in changed.items():
        settings_[section] |= values
    with pytest.raises(ValueError, match=message):
        runner.check(Config(**settings_))
