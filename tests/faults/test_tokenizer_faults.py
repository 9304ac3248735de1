"""Tokenizers and generation settings of a model folder: accepted, left out, or refused by name."""

import base64
import json

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.runtime.model_loader import load_model, load_tokenizer
from pipeline.runtime.model_source import generation_of
from pipeline.runtime.tokenizer_check import check_fits, difference
from pipeline.stages.deliver import export
from pipeline.stages.prepare import teacher
from tests.model_folders import edit
from tests.students import imported, machine
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import byte_tokenizer, configured


@pytest.fixture
def folder(tmp_path):
    """Return a sound tied Llama in a folder."""
    return save_tiny(tiny_model("llama-tied", dtype=torch.float32), tmp_path / "model")


# Tokenizers
def grown(token, special):
    tokenizer = byte_tokenizer(entries=300)
    tokenizer.add_tokens([token], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_beyond_the_vocabulary_that_no_text_yields_is_accepted(special):
    tokenizer = grown("<image_soft_token>", special)
    check_fits(tokenizer, len(tokenizer) - 1)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused():
    tokenizer = byte_tokenizer(entries=300)
    with pytest.raises(ValueError, match=f"has id {len(tokenizer) - 3}"):
        check_fits(tokenizer, len(tokenizer) - 3)


def test_an_end_token_beyond_the_vocabulary_is_refused():
    tokenizer = grown("<end>", True)
    tokenizer.eos_token = "<end>"
    with pytest.raises(ValueError, match="eos_token"):
        check_fits(tokenizer, len(tokenizer) - 1)


def test_the_ids_of_two_tokenizers_are_compared(tmp_path):
    one = byte_tokenizer(entries=300)
    assert difference(one, byte_tokenizer(entries=300), 300) is None
    assert difference(one, grown("<more>", True), len(one)) is None
    assert difference(one, byte_tokenizer(entries=299), 300)
    one.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["model"]["merges"] = fields["model"]["merges"][::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert difference(one, load_tokenizer(tmp_path), 300)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen2", "Gemma", "Cohere", "T5", "Bert"])
def test_a_tokenizer_without_its_vocabulary_is_refused(kind, folder):
    """transformers makes an empty tokenizer of the class."""
    byte_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    edit(folder, "tokenizer_config.json", tokenizer_class=f"{kind}Tokenizer")
    with pytest.raises(ValueError, match=f"tokenizer in {folder} has no vocabulary.*tokenizer.json, tokenizer.model"):
        load_tokenizer(folder)


def test_a_vocabulary_of_whole_words_is_one(folder):
    words = {"<unk>": 0} | {f"word{number}": number + 1 for number in range(90)}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", eos_token="<unk>").save_pretrained(folder)
    assert load_tokenizer(folder)("word3 word7")["input_ids"] == [4, 8]


def replacing(pattern, content, count):
    return {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": pattern, "content": content}] * count}


def template(pieces, ids=1):
    named = {"<s>": {"id": "<s>", "ids": [0] * ids, "tokens": ["<s>"] * ids}}
    parts = {"single": pieces, "pair": pieces, "special_tokens": named}
    return {"type": "TemplateProcessing", **parts}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
CHARSMAP = base64.b64encode(bytes(4) + b"a" * 2000 + b"\0").decode()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("file", "fields", "named"),
    [
        ("tokenizer.json", {"normalizer": replacing({"String": "a"}, "a" * 32, 7)}, "normalizer"),
        ("tokenizer.json", {"normalizer": replacing({"Regex": "(?=.)"}, "a", 11)}, "normalizer"),
        ("tokenizer.json", {"normalizer": {"type": "Prepend", "prepend": "a" * 2000}}, "normalizer"),
        ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "normalizer"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 11}}, "pre_tokenizer"),
        ("tokenizer.json", {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 3000}}, "decoder"),
        ("tokenizer.json", {"post_processor": template([TEXT] * 2000)}, "post_processor"),
        ("tokenizer.json", {"post_processor": template([TEXT], ids=2000)}, "post_processor"),
        (
            "tokenizer.json",
            {"post_processor": {"type": "Sequence", "processors": [template([TEXT] * 4)] * 6}},
            "post_processor",
        ),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": dict.fromkeys(map(str, range(10_193)))}}, "10193"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a" * 9_000_000, 0.0]]}}, "9000000"),
        ("tokenizer.json", {"added_tokens": [ADDED | {"id": 0, "content": "a"}] * 40_000}, "added_tokens has 40000"),
        ("tokenizer.json", {"other": [0] * 3_000_000}, "entries"),
        ("tokenizer.json", {"other": [[[]]] * 600_000}, "arrays"),
        ("tokenizer_config.json", {"added_tokens_decoder": dict.fromkeys(range(40_000), ADDED)}, "decoder has 40000"),
        ("tokenizer_config.json", {"extra_ids": 1 << 40}, "extra_ids has"),
        ("special_tokens_map.json", {"additional_special_tokens": ["a"] * 40_000}, "40000"),
        ("added_tokens.json", {str(place): place for place in range(40_000)}, "40000"),
        ("vocab.json", {str(place): place for place in range(20_000)}, "20000"),
    ],
)
def test_a_tokenizer_that_would_take_all_memory_or_time_is_refused(file, fields, named, folder):
    byte_tokenizer().save_pretrained(folder)
    edit(folder, file, **fields)
    with pytest.raises(ValueError, match=f"^{folder / file}.*{named}.*fetch") as fault:
        load_tokenizer(folder)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.model"])
