"""Chat templates, run where they can do no harm: in a child process, with limits on its time, memory and output.

A template is a program that comes with a model. Jinja's sandbox keeps it from the machine, but not from loops without
end, nor from texts and numbers that outgrow the memory.
"""

import ctypes
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from pipeline.data.answers import Render, Span, Turns, answer_spans, bracketed_spans, marks_answers, with_brackets
from pipeline.data.lines import printable

SECONDS = 5.0  # a template has for one record
MEAN_SECONDS = 0.5  # of the processor that a template has for a record of a text on average, and again for TURNS turns
TURNS = 20
FIRST = 20  # records whose seconds a text has from its beginning
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
MEMORY = 1 << 30  # bytes that the child may take beyond what it starts with
OUTPUT = 1 << 20  # characters that a template may add to a record, beside GROWTH times the record
GROWTH = 16
NO_TEMPLATE = "add a chat_template.jinja to the model folder, or set data.text_field to a column of text"

ROLES = ("system", "user", "assistant", "tool")


def template_texts(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer's chat template can add to a chat; none without a template.

    They are a chat as the template writes it, the names of roles, and the literal texts in the template.
    """
    template = tokenizer.chat_template
    if not template:
        return []
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with ChatTemplate(tokenizer) as rendered:
        chat = rendered.render(turns, "budget.vocabulary: a chat of three turns")
    sources = template.values() if isinstance(template, dict) else [template]
    return [chat, *ROLES, *(f"{role}\n" for role in ROLES), *(text for each in sources for text in _literals(each))]


def _literals(template: str) -> Iterator[str]:
    """Yield the text outside of a template's tags, and the quoted texts in them."""
    lexer = Environment(trim_blocks=True, lstrip_blocks=True).lexer
    try:
        yield from (token.value for token in lexer.tokenize(template) if token.type in ("data", "string"))
    except TemplateSyntaxError as fault:
        raise ValueError(f"the chat template is no Jinja template ({fault}); correct chat_template") from None


class ChatTemplate:
    """The chat template of a tokenizer; a context manager that ends its process.

    It renders the records of one text, for which a template has `mean_seconds` a record.
    """

    def __init__(self, tokenizer: Any, mean_seconds: float = MEAN_SECONDS):
        self._tokenizer, self._mean_seconds = tokenizer, mean_seconds
        self._process: Any = None
        self._pipe: Any = None
        self._records, self._seconds, self._allowed = 0, 0.0, FIRST * mean_seconds

    def __enter__(self) -> "ChatTemplate":
        return self

    def __exit__(self, *reason: Any) -> None:
        self._stop()

    def render(self, turns: list[dict[str, Any]], place: str, tools: list | None = None) -> str:
        """Return the text that `apply_chat_template` tokenises, with the tools that the assistant may call.

        Raise ValueError, beginning with `place`, where there is no template, it refuses the turns, or it exceeds its
        time, memory or output.
        """
        return self._asked(turns, place, tools, "text")[0]

    def prompt(self, turns: list[dict[str, Any]], place: str) -> str:
        """Return the text as `render`, up to where the assistant's next turn begins; ValueError as there."""
        return self._asked(turns, place, None, "prompt")[0]

    def answers(self, turns: list[dict[str, Any]], place: str, tools: list | None = None) -> tuple[str, list[Span]]:
        """Return the text as `render`, and the characters of it that are the assistant's.

        Raise ValueError as `render`, and where the template does not separate them from the rest exactly.
        """
        return self._asked(turns, place, tools, "answers")

    def _asked(
        self, turns: list[dict[str, Any]], place: str, tools: list | None, wanted: str
    ) -> tuple[str, list[Span]]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(f"{place} holds turns, and the teacher's tokenizer has no chat template; {NO_TEMPLATE}")
        if self._process is None:
            self._start()
        try:
            self._pipe.send((turns, tools, wanted))
            (kind, text, spans), taken = self._pipe.recv() if self._pipe.poll(SECONDS) else (("time", "", []), SECONDS)
        except (EOFError, ConnectionError):
            (kind, text, spans), taken = ("memory", "", []), 0.0
        self._records, self._seconds = self._records + 1, self._seconds + taken
        self._allowed += self._mean_seconds * (len(turns) / TURNS + (self._records > FIRST))
        if kind == "text" and self._seconds > self._allowed:
            kind, text = "mean", f"{self._seconds:.3g} s for {self._records} records"
        if kind == "text":
            return text, spans
        self._stop()
        if kind == "unknown":
            raise ValueError(
                f"{place}: data.loss_on=assistant cannot separate the assistant's text exactly in the teacher's chat "
                f"template ({text}); put {{% generation %}} around it in the template, or set data.loss_on=all"
            )
        if kind == "refused":
            roles = ", ".join(printable(turn["role"]) for turn in turns)
            fault = f"{place} holds turns of {roles:.80}, which the teacher's chat template refuses ({text:.160})"
            raise ValueError(f"{fault}; correct the record, or leave it out")
        limits = {
            "time": f"does not end within {SECONDS:g} s",
            "mean": f"takes {text}, more than {self._mean_seconds:g} s a record",
            "memory": f"needs more than {MEMORY >> 30} GiB of memory",
            "output": f"makes {text} characters of this record",
        }
        raise ValueError(f"{place}: the teacher's chat template {limits[kind]}; correct chat_template in its folder")

    def _start(self) -> None:
        # Forked: a new interpreter would import for seconds. The child runs nothing but the template.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # as by default; set, a fork prints no warning
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._tokenizer, theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def _stop(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process = self._pipe = None


def _serve(tokenizer: Any, pipe: Connection, parent: int) -> None:
    """Answer every list of turns with what `_render` returns and its seconds of the processor, until the pipe closes.

    The process ends with its parent, by its own timer where a record takes too long, and holds no file of the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends this process
    if sys.platform == "linux":  # others do not enforce the limit
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
        _limit_memory()
    if os.getppid() != parent:
        os._exit(0)
    _close_all_but(pipe.fileno())
    while True:
        try:
            turns, tools, wanted = pipe.recv()
        except EOFError:
            os._exit(0)  # the parent's exit handlers are not the child's to run
        signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
        started = time.process_time()
        answer = _render(tokenizer, turns, tools, wanted)
        pipe.send((answer, time.process_time() - started))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _close_all_but(kept: int) -> None:
    """Close the inherited descriptors, such as of locks and of the pipe's other end, beside the standard ones."""
    last = max(map(int, os.listdir("/dev/fd")))
    os.closerange(3, kept)
    os.closerange(kept + 1, last + 1)


def _render(
    tokenizer: Any, turns: list[dict[str, Any]], tools: list | None, wanted: str
) -> tuple[str, str, list[Span]]:
    """Return ("text", text, the assistant's spans if "answers" are wanted), or the kind of a fault and its text.

    The text ends with the beginning of the assistant's next turn if a "prompt" is wanted.
    """

    given_tools = {"tools": tools} if tools else {}

    def render(some: Turns, prompts: bool) -> str:
        options = given_tools | ({"add_generation_prompt": True} if prompts else {})
        return tokenizer.apply_chat_template(list(some), tokenize=False, **options)

    try:
        text = render(turns, wanted == "prompt")
    except MemoryError:
        return "memory", "", []
    except Exception as fault:  # a template may raise anything, as any program
        return "refused", " ".join(f"{fault}".split()) or type(fault).__name__, []
    given = len(json.dumps([turns, tools], ensure_ascii=False))
    if len(text) > OUTPUT + GROWTH * given:
        return "output", f"{len(text):,}", []
    try:
        return "text", text, _spans(tokenizer, turns, tools, text, render) if wanted == "answers" else []
    except MemoryError:
        return "memory", "", []
    except Exception as fault:  # of a turn that replaces another
        return "unknown", " ".join(f"{fault}".split()) or type(fault).__name__, []


def _spans(tokenizer: Any, turns: list[dict[str, Any]], tools: list | None, text: str, render: Render) -> list[Span]:
    template = tokenizer.get_chat_template(tools=tools)
    if not marks_answers(template):
        return answer_spans(render, turns, text, tuple(tokenizer.get_added_vocab()))
    options = {"tools": tools, "tokenize": False, "chat_template": with_brackets(template)}
    return bracketed_spans(tokenizer.apply_chat_template(turns, **options), text)


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="utf-8") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
