"""Ranks: sums, sharing and waiting, in one process and in two."""

import shutil
import time

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime.artifacts import Store
from pipeline.runtime.device import open_device
from pipeline.runtime.ranks import CHUNK, TORCHRUN, Ranks, join, leave, place
from tests.processes import on_ranks

KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.int64)


def draws(rank: int) -> list[torch.Tensor]:
    """Tensors [5, 3] of every type, one of them transposed, and one without axes."""
    generator = torch.Generator().manual_seed(rank)
    plain = [(torch.rand(5, 3, generator=generator, dtype=torch.float64) * 1000).to(kind) for kind in KINDS]
    return [*plain, torch.rand(3, 5, generator=generator).T, torch.rand((), generator=generator, dtype=torch.float64)]


def sums(ranks: Ranks, world: int) -> dict:
    mine, through_bits = draws(ranks.rank), draws(ranks.rank)
    on_device = [tensor.to(ranks.device) for tensor in draws(ranks.rank)]
    ranks.sum_(mine)
    ranks.sum_(on_device)
    in_parts = torch.arange(CHUNK + 3).remainder_(100).add_(ranks.rank).to(torch.uint8)  # travels in two parts
    wanted_parts = (2 * (in_parts - ranks.rank) + 1).clone()
    for tensor in (*through_bits, in_parts):
        ranks._sum_as_bits(tensor)  # the way of host tensors under an accelerator's backend
    expected = [sum(parts[1:], parts[0]) for parts in zip(*(draws(rank) for rank in range(world)))]
    return {
        "reduced": all(torch.equal(a, b) for a, b in zip(mine, expected)),
        "through_bits": all(torch.equal(a, b) for a, b in zip(through_bits, expected)),
        "in_parts": torch.equal(in_parts, wanted_parts),
        "kinds": [str(tensor.dtype) for tensor in mine] == [str(tensor.dtype) for tensor in expected],
        "shared": [ranks.share({"from": ranks.rank}), ranks.share([ranks.rank, None])],
        "once": join(None, 1.0) is ranks,
        "on_device": all(torch.equal(a.cpu(), b) for a, b in zip(on_device, expected)),
    }


@pytest.mark.parametrize("kind", ["cpu", "npu"])
def test_two_ranks_add_and_share_as_one_would(tmp_path, kind):
    if kind == "npu" and shutil.which("g++") is None:
        pytest.skip("building the simulated NPU needs g++")
    answers = on_ranks(sums, tmp_path, timeout=120.0, arguments=(2,), kind=kind)
    expected = {
        "reduced": True,
        "through_bits": True,
        "in_parts": True,
        "kinds": True,
        "shared": [{"from": 0}, [0, None]],
        "once": True,
        "on_device": True,
    }
    assert answers == [expected, expected]


def meet(ranks: Ranks) -> list[float]:
    begin = time.monotonic()
    time.sleep(3.0 * (ranks.rank == 0))
    ranks.wait("after rank 0's long work")
    return time.monotonic() - begin


def test_a_rank_that_is_alive_is_waited_for_longer_than_the_timeout(tmp_path):
    answers = on_ranks(meet, tmp_path, timeout=1.0)
    assert all(isinstance(seconds, float) and seconds >= 3.0 for seconds in answers), answers


def publish(ranks: Ranks, root: str) -> list:
    store = Store(root, ranks, "r1")
    before = store.find("score", "aa")
    with store.open("score", "aa") as partial:
        if ranks.rank == 0:
            (partial / "scores.txt").write_text("content")
        folder = store.publish("score", "aa", {}, {}, 0.0, 0)
    with store.open("score", "aa") as again:
        return [before, str(folder), str(store.find("score", "aa")), again, (folder / "scores.txt").read_text()]


def test_one_rank_publishes_and_all_see_it(tmp_path):
    root = tmp_path / "artifacts"
    there = str(root / "score-aa")
    assert on_ranks(publish, tmp_path, arguments=(str(root),)) == [[None, there, there, None, "content"]] * 2


def test_one_process_joins_a_group_of_one_without_a_port(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    ranks = join(open_device("cpu", "auto", False, 0, 0), 5.0)
    try:
        assert (ranks.rank, ranks.world, dist.get_world_size(), dist.get_backend()) == (0, 1, 1, "gloo")
        assert join(None, 1.0) is ranks
        tensor = torch.ones(3, dtype=torch.float64)
        ranks.sum_([tensor])
        ranks.wait("anything")
        assert torch.equal(tensor, torch.ones(3, dtype=torch.float64))
        assert ranks.share({"a": (1, 2)}) == {"a": [1, 2]}
    finally:
        leave()
    assert dist.is_initialized() and join(None, 1.0) is ranks, "DeepSpeed of a later run here refers to this group"


def test_the_place_of_a_process_is_torchruns(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert place() == (0, 1, 0)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK set without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        place()
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place() == (3, 4, 1)
    monkeypatch.setenv("LOCAL_RANK", "[0, 1]")
    with pytest.raises(ValueError, match="LOCAL_RANK is '\\[0, 1\\]', not a number"):
        place()
    sound = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "1"}
    wrong = {"WORLD_SIZE": "0", "RANK": "4", "LOCAL_RANK": "9", "MASTER_PORT": "99999999"}
    for name, value in [*wrong.items(), ("MASTER_PORT", "x"), ("WORLD_SIZE", "1" * 5000)]:
        for each in sound.items():
            monkeypatch.setenv(*each)
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"{name}.*unset"):
            place()


def interrupted(ranks: Ranks) -> None:
    with ranks.guard():
        if ranks.rank == 1:
            raise KeyboardInterrupt
        ranks.wait("what rank 1 will not reach")


def test_a_rank_that_the_user_stops_tells_the_others_at_once(tmp_path):
    first, second = on_ranks(interrupted, tmp_path, timeout=120.0)
    assert first.startswith("PeerFailed: rank 1 failed: KeyboardInterrupt") and second is None
