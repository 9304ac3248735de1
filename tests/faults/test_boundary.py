"""How a command ends: known faults in one line, defects with a traceback file, one line for all ranks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.cli.boundary import Boundary
from pipeline.runtime.faults import REPORTER, PeerFailed
from tests.world import environment


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


class Counters(dict):
    """The counters of a store; without a limit, or gone."""

    gone = False

    def add(self, key: str, amount: int) -> int:
        if self.gone:
            raise torch.distributed.DistNetworkError("connection was closed")
        self[key] = self.get(key, 0) + amount
        return self[key]


@pytest.fixture
def ranks(monkeypatch):
    """Return a function that makes this process a rank of a node among others, which share the counters it returns."""
    counters = Counters()

    def become(rank: int, node: int = 0, local_rank: int = 0, meet: bool = True):
        for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("GROUP_RANK", node)):
            monkeypatch.setenv(name, str(value))
        REPORTER.meet(counters if meet else None)
        return counters

    yield become
    REPORTER.meet(None)


def test_of_the_ranks_of_a_node_one_prints_and_each_writes_its_traceback(folder, capsys, ranks):
    ranks(rank=1, local_rank=1)
    status, line, (file,) = left(folder, KeyError("lost"), capsys)
    assert status == 70 and line.count("\n") == 1 and str(file) in line and file.name.endswith("-rank1.txt")
    ranks(rank=0)
    assert left(folder, PeerFailed("rank 1 failed: KeyError: 'lost'"), capsys)[:2] == (2, "")
    ranks(rank=2, node=1)
    assert "rank 1 failed" in left(folder, PeerFailed("rank 1 failed: KeyError: 'lost'"), capsys)[1]
    ranks(rank=3, node=1, local_rank=1)
    assert left(folder, KeyboardInterrupt(), capsys)[:2] == (130, "")


def test_a_rank_prints_where_it_cannot_know_of_the_others(folder, capsys, ranks):
    ranks(rank=1, local_rank=1).gone = True
    assert "no heartbeat" in left(folder, PeerFailed("rank 0 sent no heartbeat"), capsys)[1]


def test_before_ranks_have_met_the_first_of_each_node_prints(folder, capsys, ranks):
    for local_rank, lines in ((0, 1), (1, 0)):
        ranks(rank=4 + local_rank, node=1, local_rank=local_rank, meet=False)
        assert left(folder, OSError("no space left on device"), capsys)[1].count("\n") == lines


def test_an_exception_comes_through_where_a_developer_wants_it(folder, monkeypatch):
    monkeypatch.setenv("PIPELINE_TRACEBACK", "1")
    with pytest.raises(KeyError), Boundary()():
        raise KeyError("lost")


def into_a_closed_pipe(*words: str, both: bool) -> tuple[int, str]:
    """Run a command whose output nobody reads; return its exit status and what it wrote to standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as unread:
        errors = unread if both else subprocess.PIPE
        command = [sys.executable, "-m", "pipeline", *words]
        buffered = environment() | {"PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, env=buffered, stdout=unread, stderr=errors, text=True, timeout=120)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("both", [False, True], ids=["output", "output and errors"])
@pytest.mark.parametrize("words", [["--help"], ["--help", "seed"]], ids=["long", "short"])
def test_a_command_whose_output_is_read_no_more_ends_silently(words, both):
    """As in `| head`; a short output is written only when the command ends."""
    assert into_a_closed_pipe(*words, both=both) == (141, "")


def test_a_command_without_standard_streams_ends_as_ever():
    command = f"exec {sys.executable} -m pipeline --help seed >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=environment(), timeout=120).returncode == 0


def test_a_working_folder_that_was_removed_is_named(tmp_path):
    command = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} -m pipeline run=x"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (
        2, "error: the working folder does not exist any more; change to one that does\n"
    )  # fmt: skip


def test_a_fault_of_two_files_names_both(folder, capsys):
    fault = OSError(28, "No space left on device", "from", None, "to")
    assert left(folder, fault, capsys)[:2] == (2, "error: from -> to: No space left on device\n")


def test_a_fault_is_reported_though_the_output_is_read_no_more():
    status, text = into_a_closed_pipe("run=x", "distill.epochs=3", both=False)
    assert status == 2 and text.startswith("error: ") and text.count("\n") == 1


def test_another_broken_pipe_is_reported(folder, capsys):
    assert left(folder, BrokenPipeError(32, "Broken pipe"), capsys)[:2] == (2, "error: [Errno 32] Broken pipe\n")
