"""A training stage on two ranks that is killed resumes as the straight run."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.data.encoding import frame
from pipeline.data.packing import Domain, build
from pipeline.data.sources import Piece
from pipeline.model.blueprint import Blueprint, Group, LayerPlan
from pipeline.model.hf_config import with_scales
from pipeline.model.shape import Depth
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.processes import launch
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import DOCUMENTS, byte_tokenizer

SCRIPT = Path(__file__).with_name("resume_run.py")
STEPS = 8
TRAINED = {  # from what; what falls; tokens
    "distill": ("initial_student", "held_out_kl", 512),
    "onpolicy": ("initial_student", "held_out_kl", 388),
    "regularize": ("subject", "held_out_change", 512),
    "teacher_correction": ("teacher", "held_out_cross_entropy", 512),
}


def prepare(folder: Path) -> None:
    """A sandwich-norm teacher; a start whose post-norms are scales; text; a plan that keeps all; a choice of layers."""
    save_tiny(tiny_model("glm4", dtype=torch.float32, vocab_size=300), folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    (folder / "subject").symlink_to(folder / "teacher")
    teacher = open_checkpoint(folder / "teacher")
    with_scales_config = with_scales(teacher.config, teacher.anatomy)
    write_checkpoint(folder / "initial_student", with_scales_config, teacher.items(), 20_000, folder / "teacher")
    tokenizer = byte_tokenizer()
    pieces = [Piece(text, True) for text in DOCUMENTS]
    (folder / "tokens").mkdir()
    build(
        folder / "tokens" / "recovery",
        [Domain("texts", pieces, None)],
        tokenizer,
        frame(tokenizer),
        16,
        300,
        1 << 20,
        lambda items, total, label: items,
    )
    (folder / "blueprint").mkdir()
    layers = (LayerPlan(i, (Group(i, 0, (0, 1)), Group(i, 1, (2, 3))), tuple(range(24))) for i in range(4))
    Blueprint(tuple(range(32)), tuple(layers)).save(folder / "blueprint")
    (folder / "depth").mkdir()
    Depth((0, 1, 3), None, ()).save(folder / "depth")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=TRAINED)
def ran(request, tmp_path_factory):
    """A folder with `killed`, resumed after its last rank died before step 5, and `straight`; what trained them."""
    folder = tmp_path_factory.mktemp(f"resume-{request.param}")
    prepare(folder)
    with pytest.raises(AssertionError, match="SIGKILL"):
        launch(2, SCRIPT, str(folder), request.param, "killed:5")
    left = sorted(path.name for path in (folder / "killed" / "checkpoints").glob("step-*"))
    steps = [line["step"] for line in metrics(folder / "killed")]
    half = folder / "killed" / "checkpoints" / ".step-00000006"
    half.mkdir()
    (half / "part-0.safetensors").write_bytes(b"cut off")
    with (folder / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    if request.param == "distill":  # and the newest checkpoint is damaged: the one before is resumed from
        damaged = folder / "killed" / "checkpoints" / "step-00000004" / "model.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    launch(2, SCRIPT, str(folder), request.param, "killed", "straight")
    return folder, left, steps, request.param


def test_a_killed_run_leaves_its_last_checkpoint_and_every_step_it_took(ran):
    _, left, steps, stage = ran
    best = ["step-00000004"] if stage == "distill" else []  # measured there, and lower than before
    assert left == ["step-00000003", *best]
    assert steps == [0, 1, 2, 3, 4, 5]


def test_the_resumed_model_is_the_straight_one_digit_for_digit(ran):
    folder, *_, stage = ran
    resumed, straight, start = (open_checkpoint(folder / name) for name in ("killed", "straight", TRAINED[stage][0]))
    assert set(resumed) == set(straight) == set(start)
    assert all(torch.equal(resumed[name], straight[name]) for name in start)
    assert all(resumed[name].dtype == torch.float32 for name in start)
    assert not any(torch.equal(resumed[name], start[name]) for name in start), "all weights, scales too, are trained"
    load_model(folder / "killed", torch.float32, "eager")
    assert (folder / "killed" / "tokenizer.json").is_file()
    assert not (folder / "killed" / "checkpoints").exists()


def test_the_metrics_have_every_step_once_and_the_same_numbers(ran):
    folder, *_, stage = ran
    resumed, straight = (metrics(folder / name) for name in ("killed", "straight"))
    assert [line["step"] for line in resumed] == list(range(STEPS + 1))
    for one, other in zip(resumed, straight):
        assert {k: v for k, v in one.items() if k != "tokens_per_second"} == {
            k: v for k, v in other.items() if k != "tokens_per_second"
        }
    falls = TRAINED[stage][1]
    held_out = [line[falls] for line in straight if falls in line]
    assert len(held_out) == 3 and held_out[-1] < 0.8 * held_out[0]
    assert straight[-1]["tokens"] == TRAINED[stage][2]
