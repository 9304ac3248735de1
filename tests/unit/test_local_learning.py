"""Local distillation before recovery: every variant is measured and reduces the distance to the teacher."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline.data.encoding import frame
from pipeline.data.packing import Domain, Packed, build
from pipeline.data.sources import locate, read
from pipeline.runtime.model_loader import load_tokenizer
from tests.tiny import save_tiny, tiny_model
from tests.world import ROOT, make_world

sys.path.insert(0, str(ROOT / "benchmarks"))

import local_learning

LONG = {"max_position_embeddings": 512}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as the script reads it: the teacher, its calibration rows, and a start of half the neurons."""
    world = make_world(tmp_path_factory.mktemp("local"), **LONG)
    (world / "model").rename(world / "teacher")
    tokenizer = load_tokenizer(world / "teacher")
    text = Domain("text", read(locate(str(world / "calibration.txt")), "text"), None)
    (world / "tokens").mkdir()
    build(world / "tokens/calibration", [text], tokenizer, frame(tokenizer), 32, 96, 1 << 20, lambda items, *_: items)
    teacher, start = (tiny_model("llama", dtype=torch.float32, **LONG, intermediate_size=size) for size in (24, 12))
    whole = teacher.state_dict()
    start.load_state_dict(
        {name: whole[name][tuple(map(slice, part.shape))] for name, part in start.state_dict().items()}
    )
    save_tiny(start, world / "start")
    return world


@pytest.mark.slow
def test_every_way_is_measured_on_every_text_and_changes_the_student(run, monkeypatch, capsys):
    texts = f"{run / 'evaluation.txt'},{run / 'recovery.txt'}"
    given = ["--run", str(run), "--texts", texts, "--tokens", "1024", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["local_learning.py", *given])
    local_learning.main()
    lines = capsys.readouterr().out.splitlines()
    result = {line[:14].strip(): [float(ratio) for ratio in line[14:].split()] for line in lines}
    assert list(result) == ["not distilled", *local_learning.WAYS]
    assert {len(ratios) for ratios in result.values()} == {2}
    assert all(0 < ratio < math.inf for ratios in result.values() for ratio in ratios)
    assert len(set(map(tuple, result.values()))) == len(result), "no way gives what another does, or the cut"


@pytest.mark.parametrize("way", local_learning.WAYS)
def test_what_learns_brings_the_stream_of_its_text_nearer_to_the_teachers(run, way):
    together, whole, weighed = local_learning.WAYS[way]
    packed = Packed(run / "tokens" / "calibration")
    ids = torch.stack([torch.from_numpy(packed[row].astype("int64")) for row in range(64)])
    teacher, student = (local_learning.loaded(run / name, CPU) for name in ("teacher", "start"))
    pass_on = local_learning.Layers(teacher, ids.shape[1])

    def error() -> float:
        wanted, found = (
            pass_on.all(model.model.layers, model.model.embed_tokens(ids)).float() for model in (teacher, student)
        )
        return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().mean())

    before = error()
    metrics = local_learning.fisher(teacher, ids[:16]) if weighed else None
    requested = SimpleNamespace(rate=0.015, batch=1)
    local_learning.through(teacher, student, ids, together, whole, metrics, requested)
    assert error() < 0.8 * before
