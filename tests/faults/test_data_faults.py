"""Every fault of a text ends in one clear line, and those a look can find are found before any work."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data import tables
from pipeline.data.encoding import frame
from pipeline.data.packing import Domain, Packed, build
from pipeline.data.sources import Piece, check, locate, read
from pipeline.stages.prepare import tokens
from pipeline.stages.texts import PURPOSES
from tests.tiny_text import byte_tokenizer, configured, run_tokens
from tests.world import environment

PROSE = "Words enough for a sequence or two, again and again. " * 20


def refused(given, match, field="text"):
    """A text that the cheap check refuses, with one line."""
    with pytest.raises(ValueError, match=match) as fault:
        check(locate(str(given)), field)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    "given, match",
    [
        ("builtin:poems", "builtin:poems is unknown; there are builtin:topics, builtin:docstrings, builtin:readmes"),
        ("no/such.jsonl", "no/such.jsonl does not exist; give a file, a folder"),
        ("nowhere", "nowhere does not exist"),
        ("/absolute/folder", "/absolute/folder does not exist"),
        ("~nosuch/x.txt", "~nosuch/x.txt does not exist .*; give the path without ~"),
    ],
)
def test_places_that_do_not_exist(given, match):
    refused(given, match)


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("table.csv", b"a,b\n", r"table.csv is a .csv file; text is read from .jsonl, .parquet"),
        ("object.json", b"{}", "object.json is a .json file"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0", "image.png is not UTF-8 text"),
        ("zeros.txt", b"text\0\0", "zeros.txt is not text: it has NUL bytes"),
        ("latin.txt", "déjà".encode("latin-1"), "latin.txt is not UTF-8 text; convert it"),
        ("a.jsonl", b"not json\n", "a.jsonl:1 is not a JSON object"),
        ("a.jsonl", b"[1, 2]\n", "a.jsonl:1 is not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl:1 has no column 'text' but body; set data.text_field"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: column 'text' holds no text and no turns, but 3; set data"),
        ("a.parquet", b"PAR1 cut", "a.parquet is not a whole parquet file; fetch it again"),
    ],
)
def test_files_that_hold_no_text(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, match)


@pytest.mark.parametrize(
    "columns, match",
    [
        ({"body": ["x"]}, "has no column 'text' but body; set data.text_field"),
        ({"text": [1]}, "column 'text' holds no text and no turns, but int64; set data.text_field"),
        ({"text": pyarrow.array([], pyarrow.string())}, "a.parquet has no rows"),
    ],
)
def test_parquet_files_that_hold_no_text(tmp_path, columns, match):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", match)


def test_parquet_files_with_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "a.parquet has 2 columns 'text'; write it with one")


def repeated(size, rows, turns=1):
    """A text that rows repeat, or turns of one row, as a dictionary of Arrow."""
    said = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows * turns, pyarrow.int32()), ["a " * (size // 2)])
    if turns == 1:
        return pyarrow.table({"text": said})
    each = pyarrow.StructArray.from_arrays([pyarrow.array(["user"] * rows * turns), said], ["role", "content"])
    edges = pyarrow.array(range(0, rows * turns + 1, turns), pyarrow.int32())
    return pyarrow.table({"text": pyarrow.ListArray.from_arrays(edges, each)})


def test_rows_that_repeat_a_long_text_are_held_one_by_one(tmp_path):
    options = {"compression": "zstd", "store_schema": False}  # strings, not dictionaries, for readers
    pyarrow.parquet.write_table(repeated(1 << 22, 600), tmp_path / "a.parquet", **options)
    before = pyarrow.total_allocated_bytes()
    rows = tables.parquet_records(tmp_path / "a.parquet", "text")
    assert {len(value) for _, (_, value) in zip(range(100), rows)} == {1 << 22}
    assert pyarrow.total_allocated_bytes() - before < 1 << 26


@pytest.mark.parametrize(
    "size, rows, turns, match",
    [
        (1 << 20, 2, 300, "a.parquet row 1 needs more than 256 MiB"),
        ((1 << 28) + 2, 1, 1, "row group 1 holds 1 rows in [0-9,]+ bytes of [0-9,]+ on disk, which is no text"),
    ],
)
def test_rows_that_outgrow_their_file_are_refused(tmp_path, size, rows, turns, match):
    pyarrow.parquet.write_table(repeated(size, rows, turns), tmp_path / "a.parquet", compression="zstd")
    refused(tmp_path / "a.parquet", match)


FLIPS = """
import sys
from pathlib import Path
from pipeline.data import tables
path = Path(sys.argv[1])
whole = path.read_bytes()
footer = int.from_bytes(whole[-8:-4], "little")
for place in range(len(whole) - 8 - footer, len(whole) - 8):
    for bit in range(3):
        data = bytearray(whole)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        try:
            tables.check_parquet(path, "text")
            list(tables.parquet_records(path, "text"))
        except ValueError:
            pass
