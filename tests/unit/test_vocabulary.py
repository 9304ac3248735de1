"""The laws of a tokenizer with fewer pieces: kept pieces are found as before, and any text still has its pieces."""

import json
from collections import Counter
from itertools import product

import pytest
from tokenizers import Tokenizer
from transformers import GemmaTokenizer, GPT2Tokenizer, LlamaTokenizer, T5Tokenizer

from pipeline.model.token_ids import Renumbering
from pipeline.prune.vocabulary.choice import kept_tokens
from pipeline.prune.vocabulary.pieces import BYTES, merge_of, pieces_of
from pipeline.prune.vocabulary.tokenizer_file import renumbered_settings, renumbered_tokenizer
from pipeline.runtime.model_loader import load_tokenizer
from tests.tiny_tokenizers import KINDS, LINES, PROBES


@pytest.fixture(scope="module", params=KINDS)
def core(request):
    return KINDS[request.param]()


def counts_of(core: Tokenizer, lines: list[str], size: int) -> list[int]:
    found = Counter(number for line in lines for number in core.encode(line, add_special_tokens=False).ids)
    return [found[number] for number in range(size)]


def pruned(core: Tokenizer, size: int, lines: list[str] = LINES[1:2], rows: int | None = None):
    """Return the kept tokens, the tokenizer that has them, and its JSON; `rows`: of the model, by default all."""
    document, rows = json.loads(core.to_str()), rows or core.get_vocab_size()
    pieces = pieces_of(document)
    added = [token["id"] for token in document["added_tokens"]]
    kept = kept_tokens(pieces, counts_of(core, lines, rows), added, size)
    edited = renumbered_tokenizer(document, Renumbering.of(kept, rows))
    return kept, Tokenizer.from_str(json.dumps(edited)), edited


def fewest(core: Tokenizer) -> int:
    document = json.loads(core.to_str())
    pieces = pieces_of(document)
    always = pieces.always() | {token["id"] for token in document["added_tokens"]}
    return len(set().union(*(pieces.parts(token) for token in always)))


