"""GGUF files: parts are joined, and nothing damaged, incomplete or read in part becomes a model."""

import struct

import pytest
import torch

from pipeline.runtime.gguf_header import ENTRIES, read_header
from pipeline.runtime.model_source import inspect, locate
from tests.gguf_files import write_gguf
from tests.students import imported
from tests.tiny import tensors_of, tiny_model
from tests.world import make_world, pipeline, settings


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama-tied", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # the teacher is stored in bfloat16
    return model


@pytest.fixture(scope="module")
def sound(model, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model).read_bytes()


def refused(path, *names):
    """Check that a file is refused as model.path in one line with these names."""
    with pytest.raises(ValueError) as fault:
        imported(path, path.parent / "teacher")
    message = str(fault.value)
    assert message.startswith("model.path: ") and "\n" not in message, message
    assert all(name in message for name in names), message
    assert not (path.parent / "teacher" / "config.json").exists()


def test_the_header_says_what_the_library_reads(sound, tmp_path):
    from gguf import GGUFReader

    path = tmp_path / "tiny.gguf"
    path.write_bytes(sound)
    header, theirs = read_header(path), GGUFReader(path)
    assert header.start == theirs.data_offset and header.alignment == theirs.alignment
    records = {t.name: (header.start + t.offset, t.bytes, t.elements) for t in header.tensors}
    assert records == {t.name: (t.data_offset, t.n_bytes, t.n_elements) for t in theirs.tensors}
    assert header.fields["llama.block_count"] == 4 and header.fields["tokenizer.ggml.tokens"] == 96


@pytest.mark.parametrize("part", [1, 2])
def test_the_parts_of_a_split_file_are_joined_whichever_is_given(model, tmp_path, part):
    write_gguf(tmp_path / "tiny.gguf", model, split=20)
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert len(parts) == 2
    read = imported(tmp_path / parts[part - 1], tmp_path / "teacher")
    assert all(torch.equal(read[name].float(), tensor) for name, tensor in tensors_of(model).items())
    assert not list((tmp_path / "teacher").glob("*.gguf"))


def test_an_incomplete_or_mixed_split_is_refused(model, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", model, split=20)
    first, second = sorted(tmp_path.iterdir())
    alone = first.rename(tmp_path / "alone.gguf")
    refused(alone, "2 parts")
    with pytest.raises(ValueError, match=f"model.path: .* is one of 2 parts, {first.name} is missing"):
        locate(str(second))
    first.write_bytes(second.read_bytes())
    refused(first, first.name)


@pytest.mark.parametrize("without", ["blk.3.", "output_norm", "blk.1.attn_q", "."])
def test_a_file_that_lacks_tensors_is_refused(model, tmp_path, without):
    refused(write_gguf(tmp_path / "tiny.gguf", model, without=without), "tiny.gguf")


def test_a_tensor_that_transformers_does_not_read_is_refused(model, tmp_path):
    def extra(writer):
        writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy())

    refused(write_gguf(tmp_path / "tiny.gguf", model, extra=extra), "tiny.gguf", "rope_freqs.weight")


def test_a_value_that_is_not_finite_is_refused(model, tmp_path):
    state = tensors_of(model)
    state["model.norm.weight"][3] = float("nan")
    try:
        refused(write_gguf(tmp_path / "tiny.gguf", model), "model.norm.weight")
    finally:
        state["model.norm.weight"][3] = 0.5


