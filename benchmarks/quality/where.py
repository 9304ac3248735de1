"""Where a student loses: its loss over the dense model's by kind of token, on a text that a run is measured on.

    python benchmarks/quality/where.py --run runs/quality/best-25-0 [--text readmes] [--model start] [--tokens 16384]

A token is the beginning of a word, the rest of one, a number, a mark or space, and seen or new: seen where the same
three tokens stood in this order before in the sequence, so that copying predicts it. Extra is in nats a token; the
shares of all kinds add up to one, and all extra together is the logarithm of the perplexity over the dense model's; the
error printed beside it is the standard error over sequences, which the table's 8 sequences a text leave large.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.data.packing import Packed
from pipeline.evaluation.perplexity import over
from pipeline.model.logits import logits_of
from pipeline.runtime.model_loader import load_model, load_tokenizer

ALIKE = 3  # tokens in a row
KINDS = (("space", r"\s*"), ("word", r"\s+[^\W\d_]+"), ("rest of a word", r"[^\W\d_]+"), ("number", r".*\d.*"))
ELSE = "mark"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--text", default="readmes")
    parser.add_argument("--model", default="start", choices=["start", "student"], help="before or after recovery")
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args()
    found = [each for each in (options.run / "tokens" / "evaluation").glob("*") if each.name[3:] == options.text]
    if not found:
        raise SystemExit(f"error: --text: {options.run} measured on no text called {options.text}")
    packed = Packed(found[0])
    rows = torch.tensor(
        [packed[row].tolist() for row in range(max(2, options.tokens // packed.sequence))[: len(packed)]]
    )
    tokenizer = load_tokenizer(options.run / "teacher")
    words = {id_: tokenizer.decode([id_]) for id_ in rows.unique().tolist()}
    losses = [
        loss_of(load_model(options.run / each, torch.bfloat16, "sdpa"), rows) for each in ("teacher", options.model)
    ]
    print("\n".join(table(kinds(rows.tolist(), words), *losses)))


@torch.inference_mode()
def loss_of(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Return the negative log-likelihood [n, t - 1] of every token but the first of each of `rows` [n, t], in nats."""
    found = []
    for row in rows.split(1):
        states = model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, :-1]
        logits = logits_of(model, states).float()
        found.append(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none"))
    return torch.stack(found)


def kinds(rows: Sequence[Sequence[int]], words: dict[int, str]) -> list[str]:
    """Name the kind of every token but the first of each row, in order."""
    names = []
    for row in rows:
        before: set[tuple[int, ...]] = set()
        for place in range(1, len(row)):
            here = tuple(row[max(0, place - ALIKE + 1) : place + 1])
            names.append(f"{'seen' if here in before else 'new'} {kind(words[row[place]])}")
            before.add(here)
    return names


def kind(text: str) -> str:
    """Name what a token is by its text."""
    return next((name for name, pattern in KINDS if re.fullmatch(pattern, text, re.DOTALL)), ELSE)


def table(names: Sequence[str], dense: Tensor, student: Tensor) -> list[str]:
    """Return the lines of a table, the kind that loses most first, and the sum; losses are [n, t - 1]."""
    extra = student.double() - dense.double()
    lines = []
    for name in set(names):
        here = torch.tensor([each == name for each in names]).view_as(extra)
        share = float(extra[here].sum() / extra.sum())
        means = [f"{float(each[here].mean()):.2f}" for each in (dense, extra)]
        lines.append((share, f"| {name} | {float(here.double().mean()):.1%} | {' | '.join(means)} | {share:.0%} |"))
    head = ["| token | of all | dense, nats | extra, nats | share of extra |", "|---|---:|---:|---:|---:|"]
    whole = over(student.double().mean(1).tolist(), dense.double().mean(1).tolist())
    last = f"perplexity {whole.times:.3f} ± {whole.error:.3f} times, {len(extra)} sequences"
    return [*head, *(line for _, line in sorted(lines, reverse=True)), "", last]


if __name__ == "__main__":
    main()
