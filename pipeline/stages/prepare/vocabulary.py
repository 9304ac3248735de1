"""vocabulary: the teacher with the tokens that its text uses, and the text in the ids of the tokenizer that is left.

The logits of the model that is written are those of the teacher, restricted to the kept tokens; its softmax is the
teacher's distribution, restricted to them and normalised again. So the stages after this one, which read it as teacher
and subject, prune and distill within the kept tokens; no later stage depends on the removed ones.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.templates import template_texts
from pipeline.model.blueprint import everything
from pipeline.model.hf_config import student_config
from pipeline.model.token_ids import Renumbering, Vocabulary, used_ids
from pipeline.prune.surgery.cut import cut
from pipeline.prune.vocabulary.choice import kept_tokens
from pipeline.prune.vocabulary.pieces import pieces_of
from pipeline.prune.vocabulary.tokenizer_file import renumbered_settings, renumbered_tokenizer
from pipeline.runtime.checkpoint import Checkpoint
from pipeline.runtime.checkpoint_writer import GENERATION, PROCESSOR, TEMPLATES, write_checkpoint, write_wrapper_parts
from pipeline.runtime.described import read_mapping
from pipeline.runtime.disk import need_space
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_tokenizer
from pipeline.runtime.model_source import CODE, TOKENIZER_CONFIG, generation_of
from pipeline.runtime.tokenizer_check import PROBE, check_fits
from pipeline.stages import texts
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage

FIELD = "budget.vocabulary"
COUNTED = ("calibration", "recovery")  # texts whose tokens are counted
AS_THEY_ARE = ("special_tokens_map.json", *TEMPLATES, *PROCESSOR, CODE)  # files without ids


def enabled(config: Config) -> bool:
    """Return whether tokens are removed."""
    return config.budget.vocabulary is not None


def settings(config: Config) -> dict[str, Any]:
    """Return the number of tokens that remain, and what determines the texts."""
    return {"vocabulary": config.budget.vocabulary} | texts.settings(config)


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write a model folder with the kept tokens, vocabulary.json that lists them, and the texts in its ids.

    The texts are those of the stage `tokens`, tokenised again. Raise ValueError where more tokens always remain than
    are requested, the tokenizer is of an unknown kind, or a text would not decode as before.
    """
    shutil.rmtree(out, ignore_errors=True)
    source = checkpoint(config, inputs["teacher"])
    need_space(out, source.bytes())
    tokenizer = load_tokenizer(source.folder, config.model.trust_remote_code)
    document = _document(tokenizer)
    rows = source.anatomy.sizes.vocabulary
    counts = _counts(inputs["tokens"], rows)
    always = _always(source, tokenizer, document)
    try:
        pieces = pieces_of(document)
    except ValueError as fault:
        raise ValueError(f"{FIELD}: {fault}; set {FIELD}=null") from None
    chosen = kept_tokens(pieces, counts.tolist(), always, int(config.budget.vocabulary or rows))
    blueprint = replace(everything(source.anatomy.sizes), vocabulary=chosen)
    written = student_config(source.config, source.anatomy, blueprint)
    stream = machine.progress(cut(source.anatomy, blueprint, source), len(source), "vocabulary")
    write_checkpoint(out, written, stream, config.checkpoint.shard_bytes)
    kept = counts[list(chosen)]
    found = Vocabulary(chosen, rows, int((counts > 0).sum()), int((kept > 0).sum()), float(kept.sum() / counts.sum()))
    found.save(out)
    _write_tokenizer(source.folder, renumbered_tokenizer(document, found.renumbering), found.renumbering, out)
    parts = source.wrapper_parts
    if parts is not None:  # image tokens
        renumbered = parts.renumbered(found.renumbering)
        write_wrapper_parts(out, renumbered, parts.tensors.items(), config.checkpoint.shard_bytes)
    _check(tokenizer, load_tokenizer(out, config.model.trust_remote_code), len(chosen))
    machine.say(
        f"vocabulary: {len(chosen)} of {rows} tokens remain, {found.used_kept} of the {found.used} in the text; "
        f"{found.share:.2%} of the text is in them"
    )
    texts.write_texts(config, out, out, machine)


def _document(tokenizer: Any) -> dict[str, Any]:
    """Return the tokenizer.json of a tokenizer; ValueError for one of Python code alone."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"{FIELD}: {type(tokenizer).__name__} has no tokenizer.json; set {FIELD}=null")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _counts(tokens: Path, rows: int) -> Tensor:
    """Return how often each of `rows` tokens occurs in the calibration and recovery text, [rows]."""
    counts = torch.zeros(rows, dtype=torch.int64)
    for purpose in COUNTED:
        for stretch in Packed(tokens / purpose).stretches():
            counts += torch.bincount(torch.from_numpy(stretch.astype("int64")), minlength=rows)
    return counts


def _always(source: Checkpoint, tokenizer: Any, document: dict[str, Any]) -> set[int]:
    """Return the ids that remain whatever the text: added and special tokens, those of configs and chat templates."""
    added = {token["id"] for token in document["added_tokens"]} | set(tokenizer.all_special_ids)
    whole = {} if source.wrapper_parts is None else source.wrapper_parts.config
    named = used_ids(source.config) | used_ids(whole) | used_ids(generation_of(source.folder) or {})
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in template_texts(tokenizer))
    return added | named | {number for ids in encoded for number in ids}


def _write_tokenizer(source: Path, document: dict[str, Any], new: Renumbering, out: Path) -> None:
    """Write the tokenizer's and the generation's files; older forms of the tokenizer, with all tokens, are left out."""
    _write_json(out / "tokenizer.json", document)
    if (source / TOKENIZER_CONFIG).is_file():
        _write_json(out / TOKENIZER_CONFIG, renumbered_settings(read_mapping(source / TOKENIZER_CONFIG), new))
    for path in _files(source):
        copy = out / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    generation = generation_of(source)
    if generation is not None:
        _write_json(out / GENERATION, new.fields(generation))


def _files(source: Path) -> Iterator[Path]:
    for pattern in AS_THEY_ARE:
        yield from (path for path in source.glob(pattern) if path.is_file())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(before: Any, after: Any, rows: int) -> None:
    """Raise ValueError where the new tokenizer does not fit the model, or a text decodes otherwise than before."""
    check_fits(after, rows)
    decoded = [each.decode(each(PROBE, add_special_tokens=False)["input_ids"]) for each in (before, after)]
    if decoded[0] != decoded[1]:
        place = next((i for i, pair in enumerate(zip(*decoded)) if pair[0] != pair[1]), min(map(len, decoded)))
        raise ValueError(
            f"{FIELD}: with {rows} tokens the tokenizer does not give back {decoded[0][place : place + 20]!r}; raise it"
        )


STAGE = Stage(
    name="vocabulary",
    makes="vocabulary",
    run=run,
    settings=settings,
    needs=("teacher", "tokens"),
    becomes=("teacher", "subject", "tokens"),
    enabled=enabled,
    all_ranks=False,
)
