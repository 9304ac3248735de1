"""Malformed model files by the thousand: each is refused in one line, or read as safetensors reads it.

Cases are drawn with a fixed seed. The long form, with the number of cases a test (here 20,400 in all):

    FUZZ_CASES=3400 python -m pytest tests/faults/test_fuzz_models.py -s --timeout 0

It prints how many cases were refused and how many were read. A traceback of another kind than ValueError, a message of
several lines, a case of more than ten seconds, or a folder that is accepted and does not load is a failure.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.runtime.checkpoint import load_model
from pipeline.runtime.weight_files import INDEX
from tests.gguf_files import write_gguf
from tests.students import imported, student
from tests.tiny import save_tiny, tiny_model

CASES = int(os.environ.get("FUZZ_CASES", "40"))
OUTCOMES: Counter = Counter()
fuzz = settings(
    max_examples=CASES,
    derandomize=True,
    database=None,
    deadline=10_000,  # milliseconds a case
    suppress_health_check=list(HealthCheck),
)

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 10**12, 10**30, -1]),
    st.floats(allow_nan=True, allow_infinity=True),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["gemma2", "qwen3", "gpt2", "bfloat16", "../x", "sliding_attention", "pruned_llama", "yarn", "I8"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=6,
)


def fields_of(value, place=()):
    """Yield the place of everything inside a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*place, key)
        yield from fields_of(inner, (*place, key))


@st.composite
def mutated(draw, value):
    """Draw a JSON value in which one to three entries are replaced, removed, renamed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        places = list(fields_of(value))
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        holder = value
        for step in above:
            holder = holder[step]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            holder[key] = draw(VALUES)
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(VALUES)
        else:
            holder.append(draw(VALUES))
    return value


@st.composite
def damaged(draw, content, header):
    """Draw bytes in which the first `header` bytes are changed in some places, or which end early."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(header, len(data)) - 1))
        action = draw(st.sampled_from(["bit", "byte", "number", "insert", "delete", "truncate"]))
        if action == "bit":
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "byte":
            data[place] = draw(st.integers(0, 255))
        elif action == "number":
            data[place : place + 8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
        elif action == "insert":
            data[place:place] = draw(st.binary(max_size=16))
        elif action == "delete":
            del data[place : place + draw(st.integers(1, 16))]
        else:
            del data[place:]
        if not data:
            break
    return bytes(data)


@pytest.fixture(scope="module", autouse=True)
def outcomes():
    """Print what became of all cases."""
    yield
    print(f"\n{CASES} cases a test: {dict(OUTCOMES)}")


class Folder:
    """A folder whose files each case replaces, and their sound contents by name."""

    def __init__(self, place: Path):
        self.place, self.sound = place, {path.name: path.read_bytes() for path in place.iterdir()}

    def __repr__(self):
        return "Folder"  # what a failing case prints

    def fill(self, contents: dict[str, bytes]) -> None:
        """Replace all files, none of them in place: an earlier case may have one open."""
        for path in self.place.iterdir():
            path.unlink()
        for name, content in contents.items():
            (self.place / name).write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(save_tiny(tiny_model("llama-tied", dtype=torch.float32), tmp_path_factory.mktemp("fuzz") / "model"))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Return the folder of a student with layers of unequal width."""
    return Folder(student("llama", tmp_path_factory.mktemp("fuzz") / "s", dtype=torch.float32).folder)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """Return the folder of a GGUF file."""
    place = tmp_path_factory.mktemp("fuzz")
    write_gguf(place / "tiny.gguf", tiny_model("llama-tied", dtype=torch.float32))
    return Folder(place)


def judge(kind, read):
    """Run a reading and count its outcome; any error but a ValueError of one line propagates."""
    try:
        result = read()
    except ValueError as fault:
        assert "\n" not in str(fault), str(fault)
        OUTCOMES[f"{kind} refused"] += 1
        return None
    OUTCOMES[f"{kind} read"] += 1
    return result


def assert_sound(folder, contents, kind):
    """Check that a folder is refused, or that its copy loads with every weight as safetensors reads it."""
    folder.fill(folder.sound | contents)
    copy = folder.place.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    checkpoint = judge(kind, lambda: imported(folder.place, copy))
    if checkpoint is None:
        return
    weights = {}
    for path in folder.place.glob("*.safetensors"):
        weights |= load_file(path)
    loaded = dict(load_model(copy, torch.float32, "eager").named_parameters())
    assert loaded.keys() == checkpoint.keys()
    names = {name.removeprefix("model."): name for name in loaded}
    for name, tensor in weights.items():
        own = names.get(name.removeprefix("model."))
        assert own is None or torch.equal(loaded[own], tensor.float()), name


@fuzz
@given(data=st.data())
def test_config(folder, data):
    config = data.draw(mutated(json.loads(folder.sound["config.json"])))
    assert_sound(folder, {"config.json": json.dumps(config).encode()}, "config.json")


@fuzz
@given(data=st.data())
def test_config_of_a_pruned_student(pruned, data):
    config = json.loads(pruned.sound["config.json"])
    if data.draw(st.booleans()):
        config = data.draw(mutated(config))
    else:
        config["pruned"] = data.draw(mutated(config["pruned"]))
    assert_sound(pruned, {"config.json": json.dumps(config).encode()}, "config.json of a student")


@fuzz
@given(data=st.data())
def test_bytes_of_config(folder, data):
    content = folder.sound["config.json"]
    assert_sound(folder, {"config.json": data.draw(damaged(content, len(content)))}, "bytes of config.json")


@fuzz
@given(data=st.data())
def test_safetensors_header(folder, data):
    content = folder.sound["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        header = json.dumps(data.draw(mutated(json.loads(content[8 : 8 + length])))).encode()
        content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    else:
        content = data.draw(damaged(content, 8 + length))
    assert_sound(folder, {"model.safetensors": content}, "safetensors header")


@fuzz
@given(data=st.data())
def test_index(folder, data):
    names = tensor_names(folder.sound["model.safetensors"])
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    assert_sound(folder, {INDEX: json.dumps(data.draw(mutated(index))).encode()}, "index")


@fuzz
@given(data=st.data())
def test_gguf_header(gguf, data):
    path, content = gguf.place / "tiny.gguf", gguf.sound["tiny.gguf"]
    header = int(content.index(b"output_norm.weight")) + 64
    shutil.rmtree(gguf.place / "copy", ignore_errors=True)
    gguf.fill({"tiny.gguf": data.draw(damaged(content, header))})
    copy = judge("GGUF header", lambda: imported(path, gguf.place / "copy"))
    if copy is not None:
        loaded = dict(load_model(copy.folder, torch.bfloat16, "eager").named_parameters())
        assert all(torch.equal(loaded[name], copy[name]) for name in copy) and loaded.keys() == copy.keys()
    shutil.rmtree(gguf.place / "copy", ignore_errors=True)


def tensor_names(content):
    length = int.from_bytes(content[:8], "little")
    return [name for name in json.loads(content[8 : 8 + length]) if name != "__metadata__"]
