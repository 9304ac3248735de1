"""What the assistant's turns of chats show, as rows of the comparison."""

from collections.abc import Mapping
from typing import Any

from pipeline.report.facts import infinite, times

MEANING = (
    "Answers are the assistant's turns of held-out chats. KL: how far the student's distribution of the next token is "
    "from the teacher's, 0 where they are equal. Equal first choices: tokens for which both have the same most likely "
    "one. Greedy answers: both models answer the same turns, and are compared up to the first token that differs. "
    "`from`: before recovery."
)


def answer_lines(name: str, found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return what a text's assistant turns show, as (label, teacher, student, change).

    The change of what compares two models is from the student before recovery.
    """
    start = found.get("start")
    before, after = (infinite(found[who]["perplexity"]) for who in ("teacher", "student"))
    kl, agreement = (f"from {start['kl']:.4f}", f"from {start['agreement']:.1%}") if start else ("", "")
    lines = [
        (f"perplexity of answers, {name}", times(before), times(after), f"×{times(after / before)}"),
        (f"KL of answers, {name}, nats", "", f"{found['kl']:.4f} ± {found['kl_error']:.4f}", kl),
        (f"equal first choices, {name}", "", f"{found['agreement']:.1%}", agreement),
    ]
    if found["greedy"]:
        same = found["greedy"]
        lines.append((f"equal greedy answers of {same['answers']}, {name}", "", f"{same['identical']:.1%}", ""))
        shared = f"from {start['greedy']['shared']:.1%}" if start else ""
        lines.append((f"greedy answers up to a difference, {name}", "", f"{same['shared']:.1%}", shared))
    return lines
