"""The tokens stage keeps evaluation apart, prints what it split, and starts afresh when a text changes."""

import json
import os
import random

import pytest

from pipeline.data.overlap import COMMON
from pipeline.data.packing import Packed
from pipeline.stages.prepare import tokens
from pipeline.stages.texts import PURPOSES
from tests.tiny_text import byte_tokenizer, configured, run_tokens


def book(path, name):
    path.write_text("".join(f"{name}, paragraph {i}: words that stand nowhere else.\n\n" for i in range(120)))
    return path


def text_of(folder):
    packed = Packed(folder)
    return byte_tokenizer().decode([id for i in range(len(packed)) for id in packed[i]])


def paragraphs(folder):
    """The numbers of the paragraphs that a packed folder holds a part of."""
    return {int(part.partition(":")[0]) for part in text_of(folder).split("paragraph ")[1:] if ":" in part}


def test_a_text_of_all_purposes_is_split_said_and_recorded(tmp_path, capsys):
    path = book(tmp_path / "book.txt", "Book")
    config = configured(*(f"data.{purpose}.path={path}" for purpose in PURPOSES), "data.split.evaluation=0.2")
    record = run_tokens(config, tmp_path)
    evaluated = paragraphs(tmp_path / "out/evaluation/00-book")
    calibrated, recovered = paragraphs(tmp_path / "out/calibration"), paragraphs(tmp_path / "out/recovery")
    assert evaluated and calibrated and recovered
    assert max(evaluated) < min(calibrated) <= max(calibrated) < min(recovered)
    shares = "evaluation 0% to 20%, calibration 20% to 50%, recovery 50% to 100%"
    assert f"{path} is split, contiguously: {shares}" in capsys.readouterr().out
    assert {purpose: (part["start"], part["stop"]) for purpose, (part,) in record["parts"].items()} == {
        "evaluation": (0, 0.2),
        "calibration": (0.2, 0.5),
        "recovery": (0.5, 1),
    }
    assert record["recovery"]["sequences"] == len(Packed(tmp_path / "out/recovery"))


def test_every_evaluated_text_is_a_domain_of_its_own_and_mixtures_carry_weights(tmp_path):
    a, b, c = (book(tmp_path / f"{name}.txt", name) for name in ("a", "b", "some text"))
    config = configured(
        f"data.recovery.path=[{a},{b}]",
        "data.recovery.weights=[3,1]",
        f"data.evaluation.path=[{c.parent}/some\\ text.txt,builtin:topics]",
        f"data.calibration.path={a}",
    )
    record = run_tokens(config, tmp_path)
    assert sorted(os.listdir(tmp_path / "out/evaluation")) == ["00-some-text", "01-topics"]
    assert [domain["weight"] for domain in Packed(tmp_path / "out/recovery").domains] == [3.0, 1.0]
    assert set(record["evaluation"]) == {"00-some-text", "01-topics"}
    assert text_of(tmp_path / "out/calibration").startswith("a, paragraph 0")


@pytest.mark.parametrize("change", [None, "place", "time", "spelling", "middle", "length", "kind", "share"])
def test_tokens_are_named_by_what_a_text_holds_and_not_by_where_or_since_when_it_lies(tmp_path, monkeypatch, change):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    path = book(tmp_path / "book.txt", "Book")

    def named(path, *more):
        return tokens.settings(configured(*(f"data.{purpose}.path={path}" for purpose in PURPOSES), *more))

    before, more = named(path), []
    if change == "place":
        path = path.rename(tmp_path / "there" / "book.txt")
    elif change == "time":
        os.utime(path, ns=(0, 7))
    elif change == "spelling":
        path = "./book.txt"
    elif change == "middle":
        path.write_text(path.read_text().replace("paragraph 60:", "paragraph 61:"))
    elif change == "length":
        path.write_text(path.read_text() + "More.")
    elif change == "kind":
        path = path.rename(tmp_path / "book.md")
    elif change == "share":
        more = ["data.split.evaluation=0.2"]
    assert (named(path, *more) == before) == (change in (None, "place", "time", "spelling"))


