"""export: the student as a Hugging Face folder in the configured form, verified by loading it in a fresh process."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.model import decilm, export_forms
from pipeline.model.anatomy import anatomy_of
from pipeline.model.exported import Exported
from pipeline.model.families import family_of
from pipeline.model.hf_config import folded_config
from pipeline.model.token_ids import Vocabulary
from pipeline.prune.surgery.pad import pad
from pipeline.prune.surgery.reinit import Stream, fold_scales, post_norm_modules
from pipeline.runtime import configuration_decilm, decilm_reader, modelling
from pipeline.runtime.checkpoint import Checkpoint, open_checkpoint
from pipeline.runtime.checkpoint_writer import GENERATION, write_checkpoint
from pipeline.runtime.described import stored_config
from pipeline.runtime.fresh_process import quiet_environment
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.model_source import generation_of, model_folder
from pipeline.runtime.source_card import license_digests, license_files
from pipeline.runtime.wrapper import wrapped_config
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.student_config import is_image_text, student_config

FORMS = {"stock": export_forms.stock, "own": export_forms.own, "padded": export_forms.padded, "decilm": decilm.decilm}
CHECKS = {"padded": export_forms.check_padded, "decilm": decilm.check}
PROBE = 24  # tokens of the reload check

RELOAD = """
import json, sys
import torch
import transformers
from transformers import GenerationConfig
folder, dtype, ids, out, code, name = sys.argv[1:]
dtype, ids = getattr(torch, dtype), json.loads(ids)
model, loaded = getattr(transformers, name).from_pretrained(
    folder, dtype=dtype, attn_implementation="eager", local_files_only=True, trust_remote_code=code == "code",
    output_loading_info=True)
assert not loaded["missing_keys"] and not loaded["unexpected_keys"], loaded
model.eval()
model.generation_config = GenerationConfig(max_new_tokens=4, do_sample=False)  # not the folder's own
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0].float()
    new = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
torch.save(logits, out)
print(json.dumps({"class": type(model).__name__, "generated": new.shape[1] - len(ids)}))
"""


def check(config: Config) -> None:
    """Refuse a form that the teacher's family cannot take, where its config.json can be read before any work."""
    form, whole = config.export.form, is_image_text(config)
    if form not in CHECKS and not whole:
        return
    student = student_config(config)
    if student is None:
        return
    if whole:
        _check_stock("own" if form == "auto" and "pruned" in student else "stock" if form == "auto" else form)
    if form in CHECKS:
        CHECKS[form](student)


def settings(config: Config) -> dict:
    """Return the export section, and the generation_config.json and licence files written beside the weights."""
    generation, licenses = _generation(config), license_digests(_source(config))
    result = config.export.model_dump(include={"form", "dtype", "tolerance"})
    result |= {} if generation is None else {"generation": generation}
    return result | ({"licenses": licenses} if licenses else {})


def _source(config: Config) -> Path | None:
    """Return the folder that the student's weights come from; None for a GGUF."""
    return model_folder(config.model.start or config.model.path, config.model.allow_pickle)


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the final folder in the configured form, static scales folded where a class without post-norms exists.

    export.json records the form, what was padded, the bytes and the verification. Raise ValueError if the form cannot
    hold the student; RuntimeError if the folder, loaded in a process of its own, gives other logits.
    """
    shutil.rmtree(out, ignore_errors=True)
    folder = inputs.get("recovered", inputs["initial_student"])
    source = open_checkpoint(folder)
    stream, names, student_config, folds = _folded(source)
    student = anatomy_of(student_config, names)
    form: str = config.export.form
    if form == "auto":
        form = "own" if "pruned" in student_config else "stock"
    written, wide = FORMS[form](student_config | {"dtype": config.export.dtype}, student)
    dtype, tensors = getattr(torch, config.export.dtype), pad(student, wide, stream)
    if source.wrapper_parts is not None:
        _check_stock(form)
        written = wrapped_config(source.wrapper_parts.config, written, student.sizes.hidden)
        tensors = source.wrapper_parts.stored(tensors)
    write_checkpoint(out, written, _cast(tensors, dtype), config.checkpoint.shard_bytes, folder)
    _write_generation(_generation(config), inputs, out)
    for path in license_files(_source(config)):
        shutil.copyfile(path, out / path.name)
    _add_code(form, written, out)
    auto = source.wrapper_parts.wrapper.architecture if source.wrapper_parts else "AutoModelForCausalLM"
    proof = prove(folder, out, dtype, config.export.tolerance, form, auto)
    padded = export_forms.padding(student, wide)
    exported = Exported(
        proof["class"], proof.get("generated"), proof["difference"], form, folds, padded, open_checkpoint(out).bytes()
    )
    exported.save(out)
    cost = f", {_cost(padded)}" if padded else ""
    machine.say(
        f"export: {exported.architecture} ({form}{cost}), loaded in a fresh process: logits differ by "
        f"{exported.difference:.1e}"
    )


def _check_stock(form: str) -> None:
    """Raise ValueError for a form whose code computes a text model alone."""
    if form not in ("stock", "padded"):
        raise ValueError(
            f"export.form is {form}, and an image-text model is written for its stock class, whose layers have one "
            "width and norms of their own; set export.form=padded, or plan.widths=uniform and reinit.absorb=false"
        )


def _generation(config: Config) -> dict[str, Any] | None:
    """Return the generation_config.json of the external student or of the model, as it is now; None without one.

    It changes no weight, so it is no part of what names the teacher.
    """
    for path in filter(None, (config.model.start, config.model.path)):
        folder = model_folder(path, config.model.allow_pickle)
        fields = generation_of(folder) if folder else None
        if fields is not None:
            return fields
    return None


def _write_generation(fields: dict[str, Any] | None, inputs: Inputs, out: Path) -> None:
    """Replace the generation_config.json that was carried through the stages by the present one, if there is one.

    Its ids are those of the student's tokens, where these are fewer.
    """
    if fields is not None and "vocabulary" in inputs:
        fields = Vocabulary.load(inputs["vocabulary"]).renumbering.fields(fields)
    if fields is not None:
        (out / GENERATION).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in the type of the export. Raise ValueError for one that it cannot hold."""
    for name, tensor in tensors:
        cast = tensor.to(dtype)
        if not cast.isfinite().all() and tensor.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"export.dtype: {name} has values up to {float(tensor.abs().max()):.3g}, which {kind} cannot hold; set "
                "export.dtype=bfloat16"
            )
        yield name, cast