def test_a_file_is_checked_before_any_work(sound, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(sound[:-64])
    with pytest.raises(ValueError, match="^model.path: .*truncated"):
        inspect(locate(str(path)), "model.path")


def patched(content, key, offset, form, value):
    """Return a file's bytes with a number changed, `offset` bytes after a key."""
    place = content.index(key) + len(key) + offset
    data = struct.pack(f"<{form}", value)
    return content[:place] + data + content[place + len(data) :]


HOSTILE = {
    "version": lambda c: c[:4] + struct.pack("<I", 9) + c[8:],
    "big endian": lambda c: c[:4] + struct.pack(">I", 3) + c[8:],
    "tensors": lambda c: c[:8] + struct.pack("<Q", 1 << 60) + c[16:],
    "fields": lambda c: c[:16] + struct.pack("<Q", 1 << 60) + c[24:],
    "array length": lambda c: patched(c, b"tokenizer.ggml.tokens", 8, "Q", 1 << 60),
    "array of arrays": lambda c: patched(c, b"tokenizer.ggml.tokens", 4, "I", 9),
    "array type": lambda c: patched(c, b"tokenizer.ggml.tokens", 4, "I", 77),
    "field type": lambda c: patched(c, b"llama.block_count", 0, "I", 77),
    "string length": lambda c: patched(c, b"general.architecture", 4, "Q", 1 << 62),
    "dimensions": lambda c: patched(c, b"token_embd.weight", 0, "I", 1 << 30),
    "dimension": lambda c: patched(c, b"token_embd.weight", 4, "Q", 1 << 40),
    "zero dimension": lambda c: patched(c, b"token_embd.weight", 4, "Q", 0),
    "tensor type": lambda c: patched(c, b"token_embd.weight", 20, "I", 999),
    "tensor offset": lambda c: patched(c, b"token_embd.weight", 24, "Q", 1 << 50),
    "unaligned offset": lambda c: patched(c, b"token_embd.weight", 24, "Q", 7),
    "overlap": lambda c: patched(c, b"blk.0.ffn_down.weight", 24, "Q", 0),
    "layers": lambda c: patched(c, b"llama.block_count", 4, "I", 300_000_000),
    "more layers than tensors": lambda c: patched(c, b"llama.block_count", 4, "I", 4000),
    "width": lambda c: patched(c, b"llama.embedding_length", 4, "I", 1 << 31),
    "layers of another architecture": lambda c: patched(
        c.replace(b"llama", b"qwen2"), b"qwen2.block_count", 4, "I", (1 << 31) - 1
    ),
    "layers under another architecture's key": lambda c: patched(
        c.replace(b"llama.block_count", b"qwen2.block_count"), b"qwen2.block_count", 4, "I", (1 << 31) - 1
    ),
    "wide neurons": lambda c: patched(c, b"llama.feed_forward_length", 4, "I", 1 << 21),
    "no heads": lambda c: patched(c, b"llama.attention.head_count", 4, "I", 0),
    "truncated header": lambda c: c[:100],
    "nothing": lambda c: b"",
    "architecture": lambda c: c.replace(b"llama", b"t5\0\0\0"),
    "architecture without a class": lambda c: c.replace(b"llama", b"mamba"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(sound, tmp_path, case):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(HOSTILE[case](sound))
    refused(path, "tiny.gguf")


def array(key, length, text=None):
    """Return what adds an array to a GGUF file."""
    return lambda writer: writer.add_array(key, [1 if text is None else text] * length)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("extra", "names"),
    [
        (array("x.big", 200_000), ["x.big", "200000"]),
        (array("x.big", 200_000, "a"), ["x.big", "200000"]),
        (array("tokenizer.ggml.scores", 200_000), ["tokenizer", "200193", "96 rows"]),
        (array("qwen2.vocab_size", 2, "96"), ["qwen2.vocab_size is a text"]),
        (lambda w: w.add_array("qwen2.block_count", [(1 << 31) - 1]), ["qwen2.block_count is 2147483647"]),
        (lambda w: w.add_float32("qwen2.block_count", 4.0), ["qwen2.block_count is 4.0"]),
        (lambda w: w.add_string("general.description", "a" * (2 << 20)), ["2097152 bytes"]),
        (array("x.long", 2, "a" * (2 << 20)), ["2097152 bytes"]),
    ],
)
def test_fields_that_no_model_has_are_refused_before_transformers_reads_them(model, tmp_path, extra, names):
    refused(write_gguf(tmp_path / "tiny.gguf", model, extra=extra), "tiny.gguf", *names)


def test_many_empty_strings_are_not_walked_through(sound, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(sound[:8] + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a"
                     + struct.pack("<IIQ", 9, 8, ENTRIES + 1) + bytes(8 * (ENTRIES + 2)))  # fmt: skip
    refused(path, "entries")


@pytest.mark.parametrize("length", [100, 2**63 - 9, 2**64 - 1])
def test_an_array_of_strings_that_exceed_any_memory_is_refused(tmp_path, length):
    field = struct.pack("<Q1sIIQQ", 1, b"a", 9, 8, 2, length)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(32))
    refused(tmp_path / "a.gguf", "array of strings")


@pytest.mark.parametrize("wrong", ["shape.layers=99", "shape.attention_layers=99"])
def test_a_shape_that_the_model_does_not_allow_is_refused_right_after_its_import(sound, tmp_path, wrong):
    world = make_world(tmp_path)
    (world / "tiny.gguf").write_bytes(sound)
    given = settings(world, model__path=world / "tiny.gguf")
    done = pipeline("run=wrong", *given, wrong, cwd=world, check=False)
    assert done.returncode == 2 and f"error: {wrong.partition('=')[0]}" in done.stdout
    assert "stage 1 of" in done.stdout and "stage 2 of" not in done.stdout
