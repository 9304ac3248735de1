"""The whole pipeline on an image-text model: the student is of its class and has its vision tower."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from pipeline.runtime.checkpoint import open_checkpoint
from tests.tiny_tokenizers import tokenizer_folder
from tests.tiny_wrappers import image_inputs, tiny_wrapper
from tests.world import make_world, pipeline, settings


def wrapper_world(folder: Path, kind: str) -> Path:
    """Fill a folder as `make_world` does, with a tiny image-text model of a type."""
    world = make_world(folder)
    shutil.rmtree(world / "model")
    tiny_wrapper(kind, dtype=torch.float32).save_pretrained(world / "model")
    tokenizer_folder(world / "model", (world / "calibration.txt").read_text())
    (world / "model" / "preprocessor_config.json").write_text("{}")
    return world


def test_a_wrapper_is_pruned_recovered_on_text_and_exported_as_the_wrapper(tmp_path):
    world = wrapper_world(tmp_path, "qwen2_5_vl")
    rotated = {"rotate__kind": "principal", "plan__channels": "leading"}
    small = settings(world, run="w", shape__heads=2, shape__groups=1, shape__hidden=16, **rotated)
    said = pipeline(*small, cwd=world).stdout
    folder = world / "runs" / "w" / "student"
    assert "Qwen2_5_VLForConditionalGeneration" in said and (folder / "preprocessor_config.json").is_file()
    assert (world / "runs" / "w" / "report.html").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl" and config["vision_config"]["out_hidden_size"] == 16
    assert config["text_config"]["num_hidden_layers"] == 3 and config["text_config"]["hidden_size"] == 16
    student = AutoModelForImageTextToText.from_pretrained(folder)
    teacher = AutoModelForImageTextToText.from_pretrained(world / "model").state_dict()
    for name, tensor in student.state_dict().items():
        if "visual" in name and "merger.mlp.2" not in name:
            assert torch.equal(tensor, teacher[name]), name
    inputs = image_inputs("qwen2_5_vl")
    with torch.no_grad():
        assert bool(torch.isfinite(student(**inputs | {"pixel_values": inputs["pixel_values"].float()}).logits).all())


def test_gemma_4_keeps_the_layers_whose_keys_others_reuse_and_is_recovered_on_two_ranks(tmp_path):
    world = wrapper_world(tmp_path, "gemma4")
    small = settings(world, run="w", shape__layers=4, shape__hidden=24, distill__learning_rate=1e-2)
    chosen = ("plan.depth=loss", "reinit.absorb=false", "deepspeed=zero3")
    said = pipeline(*small, *chosen, cwd=world, ranks=2).stdout
    folder = world / "runs" / "w" / "student"
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert "Gemma4ForConditionalGeneration" in said and (text["num_hidden_layers"], text["hidden_size"]) == (4, 24)
    hosts = [layer["host"] for layer in json.loads((world / "runs/w/blueprint.json").read_text())["layers"]]
    assert {0, 1, 2, 5} == set(hosts) and text["num_kv_shared_layers"] == 1  # later layers read the keys of 1 and 2
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    (recovered,) = (world / "artifacts").glob("distill-*")
    (cut,) = (world / "artifacts").glob("cut-*")
    start, end = open_checkpoint(cut), open_checkpoint(recovered)
    kept = {name for name in start if torch.equal(start[name].float(), end[name])}
    assert kept == {name for name in start if name.endswith("layer_scalar")}
    rows = [json.loads(line) for line in (recovered / "metrics.jsonl").read_text().splitlines()]
    held = [row["held_out_kl"] for row in rows if "held_out_kl" in row]
    assert min(held[1:]) < held[0]
    inputs = image_inputs("gemma4")
    with torch.no_grad():
        assert bool(torch.isfinite(model(**inputs | {"pixel_values": inputs["pixel_values"].float()}).logits).all())
