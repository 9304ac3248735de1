"""The layer-by-layer stages on tiny models: pruning in sequence, and Týr-the-Pruner from supernet to student."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import runner
from pipeline.allocate.budgets import layer_weights
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning, left_over
from pipeline.evaluation.divergence import divergence, final_states
from pipeline.model.blueprint import Blueprint
from pipeline.model.sizes import LayerSizes
from pipeline.prune.second_order.hessian import gram
from pipeline.runtime.checkpoint import open_checkpoint, open_tensors
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.model_loader import load_model
from pipeline.stages.build import supernet
from tests.tiny import save_tiny, tiny_model, tokens
from tests.tiny_text import configured
from tests.watching import inputs_of, watched
from tests.world import make_world, pipeline, settings

CUT = ["importance", "shape", "layer_loss", "sequential", "supernet", "plan", "cut"]
NONE = {f"shape__{axis}": "null" for axis in ("layers", "hidden", "heads", "groups", "neurons")}
SEQUENCE = ["restore.sequential=true", "plan.clap=false", "reinit.slnp=false"]
TYR = [
    "recipe=tyr",
    "recipe.stages=[importance,shape,layer_loss,sequential,supernet,plan,cut,export,evaluate,report]",
    "budget.parameters=0.7",
    "supernet.multiple=4",
    "supernet.generations=3",
    "supernet.offspring=4",
    "supernet.tokens=[64,256]",
    "supernet.survivors=[2,1]",
    "restore.at_once=2",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tyr"))


def made(world, overrides, stages=CUT, **values):
    """Run stages in this process; give their artifacts by name."""
    chosen = settings(world, **(NONE | values), run="unit", stages="[" + ",".join(stages) + "]")
    return runner.run(configured(*chosen, *overrides), "a test")


def logits(folder):
    with torch.no_grad():
        return load_model(folder, torch.float64, "eager")(tokens()).logits


def widths_of(folders):
    blueprint = Blueprint.load(folders["blueprint"])
    return [(len(plan.groups), len(plan.neurons)) for plan in blueprint.layers]


@pytest.mark.parametrize("chosen", ["obs", "tyr"])
@pytest.mark.parametrize("shape", [(2, 1, 12), (2, 2, 16), (1, 1, 24)])
def test_pruned_in_sequence_the_cut_model_is_the_masked_one(world, shape, chosen):
    heads, groups, neurons = shape
    widths = {"shape__heads": heads, "shape__groups": groups, "shape__neurons": neurons}
    folders = made(world, [*SEQUENCE, f"restore.local={chosen}"], **widths)
    start = open_checkpoint(folders["initial_student"])
    assert {(each.heads, each.groups, each.neurons) for each in start.anatomy.sizes.layers} == {shape}
    torch.testing.assert_close(logits(folders["initial_student"]), logits(folders["restored"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "tie", "axes"), [("llama", "untied", 0), ("llama-tied", "keep", 32)])
def test_pruned_in_sequence_and_then_turned_the_cut_model_is_the_masked_one(tmp_path, kind, tie, axes):
    """In float64 on disk. The stream that is turned is the pruned model's own: its axes are principal there."""
    world = make_world(tmp_path, kind)
    save_tiny(tiny_model(kind), world / "model")
    basis = ["rotate.kind=principal", "plan.channels=leading", f"rotate.tie={tie}", f"rotate.own_axes={axes}"]
    widths = {"shape__heads": 2, "shape__groups": 1, "shape__neurons": 12}
    folders = made(world, [*SEQUENCE, *basis], [*CUT, "rotate"], **widths)
    names = ("teacher", "restored", "initial_student")
    teacher, restored, start = (logits(folders[name]) for name in names)
    assert open_checkpoint(folders["initial_student"]).anatomy.sizes.layers == (LayerSizes(2, 1, 12),) * 4
    assert (start - restored).norm() / restored.norm() < 1e-6 < 1e-2 < (restored - teacher).norm() / teacher.norm()
    narrow = load_model(folders["initial_student"], torch.float64, "eager")
    batches = beginning(Packed(folders["tokens"] / "calibration"), 1024, 8, 0, 1, 0)
    stream = gram(narrow.model, open_checkpoint(folders["initial_student"]).anatomy, batches, (), stream=True).stream
    energy = stream.diagonal()
    result = torch.tensor(json.loads((folders["rotated"] / "basis.json").read_text())["energy"], dtype=torch.float64)
    torch.testing.assert_close(energy * 32 / energy.sum(), result, rtol=2e-2, atol=2e-2)  # measured in bf16 there
    if tie == "untied":
        assert (stream - energy.diag()).norm() / energy.norm() < 2e-2


