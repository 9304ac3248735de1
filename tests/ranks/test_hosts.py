"""Two hosts with their own addresses: they find each other, train as one machine, and notice a cut cable."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.ranks.hosts import CARD, missing, two_hosts
from tests.world import ROOT, environment, make_world, settings

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
PORT = "29517"
STEPS = 32


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as pair:
        yield pair


def start(host, *command: str, cwd: Path, log: Path) -> subprocess.Popen:
    """Start a command on a host with its output in a file; gloo listens on the cable."""
    result = environment() | {
        "GLOO_SOCKET_IFNAME": CARD,
        "HOST": host.address,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with log.open("w") as out:
        return subprocess.Popen(
            host.command(*command), cwd=cwd, env=result, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def launch(hosts, *overrides: str, cwd: Path) -> list[subprocess.Popen]:
    """Start the pipeline on every host with launch/multinode.sh, as its user would."""
    addresses = ",".join(host.address for host in hosts)
    common = ["--hosts", addresses, "--port", PORT, "--nproc-per-node", "1"]
    return [
        start(
            host, str(ROOT / "launch/multinode.sh"), *common, "--node-rank", str(place), *overrides,
            cwd=cwd, log=cwd / f"host{place}.log",
        )
        for place, host in enumerate(hosts)
    ]  # fmt: skip


def finish(processes, seconds: float) -> list[int]:
    """Wait for all; give their exit codes. Kills what is late, and fails."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(1.0, end - time.monotonic())) for process in processes]
    finally:
        stop(processes)


def stop(processes) -> None:
    """Kill what still runs, with the processes that torchrun started."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_ranks_on_two_hosts_add_share_and_wait(hosts, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-id=meet"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].address}:{PORT}"]
    started = [
        start(
            host, *torchrun, f"--rdzv-conf=is_host={str(place == 0).lower()}", f"--local-addr={host.address}",
            "-m", "tests.ranks.meet", cwd=ROOT, log=tmp_path / f"{place}.log",
        )
        for place, host in enumerate(hosts)
    ]  # fmt: skip
    assert finish(started, 120) == [0, 0], (tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text()
    said = []
    for place in range(2):
        lines = (tmp_path / f"{place}.log").read_text().splitlines()
        said.append([json.loads(line) for line in lines if line.startswith('{"rank"')])
    assert [len(host) for host in said] == [2, 2]
    assert sorted(row["rank"] for host in said for row in host) == [0, 1, 2, 3]
    for row in said[0] + said[1]:
        assert (row["world"], row["sum"], row["said"]["from"]) == (4, [10.0, 100.0], 0)


def test_a_cut_cable_is_noticed_in_bounded_time_and_the_same_command_goes_on(hosts, tmp_path):
    world = make_world(tmp_path)
    chosen = settings(world, distill__micro_batch_size=4, distill__tokens=STEPS * 8 * 32, device__timeout=6)
    chosen += ["run=two", "stages=[importance,shape,plan,cut,distill]"]
    running = launch(hosts, *chosen, cwd=world)
    checkpoints = world / "artifacts/.partial"
    for _ in range(1200):  # until the recovery has left its first checkpoint
        if list(checkpoints.glob("distill-*/checkpoints/step-*")):
            break
        assert [process.poll() for process in running] == [None, None], (world / "host0.log").read_text()
        time.sleep(0.1)
    hosts[1].set_cable("down")
    logs = [world / f"host{place}.log" for place in range(2)]
    try:
        assert running[0].wait(60) != 0
        for _ in range(600):  # torchrun itself stays on the host without a network until TCP gives up
            if "error: rank 1" in logs[1].read_text():  # the silent store, or a sum that did not come
                break
            time.sleep(0.1)
        else:
            raise AssertionError(logs[1].read_text())
    finally:
        stop(running)
    assert "rank 1 sent no heartbeat" in logs[0].read_text() or "another rank stop" in logs[0].read_text()

    left = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("distill-*/checkpoints/step-*"))
    hosts[1].set_cable("up")
    again = launch(hosts, *chosen, cwd=world)
    assert finish(again, 300) == [0, 0], logs[0].read_text() + logs[1].read_text()
    said = logs[0].read_text()
    assert re.search("importance .*: finished before", said) and re.search("cut .*: finished before", said)
    (folder,) = (world / "artifacts").glob("distill-*")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert f"distill: resumes after step {left} of {STEPS}" in said
