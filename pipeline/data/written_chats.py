"""Chats that a model writes: what stands before a user's words in its template, and what separates the turns."""

from dataclasses import dataclass
from typing import Any

from pipeline.data.templates import ChatTemplate

MARK = "\u2060USER\u2060"  # in place of the user's words; no template contains it
REPLY = "\u2060REPLY\u2060"  # in place of the assistant's words


def before_user(tokenizer: Any, place: str) -> list[int]:
    """Return the ids of the chat template up to a user's words; none without a template.

    Raise ValueError, beginning with `place`, where the template refuses a user's turn.
    """
    if not tokenizer.chat_template:
        return []
    with ChatTemplate(tokenizer) as template:
        whole = template.render([{"role": "user", "content": MARK}], place)
    return tokenizer(whole.partition(MARK)[0], add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class ChatMarks:
    """What separates a user's words from the assistant's reply, and ends the reply."""

    between: str  # from the end of the user's words to where the assistant begins
    after: str  # what ends the assistant's turn: its own mark, or the beginning of the next one; "" without either
    special: tuple[str, ...]  # texts of the special tokens, which no words contain

    def turns(self, text: str) -> list[dict[str, str]] | None:
        """Return the two turns of a text that begins with a user's words; None where the reply does not end in it."""
        question, between, rest = text.partition(self.between)
        reply, end, _ = rest.partition(self.after)
        words = {"user": question.strip(), "assistant": reply.strip()}
        if not (between and end and all(words.values())):
            return None
        if any(mark in content for mark in self.special for content in words.values()):
            return None
        return [{"role": role, "content": content} for role, content in words.items()]


def chat_marks(tokenizer: Any, place: str) -> ChatMarks:
    """Return what separates turns in the tokenizer's chat template, rendered within limits.

    Raise ValueError, beginning with `place`, where there is no template, or it does not separate a user's turn and a
    reply.
    """
    user, reply = {"role": "user", "content": MARK}, {"role": "assistant", "content": REPLY}
    with ChatTemplate(tokenizer) as template:
        between = template.prompt([user], place).partition(MARK)[2]
        text, spans = template.answers([user, reply], place)
        end = text[text.index(REPLY) + len(REPLY) : spans[-1][1]]
        if not end:  # the next turn alone ends it
            end = template.render([user, reply, user], place).partition(REPLY)[2].partition(MARK)[0].strip()
    if not (between.strip() and end):
        raise ValueError(f"{place}: the teacher's chat template does not mark where turns end")
    return ChatMarks(between, end, special_texts(tokenizer))


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the tokenizer's special tokens; a turn's end need not be one that it has a name for."""
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))