def test_a_folder_of_another_name_is_another_text_as_reports_tell_names(tmp_path):
    (tmp_path / "old").mkdir()
    book(tmp_path / "old" / "book.txt", "Book")
    before = tokens.settings(configured(f"data.evaluation.path={tmp_path}/old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert tokens.settings(configured(f"data.evaluation.path={tmp_path}/new")) != before


def words(*seeds, count=40):
    """Return a text of random words for each seed."""
    texts = []
    for seed in seeds:
        draw = random.Random(seed)
        texts.append(" ".join("".join(draw.choices("abcdefghij", k=draw.randint(3, 8))) for _ in range(count)))
    return texts


def packed_text(folder):
    return " ".join(text_of(folder).split())


@pytest.mark.parametrize("purpose", ["calibration", "recovery"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_pieces_that_share_a_run_with_evaluation_are_left_out_of_a_text_and_counted(tmp_path, capsys, purpose, kind):
    """A quotation inside a longer piece, in other lines than in evaluation, is found; what is not shared stays."""
    own, evaluated = words(*range(30)), words(*range(100, 110), count=60)
    quoting = [own[3] + " " + " ".join(evaluated[4].split()[20:50]) + " " + own[4], own[20] + " " + evaluated[7]]
    pieces = [*own[:10], quoting[0], *own[10:20], quoting[1], *own[21:]]
    (tmp_path / "evaluation.txt").write_text("\n\n".join(evaluated))
    if kind == "txt":
        (tmp_path / "own.txt").write_text("\n\n".join(pieces))
    else:
        (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in pieces))
    config = configured(f"data.evaluation.path={tmp_path}/evaluation.txt", f"data.{purpose}.path={tmp_path}/own.{kind}")
    record = run_tokens(config, tmp_path)
    other = "recovery" if purpose == "calibration" else "calibration"
    assert record["left_out"][other] == {"pieces": 0, "tokens": 0}
    counts = record["left_out"][purpose]
    assert counts["pieces"] == 2
    assert counts["tokens"] == pytest.approx(sum(len(byte_tokenizer()(text)["input_ids"]) for text in quoting), abs=8)
    text = packed_text(tmp_path / "out" / purpose)
    assert own[0] in text and own[12] in text and evaluated[4].split()[30] not in text.split()
    shared = record["left_out"]["evaluation"]["00-evaluation"]
    assert 0 < shared["shared_tokens"] < shared["tokens"]
    assert f"2 pieces of {purpose} left out" in capsys.readouterr().out


def test_runs_of_many_pieces_are_no_leak(tmp_path):
    """As the system prompt of a chat template, which every record has; one that few pieces have is a leak."""
    frame, records = words(7, count=30)[0], words(*range(200, 240))
    for name, texts in {"evaluation": records[:8], "recovery": records[8:]}.items():
        lines = [json.dumps({"text": f"{frame} {text}"}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = [f"data.{name}.path={tmp_path}/{name}.jsonl" for name in ("evaluation", "recovery")]
    assert run_tokens(configured(*paths), tmp_path)["left_out"]["recovery"]["pieces"] == 0
    few = (tmp_path / "recovery.jsonl").read_text().splitlines(keepends=True)[:COMMON]
    unlike = [json.dumps({"text": text}) + "\n" for text in words(*range(300, 330))]
    (tmp_path / "recovery.jsonl").write_text("".join([*few, *unlike]))
    record = run_tokens(configured(*paths), tmp_path / "few")
    assert record["left_out"]["recovery"]["pieces"] == COMMON
    assert record["recovery"]["domains"][0]["documents"] == 30


def test_an_attempt_that_was_cut_off_leaves_nothing_behind(tmp_path):
    config = configured("data.sequence_length=64")
    run_tokens(config, tmp_path / "a")
    once, twice = tmp_path / "a/out", tmp_path / "b/out"
    (twice / "recovery").mkdir(parents=True)
    (twice / "recovery/00009.npy").write_bytes(b"half")
    run_tokens(config, tmp_path / "b")
    files = [path.relative_to(once) for path in once.rglob("*") if path.is_file()]
    assert len(files) == 7
    assert all((once / file).read_bytes() == (twice / file).read_bytes() for file in files)
    assert not (twice / "recovery/00009.npy").exists()


def test_evaluated_texts_of_one_name_are_told_apart_by_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        book(tmp_path / name / "test.txt", name)
    record = run_tokens(configured(f"data.evaluation.path=[{tmp_path}/a/test.txt,{tmp_path}/b/test.txt]"), tmp_path)
    assert list(record["evaluation"]) == ["00-test", "01-test-2"]


def test_settings_follow_the_texts_and_their_parts_and_nothing_else(tmp_path):
    path = book(tmp_path / "book.txt", "Book")
    given = f"data.recovery.path={path}"
    before = tokens.settings(configured(given))
    json.dumps(before)
    assert tokens.settings(configured(given, "distill.tokens=99", "seed=5")) == before
    assert tokens.settings(configured(given, "data.sequence_length=64")) != before
    assert tokens.settings(configured(given, "data.split.evaluation=0.2")) != before
    path.write_text(path.read_text() + "more")
    assert tokens.settings(configured(given)) != before


def test_settings_ignore_the_shares_of_a_split_that_does_not_happen(tmp_path):
    given = [f"data.evaluation.path={book(tmp_path / 'book.txt', 'Book')}"]
    assert tokens.settings(configured(*given)) == tokens.settings(configured(*given, "data.split.evaluation=0.2"))
