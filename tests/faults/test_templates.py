"""A chat template that does not end, or outgrows its bounds, ends in one line; a sound one is rendered as ever."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from pipeline.data.templates import SECONDS, ChatTemplate
from tests.tiny_text import byte_tokenizer

TURNS = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One."}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
HOSTILE = {
    "loops": LOOP + "{% endfor %}{% endfor %}{% endfor %}",
    "loops that write": LOOP + "x{% endfor %}{% endfor %}{% endfor %}",
    "long text": "{{ 'x' * 10000000 }}",
    "longer than memory": "{{ 'x' * 100000000000 }}",
    "longer than memory, folded": "{% set n = 100000000000 %}{{ 'x' * n }}",
    "doubled text": "{% set s = namespace(x='x') %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set s = namespace(x=9) %}{% for i in range(60) %}{% set s.x = s.x * s.x %}{% endfor %}{{ s.x }}",
    "padding": "{{ 'x'.ljust(100000000000) }}",
    "a width": "{{ '%999999999d' % 1 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "an error": "{{ raise_exception('no\nsuch turns') }}",
    "no syntax": "{% for %}",
    "an attribute": "{{ messages.__class__.__mro__ }}{{ messages[9].content }}",
}


def rendered(template, turns=TURNS):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with ChatTemplate(tokenizer) as chat:
        return chat.render(turns, "a.jsonl:1")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_line(name):
    started = time.monotonic()
    with pytest.raises(ValueError) as fault:
        rendered(HOSTILE[name])
    assert time.monotonic() - started < 2 * SECONDS
    message = str(fault.value)
    assert "\n" not in message and message.startswith("a.jsonl:1") and "chat template" in message and len(message) < 500


def test_a_role_from_a_file_does_not_break_the_line():
    with pytest.raises(ValueError) as fault:
        rendered("{{ raise_exception('no') }}", [{"role": "a\nb", "content": "c"}])
    assert "\n" not in str(fault.value)


def test_a_sound_template_is_rendered_as_the_tokenizer_does_and_goes_on_after_many_records():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}\n{% endfor %}"
    with ChatTemplate(tokenizer) as chat:
        for number in range(200):
            turns = [{"role": "user", "content": f"Say {number}, é 漢字." * number}]
            assert chat.render(turns, "here") == tokenizer.apply_chat_template(turns, tokenize=False)


def test_no_process_is_left_and_none_is_started_for_text():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "x"
    with ChatTemplate(tokenizer) as chat:
        assert chat._process is None
        chat.render(TURNS, "here")
        process = chat._process
        assert process.is_alive()
    assert not process.is_alive()


def test_a_template_that_is_slow_on_every_record_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for a in range(99999) %}{% endfor %}x"
    with ChatTemplate(tokenizer, mean_seconds=0.0005) as chat:
        with pytest.raises(ValueError, match=r"^here \d+: .* takes .* more than 0.0005 s a record; ") as fault:
            for number in range(100):
                chat.render(TURNS, f"here {number}")
        assert "\n" not in str(fault.value)


PARENT = """
import fcntl, sys
from pipeline.data.templates import ChatTemplate
from tests.tiny_text import byte_tokenizer
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
tokenizer = byte_tokenizer()
tokenizer.chat_template = sys.argv[2]
chat = ChatTemplate(tokenizer)
chat.render([{"role": "user", "content": "once"}], "here")
print(chat._process.pid, flush=True)
chat.render([{"role": "user", "content": "a"}], "here")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not end a child with its parent")
def test_the_process_of_a_template_ends_with_a_killed_parent_and_holds_no_lock_of_it(tmp_path):
    template = "{% if messages[0].content != 'once' %}" + HOSTILE["loops"] + "{% endif %}"
    command = [sys.executable, "-c", PARENT, str(tmp_path / "lock"), template]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        ended = os.pidfd_open(child)
        held = [os.readlink(f"/proc/{child}/fd/{number}") for number in os.listdir(f"/proc/{child}/fd")]
        parent.send_signal(signal.SIGKILL)
    assert select.select([ended], [], [], SECONDS)[0] == [ended]
    os.close(ended)
    assert held and not any(name.endswith("/lock") for name in held)
