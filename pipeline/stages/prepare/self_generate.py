"""generate: text that the teacher writes, to calibrate on and to recover from."""

import json
from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.data.encoding import frame
from pipeline.evaluation.writing import sample, user_turn, word_starts, written
from pipeline.runtime.artifacts import write_atomically
from pipeline.runtime.checkpoint import load_model, load_tokenizer
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.stages.stage import Inputs, Stage

FILE = "generated.jsonl"


def settings(config: Config) -> dict:
    """Return how much is written and how it begins, and the seed."""
    return config.self_generate.model_dump() | {"text_field": config.data.text_field, "seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write generated.jsonl, a record a text; ranks take batches in turn, and a batch depends on its number alone."""
    options, ranks, device = config.self_generate, machine.ranks, machine.device
    tokenizer = load_tokenizer(inputs["teacher"], config.model.trust_remote_code)
    model = load_model(inputs["teacher"], device.compute_dtype, device.attention)
    total = -(-options.tokens // (options.batch_size * options.length))
    files = [out / f"batch-{number:05d}.jsonl" for number in range(total)]
    chats = round(options.chat * total) if user_turn(tokenizer) else 0
    mine = [number for number in range(ranks.rank, total, ranks.world) if not files[number].exists()]
    with placed(model, device, config.device.layer_streaming):
        for number in machine.progress(mine, len(mine), "generate"):
            draw = torch.Generator(device.torch).manual_seed(config.seed * total + number)
            chat = (number + 1) * chats // total > number * chats // total  # spread evenly
            starts = _starts(tokenizer, options.batch_size, chat, draw).to(device.torch)
            ids = sample(model, starts, options.length, options.temperature, draw)
            if not chat:
                ids = torch.cat([starts[:, -1:], ids], 1)  # the drawn word is part of the text
            texts = [written(row, tokenizer) for row in ids.tolist()]
            records = [json.dumps({config.data.text_field: text}, ensure_ascii=False) + "\n" for text in texts if text]
            write_atomically(files[number], "".join(records))
    ranks.wait("generate")
    if ranks.rank == 0:
        with open(out / FILE, "w", encoding="utf-8") as whole:
            for file in files:
                whole.write(file.read_text(encoding="utf-8"))
                file.unlink()
        summary = f"{total * options.batch_size} texts of {options.length} tokens, {chats} of {total} batches as chats"
        machine.say(f"generate: {summary}")


def _starts(tokenizer, batch: int, chat: bool, draw: torch.Generator) -> torch.Tensor:
    """Return ids [batch, s] to continue from."""
    if chat:
        return torch.tensor([user_turn(tokenizer)] * batch)
    around, words = frame(tokenizer), torch.tensor(word_starts(tokenizer))
    picks = words[torch.randint(len(words), (batch, 1), generator=draw, device=draw.device).cpu()]
    first = around.after if around.first is None else around.first
    return torch.cat([torch.full_like(picks, first), picks], 1)


STAGE = Stage(
    name="self_generate",
    makes="generated",
    run=run,
    settings=settings,
    needs=("teacher",),
    resumable=True,  # every batch is written down as soon as it is there
    shows={"generated.jsonl": "generated.jsonl"},
    delivers=True,
)
