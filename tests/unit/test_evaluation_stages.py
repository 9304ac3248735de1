"""The evaluate and report stages on real artifacts of a tiny model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.data.packing import Packed
from pipeline.model.blueprint import Blueprint, everything
from pipeline.model.scores import Scores
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.device import chip_name, choose, open_device
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.tracker import Track
from pipeline.stages.build import cut
from pipeline.stages.deliver import evaluate, evaluate_reference, report
from pipeline.stages.prepare import tokens
from pipeline.stages.texts import PURPOSES
from tests.processes import on_ranks
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import byte_tokenizer, configured
from tests.world import text as sentences

OVERRIDES = (
    "evaluate.tokens=256",
    "evaluate.words=6",
    "evaluate.words_context=40",
    "evaluate.speed_prefill=16",
    "evaluate.speed_decode=3",
    "evaluate.speed_repeats=2",
    "report.sample_prompt=60",
    "report.sample_tokens=8",
    "checkpoint.shard_bytes=1e6",
)
SENTENCES = "The ferry left the harbour before the morning bell. ", "Nobody on the old pier had seen a captain."


def machine(ranks=None) -> Machine:
    """The real machine, computing in float32 so that two ways to the same number agree."""
    device = replace(open_device("cpu", "auto", False, 0, 0), compute_dtype=torch.float32)
    return Machine(device, ranks or Ranks(0, 1, 0), Track())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, tokens of two evaluation texts, scores, a blueprint that drops a layer, and the cut student."""
    folder = tmp_path_factory.mktemp("evaluation")
    texts = {name: folder / f"{name}.txt" for name in ("ships", "piers", "other")}
    for name, path in texts.items():
        path.write_text("\n\n".join(f"On {name}, {i}. {SENTENCES[0] * (1 + i % 3)}{SENTENCES[1]}" for i in range(60)))
    texts["other"].write_text(sentences(160, seed=5))  # which shares no run of tokens with the evaluation texts
    paths = [f"data.{purpose}.path={texts['other']}" for purpose in ("calibration", "recovery")]
    config = configured(*paths, f"data.evaluation.path=[{texts['ships']},{texts['piers']}]", *OVERRIDES)
    teacher = save_tiny(tiny_model("llama", dtype=torch.float32, vocab_size=320), folder / "teacher")
    byte_tokenizer().save_pretrained(teacher)
    made = dict.fromkeys(("reference", "teacher", "subject"), teacher)
    for name in ("tokens", "scores", "blueprint", "initial_student"):
        made[name] = folder / name
        made[name].mkdir()
    made["reference_tokens"] = made["tokens"]
    tokens.run(config, made, made["tokens"], machine())
    sizes = open_checkpoint(teacher).anatomy.sizes
    heads, neurons = (tuple(torch.rand(getattr(w, axis)) + 0.1 for w in sizes.layers) for axis in ("heads", "neurons"))
    Scores(torch.rand(32) + 0.1, heads, neurons, torch.rand(4).double() + 0.1, 256).save(made["scores"])
    whole = everything(sizes)
    Blueprint(whole.channels, (whole.layers[0], *whole.layers[2:])).save(made["blueprint"])
    cut.run(config, made, made["initial_student"], machine())
    return config, made, folder


def evaluated(config, inputs: dict[str, Path], out: Path, on: Machine) -> dict:
    out.mkdir()
    place = out.with_name(f"dense-of-{out.name.partition('-')[0]}")  # one folder for all ranks, as in the line
    place.mkdir(exist_ok=True)
    evaluate_reference.run(config, inputs, place, on)
    on.ranks.wait("dense")
    evaluate.run(config, inputs | {"reference_evaluation": place}, out, on)
    return json.loads((out / "evaluation.json").read_text()) if on.ranks.rank == 0 else {}


@pytest.fixture(scope="module")
def found(world):
    config, made, folder = world
    inputs = made | {"student": made["initial_student"], "recovered": made["initial_student"]}
    return evaluated(config, inputs, folder / "evaluation", machine())


