"""Packed tokens are the documents' tokens in order, one end between documents, in whole rows."""

import numpy as np
import pytest

from pipeline.data.encoding import BATCH, BLOCK, Frame, frame
from pipeline.data.packing import Domain, Packed, build
from pipeline.data.sources import Piece
from tests.tiny_text import DOCUMENTS, byte_tokenizer


def whole(documents):
    return [Piece(text, True) for text in documents]


def pack(folder, pieces, tokenizer, sequence=16, shard_bytes=1 << 20, around=None, weight=None):
    around = around or frame(tokenizer)
    domain = Domain("texts", pieces, weight)
    build(folder, [domain], tokenizer, around, sequence, len(tokenizer), shard_bytes, lambda items, total, label: items)
    return Packed(folder)


def rows(packed):
    return np.stack([packed[i] for i in range(len(packed))])


def test_rows_are_the_documents_tokens_joined_by_eos_and_the_remainder_dropped(tmp_path):
    tokenizer = byte_tokenizer()
    expected = [id for text in DOCUMENTS for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    packed = pack(tmp_path / "packed", whole(DOCUMENTS), tokenizer)
    count = len(expected) // 16
    assert len(packed) == count and packed[0].dtype == np.int32
    assert rows(packed).ravel().tolist() == expected[: count * 16]
    result = packed.domains[0]
    assert (result["documents"], result["tokens"], result["sequences"]) == (len(DOCUMENTS), len(expected), count)
    assert result["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)


def test_a_tokenizer_that_opens_with_bos_opens_every_row_with_it(tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    assert frame(tokenizer) == Frame(tokenizer.eos_token_id, tokenizer.bos_token_id, "</s>")
    around = Frame(tokenizer.eos_token_id, None, "</s>")
    plain = pack(tmp_path / "plain", whole(DOCUMENTS), tokenizer, 15, around=around)
    opened = pack(tmp_path / "opened", whole(DOCUMENTS), tokenizer, 16)
    assert (rows(opened)[:, 0] == tokenizer.bos_token_id).all()
    assert (rows(opened)[:, 1:] == rows(plain)).all()


def test_bos_joins_documents_where_there_is_no_eos():
    tokenizer = byte_tokenizer(bos=True, eos=False)
    assert frame(tokenizer).after == tokenizer.bos_token_id


def test_a_tokenizer_without_eos_and_bos_is_refused():
    with pytest.raises(ValueError, match="neither an EOS nor a BOS token; set eos_token"):
        frame(byte_tokenizer(eos=False))


@pytest.mark.parametrize("shard_rows", [1, 3, 7, 1000])
def test_shards_of_any_size_hold_the_same_rows(tmp_path, shard_rows):
    tokenizer = byte_tokenizer()
    one = pack(tmp_path / "one", whole(DOCUMENTS), tokenizer)
    many = pack(tmp_path / "many", whole(DOCUMENTS), tokenizer, shard_bytes=shard_rows * 16 * 4)
    assert (rows(one) == rows(many)).all()
    assert len(list((tmp_path / "many").glob("*.npy"))) == -(-len(one) // shard_rows)
    assert max(shard["sequences"] for shard in many.index["shards"]) <= shard_rows


def test_pieces_of_a_document_are_tokenised_as_one_text(tmp_path):
    tokenizer = byte_tokenizer()
    pieces = [Piece(letter, i == len(text) - 1) for text in DOCUMENTS for i, letter in enumerate(text)]
    cut, uncut = pack(tmp_path / "cut", pieces, tokenizer), pack(tmp_path / "uncut", whole(DOCUMENTS), tokenizer)
    assert (rows(cut) == rows(uncut)).all() and cut.domains == uncut.domains


def test_text_longer_than_blocks_and_batches_is_kept_whole(tmp_path):
    tokenizer = byte_tokenizer(entries=260)
    count = (BATCH + 2 * BLOCK) // 50
    lines = [Piece(f"line {i} of a very long document without an end\n", False) for i in range(count)]
    packed = pack(tmp_path / "packed", [*lines, Piece("the end", True)], tokenizer, 64)
    assert packed.domains[0]["bytes"] > BATCH + BLOCK
    text = "".join(piece.text for piece in lines) + "the end"
    assert text.startswith(tokenizer.decode(rows(packed).ravel()))
    assert len(packed) * 64 > 0.9 * packed.domains[0]["tokens"] and packed.domains[0]["documents"] == 1


def test_domains_lie_one_after_the_other_each_in_whole_rows(tmp_path):
    tokenizer = byte_tokenizer()
    domains = [Domain("a", whole(DOCUMENTS[:20]), 3.0), Domain("b", whole(DOCUMENTS[20:]), 1.0)]
    build(tmp_path / "both", domains, tokenizer, frame(tokenizer), 16, len(tokenizer), 512, lambda items, *_: items)
    both = Packed(tmp_path / "both")
    alone = [pack(tmp_path / d.name, d.pieces, tokenizer) for d in domains]
    assert (rows(both) == np.concatenate([rows(packed) for packed in alone])).all()
    assert [(d["name"], d["weight"], d["sequences"]) for d in both.domains] == [
        ("a", 3.0, len(alone[0])),
        ("b", 1.0, len(alone[1])),
    ]


def test_rows_outside_are_refused(tmp_path):
    packed = pack(tmp_path / "packed", whole(DOCUMENTS), byte_tokenizer())
    for row in (-1, len(packed)):
        with pytest.raises(IndexError):
            packed[row]
