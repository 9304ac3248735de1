"""self_generate: text that the teacher writes, for calibration and recovery."""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config
from pipeline.data.encoding import frame
from pipeline.data.written_chats import ChatMarks, before_user, chat_marks
from pipeline.evaluation.writing import TurnIds, sample, sample_chats, special_ids, word_starts, written
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model, load_tokenizer
from pipeline.runtime.records import load_record, read_record, save_record
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.texts import check_positions_of_source

FILE = "generated.jsonl"
PLACE = "self_generate.form"  # the setting that errors of the chat template name


def check(config: Config) -> None:
    """Refuse texts that are longer than the model's positions, before any work."""
    check_positions_of_source(config, "self_generate.length", config.self_generate.length)


def settings(config: Config) -> dict:
    """Return how much is written and how it begins, and the seed."""
    return config.self_generate.model_dump() | {"text_field": config.data.text_field, "seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write generated.jsonl, one record per text. Ranks take batches in turn; a batch depends on its number alone."""
    options, ranks, device = config.self_generate, machine.ranks, machine.device
    tokenizer = load_tokenizer(inputs["teacher"], config.model.trust_remote_code)
    total = -(-options.tokens // (options.batch_size * options.length))
    files = [out / f"batch-{number:05d}.json" for number in range(total)]
    marks = chat_marks(tokenizer, PLACE) if options.form == "messages" else None
    turn = before_user(tokenizer, PLACE) if marks or options.chat else []
    if marks and not turn:
        raise ValueError(f"{PLACE}: the teacher's chat template writes nothing before a user's words")
    separate = _turn_ids(tokenizer, marks) if marks else None
    chats = round((1.0 if marks else options.chat) * total) if turn else 0
    model = load_model(inputs["teacher"], device.compute_dtype, device.attention)
    own = [number for number in range(ranks.rank, total, ranks.world) if not load_record(files[number], {})]
    with placed(model, device, config.device.layer_streaming):
        for number in machine.progress(own, len(own), "self_generate"):
            draw = torch.Generator(device.torch).manual_seed(config.seed * total + number)
            chat = (number + 1) * chats // total > number * chats // total  # spread evenly
            starts = _starts(tokenizer, options.batch_size, turn if chat else [], draw).to(device.torch)
            how = (options.length, options.temperature, draw)
            if separate:
                rows = sample_chats(model, starts, separate, *how)
            else:
                rows = sample(model, starts, *how).tolist()
            if not chat:  # the drawn word is part of the text
                rows = [[*start[-1:], *row] for start, row in zip(starts.tolist(), rows, strict=True)]
            texts = [marks.turns(tokenizer.decode(row)) if marks else written(row, tokenizer) for row in rows]
            save_record(files[number], {"texts": [text for text in texts if text]})
    ranks.wait("self_generate")
    if ranks.rank == 0:
        drawn, found = total * options.batch_size, _joined(files, config.data.text_field, out / FILE)
        if not found:
            raise ValueError(
                f"self_generate.length: none of {drawn} texts ends within {options.length} tokens; set it higher"
            )
        kinds = f"{found} of them chats that end" if marks else f"{chats} of {total} batches as chats"
        machine.say(f"self_generate: {drawn} texts of up to {options.length} tokens, {kinds}")


def _turn_ids(tokenizer: Any, marks: ChatMarks) -> TurnIds | None:
    """Return the ids that separate the turns; None where turns do not end in special tokens."""
    between, after = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (marks.between, marks.after)
    )
    turns = TurnIds(between, after, special_ids(tokenizer))
    return turns if turns.marked else None


def _starts(tokenizer: Any, batch: int, turn: list[int], draw: torch.Generator) -> torch.Tensor:
    """Return ids [batch, s] to continue from: `turn`, or a drawn word where it is empty."""
    if turn:
        return torch.tensor([turn] * batch)
    around, words = frame(tokenizer), torch.tensor(word_starts(tokenizer))
    picks = words[torch.randint(len(words), (batch, 1), generator=draw, device=draw.device).cpu()]
    first = around.after if around.first is None else around.first
    return torch.cat([torch.full_like(picks, first), picks], 1)


def _joined(files: list[Path], field: str, place: Path) -> int:
    """Write the texts of all batches to one file, remove the batches, and return the number of texts."""
    found = 0
    with open(place, "w", encoding="utf-8") as whole:
        for file in files:
            texts = read_record(file)["value"]["texts"]
            found += len(texts)
            whole.writelines(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts)
            file.unlink()
    return found


STAGE = Stage(
    name="self_generate",
    makes="generated",
    run=run,
    settings=settings,
    needs=("teacher",),
    check=check,
    revision=2,  # 2: the template's part between the turns of a chat is copied, and a chat ends with its answer
    resumable=True,  # every batch is written down as soon as it is there
    shows={"generated.jsonl": "generated.jsonl"},
    delivers=True,
)
