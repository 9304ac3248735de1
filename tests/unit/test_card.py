"""The model card says what the run measured and what the source states, and nothing of the machine."""

import json
import re

import pytest
import yaml

from pipeline.report.card import card, command_without_paths, plain
from pipeline.runtime.source_card import license_digests, license_files, source_facts
from tests.reports import EXPORT, GGUF, example_report

HEAD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n"


def head_and_body(text):
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(head[1]), text[head.end() :]


def made(source=(), **changed):
    return head_and_body(card(example_report() | {"export": EXPORT} | changed, dict(source)))


def test_the_metadata_is_what_the_source_states_and_what_was_made():
    source = {"base_model": "org/name", "license": "other", "license_name": "x", "license_link": "LICENSE"}
    head, body = made(source)
    assert {name: head[name] for name in source} == source
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "text-generation"
    assert {"pruned", "distillation"} <= set(head["tags"])
    assert "https://huggingface.co/org/name" in body
    bare, _ = made(recovery=None)
    assert not {"base_model", "license", "license_link", "distillation"} & {*bare, *bare["tags"]}


def test_figures_are_those_of_the_run_and_absent_where_it_measured_none():
    _, body = made()
    assert "| perplexity" not in body and "| news | 20.00 | 80.00 | 25.00 | 124 |" in body
    assert "2.00 M" in body and "1.50 M" in body and "tokens/s" in body and "No benchmark tasks were run" in body
    _, body = made(speed=None)
    assert "tokens/s" not in body and "## Speed" not in body
    tasks = {who: {"arc": {"acc": value, "acc_stderr": 0.01, "questions": 9}} for who, value in
             (("teacher", 0.5), ("student", 0.4))}  # fmt: skip
    _, body = made(tasks=tasks)
    assert "| arc | acc | 0.5 ± 0.01 | 0.4 ± 0.01 |" in body and "No benchmark tasks" not in body


def test_a_smaller_vocabulary_is_said_and_bits_per_byte_are_no_shape():
    _, body = made()
    assert "bits per byte" not in body and "tokenizer has" not in body
    report = example_report()
    report["shape"]["student"]["vocabulary"] = 64
    _, body = head_and_body(card(report | {"export": EXPORT}, {}))
    assert "64 of the teacher's 96 tokens" in body and "| vocabulary | 96 | 64 |" in body


@pytest.mark.parametrize(
    ("form", "expected", "trusted"),
    [
        ("stock", "from_pretrained", False),
        ("padded", "from_pretrained", False),
        ("own", "from_pretrained", True),
        ("decilm", "vllm serve", True),
    ],  # fmt: skip
)
def test_loading_is_shown_for_the_form(form, expected, trusted):
    _, body = made(export=EXPORT | {"form": form})
    assert expected in body and ("trust" in body) == trusted
    assert "path/to/this/folder" in body and EXPORT["folder"] not in body


@pytest.mark.parametrize("adapted", [True, False])
def test_a_gguf_is_listed_with_its_command_and_what_was_adapted(adapted):
    gguf = GGUF if adapted else GGUF | {"query_factor": 1.0, "windows": False}
    _, body = made(export=EXPORT, gguf=gguf)
    assert "model.gguf (f16, 3.00 MB)" in body and "llama-cli -m path/to/this/folder/model.gguf" in body
    assert ("scaled by 2" in body) == ("sliding window" in body) == adapted
    assert "gguf" not in made(export=EXPORT)[1]


def test_the_card_holds_no_path_and_no_secret():
    command = (
        "python -m pipeline run=a model.path=/home/me/secret-model data.recovery.path=[/data/x.jsonl,y.txt] "
        "output=out/student distill.tokens=100 --config-dir my/conf note=hf_abcdefghijkl api_token=xyz artifacts=~/a"
    )
    shown = command_without_paths(command, None)
    for private in ("/home", "me/", "secret-model", "x.jsonl", "y.txt", "out/", "my/conf", "hf_", "xyz", "~"):
        assert private not in shown, (private, shown)
    assert "run=a" in shown and "distill.tokens=100" in shown
    hub = "python -m pipeline model.path=org/name-1.5"
    assert command_without_paths(hub, "org/name-1.5") == hub
    assert "org" not in command_without_paths(hub, None)  # a relative path has the same form
    assert shown in card(example_report() | {"export": EXPORT, "command": command}, {})


def test_texts_of_the_source_stay_text():
    hostile = "x](http://e)<script>`|\n# title" + "y" * 500
    text = plain(hostile)
    assert "\n" not in text and len(text) < 200 and not re.search(r"(?<!\\)[\[\]<>|`#]", text)
    head, body = made(model=hostile)
    assert "<script>" not in body.replace("\\<script\\>", "") and body.count("\n# ") == 1
    assert set(head) == {"library_name", "pipeline_tag", "tags"}


def test_a_source_is_quoted_and_never_completed(tmp_path):
    assert source_facts(str(tmp_path), tmp_path) == {}
    assert source_facts("org/name", None) == {"base_model": "org/name"}
    (tmp_path / "README.md").write_text(HEAD)
    assert source_facts("org/name", tmp_path) == {"base_model": "org/name", "license": "apache-2.0"}
    (tmp_path / "LICENSE.txt").write_text("terms")
    (tmp_path / "Notice").write_text("notice")
    (tmp_path / "license_plate.json").mkdir()
    facts = source_facts(str(tmp_path), tmp_path)
    assert facts == {"license": "apache-2.0", "license_link": "LICENSE.txt", "license_files": ["LICENSE.txt", "Notice"]}
    (tmp_path / "README.md").unlink()
    assert source_facts(str(tmp_path), tmp_path)["license"] == "other"
    assert list(license_digests(tmp_path)) == [path.name for path in license_files(tmp_path)]
    assert license_files(None) == []


@pytest.mark.parametrize(
    "values",
    [
        {"license": "a\nb: c"},
        {"license": {"x": 1}},
        {"license": "x" * 99},
        {"license": 3},
        {"license_link": "javascript:alert(1)"},
        {"license_link": "../../etc/passwd"},
        {"license_name": "a<b>"},
    ],
)
def test_metadata_of_another_form_is_left_out(values, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(values)}\n---\n")
    assert source_facts(str(tmp_path), tmp_path) == {}


UNREADABLE = [
    "",
    "no head",
    "---\n[1]\n---\n",
    "---\na: [\n---\n",
    "---\nunclosed",
    "---\n!!python/name:os.system\n---\n",
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_card_that_cannot_be_read_says_nothing(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert source_facts(str(tmp_path), tmp_path) == {}
