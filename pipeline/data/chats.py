"""Chats: records that hold turns, written out by a tokenizer's chat template."""

from typing import Any

from jinja2 import TemplateError

FORMS = (("role", "content"), ("from", "value"))  # the second is ShareGPT's
ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
TURN = "a turn is {role, content} or {from, value}, both texts, and all turns of a record are alike"


def written(record: list, tokenizer: Any, place: str) -> str:
    """Give a record as the text that `apply_chat_template` tokenises.

    ValueError, beginning with `place`, where a turn has another form, there is no template, or it refuses the turns.
    """
    chat = turns(record, place)
    if not getattr(tokenizer, "chat_template", None):
        fault = f"{place} holds turns, and the teacher's tokenizer has no chat template"
        raise ValueError(f"{fault}; give the model folder a chat_template.jinja, or a column of text")
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False)
    except TemplateError as fault:
        roles, reason = ", ".join(turn["role"] for turn in chat), " ".join(str(fault).split())
        told = f"{place} holds turns of {roles:.80}, which the teacher's chat template refuses ({reason:.160})"
        raise ValueError(f"{told}; mend the record, or leave it out") from None


def turns(record: list, place: str) -> list[dict[str, Any]]:
    """Give the turns as a template reads them; ValueError where one is of neither form or unlike the first."""
    first = record[0] if isinstance(record[0], dict) else {}
    role, content = form = next((each for each in FORMS if set(each) <= set(first)), FORMS[0])
    for number, turn in enumerate(record, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in form):
            raise ValueError(f"{place}, turn {number} is {turn!r:.80}; {TURN}")
    if form == FORMS[0]:
        return record
    return [{"role": ROLES.get(turn[role], turn[role]), "content": turn[content]} for turn in record]
