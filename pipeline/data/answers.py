"""Which characters of a rendered chat are the assistant's: what a model writes after a generation prompt.

A template may mark them by `{% generation %}`. With any other template the same chat is rendered several times with one
turn replaced, and the renderings are compared: the text on which they agree is the template's. Where the comparison
does not determine a span, the chat is refused.
"""

import os
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

Turns = Sequence[dict[str, Any]]
Span = tuple[int, int]  # characters [start, stop)
Render = Callable[[Turns, bool], str]  # (turns, whether to add a generation prompt) -> text

GENERATION = re.compile(r"\{%(-?)\s*(generation|endgeneration)\s*(-?)%\}")
BRACKETS = {"generation": "\ue000", "endgeneration": "\ue001"}  # of the private use area: no text has them
PROBES = ("A1probe1A", "B2probe2B")  # answers that differ in their first and in their last character
USER = {"role": "user", "content": "probe"}  # a turn that follows
ROLES = {"assistant", "system", "developer", "user", "tool", "function", "ipython", "observation", "environment"}
OTHER_TEXT = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # of a turn, beside its content


def marks_answers(template: str) -> bool:
    """Return whether a template marks the assistant's text by `{% generation %}`."""
    return GENERATION.search(template) is not None


def with_brackets(template: str) -> str:
    """Return a template that writes BRACKETS in place of its marks, and keeps or drops the blanks around as they do."""
    return GENERATION.sub(lambda tag: f"{{%{tag[1]} if true %}}{BRACKETS[tag[2]]}{{% endif {tag[3]}%}}", template)


def bracketed_spans(bracketed: str, text: str) -> list[Span]:
    """Return the spans between brackets, in the text without them.

    Raise ValueError where the text without brackets is not `text`.
    """
    first, last = BRACKETS.values()
    pieces = re.split(f"([{first}{last}])", bracketed)
    if "".join(pieces[::2]) != text or pieces[1::2] != [first, last] * (len(pieces) // 4):
        raise ValueError("it renders otherwise with its marks of generation")
    ends = list(accumulate(map(len, pieces[::2])))
    return list(zip(ends[0:-1:2], ends[1::2]))


def answer_spans(render: Render, turns: Turns, text: str, special: Sequence[str] = ()) -> list[Span]:
    """Return the span of each assistant turn in `text`, the rendered turns: the answer and what ends the turn.

    An answer has its reasoning and its tool calls, as far as the template writes them. What ends a turn is what the
    template writes after the answer whether or not another turn follows, without blanks at its end; `special`: texts of
    tokens, which are not cut. Raise ValueError where the renderings do not agree on a span.
    """
    spans: list[Span] = []
    for number, turn in enumerate(turns):
        if turn["role"] not in ROLES:
            raise ValueError(f"turn {number + 1} has the role {turn['role']!r:.40}; answers have the role assistant")
        if turn["role"] == "assistant":
            span = _span(render, turns, number, text, special)
            if spans and span[0] < spans[-1][1]:
                raise ValueError(f"the answers of turn {number + 1} and of one before it overlap")
            spans.append(span)
    return spans


def _span(render: Render, turns: Turns, number: int, text: str, special: Sequence[str]) -> Span:
    before, after = _around(render, turns[:number], turns[number + 1 :])
    if not text.endswith(after):
        raise ValueError(f"what follows turn {number + 1} depends on its text")
    stop = len(text) - len(after)
    start = _start(render, turns, number, text, before, stop)
    if start is None:
        raise ValueError(f"what precedes turn {number + 1} depends on its text")
    last, next_turn = (_around(render, turns[:number], later)[1] for later in ([], [USER]))
    return start, stop + len(_ending(last, next_turn if after == last else after, special))


def _around(render: Render, earlier: Turns, later: Turns) -> tuple[str, str]:
    """Return what a template writes before and after an answer between these turns, whatever the answer is."""
    first, second = (render([*earlier, {"role": "assistant", "content": probe}, *later], False) for probe in PROBES)
    return os.path.commonprefix([first, second]), os.path.commonprefix([first[::-1], second[::-1]])[::-1]


def _start(render: Render, turns: Turns, number: int, text: str, before: str, stop: int) -> int | None:
    """Return where an answer begins: after the template's text, or after the generation prompt.

    The first holds for an answer that is a content alone and appears unchanged. What a template makes of reasoning and
    of tool calls begins after the generation prompt, where the template has one.
    """
    turn = turns[number]
    alone = not any(turn.get(name) for name in OTHER_TEXT)
    fits = text.startswith(before) and len(before) <= stop
    if alone and fits and text[len(before) : stop].strip() in turn["content"]:
        return len(before)
    prompted = render(turns[:number], True)
    has_prompt = prompted != render(turns[:number], False)
    return len(prompted) if has_prompt and text.startswith(prompted) and len(prompted) <= stop else None


def _ending(last: str, after: str, special: Sequence[str]) -> str:
    """Return what ends a turn, of what follows it at the end of a chat and before a turn; blanks only where no more."""
    size = len(os.path.commonprefix([last, after]))
    starts = (
        at for token in special for at in range(max(0, size - len(token) + 1), size) if last.startswith(token, at)
    )
    common = last[: min(starts, default=size)]
    return common.rstrip() or common
