"""Bad input gets one clear line, before anything heavy starts."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import runner
from pipeline.cli.boundary import Boundary
from pipeline.cli.command import main
from pipeline.config import validate
from pipeline.runtime.faults import PeerFailed
from tests.composing import composed
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import configured
from tests.world import environment, make_world, pipeline, settings


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
    "unknown stage": (["stages=[importance,prune]"], "prune"),
    "wider than the teacher": (["shape.neurons=4096"], "shape.neurons is 4096"),
    "heads not a multiple of groups": (["shape.heads=3", "shape.groups=2"], "not a multiple of shape.groups"),
    "no such layers": (["shape.layers=9"], "Nearest possible"),
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


def test_an_unsupported_family_and_a_truncated_shard_are_refused(tmp_path):
    world = make_world(tmp_path)
    config = world / "model" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"model_type": "llama"', '"model_type": "mamba"'))
    done = pipeline("run=x", *settings(world), cwd=world, check=False)
    assert done.returncode == 2 and "model_type 'mamba' has no table" in done.stdout
    config.write_text(text)
    weights = world / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    done = pipeline("run=x", *settings(world), cwd=world, check=False)
    assert done.returncode == 2 and "corrupt or truncated" in done.stdout


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    world = make_world(tmp_path)
    save_tiny(tiny_model("llama", vocab_size=40), world / "model")
    done = pipeline("run=x", *settings(world), cwd=world, check=False)
    assert done.returncode == 2 and "they do not belong together" in done.stdout


@pytest.mark.parametrize("field", ["artifacts", "runs"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_stage(world, tmp_path, field):
    file = world / "evaluation.txt"
    for folder in (file, file / "inside", "/proc/here"):
        places = {"artifacts": tmp_path / "artifacts", "runs": tmp_path / "runs"} | {field: folder}
        values = validate(composed(*settings(world, **places)))
        with pytest.raises(ValueError, match=f"^{field}: {folder}: "):
            runner.run(values, "a test")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_line_that_names_the_folder(world, tmp_path, monkeypatch, capsys):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # as write() does, naming no file

    monkeypatch.setitem(runner.STAGES, "teacher", replace(runner.STAGES["teacher"], run=fill))
    with pytest.raises(SystemExit, match="2"), Boundary()():
        runner.run(validate(composed(*settings(world, artifacts=tmp_path / "full", runs=tmp_path))), "a test")
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/full/teacher-")
    with pytest.raises(SystemExit, match="2"), Boundary()():
        (tmp_path / "full" / ".partial" / "x").rmdir()
    assert capsys.readouterr().err == f"error: {tmp_path}/full/.partial/x: No such file or directory\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A boundary's run folder; without ranks, and without a traceback on the console."""
    for name in ("RANK", "LOCAL_RANK", "PIPELINE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "runs" / "x"


def left(folder, error: BaseException | type, capsys) -> tuple[int, str, list[Path]]:
    """Raise an error inside a boundary; return the exit status, standard error and the files in the run folder."""
    boundary = Boundary()
    boundary.folder = folder
    with pytest.raises(SystemExit) as end, boundary():
        raise error
    return end.value.code, capsys.readouterr().err, sorted(folder.glob("*"))


def test_a_defect_is_one_line_that_names_the_file_of_its_traceback(folder, capsys):
    status, line, (file,) = left(folder, KeyError("lost\nand more"), capsys)
    assert status == 70 and line.count("\n") == 1 and str(file) in line and "KeyError" in line and "defect" in line
    text = file.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text and "lost" in text and "torch " in text and "command: " in text


def test_a_refusal_by_a_library_is_a_defect_of_ours(folder, capsys):
    with pytest.raises(SystemExit) as end, Boundary()():
        json.loads("{")
    assert end.value.code == 70 and "traceback in " in capsys.readouterr().err
    with pytest.raises(SystemExit) as end, Boundary()():
        torch.zeros(2).numpy().reshape(3)  # a plain ValueError, raised by numpy
    assert end.value.code == 70 and "traceback in " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_does_not_hide_a_defect(folder, capsys):
    folder.parent.mkdir()
    folder.write_text("a file")
    boundary = Boundary()
    boundary.folder = folder
    with pytest.raises(SystemExit, match="70"), boundary():
        raise KeyError("lost")
    file = Path(re.search(r"traceback in (\S+):", capsys.readouterr().err)[1])
    assert "KeyError" in file.read_text(encoding="utf-8") and file.parent.parent != folder


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA: tried to allocate"), MemoryError()])
def test_memory_that_runs_out_is_no_defect_and_names_what_to_lower(folder, capsys, error):
    status, line, files = left(folder, error, capsys)
    assert status == 2 and "distill.micro_batch_size" in line and line.count("\n") == 1 and not files


def test_of_several_ranks_the_first_one_prints_and_each_writes_its_traceback(folder, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert left(folder, PeerFailed("rank 2 failed: ValueError: no"), capsys) == (2, "", [])
    assert left(folder, OSError("no space left on device"), capsys) == (2, "", [])
    status, line, (file,) = left(folder, KeyError("lost"), capsys)
    assert (status, line) == (70, "") and file.name.endswith("-rank1.txt")
    status, line, _ = left(folder, PeerFailed("rank 0 did not reach `stage cut`"), capsys)
    assert status == 2 and "rank 0" in line  # nobody else is left to print it
    monkeypatch.setenv("RANK", "0")
    assert "rank 2 failed" in left(folder, PeerFailed("rank 2 failed: ValueError: no"), capsys)[1]


def test_an_exception_comes_through_where_a_developer_wants_it(folder, monkeypatch):
    monkeypatch.setenv("PIPELINE_TRACEBACK", "1")
    with pytest.raises(KeyError), Boundary()():
        raise KeyError("lost")


def test_output_survives_any_encoding(world):
    locale = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    changed = environment() | locale
    command, words = [sys.executable, "-m", "pipeline"], ["run=a", "track.mode=sometimes", "model.path=模型"]
    done = subprocess.run([*command, *words], cwd=world, env=changed, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: track.mode: ") and done.stderr.count(b"\n") == 1
    done = subprocess.run([*command, "--help"], cwd=world, env=changed, capture_output=True)
    assert done.returncode == 0 and b"T\\xfdr" in done.stdout


def test_an_interrupt_is_one_line_and_an_exit_status_of_its_own(world, tmp_path):
    command = [sys.executable, "-m", "pipeline", "run=stopped", *settings(world, artifacts=tmp_path, runs=tmp_path)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # as at a terminal, also where the tests do not
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), preexec_fn=hears, **piped) as process:
        while not (tmp_path / ".partial").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, expected = process.communicate(timeout=60)
    assert process.returncode == 130 and expected.count("\n") == 1 and "same command" in expected
    assert "Traceback" not in expected


def edited(**fields):
    """Return a harm: fields of config.json changed, or taken away where None."""

    def harm(folder):
        config = json.loads((folder / "config.json").read_text()) | fields
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return harm


def written(file, text):
    return lambda folder: (folder / file).write_text(text)


def without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def test_weights_that_are_no_numbers_end_with_the_first_scores(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "hurt")
    weights = load_file(tmp_path / "hurt" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "hurt" / "model.safetensors", {"format": "pt"})
    chosen = settings(world, run="x", artifacts=tmp_path / "made", runs=tmp_path / "runs")
    with pytest.raises(ValueError, match="^model.path: scores of .* are not finite"):
        runner.run(configured(*chosen, f"model.path={tmp_path / 'hurt'}", "stages=[importance]"), "a test")


IMPOSSIBLE = {
    "layers": (["shape.layers=9"], "shape.layers is 9, outside 1..4"),
    "neurons": (["shape.neurons=25"], "shape.neurons is 25, outside 1..24"),
    "channels": (["shape.hidden=33"], "shape.hidden is 33, outside 1..32"),
    "heads": (["shape.heads=3", "shape.groups=2"], "not a multiple of shape.groups"),
    "budget": (["shape.layers=null", "shape.neurons=null", "budget.parameters=0.01"], "the smallest possible shape"),
    "first layers": (["plan.keep_first=4"], "shape.layers is 3; it must lie between 4"),
    "positions": (["data.sequence_length=128"], "more than the model's 64 positions"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_the_teacher_cannot_give_is_refused_before_any_work(world, case):
    changes, expected = IMPOSSIBLE[case]
    chosen = dict(pair.split("=", 1) for pair in (*settings(world, run="x"), *changes))
    with pytest.raises(ValueError, match=expected):
        runner.check(configured(*[f"{key}={value}" for key, value in chosen.items()]))


def test_a_hidden_size_that_the_class_of_the_student_refuses_is_refused_before_any_work(world, tmp_path):
    biased = make_world(tmp_path, "llama-biases")
    given = {"shape__hidden": 30, "shape__layers": None, "shape__neurons": None}
    runner.check(configured(*settings(world, run="x", **given)))
    for folder, chosen in ((biased, []), (world, ["recipe=flap"])):  # which gives a Llama biases
        with pytest.raises(ValueError, match=r"^shape.hidden is 30; .* multiples of its query heads \(4\)"):
            runner.check(configured(*settings(folder, run="x", **given), *chosen))


HARMS = {
    "no model_type": (edited(model_type=None), "config.json has no model_type"),
    "no width": (edited(hidden_size=None), "config.json: hidden_size is None, not a positive integer"),
    "a width in words": (edited(vocab_size="many"), "config.json: vocab_size is many, not a positive integer"),
    "no class": (edited(architectures=None), "config.json has no architectures"),
    "a list": (written("config.json", "[]"), "config.json holds [], not a JSON object"),
    "no JSON": (written("config.json", "{,"), "config.json is no JSON (Expecting property name"),
    "quantised": (edited(quantization_config={"quant_method": "gptq"}), "unquantised weights"),
    "another width": (edited(intermediate_size=20), "mlp.gate_proj.weight is [24, 32], and by config.json it would be"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no *.safetensors weights"),
    "weights cut short": (cut_short, "model.safetensors is corrupt or truncated"),
    "an index of nothing": (written("model.safetensors.index.json", "{}"), "index.json has no weight_map"),
}
TOKENIZERS = {
    "no tokenizer": (without_tokenizer, "is missing or damaged"),
    "an empty tokenizer": (written("tokenizer.json", "{}"), "is missing or damaged (KeyError: 'added_tokens')"),
}


@pytest.mark.parametrize("case", HARMS | TOKENIZERS)
def test_a_damaged_folder_is_refused_in_one_line_before_any_work(world, case, tmp_path):
    harm, expected = (HARMS | TOKENIZERS)[case]
    shutil.copytree(world / "model", tmp_path / "hurt")
    harm(tmp_path / "hurt")
    fields = {"model.path": []} | ({"model.start": ["recipe=recover"]} if case in HARMS else {})
    for field, chosen in fields.items():
        with pytest.raises(ValueError) as fault:
            runner.check(configured(*settings(world, run="x"), *chosen, f"{field}={tmp_path / 'hurt'}"))
        message = str(fault.value)
        assert message.startswith(f"{field}: ") and str(tmp_path / "hurt") in message and expected in message, message
        assert "\n" not in message


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
    ("argument", "expected"),
    [
        ("calibrate.roundz=1", "error: unknown key 'calibrate.roundz'; did you mean 'calibrate.rounds'?"),
        ("--strange", "error: "),
        ("device/chip=none_such", "error: device/chip: there is no choice 'none_such'"),
        ("calibrate.rounds=0", "error: calibrate.rounds: "),
    ],
)
def test_calibration_tells_what_it_cannot_take_in_one_line(argument, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline", "calibrate-chip", argument])
    with pytest.raises(SystemExit, match="2"):
        main()
    text = capsys.readouterr().err
    assert text.startswith(expected) and text.count("\n") == 1


def test_calibration_says_how_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline", "calibrate-chip", "--help"])
    main()
    assert capsys.readouterr().out.startswith("python -m pipeline calibrate-chip [calibrate.name=NAME]")
