"""Faults of the machine: ranks that fail or die, processes killed at work, a torch_npu without its CANN."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime.artifacts import Store
from pipeline.runtime.ranks import Ranks
from tests.processes import CONTEXT, on_ranks

ROOT = Path(__file__).resolve().parents[2]


def fail_on_one(ranks: Ranks) -> str:
    with ranks.guard():
        if ranks.rank == 1:
            raise ValueError("no such file")
        ranks.wait("the end of a stage")
    return "done"


def test_a_failing_rank_stops_the_others_at_once_with_its_reason(tmp_path):
    begin = time.monotonic()
    first, second = on_ranks(fail_on_one, tmp_path, timeout=60.0)
    assert second == "ValueError: no such file"
    assert first == "PeerFailed: rank 1 failed: ValueError: no such file"
    assert time.monotonic() - begin < 30


def die_before_a_wait(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.wait("the end of a stage")


def test_a_killed_rank_is_named_when_its_sign_of_life_stops(tmp_path):
    first, second, third = on_ranks(die_before_a_wait, tmp_path, world=3, timeout=1.5)
    assert second is None
    assert first == third
    assert first.startswith("PeerFailed: rank 1 did not reach `the end of a stage`, and rank 1 sent no heartbeat")


def die_before_a_sum(ranks: Ranks) -> None:
    ranks.sum_([torch.ones(3)])
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum_([torch.ones(3)])


def test_a_rank_killed_during_a_sum_gives_a_clear_error(tmp_path):
    first, second = on_ranks(die_before_a_sum, tmp_path, timeout=5.0)
    assert second is None
    assert first.startswith("PeerFailed: rank 0: the sum over ranks failed; did another rank stop? (")


def fail_before_a_sum(ranks: Ranks) -> None:
    ranks.sum_([torch.ones(3)])
    with ranks.guard():
        if ranks.rank == 1:
            raise ValueError("no such file")
        ranks.sum_([torch.ones(3)])


def test_a_rank_that_fails_while_another_waits_in_a_sum_is_reported_with_its_reason(tmp_path):
    first, second = on_ranks(fail_before_a_sum, tmp_path, timeout=10.0)
    assert second == "ValueError: no such file"
    assert first == "PeerFailed: rank 1 failed: ValueError: no such file"


def die_inside_a_library(ranks: Ranks) -> None:
    with ranks.guard():
        for step in range(3):
            if ranks.rank == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(3))  # as DeepSpeed does, outside `Ranks`


def test_a_rank_killed_inside_the_collective_of_a_library_gives_one_line(tmp_path):
    first, second = on_ranks(die_inside_a_library, tmp_path, timeout=5.0)
    assert second is None
    assert first.startswith("PeerFailed: rank 0: a collective failed") and "\n" not in first
    assert "pair.cc" not in first


def fail_to_open(ranks: Ranks, root: str) -> None:
    with Store(root, ranks, "r1").open("score", "aa"):
        raise AssertionError("there is no place for a lock")


def test_every_rank_learns_that_rank_0_could_not_take_the_lock(tmp_path):
    root = tmp_path / "artifacts"
    root.mkdir()
    (root / ".partial").write_text("a file where locks would be")
    first, second = on_ranks(fail_to_open, tmp_path, arguments=(str(root),))
    assert first.startswith("FileExistsError: ")
    assert second == f"PeerFailed: rank 0 failed: {first}"


def work_and_die(root: str) -> None:
    with Store(root, Ranks(0, 1, 0), "r1").open("score", "aa") as partial:
        (partial / "half.txt").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_its_work_and_not_its_lock(tmp_path):
    process = CONTEXT.Process(target=work_and_die, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    store = Store(tmp_path, Ranks(0, 1, 0), "r1")
    assert store.find("score", "aa") is None
    with store.open("score", "aa") as partial:
        assert (partial / "half.txt").read_text() == "half"


def work_slowly(root: str, seconds: float, note: str) -> None:
    store = Store(root, Ranks(0, 1, 0), "r1")
    with store.open("score", "aa") as partial:
        if partial is not None:
            Path(note).write_text("at work")
            time.sleep(seconds)
            (partial / "scores.txt").write_text("made once")
            store.publish("score", "aa", {}, {}, seconds, 0)


def test_of_two_processes_one_works_and_the_other_waits_for_its_artifact(tmp_path, capsys):
    note = tmp_path / "note"
    process = CONTEXT.Process(target=work_slowly, args=(str(tmp_path / "artifacts"), 1.0, str(note)))
    process.start()
    while not note.exists():
        time.sleep(0.01)
    store = Store(tmp_path / "artifacts", Ranks(0, 1, 0), "r1")
    with store.open("score", "aa") as partial:
        assert partial is None
    process.join(60)
    assert (store.find("score", "aa") / "scores.txt").read_text() == "made once"
    assert f"process {process.pid} on " in capsys.readouterr().out


def test_a_crash_between_manifest_and_rename_publishes_again(tmp_path):
    store = Store(tmp_path, Ranks(0, 1, 0), "r1")
    with store.open("score", "aa") as partial:
        (partial / "scores.txt").write_text("whole")
        (partial / "manifest.json").write_text('{"files": {"an earlier": {"bytes": 1}}}')
    with store.open("score", "aa"):
        folder = store.publish("score", "aa", {}, {}, 0.0, 0)
    assert store.find("score", "aa") == folder


@pytest.fixture
def broken_npu(tmp_path):
    """The environment of a process that has torch_npu installed and no CANN: importing it raises."""
    package, facts = tmp_path / "torch_npu", tmp_path / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    facts.mkdir()
    (package / "__init__.py").write_text("raise OSError('libhccl.so: cannot open shared object file')\n")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (facts / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    paths = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def in_a_process(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_torch_npu_without_cann_never_breaks_the_cpu_and_is_named_where_asked_for(broken_npu):
    code = """
from pipeline.runtime.device import open_device
from transformers.utils import is_torch_npu_available
assert not is_torch_npu_available()  # imports an installed torch_npu unguarded
print(open_device("auto", "auto", False, 0, 0).kind)
for _ in range(2):
    try:
        open_device("npu", "auto", False, 0, 0)
    except ValueError as fault:
        print(fault)
"""
    kind, *faults = in_a_process(code, broken_npu).splitlines()
    assert kind == "cpu"
    assert (
        faults
        == [
            "device.kind: npu cannot run: torch_npu cannot be imported (OSError: libhccl.so: cannot open shared object"
            " file); source CANN's set_env.sh; or set device=auto to use what this machine has"
        ]
        * 2
    )