"""


def test_no_flipped_bit_of_a_footer_ends_the_process(tmp_path):
    """As reading the metadata of a column does in Arrow."""
    table = pyarrow.table({"text": ["a b c", "d"] * 20, "turns": [[{"role": "user", "content": "x"}]] * 40})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    command = [sys.executable, "-c", FLIPS, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]


def test_saved_data_sets_that_hold_no_text(tmp_path):
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path / "other")
    refused(tmp_path / "other", "other has no column 'text' but body; set data.text_field")
    datasets.Dataset.from_dict({"text": [1]}).save_to_disk(tmp_path / "numbers")
    refused(tmp_path / "numbers", "column 'text' holds no text and no turns, but int64; set data.text_field")
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "broken")
    (tmp_path / "broken" / "state.json").write_text("{")
    refused(tmp_path / "broken", "broken is not a whole saved data set")


@pytest.mark.parametrize("key", ["_data_files", "_indices_data_files"])
@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/hosts", "..", "a\0b", "", 3])
def test_a_saved_data_set_is_read_from_its_folder_alone(tmp_path, key, name):
    for folder in ("other", "saved"):
        datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / folder)
    state = tmp_path / "saved" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {key: [{"filename": name}]}))
    refused(tmp_path / "saved", "saved/state.json names .*, which is no file in its folder; save the data set again")


def test_the_files_of_a_saved_data_set_are_those_that_its_state_names(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "beside.arrow").touch()
    state = tmp_path / "saved" / "state.json"
    shards = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    folder = locate(str(tmp_path / "saved"))
    assert [path.name for path in folder.files] == ["state.json", "dataset_info.json", *shards]
    record = json.loads(state.read_text())
    state.write_text(json.dumps(record | {"_data_files": record["_data_files"][:1]}))
    folder = locate(str(tmp_path / "saved"))
    assert [path.name for path in folder.files] == ["state.json", "dataset_info.json", shards[0]]


def test_folders_that_are_no_corpus(tmp_path):
    refused(tmp_path, "holds no files; put text in it")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    refused(tmp_path, "mixes jsonl and text files; give a folder of one kind")


def test_faults_deep_in_a_file_name_their_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 70_000 + "{\n")
    corpus = locate(str(tmp_path / "a.jsonl"))
    check(corpus, "text")
    with pytest.raises(ValueError, match="a.jsonl:70001 is not a JSON object"):
        list(read(corpus, "text"))
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 300_000 + b"\xff\xfe")
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text"):
        list(read(locate(str(tmp_path / "a.txt")), "text"))


def test_a_hub_data_set_without_network_is_one_line():
    program = "from pipeline.data.sources import locate, read; list(read(locate('no-owner/no-set'), 'text'))"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].startswith("ValueError: hub data set no-owner/no-set cannot be loaded: ")


@pytest.mark.parametrize(
    "overrides, match",
    [
        (["data.recovery.path=/no/such.txt"], "data.recovery.path: /no/such.txt does not exist"),
        (["data.evaluation.path=builtin:poems"], "data.evaluation.path: builtin:poems is unknown"),
        (["data.recovery.path=[]"], "data.recovery: .*path is empty"),
        (["data.recovery.weights=[1,2]"], "data.recovery: .*weights has 2 entries for 1 paths"),
        (["data.recovery.weights=[0]"], r"data\.recovery\.weights\.0: 0 "),
        (["+data.evaluation.weights=[1]"], r"data\.evaluation\.weights"),
        (["data.split.evaluation=0.8"], r"data\.split: .*recovery"),
        (["data.split.evaluation=0"], "data.split leaves evaluation no part of builtin:topics"),
        (["data.calibration.path=[builtin:topics,builtin:topics]"], "data.calibration.path names builtin:topics twice"),
    ],
)
def test_faults_of_the_configuration_are_found_before_any_work(overrides, match):
    with pytest.raises(ValueError, match=match):
        tokens.check(configured(*overrides))


def test_a_text_shorter_than_a_sequence_is_found_before_any_work(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="data.recovery.path: .*short.txt has at most 12 tokens, fewer than"):
        tokens.check(configured(f"data.recovery.path={tmp_path}/short.txt"))


def test_a_share_shorter_than_a_sequence_is_found_before_any_work(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": PROSE}))
    paths = [f"data.{purpose}.path={tmp_path}/one.jsonl" for purpose in PURPOSES]
    with pytest.raises(ValueError, match="data.calibration.path: .*one.jsonl from 10% to 40% has at most 0 tokens"):
        tokens.check(configured(*paths))


def test_a_text_of_fewer_tokens_than_a_sequence_is_refused_by_its_name(tmp_path):
    (tmp_path / "few.txt").write_text("again and " * 10)  # two tokens a word: found only by tokenising
    config = configured(f"data.recovery.path={tmp_path}/few.txt", "data.sequence_length=64")
    with pytest.raises(ValueError, match=r"data.recovery.path: .*few.txt has \d+ tokens, fewer than one sequence"):
        run_tokens(config, tmp_path)


def test_a_sequence_longer_than_the_models_positions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.sequence_length is 65, more than the model's 64 positions; lower it"):
        run_tokens(configured("data.sequence_length=65"), tmp_path)


def pack(folder, vocabulary):
    tokenizer = byte_tokenizer()
    domain = Domain("texts", [Piece(PROSE, True)], None)
    build(folder, [domain], tokenizer, frame(tokenizer), 16, vocabulary, 512, lambda items, total, label: items)


def test_an_id_beyond_the_models_vocabulary_is_refused(tmp_path):
    largest = max(byte_tokenizer()(PROSE)["input_ids"])
    with pytest.raises(
        ValueError, match=f"the tokenizer gives id {largest}, but the model's vocabulary has {largest} "
    ):
        pack(tmp_path / "short", largest)
    pack(tmp_path / "enough", largest + 1)


def test_a_packing_that_was_cut_off_is_refused(tmp_path):
    with pytest.raises(ValueError):
        pack(tmp_path / "packed", 200)
    with pytest.raises(ValueError, match="has no index.json: its packing was not finished"):
        Packed(tmp_path / "packed")


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_shard_is_refused(tmp_path, damage):
    pack(tmp_path / "packed", 300)
    shard = tmp_path / "packed" / "00000.npy"
    if damage == "truncated":
        os.truncate(shard, 100)
    else:
        shard.unlink()
    with pytest.raises(ValueError, match=r"00000.npy has \d+ bytes, not 640; delete the tokens artifact"):
        Packed(tmp_path / "packed")
