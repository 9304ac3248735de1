"""Signs of life reach where a collective cannot be interrupted."""

import subprocess
import sys
from datetime import timedelta

import torch.distributed as dist

from pipeline.runtime.heartbeat import GAVE_UP
from tests.world import ROOT, environment


def test_a_rank_that_waits_for_a_frozen_one_in_a_collective_ends_and_says_why():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    common = environment() | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.freeze"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        _, said = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == GAVE_UP
    assert "error: rank 0 stops: rank 1 sent no heartbeat for 2 s" in said
