"""Two hosts with their own addresses: they find each other, train as one machine, and notice a cut cable."""

import json
import os
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
STEPS = 64
NOTICED = ("no sign of life", "gave no answer", "another rank stop")


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as pair:
        yield pair


def start(host, *command: str, cwd: Path, log: Path) -> subprocess.Popen:
    """Start a command on a host with its output in a file; gloo listens on the cable."""
    told = environment() | {
        "GLOO_SOCKET_IFNAME": CARD,
        "HOST": host.address,
        "RDZV_CONF": "read_timeout=10",  # seconds that torchrun's agents wait for their store; 60 by default
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with log.open("w") as out:
        return subprocess.Popen(
            host.command(*command), cwd=cwd, env=told, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
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
        for process in processes:
            with suppress(ProcessLookupError):  # torchrun's processes outlive it when it is killed
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
    chosen = settings(world, distill__micro_batch=4, distill__tokens=STEPS * 8 * 32, device__timeout=8)
    chosen += ["run=two", "stages=[score,shape,plan,cut,distill]"]
    running = launch(hosts, *chosen, cwd=world)
    checkpoints = world / "artifacts/.partial"
    for _ in range(1200):  # until the recovery has left its first checkpoint
        if list(checkpoints.glob("distill-*/checkpoints/step-*")):
            break
        assert [process.poll() for process in running] == [None, None], (world / "host0.log").read_text()
        time.sleep(0.1)
    hosts[1].set_cable("down")
    codes = finish(running, 120)  # device.timeout is 8 s; torchrun's own agents end when TCP does
    assert 0 not in codes
    for place in range(2):
        said = (world / f"host{place}.log").read_text()
        assert any(reason in said for reason in NOTICED), said

    left = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("distill-*/checkpoints/step-*"))
    hosts[1].set_cable("up")
    again = launch(hosts, *chosen, cwd=world)
    assert finish(again, 300) == [0, 0], (world / "host0.log").read_text() + (world / "host1.log").read_text()
    said = (world / "host0.log").read_text()
    assert "score: finished before" in said and "cut: finished before" in said
    (folder,) = (world / "artifacts").glob("distill-*")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert f"distill: goes on after step {left} of {STEPS}" in said