def test_in_sequence_every_error_is_at_most_that_of_no_update_for_what_the_layer_reads(world):
    """Read from the pruned model itself, on the calibration text: bf16 layers leave a little room."""
    folders = made(world, SEQUENCE, shape__heads=2, shape__groups=1, shape__neurons=12)
    dense, pruned = (load_model(folders[name], torch.float64, "eager") for name in ("teacher", "restored"))
    text = Packed(folders["tokens"] / "calibration")
    batches = list(beginning(text, 1024, 8, 0, 1, 0))
    names = [f"model.layers.{i}.{m}" for i in range(4) for m in ("self_attn.o_proj", "mlp.down_proj")]
    read = {name: [] for name in names}
    for ids in batches:
        for name, rows in inputs_of(pruned, ids, names).items():
            read[name].append(rows)
    for name in names:
        rows, weight = torch.cat(read[name]), dense.get_submodule(name).weight.detach()
        solved = pruned.get_submodule(name).weight.detach()
        zeroed = weight * (solved.abs().sum(0) > 0)
        found, plain = (float((rows @ (weight - other).T).square().sum()) for other in (solved, zeroed))
        assert found < plain, name


def test_layers_that_go_take_no_part(world):
    folders = made(world, SEQUENCE, shape__layers=3, shape__neurons=12)
    start, restored, teacher = (open_checkpoint(folders[name]) for name in ("initial_student", "restored", "teacher"))
    hosts = [plan.host for plan in Blueprint.load(folders["blueprint"]).layers]
    (gone,) = set(range(4)) - set(hosts)
    name = f"model.layers.{gone}.mlp.down_proj.weight"
    assert torch.equal(restored[name], teacher[name]) and start.config["num_hidden_layers"] == 3
    assert all(int((restored[name.replace(str(gone), str(h), 1)].abs().sum(0) > 0).sum()) == 12 for h in hosts)


def test_the_supernet_gives_layers_widths_of_their_own_within_the_budget(world):
    folders = made(world, TYR)
    facts = json.loads((folders["restored"] / "supernet.json").read_text())
    teacher, start = open_checkpoint(folders["teacher"]), open_checkpoint(folders["initial_student"])
    allowed = json.loads((folders["shape"] / "shape.json").read_text())["weights"]
    weights = layer_weights(start.anatomy.sizes, start.anatomy.sizes.layers)
    assert allowed - 3 * 32 * 4 < weights <= allowed
    assert start.anatomy.parameters()[1] <= 0.7 * teacher.anatomy.parameters()[1]
    for losses in (each["losses"] for each in facts["rounds"]):
        assert losses == sorted(losses, reverse=True) and len(losses) == 4
    found = facts["rounds"][-1]["widths"]
    assert widths_of(folders) == list(zip(found[::2], found[1::2], strict=True))
    assert found != facts["start"] and facts["rounds"][0]["losses"][-1] < facts["rounds"][0]["losses"][0]
    assert facts["losses"][facts["taken"]] == min(facts["losses"].values())
    torch.testing.assert_close(logits(folders["initial_student"]), logits(folders["restored"]), rtol=1e-5, atol=1e-5)
    assert not (folders["restored"] / "work").exists()


