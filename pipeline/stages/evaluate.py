"""evaluate: teacher, start and student measured on held-out text; teacher and student timed, and asked to go on."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.evaluation import tasks
from pipeline.evaluation.perplexity import quality, tally
from pipeline.evaluation.samples import cache_bytes_per_token, continue_greedily, opening
from pipeline.evaluation.speed import speeds
from pipeline.evaluation.words import Question, questions, right
from pipeline.model.anatomy import Sizes
from pipeline.runtime.artifacts import fingerprint
from pipeline.runtime.checkpoint import load_model, load_tokenizer, open_checkpoint

MAKES = "evaluation"
NEEDS = ("teacher", "start", "export", "tokens")
EVERY_RANK = True
FREE = {"batch", "chunk"}  # change speed and memory, not the numbers
COMPARED = ("teacher", "student")  # timed, given tasks and asked for continuations; `start` is only measured


def check(config: Config) -> None:
    """Refuse tasks that cannot be run here, before any work."""
    tasks.check(config.evaluate.tasks)


def settings(config: Config) -> dict:
    """Give what determines the numbers: how much is measured, and on which kind of device."""
    samples = config.report.model_dump(include={"samples", "sample_prompt", "sample_tokens"})
    device = config.device.model_dump(include={"kind", "attention"})
    files = {task: fingerprint(Path(task)) for task in config.evaluate.tasks if tasks.is_file(task)}
    asked = config.evaluate.model_dump(exclude=FREE)
    return {"evaluate": asked, "task_files": files, "samples": samples, "device": device}


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write evaluation.json: sizes, quality per text, next-word accuracy, tasks, continuations and speed."""
    asked = config.evaluate
    first = machine.ranks.rank == 0
    tokenizer = load_tokenizer(inputs["teacher"])
    folders = {"teacher": inputs["teacher"], "start": inputs["start"], "student": inputs["export"]}
    texts = {folder.name[3:]: Packed(folder) for folder in sorted((inputs["tokens"] / "evaluation").iterdir())}
    asked_words = {name: _questions(packed, tokenizer, asked) for name, packed in texts.items()}
    found = {
        "device": _device(machine),
        "models": {who: _sizes(folders[who], config.model.allow_pickle) for who in COMPARED},
        "texts": {name: _facts(packed, asked, tokenizer, machine) for name, packed in texts.items()},
        "tasks": {},
        "speed": None,
        "samples": _prompts(texts, tokenizer, config.report),
    }
    held: dict[str, torch.nn.Module] = {}
    for who, folder in folders.items():
        model = _load(config, folder, machine)
        for name, packed in texts.items():
            total, words = _measure(model, packed, asked_words[name], asked, machine, f"{who} on {name}")
            numbers = asdict(quality(total, found["texts"][name]["bytes"]))
            if words[1]:
                numbers["next_word"] = float(words[0] / words[1])
            found["texts"][name][who] = numbers
            machine.say(f"{who} on {name}: perplexity {numbers['perplexity']:.3f}")
            machine.track.log({f"{who}/{name}/{key}": value for key, value in numbers.items()}, None, "evaluate")
        if first and who in COMPARED:
            found["models"][who]["kv_bytes_per_token"] = cache_bytes_per_token(model, _prompt(texts, 8))
            found["tasks"][who] = tasks.measure(model, tokenizer, asked.tasks, asked.batch) if asked.tasks else {}
            _continue(found["samples"], who, model, tokenizer, config.report)
            held[who] = model.to("cpu")
        del model
    if first:
        if asked.speed:
            found["speed"] = _speed(held, _prompt(texts, asked.speed_prefill), asked, machine)
        (out / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")


def _load(config: Config, folder: Path, machine) -> torch.nn.Module:
    device = machine.device
    model = load_model(folder, device.compute_dtype, device.attention, config.model.trust_remote_code)
    return model.to(device.torch)


def _measure(model, packed: Packed, asked_words: list[Question], asked, machine, label: str) -> tuple[Tensor, Tensor]:
    """Give the tally [3] and the word count [2] of all ranks together."""
    ranks = machine.ranks
    rows = range(ranks.rank, _rows(packed, asked.tokens), ranks.world)
    batches = machine.progress(_batches(packed, rows, asked.batch), -(-len(rows) // asked.batch), label)
    total = tally(model, batches, asked.chunk)
    words = right(model, asked_words[ranks.rank :: ranks.world], asked.batch)
    ranks.sum_([total, words])
    return total, words


def _rows(packed: Packed, tokens: int) -> int:
    return min(len(packed), max(1, tokens // packed.sequence))


def _batches(packed: Packed, rows: range, batch: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), batch):
        yield torch.stack([_row(packed, row) for row in rows[start : start + batch]])


def _row(packed: Packed, row: int) -> Tensor:
    return torch.from_numpy(packed[row].astype("int64"))


def _prompt(texts: dict[str, Packed], tokens: int) -> Tensor:
    """Give [1, tokens] ids from the beginning of the first text, repeated where it is shorter."""
    packed = next(iter(texts.values()))
    rows = -(-tokens // packed.sequence)
    ids = torch.cat([_row(packed, row % len(packed)) for row in range(rows)])
    return ids[None, :tokens]


def _documents(packed: Packed, row: int, tokenizer) -> list[str]:
    """Give the texts of a row, split where a document ends."""
    ids, documents = packed[row].tolist(), [[]]
    for token in ids:
        if token == packed.index["after"]:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tokenizer.decode(some, skip_special_tokens=True) for some in documents]


def _facts(packed: Packed, asked, tokenizer, machine) -> dict:
    """Give what stands beside every number of a text: length and stride of sequences, tokens and bytes predicted."""
    ranks, rows = machine.ranks, _rows(packed, asked.tokens)
    read = torch.zeros(1, dtype=torch.float64)
    for row in range(ranks.rank, rows, ranks.world):
        read += len(tokenizer.decode(packed[row][1:].tolist(), skip_special_tokens=True).encode())
    ranks.sum_([read])
    tokens = rows * (packed.sequence - 1)
    counts = {"sequences": rows, "tokens": tokens, "bytes": int(read)}
    return {"sequence": packed.sequence, "stride": packed.sequence, **counts}


def _questions(packed: Packed, tokenizer, asked) -> list[Question]:
    opened = [] if packed.index["first"] is None else [packed.index["first"]]
    rows = range(_rows(packed, asked.tokens))
    documents = (text for row in rows for text in _documents(packed, row, tokenizer))

    def encode(text: str) -> list[int]:
        return opened + tokenizer(text, add_special_tokens=False)["input_ids"]

    return questions(documents, encode, asked.words, asked.words_context)


def _prompts(texts: dict[str, Packed], tokenizer, report) -> list[dict]:
    """Give prompts from the texts in turn, each with the text that really follows it."""
    prompts: list[dict] = []
    for turn in range(report.samples):
        name, packed = list(texts.items())[turn % len(texts)]
        row = (turn // len(texts) + 1) * len(packed) // (report.samples + 1)
        document = max(_documents(packed, row, tokenizer), key=len)
        prompt, follows = opening(document, report.sample_prompt)
        prompts.append({"text": name, "prompt": prompt, "reference": follows})
    return prompts


def _continue(samples: list[dict], who: str, model, tokenizer, report) -> None:
    stop = frozenset({tokenizer.eos_token_id})
    for sample in samples:
        ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        sample[who] = tokenizer.decode(continue_greedily(model, ids, report.sample_tokens, stop))


def _sizes(folder: Path, allow_pickle: bool) -> dict:
    checkpoint = open_checkpoint(folder, allow_pickle)
    parameters, inner = checkpoint.anatomy.parameters()
    return {
        "parameters": parameters,
        "non_embedding_parameters": inner,
        "checkpoint_bytes": checkpoint.bytes(),
        "shape": _shape(checkpoint.anatomy.sizes),
    }


def _shape(sizes: Sizes) -> dict:
    """Give the widths of a model; one number where all its layers agree, else one a layer."""
    shape = {"layers": len(sizes.layers), "hidden": sizes.hidden}
    for axis in ("heads", "groups", "neurons"):
        widths = [getattr(layer, axis) for layer in sizes.layers]
        shape[axis] = widths[0] if len(set(widths)) == 1 else widths
    return shape | {"head_size": sizes.head_size, "vocabulary": sizes.vocabulary}


def _device(machine) -> dict:
    device = machine.device
    facts = {"kind": device.kind, "name": device.name, "dtype": str(device.compute_dtype).removeprefix("torch.")}
    threads = {"threads": torch.get_num_threads()} if device.kind == "cpu" else {}
    return facts | {"attention": device.attention, "ranks": machine.ranks.world} | threads


def _speed(held: dict[str, torch.nn.Module], prompt: Tensor, asked, machine) -> dict:
    device = machine.device
    measured = speeds(held, prompt, asked.speed_decode, asked.speed_repeats, device.torch, device.synchronise)
    how = {"batch": 1, "prefill": asked.speed_prefill, "decode": asked.speed_decode, "repeats": asked.speed_repeats}
    return how | {who: asdict(speed) for who, speed in measured.items()}