def sizes(core: Tokenizer) -> list[int]:
    least, most = fewest(core), core.get_vocab_size()
    return [least, least + 5, (least + most) // 2, most - 1]


def texts():
    words = ["low", "lowest", " slow", "new", " newer", " wide", "est", " the", "é", "  ", "\n", "x1", "世", "<s>"]
    return [*PROBES, *("".join(each) for each in product(words, repeat=2))]


def test_a_text_of_kept_pieces_has_the_same_pieces_under_their_new_ids(core):
    met = 0
    for size in sizes(core):
        kept, fewer, _ = pruned(core, size)
        new = Renumbering.of(kept, core.get_vocab_size())
        for text in texts():
            for special in (False, True):
                before, after = (each.encode(text, add_special_tokens=special) for each in (core, fewer))
                if set(before.ids) <= set(kept):
                    met += 1
                    assert after.ids == [new[number] for number in before.ids]
                    assert after.tokens == before.tokens
    assert met > 100


def test_any_text_keeps_what_it_decodes_to(core):
    for size in sizes(core):
        _, fewer, _ = pruned(core, size)
        for text in texts():
            before, after = (
                each.decode(each.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
                for each in (core, fewer)
            )
            assert after == before, size


def test_keeping_everything_changes_nothing(core):
    kept, _, edited = pruned(core, core.get_vocab_size())
    assert kept == tuple(range(core.get_vocab_size()))
    assert edited == json.loads(core.to_str())
    assert pruned(core, core.get_vocab_size() + 10)[2] == edited


def test_a_tokenizer_has_as_many_tokens_as_asked_for_and_always_its_bytes_and_added_tokens(core):
    document = json.loads(core.to_str())
    added = {token["content"] for token in document["added_tokens"]}
    ids = pieces_of(document).ids
    for size in sizes(core):
        kept, fewer, _ = pruned(core, size)
        names = {core.id_to_token(number) for number in kept}
        assert len(kept) == size == fewer.get_vocab_size()
        assert list(kept) == sorted(kept)
        assert added <= names
        assert not set(BYTES) <= ids.keys() or set(BYTES) <= names
        assert {fewer.token_to_id(name) for name in names} == set(range(size))


def test_the_most_frequent_pieces_stay(core):
    """The pieces of a text that a tokenizer was pruned for are fewer than those of one pruned for another text."""
    size, text = (2 * fewest(core) + core.get_vocab_size()) // 3, LINES[0]
    counts = counts_of(core, [text], core.get_vocab_size())
    kept, own, _ = pruned(core, size, [text])
    _, other, _ = pruned(core, size, ["für Größte Größte"] * 2)
    lengths = [len(each.encode(text, add_special_tokens=False).ids) for each in (own, other)]
    assert lengths[0] < lengths[1]
    assert max(range(len(counts)), key=counts.__getitem__) in kept


def test_fewer_tokens_than_always_remain_are_refused(core):
    with pytest.raises(ValueError, match=r"budget\.vocabulary"):
        pruned(core, fewest(core) - 1)


def test_tokens_beyond_the_models_rows_stay_beyond_them(core):
    """As Gemma 3's token of an image, which the text model has no row for."""
    core = Tokenizer.from_str(core.to_str())
    rows = core.get_vocab_size()
    core.add_special_tokens(["<image>"])
    size = fewest(core) + 5
    kept, fewer, _ = pruned(core, size, rows=rows)
    assert max(kept) < rows and fewer.token_to_id("<image>") == size


def test_rows_without_a_token_are_removed_first(core):
    rows = core.get_vocab_size()
    assert pruned(core, rows, rows=rows + 20)[0] == tuple(range(rows))


def test_every_piece_that_stays_can_be_made(core):
    """Of BPE: each kept piece is what the pruned tokenizer makes of its own text."""
    document = json.loads(core.to_str())
    if document["model"]["type"] == "BPE":
        kept, _, edited = pruned(core, sizes(core)[2])
        before, after = pieces_of(document), pieces_of(edited)
        for piece, number in after.ids.items():
            assert len(after.parts(number)) == len(before.parts(kept[number])), piece


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("BPE with byte fallback", LlamaTokenizer),
        ("BPE with byte fallback", GemmaTokenizer),
        ("byte-level BPE", GPT2Tokenizer),
        ("Unigram", T5Tokenizer),
    ],
)
def test_classes_that_build_their_tokenizer_from_the_pieces_load_the_pruned_one(kind, cls, tmp_path):
    model = json.loads(KINDS[kind]().to_str())["model"]
    vocab = [tuple(piece) for piece in model["vocab"]] if kind == "Unigram" else model["vocab"]
    merges = {"merges": list(map(merge_of, model["merges"]))} if "merges" in model else {}
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    cls(vocab=vocab, **merges, **names).save_pretrained(tmp_path / "whole")
    whole = load_tokenizer(tmp_path / "whole")
    core = whole.backend_tokenizer
    kept, _, edited = pruned(core, sizes(core)[2])
    new = Renumbering.of(kept, len(whole))
    config = json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text())
    (tmp_path / "fewer").mkdir()
    for name, fields in (("tokenizer.json", edited), ("tokenizer_config.json", renumbered_settings(config, new))):
        (tmp_path / "fewer" / name).write_text(json.dumps(fields))
    fewer = load_tokenizer(tmp_path / "fewer")
    assert isinstance(fewer, cls) and len(fewer) == len(kept)
    for text in texts():
        before, after = (each(text)["input_ids"] for each in (whole, fewer))
        assert fewer.decode(after) == whole.decode(before)
        assert not set(before) <= set(kept) or after == [new[number] for number in before]


def test_other_models_are_refused():
    document = {"model": {"type": "WordPiece", "vocab": {"[UNK]": 0}}, "added_tokens": []}
    with pytest.raises(ValueError, match="WordPiece"):
        renumbered_tokenizer(document, Renumbering.of((0,), 1))


def test_settings_with_ids_are_renumbered():
    fields = {"added_tokens_decoder": {"2": {"content": "<s>"}, "9": {"content": "<image>"}}, "bos_token": "<s>"}
    assert renumbered_settings(fields, Renumbering.of((2, 4), 8)) == fields | {
        "added_tokens_decoder": {"0": {"content": "<s>"}, "3": {"content": "<image>"}}
    }
