"""Every command line of the README and docs/ composes as a whole, validates and passes the check of its stages.

A command's files are made up, the model is the demo's without its weights, the device that of this machine, and
llama.cpp's converter is a stand-in.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import runner
from pipeline.cli.command import COMMANDS, configurations
from pipeline.cli.compose import checked, groups
from pipeline.cli.sweep import objective
from pipeline.cli.words import parsed
from pipeline.config import Config
from pipeline.runtime.records import record_text
from tests.composing import ROOT
from tests.questions import stand_in
from tests.tiny import save_tiny, tensors_of, tiny_model
from tests.tiny_tokenizers import tokenizer_folder

CONVERTER = ROOT / "tests" / "stand_in_converter.py"  # in place of llama.cpp's, which `make serving` fetches


def commands(markdown: str) -> list[list[str]]:
    """Return the words of every command in blocks and code spans, ellipses and comments left out."""
    parts = re.split(r"^ *```.*$", markdown, flags=re.MULTILINE)
    lines = [line for block in parts[1::2] for line in block.replace("\\\n", " ").splitlines()]
    lines += [span.replace("\n", " ") for text in parts[::2] for span in re.findall(r"`([^`]+)`", text)]
    words = [shlex.split(line, comments=True) for line in lines if "-m pipeline" in line and "-m pipeline." not in line]
    return [[word for word in each if not word.endswith("...")] for each in words]


def documented() -> list[list[str]]:
    files = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    every = [command for file in files for command in commands(file.read_text(encoding="utf-8"))]
    return [list(command) for command in dict.fromkeys(map(tuple, every))]


def world(command: list[str]) -> int:
    """Return how many processes a command starts."""
    flags = {name: int(value) for name, value in zip(command, command[1:]) if name in ("--nnodes", "--nproc-per-node")}
    return flags.get("--nnodes", 1) * flags.get("--nproc-per-node", 1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A folder with the demo model's configuration; its weights have names and shapes but take no disk space.

    Its folder `mixture` is a tiny model with experts.
    """
    widths = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**widths, **heads, tie_word_embeddings=True))
    folder = tokenizer_folder(tmp_path_factory.mktemp("teacher"), "Some words to learn from.")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    entries, end = {}, 0
    for name, tensor in tensors_of(model).items():
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    mixture = tiny_model("qwen3_moe", num_experts=128, max_position_embeddings=8192)
    tokenizer_folder(save_tiny(mixture, folder / "mixture"), "Some words to learn from.")
    return folder


def make_texts(config: Config, folder: Path) -> None:
    """Write files to where the texts of a configuration are."""
    data = config.data
    for path in (*data.calibration.paths, *data.recovery.paths, *data.evaluation.paths):
        if not path.startswith("builtin:"):
            text = "Words of a text that is long enough.\n\n" * 200
            text = 20 * (json.dumps({data.text_field: text}) + "\n") if path.endswith(".jsonl") else text
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")


