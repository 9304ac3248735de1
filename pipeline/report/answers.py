"""What the assistant's turns of chats show, as rows of the comparison."""

from collections.abc import Mapping
from typing import Any

from pipeline.report.facts import infinite, times


def answer_lines(name: str, found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return what a text's assistant turns show, as (label, teacher, student, change)."""
    before, after = (infinite(found[who]["perplexity"]) for who in ("teacher", "student"))
    lines = [
        (f"perplexity of answers, {name}", times(before), times(after), f"×{times(after / before)}"),
        (f"KL of answers, {name}, nats", "", f"{found['kl']:.4f} ± {found['kl_error']:.4f}", ""),
        (f"equal first choices, {name}", "", f"{found['agreement']:.1%}", ""),
    ]
    if found["greedy"]:
        same = found["greedy"]
        lines.append((f"equal greedy answers of {same['answers']}, {name}", "", f"{same['identical']:.1%}", ""))
        lines.append((f"greedy answers up to a difference, {name}", "", f"{same['shared']:.1%}", ""))
    return lines
