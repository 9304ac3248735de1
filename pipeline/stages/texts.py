"""The configured texts, tokenised by a model's tokenizer and packed, evaluation kept apart."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data import sources, split
from pipeline.data.builtin import version
from pipeline.data.encoding import Encoder, batches, blocks, frame
from pipeline.data.overlap import EvaluationRuns, run_length
from pipeline.data.packing import Domain, Packed, TooShort, build
from pipeline.runtime.checkpoint import read_config
from pipeline.runtime.hashing import fingerprint
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_class import most_positions
from pipeline.runtime.model_loader import load_tokenizer
from pipeline.runtime.model_source import model_folder

PURPOSES = ("calibration", "recovery", "evaluation")
MOST = 0.9  # of a text that may be left out because evaluation text shares it; see `write_texts`
SMALL = 1 << 20  # bytes of files that are read through before any work
SHARD_BYTES = 1 << 26  # a shard is also what packing holds in memory


def check_texts(config: Config, load: Callable[[], Any]) -> None:
    """Refuse texts by heads and small files; `load` returns the tokenizer that chats need, or None."""
    field, tokenizer = config.data.text_field, None
    for purpose, parts in _parts(config).items():
        for part in parts:
            with _named(purpose):
                if sources.check(part.corpus, field):
                    tokenizer = load() if tokenizer is None else tokenizer
                    if tokenizer is None:
                        continue
                    next(sources.read(part.corpus, field, tokenizer, config.data.answers), None)
                _check_length(part, field, config.data.sequence_length, tokenizer)


def _check_length(part: split.Part, field: str, sequence: int, tokenizer: Any) -> None:
    """Refuse a small file that has not `sequence` tokens however it is tokenised: one per byte, two around a piece."""
    files = part.corpus.files
    if files and sum(path.stat().st_size for path in files) < SMALL:
        most = sum(len(piece.text.encode()) + 2 for piece in split.passages(part, field, tokenizer))
        if most < sequence:
            fault = f"{part} has at most {most} tokens, fewer than one sequence of {sequence}"
            raise ValueError(f"{fault}; give a longer text, a larger share, or a smaller data.sequence_length")


def check_positions(field: str, count: int, folder: Path) -> None:
    """Refuse a number of positions beyond those of the model of a folder."""
    longest = most_positions(read_config(folder), folder)
    if longest is not None and count > longest:
        raise ValueError(f"{field} is {count}, more than the model's {longest} positions; lower it")


def check_positions_of_source(config: Config, field: str, count: int) -> None:
    """Refuse a number of positions beyond those of the model that is to be made smaller, where that is a folder."""
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder is not None:
        check_positions(field, count, folder)


def settings(config: Config) -> dict[str, Any]:
    """Return what determines the tokens beside the model: the texts' contents, their parts, the length of a row."""
    data = config.data
    return {
        "sequence": data.sequence_length,
        "text_field": data.text_field,
        "loss_on": data.loss_on,
        "weights": {"calibration": data.calibration.weights, "recovery": data.recovery.weights},
        "parts": {purpose: [_record(part) for part in parts] for purpose, parts in _parts(config).items()},
    }