def test_the_perplexity_is_that_of_the_models_own_logits_on_the_texts_rows(world, found):
    made = world[1]
    for name in ("ships", "piers"):
        (place,) = (made["tokens"] / "evaluation").glob(f"*-{name}")
        packed, text = Packed(place), found["texts"][name]
        assert (text["sequence"], text["stride"], text["sequences"], text["tokens"]) == (32, 32, 8, 8 * 31)
        ids = torch.stack([torch.from_numpy(packed[row].astype("int64")) for row in range(8)])
        decoded = byte_tokenizer().batch_decode(ids[:, 1:], skip_special_tokens=True)
        assert text["bytes"] == sum(len(row.encode()) for row in decoded)
        for who, folder in (
            ("teacher", made["teacher"]),
            ("start", made["initial_student"]),
            ("student", made["initial_student"]),
        ):
            logits = load_model(folder, torch.float32, "sdpa")(ids).logits[:, :-1].transpose(1, 2)
            losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)
            loss = losses.mean().item()
            assert text[who]["losses"] == pytest.approx(losses.tolist(), rel=1e-4)
            assert text[who]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
            assert text[who]["bits_per_byte"] == pytest.approx(loss * 8 * 31 / math.log(2) / text["bytes"], rel=1e-4)
            assert 0 <= text[who]["next_word"] <= 1
        times, result = text["student"]["perplexity"] / text["teacher"]["perplexity"], text["student"]["over_teacher"]
        extra = torch.tensor(text["student"]["losses"]) - torch.tensor(text["teacher"]["losses"])
        assert result["times"] == pytest.approx(times, rel=1e-6)
        assert result["error"] == pytest.approx(times * float(extra.std()) / math.sqrt(8), rel=1e-4)