def check(command: list[str], teacher: Path, folder: Path, monkeypatch) -> int:
    """Validate and check every run of a command; return how many there are."""
    words = command[command.index("pipeline") + 1 :]
    monkeypatch.chdir(folder)
    place = {"RANK": 0, "WORLD_SIZE": world(command), "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    if words[:1] in (["clean"], ["compare"]):  # has options, and no settings of a run
        return 1
    runs = words[1:] if words[:1] and words[0] in COMMANDS else words
    options = parsed(runs)
    if options.source is not None or options.config_dir is not None:  # files of the reader's own
        return 1
    found = configurations(options)
    for config, _ in found:
        if options.help is None and runs is words:
            device = config.device.model_copy(update={"kind": "auto"})
            experts = config.shape.experts or config.budget.axes == "experts"
            start = config.model.start and str(teacher)
            path = str(teacher / "mixture" if experts else teacher)
            model = config.model.model_copy(update={"path": path, "start": start})
            evaluate = config.evaluate
            if evaluate.task_backend == "vllm":
                evaluate = evaluate.model_copy(update={"vllm_python": stand_in(folder, evaluate.task_names)})
            elif evaluate.tasks:
                pytest.importorskip("lm_eval", reason="the check looks up the names of tasks in lm-eval")
            make_texts(config, folder)
            export = config.export.model_copy(update={"gguf_converter": str(CONVERTER)})
            changed = {"device": device, "model": model, "export": export, "evaluate": evaluate}
            runner.check(config.model_copy(update=changed))
    return len(found)


@pytest.mark.parametrize("command", documented(), ids=" ".join)
def test_a_documented_command_passes_the_check_of_its_recipe(command, teacher, tmp_path, monkeypatch):
    assert check(command, teacher, tmp_path, monkeypatch) >= 1


IMPOSSIBLE = {
    "python -m pipeline run=x shape.layers=26 budget.speedup=2 device/chip=910B3": "shape.*budget",
    "python -m pipeline run=x --multirun plan.widths=uniform,adaptive device/chip=910B3 budget.speedup=2": "widths",
    "torchrun --nnodes 2 --nproc-per-node 3 -m pipeline run=x": "distill.global_batch_size",
    "python -m pipeline run=x data.calibration.path=[a.txt,b.txt] data.calibration.weights=[1]": "1 entries for 2",
    "python -m pipeline run=x distill.lr=1": "distill.learning_rate",
}


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_a_command_that_could_not_run_would_be_found(line, teacher, tmp_path, monkeypatch):
    (command,) = commands("Text.\n```\n" + line.replace("run=x", "run=x \\\n ") + "  # a note\n```\nAnd so on.")
    with pytest.raises(ValueError, match=IMPOSSIBLE[line]):
        check(command, teacher, tmp_path, monkeypatch)


def test_a_sweep_is_every_combination_and_each_has_a_run_of_its_own():
    words = ["run=s", "shape.hidden=448,512", "-m", "distill.learning_rate=1e-4,3e-4", "track.tags=[a],[b]", "seed=3"]
    found = [config for config, _ in configurations(parsed(words))]
    assert len(found) == 8 and len({config.run for config in found}) == 8
    assert found[0].run == "s/shape.hidden=448,distill.learning_rate=0.0001,track.tags=_a_"
    assert {config.track.group for config in found} == {"s"} and {config.seed for config in found} == {3}
    points = {(config.shape.hidden, config.distill.learning_rate) for config in found}
    assert points == {(hidden, rate) for hidden in (448, 512) for rate in (1e-4, 3e-4)}


def test_a_sweep_goes_over_groups_and_over_paths_as_they_are_typed():
    words = ["--multirun", "run=a,b", "recipe=best,tyr", "model.path=/x/my model (1),/y/模型"]
    found = [config for config, _ in configurations(parsed(words))]
    assert {(c.recipe.name, c.model.path) for c in found} == {
        (name, path) for name in ("best", "tyr") for path in ("/x/my model (1)", "/y/模型")
    }
    assert all(config.run.startswith("a,b/recipe=") for config in found)


def test_of_a_setting_given_twice_the_last_counts():
    for words in (["seed=1", "seed=2", "device=cpu", "device=auto"], ["-m", "run=s", "seed=1", "seed=2,3"]):
        found = [config for config, _ in configurations(parsed(words))]
        assert [config.seed for config in found] == ([2, 3] if "-m" in words else [2])
        assert {config.device.kind for config in found} == {"auto"}
        assert len({config.run for config in found}) == len(found)


def test_a_wrong_point_of_a_sweep_is_found_before_the_first_run():
    with pytest.raises(ValueError, match="^distill.tokens: "):
        configurations(parsed(["--multirun", "distill.tokens=8192,-1"]))
    with pytest.raises(ValueError, match="recipe: .*'none'"):
        configurations(parsed(["--multirun", "recipe=best,none"]))


def test_options_and_settings_come_in_any_order():
    for words in (["run=x", "-m", "seed=1,2"], ["-m", "run=x", "seed=1,2"], ["run=x", "seed=1,2", "--multirun"]):
        assert parsed(words).settings == ("run=x", "seed=1,2") and parsed(words).multirun
    assert parsed(["--help"]).help == "" and parsed(["run=x", "--help", "distill"]).help == "distill"
    for words in (["--strange"], ["--mult"], ["--cfg", "hydra"]):
        with pytest.raises(ValueError, match="--help"):
            parsed(words)


def test_a_run_can_be_repeated_from_its_record(tmp_path):
    words = ["run=a", "recipe=tyr", "device/chip=910B3", "distill.tokens=8192", "model.path=it's, 模型"]
    config = configurations(parsed(words))[0][0]
    config = config.model_copy(update={"run": r"a\${b}${oc.env:HOME}"})  # as a run that is typed in quotes is named
    record = tmp_path / "run.json"
    record.write_text(record_text({"config": config.model_dump(mode="json")}), encoding="utf-8")
    again = ["--from", str(record)]
    assert configurations(parsed(again))[0][0] == config
    assert configurations(parsed(["--from", str(tmp_path)]))[0][0] == config
    words = [*again, "run=b", "shape.layers=9", "track.tags=[x]", "device=cpu", "deepspeed=zero2"]
    changed = configurations(parsed(words))[0][0]
    assert (changed.run, changed.shape.layers, changed.track.tags) == ("b", 9, ["x"])
    assert changed.device.kind == "cpu" and changed.device.chip.name == "CPU" and changed.deepspeed.stage == 2
    assert changed.recipe == config.recipe and changed.distill == config.distill
    with pytest.raises(ValueError, match="--from: .*--multirun"):
        configurations(parsed([*again, "-m", "seed=1,2"]))
    for refused, match in (("recipe=best", "--from: recipe=best"), ("distill.lr=1", "distill.learning_rate")):
        with pytest.raises(ValueError, match=match):
            configurations(parsed([*again, refused]))
    changed_by_hand = record.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 4')
    for text in ("{", "[]", '{"config": 3}', record_text({"config": 3}), "[" * 100_000, changed_by_hand):
        record.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="--from: "):
            configurations(parsed(again))
    with pytest.raises(ValueError, match="--from: "):
        configurations(parsed(["--from", str(tmp_path / "none.json")]))


def test_settings_of_hydras_own_sweepers_pass_to_hydra():
    words = ["hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2", "shape.hidden=448,512"]
    assert [str(setting) for setting in checked(words, groups(), multirun=True)] == words
    with pytest.raises(ValueError, match="hydra"):
        checked(words[:1], groups(), multirun=False)


def test_the_objective_of_a_point_is_the_geometric_mean_of_perplexity_ratios(tmp_path):
    measured = {
        name: {"teacher": {"perplexity": before}, "student": {"perplexity": after}}
        for name, (before, after) in {"a": (10.0, 20.0), "b": (10.0, 80.0)}.items()
    }
    (tmp_path / "evaluation.json").write_text(json.dumps({"texts": measured}))
    assert objective({"evaluation": tmp_path}) == pytest.approx(4.0) and objective({}) is None
