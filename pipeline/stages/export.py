"""export: the student as an ordinary Hugging Face folder, proven by reloading it in a fresh process."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.model.settings import folded_config
from pipeline.prune.reinit import fold_scales
from pipeline.runtime import modelling
from pipeline.runtime.checkpoint import load_model, open_checkpoint, write_checkpoint

MAKES = "export"
NEEDS = ("start",)
OPTIONAL = ("student",)
EVERY_RANK = False
CODE = "modeling_pruned.py"
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


def settings(config: Config) -> dict:
    """Give the export section."""
    return config.export.model_dump()


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write the final folder, static scales folded where a class without post-norms exists, and export.json.

    RuntimeError if the folder, reloaded by stock transformers in a process of its own, gives other logits.
    """
    shutil.rmtree(out, ignore_errors=True)
    origin = inputs.get("student", inputs["start"])
    source = open_checkpoint(origin)
    anatomy, kind = source.anatomy, source.config
    scales = bool(kind.get("pruned", {}).get("scales"))
    folds = scales and anatomy.family.folded is not None
    dtype = getattr(torch, config.export.dtype)
    tensors = fold_scales(anatomy, source) if folds else _all(source)
    kind = (folded_config(kind, anatomy) if folds else dict(kind)) | {"dtype": config.export.dtype}
    own = "pruned" in kind
    if own:
        name = "PrunedForCausalLM"
        kind |= {"architectures": [name], "auto_map": {"AutoModelForCausalLM": f"{CODE[:-3]}.{name}"}}
    cast = ((name, tensor.to(dtype)) for name, tensor in tensors)
    write_checkpoint(out, kind, cast, config.export.shard_bytes, origin)
    if own:
        text = Path(modelling.__file__).read_text()
        (out / CODE).write_text(f'{text}\n\nPrunedForCausalLM = pruned_class("{kind["pruned"]["base"]}")\n')
    told = prove(origin, out, dtype, config.export.tolerance, own)
    form = "own modelling code" if own else "stock class"
    (out / "export.json").write_text(json.dumps(told | {"form": form, "folded": folds}, indent=1))
    machine.say(
        f"export: {told['class']} ({form}), reloaded in a fresh process: logits differ by {told['difference']:.1e}"
    )


def _all(source: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from source.items()


def prove(origin: Path, folder: Path, dtype: torch.dtype, tolerance: float, own: bool) -> dict:
    """Reload `folder` in a fresh process that has transformers and not this project; compare logits with `origin`'s.

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
        arguments = [str(folder.resolve()), kind, json.dumps(ids), str(saved), "code" if own else ""]
        done = subprocess.run(
            [sys.executable, "-I", "-c", RELOAD, *arguments],
            env=_quiet_environment(scratch),
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"export: {folder} does not reload with stock transformers:\n{done.stderr[-2000:]}")
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
