"""Each script in examples/ runs on a tiny model."""

import subprocess
import sys

import pytest

from tests.tiny import save_tiny, tiny_model
from tests.world import ROOT, environment, make_world, settings

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("examples"))
    save_tiny(tiny_model("llama", dtype=None, num_hidden_layers=3), folder / "external")
    return folder


def words(world, name: str) -> list[str]:
    """Return the options of an example; the texts and sizes come as settings where it takes them."""
    model = ["--model", str(world / "model")]
    small = settings(world, evaluate__speed="false", report__samples=0, shape__layers=None, shape__neurons=None)
    small = [word for word in small if not word.startswith(("model.path=", "data.calibration", "data.recovery"))]
    data = ["--data", str(world / "recovery.txt")]
    return {
        "prune_to_a_budget": [*model, *data, "--recipe", "pangu_light", *small],
        "sweep_and_compare": [*model, *data, "--recipes", "minitron,flap", *small],
        "own_score": [*model, *data, *small],
        "recover_external_student": [
            "--teacher", str(world / "model"), "--student", str(world / "external"), *data, *small,
        ],
        "prune_in_memory": [
            *model, "--text", str(world / "calibration.txt"), "--length", "32", "--layers", "3", "--neurons", "16",
            "--output", str(world / "cut"),
        ],
    }[name]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_example_runs(world, script):
    done = subprocess.run(
        [sys.executable, str(script), *words(world, script.stem)],
        cwd=world, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert ("student" in done.stdout) or (world / "cut" / "config.json").is_file()


def test_every_example_is_listed():
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{script.name}`" in listed for script in SCRIPTS)
