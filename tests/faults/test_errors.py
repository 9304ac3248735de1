"""Bad input ends in one line that names the setting, before any work; how other faults end a command."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from pipeline import runner
from pipeline.cli.boundary import Boundary
from pipeline.cli.command import main
from pipeline.config import validate
from pipeline.graph import STAGES
from tests.composing import composed
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import configured
from tests.watching import calls_of
from tests.world import environment, make_world, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def ended(monkeypatch, capsys, *words: str) -> tuple[str, int]:
    """Run a command in this process; return what it wrote to standard error, and its exit status."""
    monkeypatch.setattr(sys, "argv", ["pipeline", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return capsys.readouterr().err, end.value.code


CASES = {
    "unknown key": (["distill.epochs=3"], "epochs"),
    "wrong type": (["distill.tokens=many"], "distill.tokens"),
    "a time without end": (["device.timeout=1000000000000000000"], "device.timeout"),
    "too many samples": (["report.samples=1000000"], "report.samples"),
    "no such user": (["runs=~nosuch/x"], "runs: "),
    "unknown stage": (["stages=[importance,prune]"], "prune"),
    "wider than the teacher": (["shape.neurons=4096"], "shape.neurons"),
    "heads not a multiple of groups": (["shape.heads=3", "shape.groups=2"], "shape.groups"),
    "no such layers": (["shape.layers=9"], "shape.layers"),
    "no such model": (["model.path=/nowhere/at/all"], "model.path: /nowhere/at/all"),
    "no such text": (["data.recovery.path=/nowhere.txt"], "data.recovery.path"),
    "unsupported text": (["data.recovery.path=model"], "data.recovery.path"),
    "too short a text": (["data.recovery.path=short.txt"], "data.recovery.path"),
    "empty text": (["data.recovery.path=empty.txt"], "data.recovery.path"),
    "a batch that cannot be split": (
        ["distill.global_batch_size=7", "distill.micro_batch_size=4"],
        "distill.global_batch_size",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_one_line_that_names_it(world, case, monkeypatch, capsys):
    (world / "short.txt").write_text("too short")
    (world / "empty.txt").write_text("")
    changes, named = CASES[case]
    monkeypatch.chdir(world)
    line, status = ended(monkeypatch, capsys, "run=faulty", *settings(world), *changes)
    assert status == 2 and line.startswith("error: ") and named in line and line.count("\n") == 1


def test_an_unsupported_family_and_a_truncated_shard_are_refused(tmp_path, monkeypatch, capsys):
    world = make_world(tmp_path)
    config = world / "model" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"model_type": "llama"', '"model_type": "mamba"'))
    line, status = ended(monkeypatch, capsys, "run=x", *settings(world))
    assert status == 2 and line.startswith("error: model.path: ") and "'mamba'" in line
    config.write_text(text)
    weights = world / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    line, status = ended(monkeypatch, capsys, "run=x", *settings(world))
    assert status == 2 and line.startswith("error: model.path: ") and "model.safetensors" in line


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, monkeypatch, capsys):
    world = make_world(tmp_path)
    save_tiny(tiny_model("llama", vocab_size=40), world / "model")
    line, status = ended(monkeypatch, capsys, "run=x", *settings(world))
    assert status == 2 and "model.path" in line and "tokenizer" in line and "40" in line


@pytest.mark.parametrize("field", ["artifacts", "runs"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_stage(world, tmp_path, field):
    file = world / "evaluation.txt"
    for folder in (file, file / "inside", "/proc/here"):
        places = {"artifacts": tmp_path / "artifacts", "runs": tmp_path / "runs"} | {field: folder}
        values = validate(composed(*settings(world, **places)))
        with pytest.raises(ValueError, match=f"^{field}: {folder}: "):
            runner.run(values, "a test")
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_stage(world, tmp_path):
    for output in (world / "evaluation.txt" / "student", "/proc/here/student"):
        places = {"artifacts": tmp_path / "artifacts", "runs": tmp_path / "runs", "output": output}
        with pytest.raises(ValueError, match=f"^output: {output}: "):
            runner.run(validate(composed(*settings(world, **places))), "a test")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_line_that_names_the_folder(world, tmp_path, capsys):
    full = OSError(errno.ENOSPC, "No space left on device")  # as write() raises it, naming no file
    with pytest.raises(SystemExit, match="2"), Boundary()(), calls_of(STAGES["teacher"].run, full, at=1):
        runner.run(validate(composed(*settings(world, artifacts=tmp_path / "full", runs=tmp_path))), "a test")
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/full/teacher-")
    with pytest.raises(SystemExit, match="2"), Boundary()():
        (tmp_path / "full" / ".partial" / "x").rmdir()
    assert capsys.readouterr().err == f"error: {tmp_path}/full/.partial/x: No such file or directory\n"


def test_output_survives_any_encoding(world):
    locale = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    changed = environment() | locale
    command, words = [sys.executable, "-m", "pipeline"], ["run=a", "track.mode=sometimes", "model.path=模型"]
    done = subprocess.run([*command, *words], cwd=world, env=changed, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: track.mode: ") and done.stderr.count(b"\n") == 1
    done = subprocess.run([*command, "--help"], cwd=world, env=changed, capture_output=True)
    assert done.returncode == 0 and b"T\\xfdr" in done.stdout
    changed |= {"PYTHONIOENCODING": "utf-8"}  # the words of a command are those that were typed
    done = subprocess.run([*command, "model=./模型", "--cfg", "job"], cwd=world, env=changed, capture_output=True)
    assert done.returncode == 0 and "path: ./模型\n" in done.stdout.decode()


def test_an_interrupt_is_one_line_and_an_exit_status_of_its_own(world, tmp_path):
    command = [sys.executable, "-m", "pipeline", "run=stopped", *settings(world, artifacts=tmp_path, runs=tmp_path)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Python raises KeyboardInterrupt as at a terminal, also where the tests themselves ignore the signal.
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), preexec_fn=interruptible, **piped) as process:
        while not (tmp_path / ".partial").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
    assert process.returncode == 130 and message.count("\n") == 1 and "same command" in message
    assert "Traceback" not in message


def edited(**fields):
    """Return a change of a model folder: fields of config.json set, or removed where None."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | fields
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def written(file, text):
    return lambda folder: (folder / file).write_text(text)


