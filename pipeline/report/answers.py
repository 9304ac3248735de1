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
        equal = f"{same['identical']:.1%}, {same['shared']:.1%} of each before it differs"
        lines.append((f"equal greedy answers, {name}", "", equal, f"of {same['answers']}"))
    return lines
