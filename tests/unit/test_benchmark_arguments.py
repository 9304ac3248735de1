"""Measuring scripts on the command line: --help describes each, a wrong argument ends in one line, before work."""

import importlib
import subprocess
import sys

import pytest

from pipeline.runtime.device import missing
from tests.world import ROOT

FOLDERS = (ROOT / "benchmarks", ROOT / "benchmarks" / "quality")
sys.path[:0] = map(str, FOLDERS)  # its scripts import each other as scripts do

SCRIPTS = sorted(
    file.stem for folder in FOLDERS for file in folder.glob("*.py") if '__name__ == "__main__"' in file.read_text()
)
RUN = ("teacher/config.json", "start/config.json", "tokens/calibration/index.json")
NO_CUDA, NO_NPU = (pytest.mark.skipif(not missing(kind), reason=f"{kind} can run here") for kind in ("cuda", "npu"))
# {} is a folder of which the files in RUN are a run, and whose text.txt is a text
WRONG = [
    ("chip_calibration", "six", "rounds: 'six' is no whole number of at least 1"),
    ("chip_calibration", "1 1 1 /nowhere/chip.yaml", "chip-file: /nowhere is no folder"),
    ("score_overhead", "", "arguments are required: folder"),
    ("score_overhead", "/nowhere", "folder: '/nowhere' has no config.json"),
    ("score_overhead", "{}/teacher 511", "tokens: '511' is no whole number of at least 512"),
    ("local_learning", "--run {} --texts {}/text.txt --ways foo", "--ways: names ['foo']; there are ffn, layer"),
    ("local_learning", "--run {}/teacher --texts {}/text.txt", "no teacher and no start and no tokens/calibration"),
    ("local_learning", "--run {} --texts {}/text.txt,/nowhere", "--texts: '/nowhere' is no file"),
    pytest.param(
        "local_learning", "--run {} --texts {}/text.txt --device npu", "--device: npu cannot run here", marks=NO_NPU
    ),
    ("fused_loss", "--tokens 0", "--tokens: '0' is no whole number of at least 1"),
    pytest.param("fused_loss", "--device cuda", "--device: cuda cannot run here", marks=NO_CUDA),
    ("fused_loss", "--kernels triton", "kernel kl_of_logits: triton cannot run on cpu"),
    ("cut_cost", "nosuch=1", "settings nosuch=1: Could not override 'nosuch'"),
    ("cut_cost", "--tokens 511", "--tokens: '511' is no whole number of at least 512"),
    ("aligned_widths", "--chip 910X", "--chip: invalid choice: '910X' (choose from"),
    ("absorption", "--texts /nowhere", "--texts: /nowhere has no jargon.txt; benchmarks/quality/texts.py writes it"),
    ("absorption", "--seeds a", "--seeds: 'a' is no whole number of at least 0"),
    ("absorption", "--row keep --sedes 1", "unrecognized arguments: --sedes"),
    ("hidden_widths", "--texts /nowhere", "--texts: /nowhere has no jargon.txt"),
    ("vocabulary", "--rows 500", "--rows: names ['500']; there are 32768, 16384"),
    ("reinit_ablation", "--seeds=", "--seeds: '' is no whole number of at least 0"),
    ("run", "--removed x", "--removed: 'x' is no percentage between 0 and 100"),
    ("run", "--rows nosuch", "--rows: names ['nosuch']; there are"),
    ("run", "--peers /nowhere/python", "--peers: /nowhere/python is no program"),
    ("table", "--docs /nowhere", "--docs: '/nowhere' is no file"),
    ("table", "--docs {}/text.txt", "text.txt: the document has no part between"),
    ("peers", "--teacher {}/teacher --peer mergekit --keep 0.5 --out {}/out", "--peer: mergekit needs mergekit"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    for file in RUN:
        (place / file).parent.mkdir(parents=True)
        (place / file).write_text("{}")
    (place / "text.txt").write_text("words")
    return place


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """No command may be started, other tools are not installed, and Triton is not interpreted."""

    def started(*command, **options):
        raise AssertionError(f"started {command}")

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setitem(sys.modules, "mergekit", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def ended(name, arguments, monkeypatch):
    """Run a script's `main` in this process; give what it exits with."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    return end.value.code


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_tells_what_a_script_is(name, monkeypatch, capsys):
    assert ended(name, ["--help"], monkeypatch) in (0, None)
    first = importlib.import_module(name).__doc__.splitlines()[0]
    assert first in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG)
def test_a_wrong_argument_is_told_before_any_work(name, arguments, message, run, monkeypatch, capsys):
    before = sorted(run.rglob("*"))
    code = ended(name, arguments.replace("{}", str(run)).split(), monkeypatch)
    written = capsys.readouterr().err + (code if isinstance(code, str) else "")  # Python prints such a code itself
    (line,) = [line for line in written.splitlines() if "error: " in line]
    assert message in line and (code == 2 or isinstance(code, str))
    assert sorted(run.rglob("*")) == before
