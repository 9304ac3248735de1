"""Texts come back whole and in order from every place they may lie in, and one place has one identity."""

import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.sources import PIECE, check, locate, read
from pipeline.data.tables import parquet_records

RECORDS = ["First record.\n\nIts second paragraph.", "Second record: é, 漢字.", "Third."]


def texts(given, field="text"):
    """The documents of a place, after its check."""
    corpus = locate(str(given))
    check(corpus, field)
    documents = [""]
    for piece in read(corpus, field):
        documents[-1] += piece.text
        if piece.ends:
            documents.append("")
    assert documents.pop() == "", "the last piece must end its document"
    return documents


def write_jsonl(path, records, field="text"):
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(records)))
    return path


def write_parquet(path, records, field="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(records))), field: records}), path)
    return path


@pytest.mark.parametrize("write, name", [(write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")])
def test_records_come_back_in_order_without_the_empty_ones(tmp_path, write, name):
    assert texts(write(tmp_path / name, [RECORDS[0], None, " \n", *RECORDS[1:]])) == RECORDS


def test_the_text_field_names_the_column(tmp_path):
    assert texts(write_jsonl(tmp_path / "a.jsonl", RECORDS, "content"), "content") == RECORDS
    assert texts(write_parquet(tmp_path / "a.parquet", RECORDS, "content"), "content") == RECORDS


@pytest.mark.parametrize("form", [None, "pandas", "numpy", "arrow"])
def test_a_saved_data_set_gives_its_records_whatever_its_format(tmp_path, form):
    table = datasets.Dataset.from_dict({"text": RECORDS, "id": [1, 2, 3]})
    table.with_format(form).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == RECORDS


def test_a_split_of_a_saved_dictionary_is_a_saved_data_set(tmp_path):
    pair = {"train": {"text": RECORDS}, "test": {"text": RECORDS[:1]}}
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict(columns) for name, columns in pair.items()})
    both.save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both" / "test") == RECORDS[:1]
    with pytest.raises(ValueError, match="holds the splits test, train; give one"):
        locate(str(tmp_path / "both"))


def test_a_folder_is_read_file_by_file_in_order_of_path_hidden_files_aside(tmp_path):
    for name, text in {"b.txt": "bee", "a/z.md": "zed", ".git/c.txt": "hidden"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert texts(tmp_path) == ["zed", "bee"]


def test_a_folder_of_shards_gives_the_records_of_all(tmp_path):
    write_parquet(tmp_path / "1.parquet", RECORDS[2:])
    write_parquet(tmp_path / "0.parquet", RECORDS[:2])
    assert texts(tmp_path) == RECORDS


@pytest.mark.parametrize("suffix", ["", ".jsonl"])
@pytest.mark.parametrize("rest", ["", '{"text": []}\n'])
def test_files_of_a_folder_that_hold_nothing_are_of_any_kind(tmp_path, suffix, rest):
    chat = [{"role": "user", "content": "Hi."}]
    (tmp_path / f"part-0{suffix}").write_text(json.dumps({"text": chat}) + "\n")
    (tmp_path / f"part-1{suffix}").write_text(rest)
    assert check(locate(str(tmp_path)), "text")


@pytest.mark.parametrize("kind", [pyarrow.string_view(), pyarrow.large_string()])
def test_the_strings_of_a_parquet_file_may_have_any_type(tmp_path, kind):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(RECORDS, kind)}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == RECORDS


@pytest.mark.parametrize(
    "listed", [pyarrow.list_, pyarrow.large_list, pyarrow.list_view, lambda kind: pyarrow.list_(kind, 1)]
)
def test_the_turns_of_a_parquet_file_may_have_any_type_of_list(tmp_path, listed):
    chat = [{"role": "user", "content": "Hi."}]
    turn = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([chat, chat], listed(turn))}), tmp_path / "a.parquet"
    )
    assert check(locate(str(tmp_path / "a.parquet")), "text")
    assert [list(value) for _, value in parquet_records(tmp_path / "a.parquet", "text")] == [chat, chat]


@pytest.mark.parametrize(
    "text",
    [
        "one\ntwo\n\nthree\n\n\nfour",
        "\n\nleading\n\nlines\n",
        "no line end",
        "word " * PIECE,
        "line\n" * PIECE,
        "é\n \nwhite between\n",
    ],
)
def test_the_paragraphs_of_a_text_file_make_up_the_file_in_bounded_pieces(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(read(locate(str(tmp_path / "a.txt")), "text"))
    assert "".join(piece.text for piece in pieces).rstrip() == text.rstrip()
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.text) for piece in pieces) <= PIECE


def test_paragraphs_break_only_where_a_blank_line_stands(tmp_path):
    (tmp_path / "a.md").write_text("one\ntwo\n\nthree\n")
    assert [piece.text for piece in read(locate(str(tmp_path / "a.md")), "text")] == ["one\ntwo\n\n", "three\n"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert texts(tmp_path / "a.txt") == ["words"]


@pytest.mark.parametrize("name, words", [("topics", "try"), ("docstrings", "argparse"), ("readmes", "install")])
def test_builtin_texts_need_no_file_and_repeat_nothing(name, words):
    found = texts(f"builtin:{name}")
    assert len(found) > 20 and len(set(found)) == len(found)
    assert words in "".join(found)
    assert found == texts(f"builtin:{name}")


def test_two_spellings_of_a_place_are_one_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "b.txt").write_text("text")
    assert locate("a.txt") == locate(str(tmp_path / "a.txt")) == locate("./link.txt")
    assert locate("a.txt") != locate("b.txt")


def test_hub_ids_are_known_by_their_form_and_files_by_their_ending():
    corpus = locate("some-owner/some.set:config-1@train[:10%]")
    assert corpus.kind == "hub" and corpus.name == "some-owner-some.set-config-1-train-10"
    with pytest.raises(ValueError, match="corpus/train.txt does not exist"):
        locate("corpus/train.txt")


def test_a_hub_data_set_is_read_by_its_id(tmp_path, monkeypatch):
    """A data set that `datasets` already holds under a hub id is read without the network."""
    write_parquet(tmp_path / "a.parquet", RECORDS)
    made = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
    prepared = os.path.dirname(made["train"].cache_files[0]["filename"])
    held = tmp_path / "hub" / "owner___texts" / "default" / "0.0.0" / "0123456789abcdef"
    held.parent.mkdir(parents=True)
    os.rename(prepared, held)
    for name in os.listdir(held):
        os.rename(held / name, held / name.replace("parquet-", "texts-"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert texts("owner/texts") == RECORDS
