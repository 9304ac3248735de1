"""Chats: records that hold turns, as lists or as JSON in a string, in the form that a chat template reads."""

import json
import re
from typing import Any

FORMS = (("role", "content"), ("from", "value"))  # the second is ShareGPT's
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
TURN = "a turn is {role, content} or {from, value}, both texts, and all turns of a record are alike"
LISTS = {"messages", "conversations", "conversation", "turns", "chat"}  # keys of a record with turns
BESIDE = {"id", "system", "source", "tools"}  # other keys of such records

_JSON = re.compile(r'\s*(\[\s*\{\s*"|\{\s*")')
_PYTHON = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)'\s*:")


def as_turns(text: str, place: str) -> str | list:
    """Return a text, or the turns that it holds as JSON.

    Raise ValueError, beginning with `place`, for one turn or a whole record in a string, and for turns that are written
    as Python, which has no single reading.
    """
    if _PYTHON.match(text):
        raise ValueError(f"{place} holds turns written as Python: {text!r:.80}; write them as JSON")
    if not _JSON.match(text):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text  # such as a program or a part of a document
    if isinstance(value, list):
        return value if value and _has_form(value[0]) else text
    listed = next((key for key in value if key in LISTS and isinstance(value[key], list)), None)
    if listed and set(value) <= LISTS | BESIDE or _has_form(value) and len(value) == 2:
        what = f"a record with {listed!r}" if listed else "a single turn"
        raise ValueError(f"{place} holds {what} in a string: {text!r:.80}; give a list of turns")
    return text


def _has_form(turn: Any) -> bool:
    return isinstance(turn, dict) and any(set(form) <= set(turn) for form in FORMS)


def turns(record: list, place: str) -> list[dict[str, Any]]:
    """Return the turns as a template reads them, those that call tools with or without a content.

    Raise ValueError where one has neither form or is unlike the first.
    """
    first = record[0] if isinstance(record[0], dict) else {}
    role, content = form = next((each for each in FORMS if set(each) <= set(first)), FORMS[0])
    for number, turn in enumerate(record, start=1):
        texts = isinstance(turn, dict) and [turn.get(key) for key in form]
        if texts and texts[1] is None and turn.get("tool_calls"):
            texts[1] = ""
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{place}, turn {number} is {turn!r:.80}; {TURN}")
    if form == FORMS[0]:
        return [_given(turn) for turn in record]
    return [{"role": ROLES.get(turn[role], turn[role]), "content": turn[content]} for turn in record]


def _given(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn without the fields that are null, as tables hold them; an absent content is empty."""
    return {"content": "", **{name: value for name, value in turn.items() if value is not None}}
