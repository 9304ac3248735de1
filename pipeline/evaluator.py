"""Measuring a model on held-out text and sampling its continuations, for evaluate_reference and evaluate."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import Rows
from pipeline.evaluation import answers, drafting, tasks
from pipeline.evaluation.perplexity import quality, tallies
from pipeline.evaluation.results import Behaviour
from pipeline.evaluation.samples import Prompt, cache_bytes_per_token, continue_greedily, opening
from pipeline.evaluation.words import Question, questions, right
from pipeline.model.marks import Marked
from pipeline.runtime.device import chip_name, choose
from pipeline.runtime.hashing import fingerprint
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.log import bars_on_terminals_only
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.ranks import place

REVISION = 6  # 4: bytes per token; 5: answers before recovery; 6: samples of chats are answers; cache in export.dtype
SAMPLED_ROWS = 8  # rows of a chat text, of which a sample takes one


def settings(config: Config) -> dict[str, Any]:
    """Return what determines the figures of any model: how much is measured, and on which device."""
    samples = config.report.model_dump(include={"samples", "sample_prompt", "sample_tokens"})
    kind = choose(config.device.kind)
    device = {"kind": kind, "chip": chip_name(kind, place()[2]), "attention": config.device.attention}
    names = config.evaluate.task_names
    files = {task: fingerprint(Path(task)) for task in names if tasks.is_file(task)}
    evaluate = config.evaluate.model_dump(include={"tokens", "words", "words_context"})
    evaluate |= {"tasks": names, "templated": config.evaluate.templated, "task_backend": config.evaluate.task_backend}
    evaluate |= {"vllm_args": config.evaluate.vllm_args}
    evaluate |= {"cache": config.export.dtype}
    return {"evaluate": evaluate, "task_files": files, "samples": samples, "device": device}


def tasks_of(config: Config) -> tasks.Tasks:
    """Return the tasks that a configuration asks for."""
    section = config.evaluate
    python = section.vllm_python or sys.executable
    own = (section.templated, section.batch_size, section.task_backend, python, section.vllm_args or {})
    return tasks.Tasks(section.task_names, *own)


class Bench:
    """The held-out text of a run, and which part of it is measured: the same for every model.

    Where the student has another tokenizer than the reference, it has a bench of its own, and `original` is that of the
    reference: the student's rows are as many as hold the same stretch of text, to within half a row, and questions and
    prompts are the reference's.
    """

    def __init__(self, config: Config, tokens: Path, tokenizer: Any, machine: Machine, original: "Bench | None" = None):
        self.config, self.tokenizer, self.machine, self.original = config, tokenizer, machine, original
        self.texts = {folder.name[3:]: Packed(folder) for folder in sorted((tokens / "evaluation").iterdir())}
        self.rows = {name: self._count(name) for name in self.texts}
        self.questions = {name: self._questions(name) for name in self.texts}
        self._reference_answers: dict[str, list[list[int]]] = {}  # by text; of this rank's turns

    def load(self, folder: Path) -> nn.Module:
        """Return the model of a folder, on the host."""
        device = self.machine.device
        return load_model(folder, device.compute_dtype, device.attention)

    def placed(self, folder: Path) -> AbstractContextManager[nn.Module]:
        """Return the model of a folder, placed for forward passes on this device."""
        return placed(self.load(folder), self.machine.device, self.config.device.layer_streaming)

    def facts(self) -> dict[str, dict[str, int]]:
        """Return by text: length and stride of sequences, their number, predicted tokens and bytes."""
        ranks, facts = self.machine.ranks, {}
        for name, packed in self.texts.items():
            rows = self.rows[name]
            read = torch.zeros(1, dtype=torch.float64)
            for row in range(ranks.rank, rows, ranks.world):
                read += self._bytes(packed[row][1:])
            ranks.sum_([read])
            counts = {"sequences": rows, "tokens": rows * (packed.sequence - 1), "bytes": int(read)}
            facts[name] = {"sequence": packed.sequence, "stride": packed.sequence, **counts}
        return facts

    def measure(self, model: nn.Module, who: str, facts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
        """Return loss, perplexity, accuracy, bits per byte and next-word accuracy by text, over all ranks.

        Beside them the `losses` of the sequences in order, the mean of each in nats, and the bytes of a predicted
        token. `facts` are the reference's: loss and perplexity are per token of its tokenizer, also where the model
        has another one; accuracy is of the model's own tokens.
        """
        figures = {}
        read = self.facts() if self.original else facts
        for name in self.texts:
            own, unit = (each[name]["bytes"] / each[name]["tokens"] for each in (read, facts))
            sums, words = self._tally(model, name, f"{who} on {name}")
            numbers = asdict(quality(sums.sum(0), read[name]["bytes"], unit / own)) | {"bytes_per_token": own}
            if words[1]:
                numbers["next_word"] = float(words[0] / words[1])
            figures[name] = numbers | {"losses": (sums[:, 0] / sums[:, 2] * (unit / own)).tolist()}
            self.machine.say(f"{who} on {name}: perplexity {numbers['perplexity']:.3f}")
            self.machine.track.log({f"{who}/{name}/{key}": value for key, value in numbers.items()}, None, "evaluate")
        return figures

    def behaviour(self, model: nn.Module, folder: Path) -> Behaviour:
        """Return bytes of cache per token, metrics of tasks and continuations of `prompts`; one rank measures them.

        The cache is counted in the type of the export. `folder` is the model's.
        """
        continued = []
        for each in self.prompts():
            ids = self.tokenizer(each.content, add_special_tokens=not each.templated, return_tensors="pt")["input_ids"]
            stop = {self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(sorted(each.stops))}
            found = continue_greedily(model, ids, self.config.report.sample_tokens, frozenset(stop))
            continued.append(self.tokenizer.decode(found))
        wanted = tasks_of(self.config)
        if wanted.names:
            self.machine.say(f"tasks with {wanted.backend}: {', '.join(wanted.names)}")
        with bars_on_terminals_only():
            metrics = tasks.measure(wanted, model, self.tokenizer, folder)
        dtype = getattr(torch, self.config.export.dtype)
        return Behaviour(cache_bytes_per_token(model, self.prompt(8), dtype), metrics, tuple(continued))

    def answers(self, reference: nn.Module, student: nn.Module, label: str) -> dict[str, dict[str, Any]]:
        """Return the comparison of two models on the assistant's turns, by text whose turns are marked.

        The reference must be the same in every call: its greedy answers are kept. `label` is what is printed before
        the name of a text.
        """
        ranks, section, found = self.machine.ranks, self.config.evaluate, {}
        special = frozenset(self.tokenizer.added_tokens_decoder)
        for name, packed in self.texts.items():
            if not packed.marked:
                continue
            rows = range(ranks.rank, self.rows[name], ranks.world)
            sums = torch.zeros(self.rows[name], len(answers.SUMS), dtype=torch.float64)
            size = section.batch_size
            batches = _batches(Marked(packed), rows, size)
            shown = self.machine.progress(batches, -(-len(rows) // size), f"{label} in {name}")
            for number, part in enumerate(answers.compared(reference, student, shown, self.config.logits.chunk)):
                own = rows[number * size : (number + 1) * size]
                sums[own.start : own.stop : own.step] = part
            every = (_row(Marked(packed), row) for row in range(self.rows[name]))
            turns = answers.turns_of(every, special, self.tokenizer.eos_token_id, section.answers)
            own_turns, most = turns[ranks.rank :: ranks.world], section.answer_tokens
            if name not in self._reference_answers:
                self._reference_answers[name] = answers.greedy(reference, own_turns, most)
            equal = answers.equal(self._reference_answers[name], answers.greedy(student, own_turns, most))
            ranks.sum_([sums, equal])
            numbers = answers.figures(sums)
            if numbers is not None:
                found[name] = numbers | {"greedy": answers.greedy_figures(equal, section.answer_tokens)}
                self.machine.say(f"{label} in {name}: KL {numbers['kl']:.4f} on {numbers['tokens']} tokens")
        return found

    def drafts(self, reference: nn.Module, student: nn.Module) -> dict[str, dict[str, Any]]:
        """Return how many of the student's drafts the reference accepts, by text."""
        ranks, size, found = self.machine.ranks, self.config.evaluate.batch_size, {}
        for name, packed in self.texts.items():
            rows = range(ranks.rank, self.rows[name], ranks.world)
            batches = self.machine.progress(_batches(packed, rows, size), -(-len(rows) // size), f"drafts on {name}")
            sums = torch.zeros(self.rows[name], dtype=torch.float64)
            for number, part in enumerate(drafting.accepted(reference, student, batches, self.config.logits.chunk)):
                own = rows[number * size : (number + 1) * size]
                sums[own.start : own.stop : own.step] = part
            ranks.sum_([sums])
            found[name] = drafting.figures(sums / packed.sequence)
            self.machine.say(f"drafts on {name}: {found[name]['acceptance']:.1%} are accepted")
        return found

    def prompt(self, tokens: int) -> Tensor:
        """Return ids [1, tokens] from the beginning of the first text, repeated where it is shorter."""
        packed = next(iter(self.texts.values()))
        rows = -(-tokens // packed.sequence)
        ids = torch.cat([_row(packed, row % len(packed)) for row in range(rows)])
        return ids[None, :tokens]

    def prompts(self) -> list[Prompt]:
        """Return prompts from the texts in turn, of a text with marked turns the chat before one of them."""
        if self.original:
            return self.original.prompts()
        prompts: list[Prompt] = []
        count = self.config.report.samples
        for turn in range(count):
            name, packed = list(self.texts.items())[turn % len(self.texts)]
            row = (turn // len(self.texts) + 1) * len(packed) // (count + 1)
            prompts.append(self._turn(name, row) or self._opening(name, row))
        return prompts

    def _opening(self, name: str, row: int) -> Prompt:
        """Return the opening of the longest document of a row of a text."""
        document = max(self._documents(self.texts[name], row), key=len)
        prompt, follows = opening(document, self.config.report.sample_prompt)
        return Prompt(name, prompt, False, prompt, follows, frozenset())

    def _turn(self, name: str, row: int) -> Prompt | None:
        """Return the turn of the assistant with the longest prompt of a few rows, since the first of a row is cut off.

        Shown is what follows the answer before it. None where these rows have no turn.
        """
        packed, decode = self.texts[name], self.tokenizer.decode
        if not packed.marked:
            return None
        special = frozenset(self.tokenizer.added_tokens_decoder)
        rows = (_row(Marked(packed), each) for each in range(row, min(row + SAMPLED_ROWS, len(packed))))
        ends = [turns[-2:] for each in rows if (turns := list(answers.turns_in(each, special, None)))]
        if not ends:
            return None
        *before, turn = max(ends, key=lambda turns: turns[-1].prompt.shape[1])
        answered = sum(each.prompt.shape[1] + len(each.answer) for each in before)
        shown = decode(turn.prompt[0, answered:])[-self.config.report.sample_prompt :]
        stops = frozenset(self.tokenizer.convert_ids_to_tokens(sorted(turn.stop)))
        return Prompt(name, decode(turn.prompt[0]), True, shown, decode(turn.answer), stops)

    def _tally(self, model: nn.Module, name: str, label: str) -> tuple[Tensor, Tensor]:
        """Return the tallies [sequences, 3] and the counts of correct and all words [2], over all ranks."""
        ranks, size = self.machine.ranks, self.config.evaluate.batch_size
        packed, words = self.texts[name], self.questions[name]
        rows = range(ranks.rank, self.rows[name], ranks.world)
        batches = self.machine.progress(_batches(packed, rows, size), -(-len(rows) // size), label)
        sums = torch.zeros(self.rows[name], 3, dtype=torch.float64)
        for number, tally in enumerate(tallies(model, batches, self.config.logits.chunk)):
            own = rows[number * size : (number + 1) * size]
            sums[own.start : own.stop : own.step] = tally
        own_words = words[ranks.rank :: ranks.world]
        parts = [own_words[start : start + size] for start in range(0, len(own_words), size)]
        correct = torch.zeros(2, dtype=torch.float64)
        for part in self.machine.progress(parts, len(parts), f"{label}, next words"):
            correct += right(model, part, size)
        ranks.sum_([sums, correct])
        return sums, correct

    def _count(self, name: str) -> int:
        """Return how many rows of a text are measured."""
        packed = self.texts[name]
        if self.original is None:
            return min(len(packed), max(1, self.config.evaluate.tokens // packed.sequence))
        whole = self.original
        wanted = sum(whole._bytes(whole.texts[name][row]) for row in range(whole.rows[name]))
        ends = list(accumulate(self._bytes(packed[row]) for row in range(len(packed))))
        return 1 + min(range(len(ends)), key=lambda row: abs(ends[row] - wanted))

    def _bytes(self, row: np.ndarray) -> int:
        """Return the length of the text of some tokens, in bytes."""
        return len(self.tokenizer.decode(row.tolist(), skip_special_tokens=True).encode())

    def _documents(self, packed: Packed, row: int) -> list[str]:
        """Return the texts of a row, split where a document ends."""
        ids = packed[row].tolist()
        documents: list[list[int]] = [[]]
        for token in ids:
            if token == packed.index["after"]:
                documents.append([])
            else:
                documents[-1].append(token)
        return [self.tokenizer.decode(some, skip_special_tokens=True) for some in documents]

    def _questions(self, name: str) -> list[Question]:
        first, whole = self.texts[name].index["first"], self.original or self
        opened = [] if first is None else [first]
        rows = range(whole.rows[name])
        documents = (text for row in rows for text in whole._documents(whole.texts[name], row))

        def encode(text: str) -> list[int]:
            return opened + self.tokenizer(text, add_special_tokens=False)["input_ids"]

        return questions(documents, encode, self.config.evaluate.words, self.config.evaluate.words_context)


def _batches(packed: Rows, rows: range, batch: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), batch):
        yield torch.stack([_row(packed, row) for row in rows[start : start + batch]])


def _row(packed: Rows, row: int) -> Tensor:
    return torch.from_numpy(packed[row].astype("int64"))