def without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def test_weights_that_are_not_finite_are_refused(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    chosen = settings(world, run="x", artifacts=tmp_path / "made", runs=tmp_path / "runs")
    with pytest.raises(ValueError, match="^model.path: .*not finite"):
        runner.run(configured(*chosen, f"model.path={tmp_path / 'damaged'}", "stages=[importance]"), "a test")


IMPOSSIBLE = {  # settings, and the setting and values that the refusal names
    "layers": (["shape.layers=9"], r"shape\.layers.*9.*1\.\.4"),
    "neurons": (["shape.neurons=25"], r"shape\.neurons.*25.*1\.\.24"),
    "channels": (["shape.hidden=33"], r"shape\.hidden.*33.*1\.\.32"),
    "heads": (["shape.heads=3", "shape.groups=2"], r"shape\.heads.*3.*shape\.groups"),
    "budget": (["shape.layers=null", "shape.neurons=null", "budget.parameters=0.01"], r"budget\.parameters.*0\.01"),
    "amplitude of the first round": (
        ["recipe=adapt_pruner", "recipe.rounds=2", "plan.amplitude=0.2"],
        r"plan\.amplitude: 0\.2.*0\.1429 of round 1 of 2",
    ),
    "amplitude of a later round": (
        ["recipe=adapt_pruner", "recipe.rounds=2", "shape.layers=null", "shape.neurons=14", "plan.amplitude=0.1"],
        r"plan\.amplitude: 0\.1.*0\.03571 of round 2 of 2",
    ),
    "positions of the speed": (["evaluate.speed_prefill=62"], r"evaluate\.speed_prefill.*66.*64"),
    "positions of a sample": (["report.sample_tokens=65"], r"report\.sample_tokens.*65.*64"),
    "positions of a written text": (
        ["recipe=generate", "self_generate.length=65", "shape.layers=null", "shape.neurons=null"],
        r"self_generate\.length.*65.*64",
    ),
    "first layers": (["plan.keep_first=4"], r"shape\.layers.*3.*4"),
    "positions": (["data.sequence_length=128"], r"data\.sequence_length.*128.*64"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_shape_that_the_teacher_does_not_have_is_refused_before_any_work(world, case):
    changes, named = IMPOSSIBLE[case]
    chosen = dict(pair.split("=", 1) for pair in (*settings(world, run="x"), *changes))
    with pytest.raises(ValueError, match=named):
        runner.check(configured(*[f"{key}={value}" for key, value in chosen.items()]))


def test_a_hidden_size_that_the_class_of_the_student_refuses_is_refused_before_any_work(world, tmp_path):
    biased = make_world(tmp_path, "llama-biases")
    given = {"shape__hidden": 30, "shape__layers": None, "shape__neurons": None}
    runner.check(configured(*settings(world, run="x", **given)))
    for folder, chosen in ((biased, []), (world, ["recipe=flap"])):  # which gives a Llama biases
        with pytest.raises(ValueError, match=r"^shape\.hidden.*30.*4"):
            runner.check(configured(*settings(folder, run="x", **given), *chosen))


DAMAGE = {
    "no model_type": (edited(model_type=None), r"config\.json.*model_type"),
    "no width": (edited(hidden_size=None), r"config\.json.*hidden_size"),
    "a width in words": (edited(vocab_size="many"), r"config\.json.*vocab_size.*many"),
    "a list": (written("config.json", "[]"), r"config\.json.*\[\]"),
    "no JSON": (written("config.json", "{,"), r"config\.json.*JSON"),
    "quantised": (edited(quantization_config={"quant_method": "gptq"}), "quantis"),
    "another width": (edited(intermediate_size=20), r"mlp\.gate_proj\.weight.*\[24, 32\]"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "weights cut short": (cut_short, r"model\.safetensors"),
    "an index of nothing": (written("model.safetensors.index.json", "{}"), r"index\.json.*weight_map"),
}
TOKENIZERS = {
    "no tokenizer": (without_tokenizer, "tokenizer"),
    "an empty tokenizer": (written("tokenizer.json", "{}"), "tokenizer"),
}


@pytest.mark.parametrize("case", DAMAGE | TOKENIZERS)
def test_a_damaged_folder_is_refused_in_one_line_before_any_work(world, case, tmp_path):
    damage, named = (DAMAGE | TOKENIZERS)[case]
    shutil.copytree(world / "model", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    fields = {"model.path": []} | ({"model.start": ["recipe=recover"]} if case in DAMAGE else {})
    for field, chosen in fields.items():
        with pytest.raises(ValueError) as fault:
            runner.check(configured(*settings(world, run="x"), *chosen, f"{field}={tmp_path / 'damaged'}"))
        message = str(fault.value)
        assert message.startswith(f"{field}: ") and str(tmp_path / "damaged") in message and "\n" not in message
        assert re.search(named, message), message


def test_a_recipe_whose_stages_are_in_no_possible_order_is_refused_before_any_work(world):
    refused = {
        "[importance,shape,cut]": "recipe.stages: cut .*blueprint.*put plan before it",
        "[importance,plan,shape,cut]": "recipe.stages: plan .*shape.*put shape before it",
        "[importance,shape,plan,cut,evaluate,export]": "recipe.stages: evaluate .*put export before it",
    }
    for stages, message in refused.items():
        with pytest.raises(ValueError, match=message):
            runner.check(validate(composed(*settings(world, recipe__stages=stages))))
    part = settings(world, recipe__stages="[importance,shape,cut]", stages="[importance]")
    assert runner.check(validate(composed(*part)))[-1] == "cut"


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("calibrate.roundz=1", "error: unknown key 'calibrate.roundz'; did you mean 'calibrate.rounds'?"),
        ("--strange", "error: "),
        ("device/chip=none_such", "error: device/chip: there is no choice 'none_such'"),
        ("calibrate.rounds=0", "error: calibrate.rounds: "),
    ],
)
def test_calibration_refuses_in_one_line(argument, line, monkeypatch, capsys):
    text, status = ended(monkeypatch, capsys, "calibrate-chip", argument)
    assert status == 2 and text.startswith(line) and text.count("\n") == 1


def test_calibration_prints_its_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline", "calibrate-chip", "--help"])
    main()
    assert capsys.readouterr().out.startswith("python -m pipeline calibrate-chip [calibrate.name=NAME]")