def test_sizes_are_those_of_the_folders(world, found):
    made = world[1]
    for who, folder, layers in (("teacher", made["teacher"], 4), ("student", made["initial_student"], 3)):
        model = load_model(folder, torch.float32, "sdpa")
        facts = found["models"][who]
        outer = sum(p.numel() for p in (model.get_input_embeddings().weight, model.lm_head.weight))
        assert facts["parameters"] == sum(p.numel() for p in model.parameters())
        assert facts["non_embedding_parameters"] == facts["parameters"] - outer
        assert facts["checkpoint_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert facts["kv_bytes_per_token"] == layers * 2 * 2 * 8 * 2  # K and V, groups, head size, bytes of bfloat16
        assert facts["shape"]["layers"] == layers and facts["shape"]["heads"] == 4


def test_teacher_and_student_are_timed_and_go_on_from_held_out_text(world, found):
    speed = found["speed"]
    assert (speed["batch"], speed["prefill"], speed["decode"], speed["repeats"]) == (1, 16, 3, 2)
    assert all(len(speed[who]["decode_runs"]) == 2 and speed[who]["decode"] > 0 for who in ("teacher", "student"))
    assert [sample["text"] for sample in found["samples"]] == ["ships", "piers"]
    for sample in found["samples"]:
        assert sample["prompt"] + sample["reference"] in (world[2] / f"{sample['text']}.txt").read_text()
        assert 0 < len(sample["prompt"]) <= 60 and sample["teacher"] and sample["student"]


def two_ranks(ranks, overrides, inputs, out):
    config = configured(*overrides, *OVERRIDES)
    evaluated(config, {name: Path(path) for name, path in inputs.items()}, Path(f"{out}-{ranks.rank}"), machine(ranks))


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(world, found):
    config, made, folder = world
    inputs = {
        name: str(path)
        for name, path in (made | {"student": made["initial_student"], "recovered": made["initial_student"]}).items()
    }
    paths = [f"data.{name}.path={getattr(config.data, name).path}" for name in PURPOSES]
    assert on_ranks(two_ranks, folder / "ranks", 2, 60.0, (paths, inputs, str(folder / "two"))) == [None, None]
    both = json.loads((folder / "two-0" / "evaluation.json").read_text())
    assert not (folder / "two-1" / "evaluation.json").exists()
    for name, text in found["texts"].items():
        assert both["texts"][name]["bytes"] == text["bytes"]
        for who in ("teacher", "start", "student"):
            result, alone = both["texts"][name][who], text[who]
            assert result.pop("losses") == pytest.approx(alone["losses"], rel=1e-5)
            assert result.pop("over_teacher", {}) == pytest.approx(alone.get("over_teacher", {}), rel=1e-3)
            assert result == pytest.approx({key: alone[key] for key in result}, rel=1e-5)


def test_the_report_has_its_page_pictures_and_no_time_of_stages_without_a_manifest(world, found, capsys):
    config, made, folder = world
    out = folder / "report"
    out.mkdir()
    report.run(config, made | {"student": made["initial_student"], "evaluation": folder / "evaluation"}, out, machine())
    result = json.loads((out / "report.json").read_text())
    assert result["stages"] == {} and result["recovery"] is None and "start" not in result["perplexity"]["ships"]
    assert result["parameters"]["student"] == found["models"]["student"]["parameters"]
    assert result["cut"]["dropped_layers"] == [1]
    assert (
        result["settings"]["plan"]["clap"] is True and result["versions"]["torch"] and result["recipe"] == "pangu_light"
    )
    assert {path.stem for path in (out / "figures").iterdir()} == {"map", "layers", "channels", "perplexity"}
    assert "perplexity, ships" in capsys.readouterr().out
    assert "Recovery" not in (out / "report.html").read_text()


def test_the_report_tells_recovery_and_the_cost_of_every_stage_behind_it(world, found):
    config, made, folder = world
    student, out = folder / "distill-1", folder / "recovered"
    student.mkdir()
    out.mkdir()
    rows = [{"step": 0, "tokens": 0, "held_out_kl": 3.0}]
    rows += [{"step": i, "tokens": i * 64, "loss": 3 - i / 8, "learning_rate": 1e-3} for i in range(1, 9)]
    rows[-1]["held_out_kl"] = 1.0
    (student / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, stage, inputs in (("tokens-1", "tokens", {}), ("distill-1", "distill", {"tokens": "tokens-1"})):
        (folder / name).mkdir(exist_ok=True)
        facts = {"stage": stage, "inputs": inputs, "seconds": 1.5, "peak_memory": 10, "device": "chip"}
        (folder / name / "manifest.json").write_text(json.dumps(facts))
    inputs = made | {"student": made["initial_student"], "recovered": student, "evaluation": folder / "evaluation"}
    report.run(config, inputs, out, machine())
    result = json.loads((out / "report.json").read_text())
    assert list(result["stages"]) == ["tokens", "distill"]
    assert result["stages"]["distill"] == {"seconds": 1.5, "peak_memory": 10, "devices": ["chip"]}
    assert result["recovery"]["tokens"] == 512
    assert result["recovery"]["curves"]["held_out_kl"].items() >= {"first": 3.0, "last": 1.0}.items()
    assert "start" in result["perplexity"]["ships"]
    assert {"loss", "kl", "rate", "stages"} < {path.stem for path in (out / "figures").iterdir()}


def test_what_the_report_shows_is_in_its_settings_and_where_it_is_kept_is_not():
    plain = report.settings(configured())
    assert report.settings(configured("plan.clap=false")) != plain
    assert report.settings(configured("artifacts=elsewhere", "runs=elsewhere")) == plain
    assert evaluate.settings(configured("evaluate.tokens=64")) != evaluate.settings(configured())
    unchanged = configured("distill.tokens=8192", "evaluate.batch_size=1", "logits.chunk=64")
    assert evaluate.settings(unchanged) == evaluate.settings(configured())


def test_figures_are_of_the_device_that_is_found_and_of_its_chip():
    requested = [configured(f"device={kind}") for kind in ("auto", "cpu")]
    auto, cpu = map(evaluate.settings, requested)
    assert (auto == cpu) == (choose("auto") == "cpu")
    for stage in (evaluate_reference, evaluate):
        device = stage.settings(requested[0])["device"]
        assert (device["kind"], device["chip"]) == (choose("auto"), chip_name(choose("auto"), 0))


def test_the_teacher_is_measured_once_and_a_start_that_was_not_recovered_once_as_the_student(world, found, capsys):
    config, made, folder = world
    bare = evaluated(config, made | {"student": made["initial_student"]}, folder / "bare", machine())
    said = capsys.readouterr().out
    assert said.count("teacher on ships") == 1 and "start on" not in said
    for name, text in found["texts"].items():
        assert text["start"] == text["student"] == bare["texts"][name]["student"]
        assert bare["texts"][name] == {key: value for key, value in text.items() if key != "start"}
    assert evaluate_reference.settings(config) == evaluate_reference.settings(
        configured(*OVERRIDES, "evaluate.speed=false", "plan.clap=false")
    )