def write_texts(config: Config, folder: Path, out: Path, machine: Machine) -> None:
    """Write calibration/, recovery/, evaluation/<nn-name>/ and tokens.json, in the ids of the model of a folder.

    Pieces of calibration and recovery text that share a run of tokens with evaluation text are left out; `left_out`
    of tokens.json counts them, and the evaluated tokens that they had. Where that is over MOST of a purpose's text, the
    texts are alike by their nature, and only copies are left out.
    """
    data, model = config.data, read_config(folder)
    check_positions("data.sequence_length", data.sequence_length, folder)
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    check_texts(config, lambda: tokenizer)
    around, parts = frame(tokenizer), _parts(config)
    row, vocabulary, progress = data.sequence_length, model["vocab_size"], machine.progress
    for line in _splits(parts):
        machine.say(line)

    def passages(part: split.Part, answers: bool = False) -> Iterator[sources.Piece]:
        return split.passages(part, data.text_field, tokenizer, answers)

    def pack(purpose: str, name: str, several, weights, **overlap: Any) -> dict:
        marks = data.answers and purpose != "calibration"
        pieces = (passages(part, marks) for part in several)
        domains = [Domain(*each) for each in zip(map(str, several), pieces, weights)]
        overlap |= {"marks": marks}
        shutil.rmtree(out / name, ignore_errors=True)  # of an interrupted attempt
        with _named(purpose):
            try:
                index = build(out / name, domains, tokenizer, around, row, vocabulary, SHARD_BYTES, progress, **overlap)
            except TooShort as fault:
                if fault.left_out and not overlap.get("copies", True):
                    return {}
                raise
        return {key: index[key] for key in ("sequences", "tokens", "domains")}

    with _named("evaluation"):
        runs = EvaluationRuns(_run_length(tokenizer, passages(parts["evaluation"][0])))
    record: dict[str, Any] = {
        "sequence": data.sequence_length,
        "after": around.after,
        "first": around.first,
        "evaluation": {},
    }
    for name, part in zip(_names(parts["evaluation"]), parts["evaluation"]):
        record["evaluation"][name] = pack("evaluation", f"evaluation/{name}", [part], [None], notes=runs)
    for purpose in ("calibration", "recovery"):
        runs.forget()
        for part in parts[purpose]:
            encoder = Encoder(tokenizer, around, vocabulary, avoids=runs)
            with _named(purpose):
                encoder.count(progress(batches(blocks(passages(part))), None, f"overlap {part}"))
        weights = getattr(data, purpose).weights or [None] * len(parts[purpose])
        packed = pack(purpose, purpose, parts[purpose], weights, avoids=runs, copies=False)
        copies = _share_left_out(packed) > MOST
        if copies:
            machine.say(
                f"data: {purpose} text is like evaluation text: over {MOST:.0%} of it shares runs of {runs.length} "
                "tokens. Copies alone are left out; what is measured says little about unlike text"
            )
            packed = pack(purpose, purpose, parts[purpose], weights, avoids=runs, copies=True)
        record[purpose] = packed | {"left_out": "copies" if copies else "shared runs"}
    if data.answers:
        record["answers"] = _answers(record, machine)
    record["left_out"] = _left_out(record, runs, out, machine)
    record["parts"] = {
        purpose: [_record(part) | {"path": part.corpus.given} for part in several] for purpose, several in parts.items()
    }
    (out / "tokens.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


@contextmanager
def _named(purpose: str) -> Iterator[None]:
    """Raise ValueError of the texts of a purpose with the name of its setting."""
    try:
        yield
    except ValueError as fault:
        raise ValueError(f"data.{purpose}.path: {fault}") from fault


def _answers(record: dict, machine: Machine) -> dict[str, int]:
    """Return, and report, the tokens of recovery text that are an assistant's; ValueError where there are none."""
    domains = record["recovery"]["domains"]
    tokens, edge = (sum(domain[f"{kind}_tokens"] for domain in domains) for kind in ("answer", "edge"))
    if not tokens:
        raise ValueError(
            "data.loss_on: assistant, but no token of data.recovery.path is an assistant's; give chats, or set "
            "data.loss_on=all"
        )
    share = tokens / sum(domain["tokens"] for domain in domains)
    reached = f"; {edge} reach out of an answer and are not counted" if edge else ""
    machine.say(f"data: {tokens} tokens of recovery are an assistant's ({share:.1%}){reached}")
    return {"tokens": tokens, "edge_tokens": edge}


def _share_left_out(packed: dict) -> float:
    """Return the share of a purpose's tokens that was left out; 1 where no sequence remains of one of its texts."""
    if not packed:
        return 1.0
    left_out = sum(domain["left_out_tokens"] for domain in packed["domains"])
    return left_out / (left_out + sum(domain["tokens"] for domain in packed["domains"]))


def _run_length(tokenizer: Any, pieces: Iterator[sources.Piece]) -> int:
    """Return the tokens of a run that counts as shared, by the beginning of a text."""
    text = "".join(block.text for block in next(batches(blocks(pieces)), []))
    return run_length(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), len(text.encode()))


def _left_out(record: dict, runs: EvaluationRuns, out: Path, machine: Machine) -> dict:
    """Return, and report, what was left out of calibration and recovery, and how much of evaluation it had."""
    counts: dict[str, Any] = {"run": runs.length}
    for purpose in ("calibration", "recovery"):
        domains = record[purpose]["domains"]
        pieces, tokens = (sum(each[f"left_out_{kind}"] for each in domains) for kind in ("pieces", "tokens"))
        counts[purpose] = {"pieces": pieces, "tokens": tokens}
        if pieces:
            share = _share_left_out(record[purpose])
            reason = f"they share runs of {runs.length} tokens with evaluation text"
            machine.say(f"data: {pieces} pieces of {purpose} left out, {tokens} tokens ({share:.1%}): {reason}")
    counts["evaluation"] = {}
    for name in record["evaluation"]:
        shared, tokens = runs.met(Packed(out / "evaluation" / name).stretches())
        counts["evaluation"][name] = {"shared_tokens": shared, "tokens": tokens}
        if shared:
            machine.say(f"data: {shared / tokens:.1%} of the tokens of evaluation/{name} stood in what was left out")
    return counts


def _parts(config: Config) -> dict[str, tuple[split.Part, ...]]:
    corpora: dict[str, Sequence[sources.Corpus]] = {}
    for purpose in PURPOSES:
        with _named(purpose):
            corpora[purpose] = [sources.locate(path) for path in getattr(config.data, purpose).paths]
    return split.assign(corpora, config.data.split.evaluation, config.data.split.calibration)


def _names(parts: tuple[split.Part, ...]) -> list[str]:
    """Return a folder name for each part, nn-name; the names alone differ too."""
    names: list[str] = []
    for part in parts:
        alike = sum(part.corpus.name == other.corpus.name for other in parts[: len(names)])
        names.append(f"{len(names):02}-{part.corpus.name}" + (f"-{alike + 1}" if alike else ""))
    return names


def _record(part: split.Part) -> dict:
    """Return what a part is, wherever it is stored and whenever it was copied there; of a hub data set its id."""
    corpus = part.corpus
    files = [fingerprint(path) for path in corpus.files]
    content = files or (version(corpus.key) if corpus.kind == "builtin" else corpus.key)
    return {"name": corpus.name, "kind": corpus.kind, "start": part.start, "stop": part.stop, "content": content}


def _splits(parts: dict[str, tuple[split.Part, ...]]) -> list[str]:
    """Return a line for each text that is split."""
    shares: dict[sources.Corpus, list[str]] = {}
    for purpose in ("evaluation", "calibration", "recovery"):
        for part in parts[purpose]:
            if not part.whole:
                shares.setdefault(part.corpus, []).append(f"{purpose} {part.start:.0%} to {part.stop:.0%}")
    return [f"data: {corpus.given} is split, contiguously: {', '.join(each)}" for corpus, each in shares.items()]
