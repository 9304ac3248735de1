"""Faults that are known by more than one name, or that a library reports without one, are named."""

import json
from pathlib import Path

import pytest
import torch

from pipeline import runner
from pipeline.cli.boundary import known
from pipeline.stages.deliver import export
from tests.tiny_text import configured
from tests.world import make_world, settings


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("evaluate.speed_prefill=64", r"evaluate\.speed_prefill.*68.*64"),
        ("report.sample_tokens=65", r"report\.sample_tokens.*65.*64"),
        ("data.sequence_length=65", r"data\.sequence_length.*65.*64"),
    ],
)
def test_positions_are_known_under_another_name_of_the_field(setting, named, tmp_path):
    world = make_world(tmp_path, "gpt2")
    assert "n_positions" in json.loads((world / "model" / "config.json").read_text())
    with pytest.raises(ValueError, match=named):
        runner.check(configured(*settings(world, run="x", shape__groups=None, shape__heads=None), setting))


def test_a_home_folder_is_written_as_in_a_shell(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = configured("runs='~/x'", "artifacts='~/a'", "output='~/o'")
    assert [config.runs, config.artifacts, config.output] == [str(tmp_path / name) for name in "xao"]
    assert configured("runs='x/~'").runs == "x/~"


def test_an_export_type_that_cannot_hold_a_weight_is_named():
    weights = [("a", torch.tensor([1.0, 70_000.0])), ("b", torch.tensor([torch.nan]))]
    assert [name for name, _ in export._cast(weights, torch.bfloat16)] == ["a", "b"], "NaN is refused when written"
    with pytest.raises(ValueError, match=r"export\.dtype: a has values up to 7e\+04.*float16"):
        list(export._cast(weights, torch.float16))


def test_a_file_that_numpy_could_not_write_whole_names_its_folder():
    words = "24448 requested and 16352 written"
    with pytest.raises(OSError, match=f"{words}.*disk") as fault, runner._writing(Path("there")):
        raise OSError(words)
    assert known(fault.value).startswith("there: ")
