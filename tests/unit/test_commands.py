"""Every command line of the README and docs/ is real as a whole: together its settings compose, validate and pass the
check of the line they start. The files they name are made up, the model is the demo's without its weights, the device
that of this machine."""

import json
import re
import shlex
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import runner
from pipeline.__main__ import arranged
from pipeline.config import Config, validate
from tests.tiny import tensors_of, tokenizer_folder
from tests.unit.test_conf import ROOT, composed

BESIDE = ("doctor", "calibrate-chip", "--help")  # commands that run no line


def commands(markdown: str) -> list[list[str]]:
    """The words of every command in blocks and code spans, ellipses and comments left out."""
    parts = re.split(r"^ *```.*$", markdown, flags=re.MULTILINE)
    lines = [line for block in parts[1::2] for line in block.replace("\\\n", " ").splitlines()]
    lines += [span.replace("\n", " ") for text in parts[::2] for span in re.findall(r"`([^`]+)`", text)]
    words = [shlex.split(line, comments=True) for line in lines if "-m pipeline" in line]
    return [[word for word in each if not word.endswith("...")] for each in words]


def documented() -> list[list[str]]:
    files = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    every = [command for file in files for command in commands(file.read_text())]
    return [list(command) for command in dict.fromkeys(map(tuple, every))]


def world(command: list[str]) -> int:
    """How many processes a command starts."""
    flags = {name: int(value) for name, value in zip(command, command[1:]) if name in ("--nnodes", "--nproc-per-node")}
    return flags.get("--nnodes", 1) * flags.get("--nproc-per-node", 1)


def points(arguments: list[str]) -> list[list[str]]:
    """The overrides of every run that a command is."""
    overrides = [word for word in arguments if "=" in word]
    if "--multirun" not in arguments:
        return [overrides]
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [one.input_line]
        for one in parsed
    ]
    return [list(point) for point in product(*swept)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A folder with all that is said of the demo's model; of its weights the names and shapes, on no disk space."""
    widths = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**widths, **heads, tie_word_embeddings=True))
    folder = tokenizer_folder(tmp_path_factory.mktemp("teacher"), "Some words to learn from.")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    header, end = {}, 0
    for name, tensor in tensors_of(model).items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    told = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.truncate(8 + len(told) + end)
    return folder


def made_up(config: Config, folder: Path) -> None:
    """Put files where the texts of a configuration are said to be."""
    data = config.data
    for path in (*data.calibration.paths, *data.recovery.paths, *data.evaluation.paths):
        if not path.startswith("builtin:"):
            text = "Words of a text that is long enough.\n\n" * 200
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            record = json.dumps({data.text_field: text}) + "\n"
            (folder / path).write_text(record * 20 if path.endswith(".jsonl") else text)


def try_out(command: list[str], teacher: Path, folder: Path, monkeypatch) -> int:
    """Go through a command's runs up to the work; give how many there are."""
    arguments, ranks = command[command.index("pipeline") + 1 :], world(command)
    monkeypatch.chdir(folder)
    for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    for overrides in points(arguments):
        values = composed(*overrides)
        values["model"]["path"], values["device"]["kind"] = str(teacher), "auto"
        if values["model"]["start"]:
            values["model"]["start"] = str(teacher)
        if values["evaluate"]["tasks"]:
            pytest.importorskip("lm_eval", reason="the check looks up the names of tasks in lm-eval")
        config = validate(values)
        if not set(BESIDE) & set(arguments):
            made_up(config, folder)
            runner.check(config)
    return len(points(arguments))


@pytest.mark.parametrize("command", [each for each in documented() if not {"doctor", "calibrate-chip"} & set(each)])
def test_hydra_takes_the_words_of_a_documented_command(command):
    words = command[command.index("pipeline") + 1 :]
    parsed, unknown = get_args_parser().parse_known_args(arranged(words))
    assert not unknown and parsed.overrides == [word for word in words if "=" in word]
    assert parsed.multirun == ("--multirun" in words)


@pytest.mark.parametrize("command", documented(), ids=" ".join)
def test_a_documented_command_passes_the_check_of_its_line(command, teacher, tmp_path, monkeypatch):
    assert try_out(command, teacher, tmp_path, monkeypatch) >= 1


IMPOSSIBLE = {
    "python -m pipeline run=x shape.layers=26 budget.speedup=2 device/chip=910B3": "shape.* gives the shape and budget",
    "python -m pipeline run=x --multirun plan.widths=uniform,adaptive device/chip=910B3 budget.speedup=2": "own widths",
    "torchrun --nnodes 2 --nproc-per-node 3 -m pipeline run=x": "distill.global_batch_size is 4, not a multiple",
    "python -m pipeline run=x data.calibration.path=[a.txt,b.txt] data.calibration.weights=[1]": "1 entries for 2",
}


@pytest.mark.parametrize("told", IMPOSSIBLE)
def test_settings_that_are_fine_alone_and_not_together_would_be_found(told, teacher, tmp_path, monkeypatch):
    (command,) = commands("Text.\n```\n" + told.replace("run=x", "run=x \\\n ") + "  # a note\n```\nAnd so on.")
    with pytest.raises(ValueError, match=re.escape(IMPOSSIBLE[told])):
        try_out(command, teacher, tmp_path, monkeypatch)
