"""Chats: records that hold turns, as lists or as JSON in a string, in the form that a chat template reads."""

import json
import re
from typing import Any

FORMS = (("role", "content"), ("from", "value"))  # the second is ShareGPT's
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
TURN = "a turn is {role, content} or {from, value}, both texts, and all turns of a record are alike"
LISTS = {"messages", "conversations", "conversation", "turns", "chat"}  # keys of a record with turns
BESIDE = {"id", "system", "source", "tools"}  # other keys of such records
SPEAKERS = {"system", "user", "assistant", "tool", "human", "gpt", "model", "bot"}
TEXTS = {"content", "value", "text", "message"}  # keys of what a turn says

_JSON = re.compile(r'\s*(\[\s*\{\s*"|\{\s*"|"\s*[\[{])')
_PYTHON = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)'\s*:")
_PYTHON_LIST = re.compile(r"\s*\[\s*\{\s*'\w+'\s*:.*[\]}]\s*", re.DOTALL)
_PYTHON_TURN = re.compile(rf"'(role|from)'\s*:\s*'({'|'.join(sorted(SPEAKERS))})'")


def as_turns(text: str, place: str) -> str | list:
    """Return a text, or the turns that it holds as JSON.

    Raise ValueError, beginning with `place`, for one turn or a whole record in a string, for turns that are encoded
    twice or say nothing under `content`, and for turns that are written as Python, which has no single reading.
    """
    if _PYTHON.match(text) or (_PYTHON_LIST.fullmatch(text) and _PYTHON_TURN.search(text)):
        raise ValueError(f"{place} holds turns written as Python: {text!r:.80}; write them as JSON")
    value = _parsed(text)
    if isinstance(value, list) and value and _has_form(value[0]):
        return value
    what = _misplaced(value)
    if what:
        raise ValueError(f"{place} holds {what} in a string: {text!r:.80}; give a list of turns")
    return text


def _parsed(text: str) -> Any:
    """Return the JSON value of a text that begins as one of turns; None for any other text."""
    if not _JSON.match(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None  # such as a program or a part of a document


def _misplaced(value: Any) -> str:
    """Return what holds turns, of a JSON value that is no list of turns; nothing where it holds none."""
    if isinstance(value, str):
        inner = _parsed(value)
        return "turns that are encoded twice" if _is_turns(inner) or _misplaced(inner) else ""
    if isinstance(value, list):
        return "turns without content" if _is_turns(value) else ""
    if not isinstance(value, dict):
        return ""
    bare = set(value) <= LISTS | BESIDE
    lists = [key for key in value if key in LISTS and isinstance(value[key], list)]
    listed = next((key for key in lists if bare or _is_turns(value[key])), None)
    if listed:
        return f"a record with {listed!r}"
    return "a single turn" if _has_form(value) and len(value) == 2 else ""


def _is_turns(value: Any) -> bool:
    """Return whether a JSON value is a list that begins with what somebody says, in any form."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    first = value[0]
    speaks = any(isinstance(first.get(key), str) and first[key].lower() in SPEAKERS for key, _ in FORMS)
    return _has_form(first) or (speaks and not TEXTS.isdisjoint(first))


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


def check_written(record: list[dict[str, Any]], text: str, place: str) -> None:
    """Raise ValueError where a template writes nothing that the user, or the assistant, says in a record.

    Templates change blanks and case, and leave out reasoning, some turns, and the content of turns that call tools.
    """
    written = _without_blanks(text)
    for role in ("user", "assistant"):
        turns_of = [turn for turn in record if turn["role"] == role and not turn.get("tool_calls")]
        contents = [_without_blanks(turn["content"].split("</think>")[-1]) for turn in turns_of]
        if any(contents) and not any(content and content in written for content in contents):
            raise ValueError(
                f"{place}: the teacher's chat template writes no content of the role {role!r}; correct chat_template "
                "in its folder"
            )


def _without_blanks(text: str) -> str:
    return "".join(text.split()).casefold()