def test_files_that_a_network_file_system_keeps_while_they_are_mapped_end_no_search(world, monkeypatch):
    remove = shutil.rmtree

    def silly(folder, ignore_errors=False, **named):
        """Rename open files to hidden ones, as NFS does, and so leave a folder that is not empty."""
        if Path(folder).name != supernet.WORK:
            return remove(folder, ignore_errors=ignore_errors, **named)
        for number, file in enumerate(path for path in Path(folder).rglob("*") if path.is_file()):
            file.rename(file.with_name(f".nfs{number:04d}"))
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    monkeypatch.setattr(shutil, "rmtree", silly)
    chosen = [*TYR, "supernet.rounds=1", "supernet.generations=0", f"artifacts={world / 'mapped'}"]
    folder = made(world, chosen)["restored"]
    assert list((folder / supernet.WORK).rglob(".nfs*"))
    manifest = folder / "manifest.json"
    assert not any(name.startswith(supernet.WORK) for name in json.loads(manifest.read_text())["files"])
    remove(folder / supernet.WORK)  # as it goes when the process ends
    before = manifest.stat().st_mtime_ns
    assert made(world, chosen)["restored"].samefile(folder) and manifest.stat().st_mtime_ns == before


@pytest.mark.parametrize("weights", ["composed", "solved_again"])
def test_composed_and_solved_weights_are_cut_to_the_same_widths(world, weights):
    folders = made(world, [*TYR, f"supernet.weights={weights}", "supernet.rounds=1"])
    torch.testing.assert_close(logits(folders["initial_student"]), logits(folders["restored"]), rtol=1e-5, atol=1e-5)
    facts = json.loads((folders["restored"] / "supernet.json").read_text())
    found = facts["rounds"][-1]["widths"]
    assert facts["taken"] == weights and widths_of(folders) == list(zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize("weights", ["composed", "solved_again"])
def test_the_loss_found_is_that_of_the_student_also_where_a_norm_spans_all_heads(tmp_path, weights):
    world = make_world(tmp_path, "olmo2", num_key_value_heads=4)
    model = load_model(world / "model", torch.float32, "eager")
    with torch.no_grad():
        for layer in model.model.layers:  # attention that depends on what it reads
            layer.self_attn.q_norm.weight.mul_(60.0)
            layer.post_attention_layernorm.weight.mul_(4.0)
    save_tiny(model, world / "model")
    chosen = [*TYR, f"supernet.weights={weights}", "supernet.rounds=1", "supernet.tokens=[256,999999]"]
    folders = made(world, [*chosen, "budget.parameters=0.5"])
    result = json.loads((folders["restored"] / "supernet.json").read_text())["losses"][weights]
    assert min(groups for groups, _ in widths_of(folders)) < 4
    text = Packed(folders["tokens"] / "calibration")
    ids = torch.tensor([text[row].tolist() for row in left_over(text, 1024 // 32, 0)])
    dense, narrow = (load_model(folders[name], torch.float32, "eager") for name in ("teacher", "initial_student"))
    sums = divergence(narrow, ids, final_states(dense, ids), 64)
    assert result == pytest.approx(float(sums[0] / sums[1]), rel=1e-2)  # layers compute in bf16 here


def test_without_accumulation_the_error_is_larger(world):
    """On the same even widths: the supernet whose candidates saw what comes before them, and the one that did not."""
    common = [*TYR, "supernet.generations=0", "supernet.rounds=1", "supernet.weights=composed", "supernet.steps=1"]
    common += ["restore.tokens=4096", "supernet.tokens=[512,2048]", "budget.parameters=0.6"]
    found = [made(world, [*common, f"supernet.accumulation={on}"])["restored"] for on in ("true", "false")]
    losses = [json.loads((folder / "supernet.json").read_text())["losses"]["composed"] for folder in found]
    assert losses[0] < losses[1]


def test_killed_between_rounds_or_inside_one_and_taken_up_it_ends_the_same(world):
    whole = made(world, [*TYR, "supernet.rounds=2"])["restored"]
    for last in ((1, 0), (1, 2), (0, 1)):

        def die(given, last=last):
            if given["self"].path.stem == f"round-{last[0]}" and given["entry"].number == last[1]:
                raise KeyboardInterrupt

        chosen = [*TYR, "supernet.rounds=2", f"artifacts={world / f'killed-{last[0]}-{last[1]}'}"]
        with pytest.raises(KeyboardInterrupt), watched({Ledger.append: die}):
            made(world, chosen)
        resumed = made(world, chosen)["restored"]
        for file in ("supernet.json", "widths.json"):
            assert (resumed / file).read_text() == (whole / file).read_text(), last
        for name, tensor in open_tensors(whole).items():
            assert torch.equal(tensor, open_tensors(resumed)[name]), name


@pytest.mark.parametrize("tokens", [{}, {"score": "32", "restore": "32", "supernet": "[32,32]"}])
def test_two_ranks_find_what_one_finds(world, tokens):
    """Also where all text is one sequence, of which the second rank has none."""
    chosen = [*TYR, "supernet.rounds=1", "supernet.generations=1"]
    chosen += [f"{section}.tokens={count}" for section, count in tokens.items()]
    one = made(world, [*chosen, "calibration.batch_size=8"])
    stages = f"stages=[{','.join(CUT)}]"
    values = settings(world, **NONE, artifacts=world / f"two-{len(tokens)}")
    pipeline("run=two", *values, *chosen, "calibration.batch_size=4", stages, cwd=world, ranks=2)
    (two,) = (world / f"two-{len(tokens)}").glob("supernet-*")
    facts = [json.loads((folder / "supernet.json").read_text()) for folder in (one["restored"], two)]
    assert facts[0]["start"] == facts[1]["start"]
    starts = [each["rounds"][0]["losses"][0] for each in facts]
    assert starts[0] == pytest.approx(starts[1], rel=3e-2)  # layers compute in bf16 here, and batches differ
    assert sorted(os.listdir(two)) == sorted(os.listdir(one["restored"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*SEQUENCE, "plan.clap=true"], "restore.sequential=true .* set plan.clap=false"),
        ([*SEQUENCE, "plan.widths=threshold"], r"restore\.sequential: "),
        ([*TYR, "restore.outputs=true", "plan.heads=random"], "set plan.heads=scores, restore.outputs=false"),
        ([*TYR, "supernet.survivors=[2,2]"], r"supernet\.survivors: \[2, 2\]"),
        ([*TYR, "supernet.tokens=[64]"], r"supernet\.tokens: \[64\]"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(overrides, message):
    with pytest.raises(ValueError, match=message):
        runner.check(configured(*overrides))


def test_the_tyr_recipe_runs_to_its_report_and_with_distill_added_recovers(world):
    plain = [each for each in TYR if not each.startswith("recipe.stages")] + ["supernet.rounds=1"]
    pipeline("run=tyr", *plain, *settings(world, **NONE), cwd=world)
    report = json.loads((world / "runs" / "tyr" / "report.json").read_text())
    student = open_checkpoint(world / "runs" / "tyr" / "student").anatomy
    assert report["parameters"]["student"] == student.parameters()[0] < report["parameters"]["teacher"]
    assert not student.sizes.uniform and "distill" not in report["stages"]
    line_ = ["importance", "shape", "layer_loss", "supernet", "plan", "cut", "distill"]
    added = f"recipe.stages=[{','.join(line_)},export,evaluate,report]"
    stages = f"stages=[{','.join(line_)}]"
    said = pipeline("run=more", *plain, added, stages, *settings(world, **NONE), cwd=world).stdout
    assert re.search(r"cut\b.*: finished before", said)
    (recovered,) = (world / "artifacts").glob("distill-*")
    assert open_checkpoint(recovered).anatomy.sizes == student.sizes
