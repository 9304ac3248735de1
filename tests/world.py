"""A small world to run the real commands in: a tiny model with its tokenizer, texts, and the command itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.tiny import save_tiny, tiny_model
from tests.tiny_tokenizers import tokenizer_folder

ROOT = Path(__file__).resolve().parents[1]
VOICES = """the quick brown fox jumps over a lazy dog while seven wizards brew dark potions near old stone bridges and
quiet rivers carry light boats past green hills where farmers sing about rain and bread"""
WORDS = VOICES.split()


def text(sentences: int, seed: int) -> str:
    """Return paragraphs of random sentences: enough structure for a tokenizer, none to remember."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(sentences):
        picks = torch.randint(0, len(WORDS), (9,), generator=generator).tolist()
        lines.append(" ".join(WORDS[i] for i in picks).capitalize() + ".")
    return "\n\n".join(" ".join(lines[i : i + 4]) for i in range(0, len(lines), 4))


def make_world(folder: Path, kind: str = "llama", **changed) -> Path:
    """Fill a folder with model/ (float32), calibration.txt, recovery.txt and evaluation.txt; give the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sentences, seed in (("calibration", 400, 1), ("recovery", 800, 2), ("evaluation", 300, 3)):
        (folder / f"{name}.txt").write_text(text(sentences, seed))
    model = tiny_model(kind, dtype=torch.float32, **changed)
    save_tiny(model, folder / "model")
    tokenizer_folder(folder / "model", (folder / "calibration.txt").read_text())
    return folder


def settings(world: Path, **changed) -> list[str]:
    """Return the overrides of a small run in a world; `changed` replaces or adds, with __ for a dot."""
    values = {
        "runs": world / "runs",
        "artifacts": world / "artifacts",
        "model.path": world / "model",
        "data.sequence_length": 32,
        "data.calibration.path": world / "calibration.txt",
        "data.recovery.path": world / "recovery.txt",
        "data.evaluation.path": world / "evaluation.txt",
        "shape.layers": 3,
        "shape.neurons": 16,
        "score.tokens": 1024,
        "rotate.tokens": 1024,
        "restore.tokens": 1024,
        "distill.tokens": 2048,
        "distill.global_batch_size": 8,
        "distill.micro_batch_size": 4,
        "distill.save_steps": 2,
        "distill.eval_steps": 4,
        "distill.eval_tokens": 128,
        "distill.precision": "fp32",
        "export.dtype": "float32",
        "evaluate.tokens": 512,
        "evaluate.speed_prefill": 16,
        "evaluate.speed_decode": 4,
        "evaluate.speed_repeats": 1,
        "device": "cpu",
        "track.mode": "disabled",
    } | {key.replace("__", "."): value for key, value in changed.items()}
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def environment() -> dict[str, str]:
    """The environment of a command: this checkout importable, one thread, no network."""
    there = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *there]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }


def losses(artifacts: Path) -> list[float]:
    """Return the loss of every step of the one recovery among artifacts."""
    (folder,) = artifacts.glob("distill-*")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def pipeline(*arguments: str, cwd: Path, ranks: int = 0, check: bool = True, **changed) -> subprocess.CompletedProcess:
    """Run `python -m pipeline`, under torchrun where ranks is given; the output is one text."""
    start = [sys.executable, "-m", "pipeline"]
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        start = [sys.executable, *torchrun, "-m", "pipeline"]
    done = subprocess.run(
        [*start, *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        **changed,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(arguments)}\nexit {done.returncode}\n{done.stdout[-6000:]}")
    return done
