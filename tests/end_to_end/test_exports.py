"""A student whose layers differ, by the real command into every form; each gives its logits where this code is not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.runtime import decilm_reader
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.world import environment, make_world, pipeline, settings

FORMS = ("own", "padded", "decilm")
IDS = list(range(3, 27))
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids, *folders = sys.argv[1:]
for folder, out, code in zip(folders[::3], folders[1::3], folders[2::3]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code == "code", attn_implementation="eager")
    with torch.no_grad():
        torch.save(model.eval()(torch.tensor([json.loads(ids)])).logits[0].float(), out)
    print(type(model).__name__)
assert "pipeline" not in sys.modules
"""


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """The views of one sweep over the forms: FLAP's widths by layer, without its biases."""
    world = make_world(tmp_path_factory.mktemp("exports"), num_key_value_heads=4, intermediate_size=128)
    given = {"recipe": "flap", "reinit__bias_compensation": "false", "budget__parameters": 0.5}
    chosen = settings(world, shape__layers=None, shape__neurons=None, **given)
    part = "stages=[importance,shape,plan,cut,export]"
    said = pipeline("run=forms", *chosen, part, f"export.form={','.join(FORMS)}", "--multirun", cwd=world).stdout
    assert len(re.findall(r"cut .*: finished before", said)) == 2, "the forms share all before them"
    return {form: world / "runs" / "forms" / f"export.form={form}" for form in FORMS}


def test_own_and_padded_load_with_transformers_alone_and_give_the_logits_of_what_was_cut(views, tmp_path):
    """Padded to three heads, which do not divide 32 channels, the stock class is Mistral's."""
    requested = {"own": "code", "padded": ""}
    folders = [part for form, code in requested.items() for part in (views[form] / "student", tmp_path / form, code)]
    classes = fresh(READ, tmp_path, json.dumps(IDS), *folders)
    assert classes == ["PrunedForCausalLM", "MistralForCausalLM"]
    for form, name in zip(requested, classes, strict=True):
        same(tmp_path / form, views[form])
        result, student = exported(views[form]), open_checkpoint(views[form] / "student").anatomy
        assert (result["form"], result["class"]) == (form, name) and student.sizes.uniform == (form == "padded")
        assert (result["padded"] is None) == (form == "own")


def test_the_decilm_form_is_read_by_its_rules_with_the_logits_of_what_was_cut(views, tmp_path):
    folder, program = views["decilm"] / "student", Path(decilm_reader.__file__).read_text()
    fresh(program, tmp_path, folder, "float32", json.dumps(IDS), tmp_path / "decilm", "")
    same(tmp_path / "decilm", views["decilm"])
    assert exported(views["decilm"])["form"] == "decilm"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["DeciLMForCausalLM"]


def fresh(program, scratch, *arguments):
    """Run a program in a process that sees nothing of this project; give the lines it says."""
    free = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *map(str, arguments)],
        env=free | {"HF_MODULES_CACHE": str(scratch)},
        cwd=scratch,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def same(logits, view):
    start = load_model(view / "initial_student", torch.float32, "eager")
    assert not open_checkpoint(view / "initial_student").anatomy.sizes.uniform
    with torch.no_grad():
        wanted = start(torch.tensor([IDS])).logits[0]
    got = torch.load(logits, weights_only=True)
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def exported(view):
    return json.loads((view / "student" / "export.json").read_text())