def _folded(source: Checkpoint) -> tuple[Stream, list[str], dict[str, Any], bool]:
    """Return the student's tensors, their names, its config, and whether static scales were folded.

    They are folded where a class without post-norms exists.
    """
    anatomy, config = source.anatomy, source.config
    if not config.get("pruned", {}).get("scales") or anatomy.family.folded is None:
        return iter(source.items()), list(source), dict(config), False
    gone = post_norm_modules(anatomy)
    names = [name for name in source if name.removesuffix(".weight") not in gone]
    return fold_scales(anatomy, source), names, folded_config(config, anatomy), True


def _cost(padded: dict[str, Any]) -> str:
    (small, large), (few, many) = padded["parameters"], padded["kv_values_per_token"]
    return f"zeros in {len(padded['layers'])} layers: {large / small - 1:+.1%} parameters, {many / few - 1:+.1%} KV"


def _add_code(form: str, config: dict[str, Any], out: Path) -> None:
    """Write into the folder the code that its form needs: modelling code for `own`, configuration code for `decilm`."""
    if form == "own":
        text = Path(modelling.__file__).read_text(encoding="utf-8")
        base = family_of(config["model_type"]).architecture  # of the table, never a name from the checkpoint
        text += "\n\n"
        own_type = stored_config(config)["model_type"]
        if own_type != config["model_type"]:
            text += f'{export_forms.OWN_CONFIG} = pruned_config("{base}", "{own_type}")\n'
            text += f'{export_forms.OWN_CLASS} = pruned_class("{base}", {export_forms.OWN_CONFIG})\n'
        else:
            text += f'{export_forms.OWN_CLASS} = pruned_class("{base}")\n'
        (out / export_forms.OWN_FILE).write_text(text, encoding="utf-8")
    if form == "decilm":
        shutil.copyfile(configuration_decilm.__file__, out / decilm.CONFIGURATION_FILE)


def prove(
    source: Path, folder: Path, dtype: torch.dtype, tolerance: float, form: str, auto: str = "AutoModelForCausalLM"
) -> dict:
    """Load `folder` in a fresh process that has transformers and not this project; compare logits with `source`'s.

    `auto` is the class of transformers that loads a stock folder. The stock classes and our modelling file load as
    anyone loads them; the DeciLM form is read by `decilm_reader`.
    Return class, generated tokens, and the largest logit difference relative to the largest logit. Raise RuntimeError
    above `tolerance` or if the process fails.
    """
    model = load_model(source, dtype, "eager")
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (PROBE,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].float()
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "logits.pt"
        kind = str(dtype).removeprefix("torch.")
        arguments = [str(folder.resolve()), kind, json.dumps(ids), str(saved), "code" if form == "own" else "", auto]
        program = Path(decilm_reader.__file__).read_text(encoding="utf-8") if form == "decilm" else RELOAD
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, *arguments],
            env=quiet_environment(scratch),
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"export: {folder} ({form}) does not load in a fresh process:\n{done.stderr[-2000:]}")
        actual = torch.load(saved, weights_only=True)
    difference = float((actual - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise RuntimeError(
            f"export: reloaded logits differ by {difference:.3g} of the largest; export.tolerance is {tolerance}"
        )
    return json.loads(done.stdout.splitlines()[-1]) | {"difference": difference}


STAGE = Stage(
    name="export",
    makes="student",
    run=run,
    settings=settings,
    needs=("initial_student",),
    optional=("recovered", "onpolicy_student", "vocabulary"),
    check=check,
    all_ranks=False,
    shows={"student": ""},
    delivers=True,
)
