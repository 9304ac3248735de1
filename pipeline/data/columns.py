"""Which columns of a record are its text: one, of text or turns, or several that are a prompt and its completion.

`data.text_field=instruction+input+output` names the columns of a prompt, which are joined by empty lines, and last that
of the completion: a chat of a user's and an assistant's turn. A first column `system` is a system turn. Prompts and
completions may also be lists of turns. A column `tools` beside turns holds what the assistant may call, as a list or as
JSON in a string.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

TOOLS = "tools"
SYSTEM = "system"


class Chat(list):
    """Turns, with the tools that the assistant may call."""

    def __init__(self, turns: Iterable[Any], tools: list | None = None):
        super().__init__(turns)
        self.tools = tools


Value = str | Chat | None


def columns(field: str, known: Iterable[str]) -> list[str]:
    """Return the columns that `data.text_field` names; one, where a column of the whole name is known."""
    return [field] if field in set(known) else [name.strip() for name in field.split("+")]


def value_of(record: Mapping[str, Any], field: str, place: str) -> Value:
    """Return the text or the turns of a record, whose columns are known to be there.

    Raise ValueError, beginning with `place`, for a column that is neither, and for tools that are no list.
    """
    names = columns(field, record)
    values = [record[name] for name in names]
    for name, value in zip(names, values):
        if not isinstance(value, str | list | None):
            fault = f"{place}: column {name!r} holds no text and no turns, but {value!r:.80}"
            raise ValueError(f"{fault}; set data.text_field to the column that does")
    value = values[0] if len(names) == 1 else _joined(names, values, place)
    if isinstance(value, list):
        return Chat(value, _tools(record.get(TOOLS), place))
    return value


def _joined(names: list[str], values: list[Any], place: str) -> list | None:
    """Return the turns of prompt columns and a completion; None where all are empty."""
    if not any(values):
        return None
    *prompts, completion = values
    if not completion or (isinstance(completion, str) and not completion.strip()):
        raise ValueError(f"{place}: column {names[-1]!r} has no completion; leave the record out")
    turns: list = []
    if names[0] == SYSTEM and len(prompts) > 1:
        system = prompts.pop(0)
        turns += [{"role": "system", "content": system}] if system else []
    given = [prompt for prompt in prompts if prompt and (isinstance(prompt, list) or prompt.strip())]
    if len({type(prompt) for prompt in given}) > 1 or (given and isinstance(given[0], list) and len(given) > 1):
        raise ValueError(f"{place}: the columns {', '.join(names[:-1])} hold turns and text; name one list of turns")
    if given:
        turns += given[0] if isinstance(given[0], list) else [{"role": "user", "content": "\n\n".join(given)}]
    return turns + (completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}])


def _tools(value: Any, place: str) -> list | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = f"{value:.40}"  # refused below
    if not value:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{place}: column {TOOLS!r} holds no list of tools: {value!r:.80}; correct it")
    return value