def test_a_large_file_of_a_tokenizer_that_is_no_json_is_refused(name, folder):
    byte_tokenizer().save_pretrained(folder)
    with (folder / name).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match=f"^{folder / name} has {1 << 30} bytes"):
        load_tokenizer(folder)


def test_a_tokenizer_whose_library_fails_inside_is_refused(folder):
    byte_tokenizer().save_pretrained(folder)
    edit(folder, "tokenizer.json", normalizer=replacing({"Regex": "(?=.)"}, "a", 10))
    with pytest.raises(ValueError, match="damaged.*PanicException"):
        load_tokenizer(folder)


def test_steps_that_published_tokenizers_have_are_accepted(folder):
    """As Llama 2, XLM-R and Llama 3 have them."""
    byte_tokenizer(bos=True).save_pretrained(folder)
    normalizer = replacing({"String": " "}, "▁", 1)
    normalizer["normalizers"] += [
        {"type": "Prepend", "prepend": "▁"},
        *replacing({"Regex": " {2,}"}, "▁", 2)["normalizers"],
    ]
    edit(folder, "tokenizer.json", normalizer=normalizer)
    assert load_tokenizer(folder)("a")["input_ids"]


# generation_config.json
GENERATION = {"stop_strings": ["User:"], "return_dict_in_generate": True, "penalty_alpha": 0.6, "top_k": 4}


WRONG = [{"num_beams": 4, "temperature": -1.0}, {"cache_implementation": "no such cache"}, {"max_new_tokens": "many"}]


def test_the_export_does_not_depend_on_generation_config(folder):
    edit(folder, "generation_config.json", **GENERATION)
    copy = imported(folder, folder.with_name("copy")).folder
    chosen = configured(f"model.path={folder}", "export.dtype=float32", "export.tolerance=1e-4")
    export.run(chosen, {"initial_student": copy}, folder.with_name("out"), machine())
    assert generation_of(folder.with_name("out")) == generation_of(folder)


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: next(iter(fields)))
def test_a_model_loads_whatever_its_generation_config_says(folder, fields):
    edit(folder, "generation_config.json", **fields)
    copy = imported(folder, folder.with_name("copy")).folder
    assert load_model(copy, torch.float32, "eager").can_generate()


def test_generation_config_names_the_export_and_not_the_teacher(folder):
    chosen = configured(f"model.path={folder}")
    before = teacher.settings(chosen), export.settings(chosen)
    edit(folder, "generation_config.json", temperature=0.5)
    assert teacher.settings(chosen) == before[0] and export.settings(chosen) != before[1]
    edit(folder, rms_norm_eps=1e-3)
    assert teacher.settings(chosen) != before[0]


def test_a_damaged_generation_config_is_left_out_and_reported(folder):
    (folder / "generation_config.json").write_text("{")
    checkpoint = imported(folder, folder.with_name("copy"))
    assert not (checkpoint.folder / "generation_config.json").exists()
    assert any("generation_config.json" in note for note in checkpoint.notes)
