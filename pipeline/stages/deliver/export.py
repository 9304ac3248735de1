"""export: the student as a Hugging Face folder in the form asked for, proven by reading it in a fresh process."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config
from pipeline.model import decilm, export_forms
from pipeline.model.anatomy import anatomy_of
from pipeline.model.families import FAMILIES, family_of
from pipeline.model.hf_config import folded_config
from pipeline.prune.surgery.pad import pad
from pipeline.prune.surgery.reinit import Stream, fold_scales, post_norm_modules
from pipeline.runtime import configuration_decilm, decilm_reader, modelling
from pipeline.runtime.checkpoint import Checkpoint, load_model, open_checkpoint, write_checkpoint
from pipeline.runtime.described import read_config
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.stages.stage import Inputs, Stage

FORMS = {"stock": export_forms.stock, "own": export_forms.own, "padded": export_forms.padded, "decilm": decilm.decilm}
CHECKS = {"padded": export_forms.check_padded, "decilm": decilm.check}
PROBE = 24  # tokens of the reload check

RELOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
folder, dtype, ids, out, code = sys.argv[1:]
dtype, ids = getattr(torch, dtype), json.loads(ids)
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=dtype, attn_implementation="eager", local_files_only=True, trust_remote_code=code == "code").eval()
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0].float()
    new = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                         max_new_tokens=4, do_sample=False)
torch.save(logits, out)
print(json.dumps({"class": type(model).__name__, "generated": new.shape[1] - len(ids)}))
"""


def check(config: Config) -> None:
    """Refuse a form that the teacher's family cannot take, where its config.json is at hand, before any work."""
    form = config.export.form
    folder = model_folder(config.model.path, config.model.allow_pickle) if form in CHECKS else None
    if folder is None:
        return
    kind = read_config(folder)
    family = FAMILIES.get(kind["model_type"])
    if family is None:  # the teacher stage says what it needs
        return
    absorbs = config.reinit.absorb is not False and "absorb" in config.recipe.stages
    if absorbs and family.sandwich and family.folded is None:
        kind["pruned"] = {"scales": list(family.post_norms)}
    CHECKS[form](kind)


def settings(config: Config) -> dict:
    """Give the export section."""
    return config.export.model_dump()


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the final folder in the form asked for, static scales folded where a class without post-norms exists.

    export.json says the form, what was padded, the bytes and the proof. ValueError if the form cannot hold the
    student; RuntimeError if the folder, read in a process of its own, gives other logits.
    """
    shutil.rmtree(out, ignore_errors=True)
    origin = inputs.get("recovered", inputs["initial_student"])
    source = open_checkpoint(origin)
    stream, names, kind, folds = _folded(source)
    if not config.model.trust_remote_code:
        kind.pop("auto_map", None)
    student = anatomy_of(kind, names)
    form = config.export.form
    if form == "auto":
        form = "own" if "pruned" in kind else "stock"
    written, wide = FORMS[form](kind | {"dtype": config.export.dtype}, student)
    dtype = getattr(torch, config.export.dtype)
    cast = ((name, tensor.to(dtype)) for name, tensor in pad(student, wide, stream))
    write_checkpoint(out, written, cast, config.checkpoint.shard_bytes, origin)
    _add_code(form, kind, out)
    told = prove(origin, out, dtype, config.export.tolerance, form)
    told |= {"form": form, "folded": folds, "padded": export_forms.padding(student, wide)}
    told |= {"bytes": open_checkpoint(out).bytes()}
    (out / "export.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    cost = f", {_cost(told['padded'])}" if told["padded"] else ""
    machine.say(
        f"export: {told['class']} ({form}{cost}), read in a fresh process: logits differ by {told['difference']:.1e}"
    )


def _folded(source: Checkpoint) -> tuple[Stream, list[str], dict[str, Any], bool]:
    """Give the student's tensors, their names and its config, static scales folded where a class without post-norms
    exists; and whether they were."""
    anatomy, kind = source.anatomy, source.config
    if not kind.get("pruned", {}).get("scales") or anatomy.family.folded is None:
        return iter(source.items()), list(source), dict(kind), False
    gone = post_norm_modules(anatomy)
    names = [name for name in source if name.removesuffix(".weight") not in gone]
    return fold_scales(anatomy, source), names, folded_config(kind, anatomy), True


def _cost(padded: dict[str, Any]) -> str:
    (small, large), (few, many) = padded["parameters"], padded["kv_values_per_token"]
    return f"zeros in {len(padded['layers'])} layers: {large / small - 1:+.1%} parameters, {many / few - 1:+.1%} KV"


def _add_code(form: str, kind: dict[str, Any], out: Path) -> None:
    """Put into the folder the code that its form needs: modelling code for `own`, configuration code for `decilm`."""
    if form == "own":
        text = Path(modelling.__file__).read_text(encoding="utf-8")
        base = family_of(kind["model_type"]).architecture  # of our table, never a word of the checkpoint
        text += f'\n\n{export_forms.OWN_CLASS} = pruned_class("{base}")\n'
        (out / export_forms.OWN_FILE).write_text(text, encoding="utf-8")
    if form == "decilm":
        shutil.copyfile(configuration_decilm.__file__, out / decilm.CONFIGURATION_FILE)


def prove(origin: Path, folder: Path, dtype: torch.dtype, tolerance: float, form: str) -> dict:
    """Read `folder` in a fresh process that has transformers and not this project; compare logits with `origin`'s.

    The stock classes and our modelling file load as anyone loads them; the DeciLM form is read by `decilm_reader`.
    Gives class, generated tokens, and the largest logit difference relative to the largest logit. RuntimeError above
    `tolerance` or if the process fails.
    """
    model = load_model(origin, dtype, "eager")
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (PROBE,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].float()
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "logits.pt"
        kind = str(dtype).removeprefix("torch.")
        arguments = [str(folder.resolve()), kind, json.dumps(ids), str(saved), "code" if form == "own" else ""]
        program = Path(decilm_reader.__file__).read_text(encoding="utf-8") if form == "decilm" else RELOAD
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, *arguments],
            env=_quiet_environment(scratch),
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"export: {folder} ({form}) does not load in a fresh process:\n{done.stderr[-2000:]}")
        got = torch.load(saved, weights_only=True)
    difference = float((got - wanted).abs().max() / wanted.abs().max())
    if not difference <= tolerance:
        raise RuntimeError(
            f"export: reloaded logits differ by {difference:.3g} of the largest; export.tolerance is {tolerance}"
        )
    return json.loads(done.stdout.splitlines()[-1]) | {"difference": difference}


def _quiet_environment(scratch: str) -> dict[str, str]:
    """The environment without the launcher's variables; hub offline, remote code cached in the scratch folder."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "GROUP_", "ROLE_", "PYTHONPATH")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TRANSFORMERS_VERBOSITY": "error"}


STAGE = Stage(
    name="export",
    makes="student",
    run=run,
    settings=settings,
    needs=("initial_student",),
    optional=("recovered",),
    check=check,
    all_ranks=False,
    shows={"student": ""},
    delivers=True,
)
