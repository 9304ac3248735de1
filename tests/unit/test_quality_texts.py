"""The table's mixed-domain text, and where a student loses on a text, to the character."""

import gzip
import json
import sys
import zlib

import pytest
import torch

from pipeline.evaluation.perplexity import quality, tally
from tests.tiny import tiny_model
from tests.world import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))  # its scripts import each other as scripts do

import broad
import run
import where


def lazy_load(*blocks):
    """A lazy-load database of R as far as its strings go: compressed blocks behind their sizes."""
    return b"".join(len(block).to_bytes(4) + zlib.compress(block) for block in blocks)


def string(text):
    return b"\x00\x04\x00\x09" + len(text).to_bytes(4) + text.encode()


@pytest.mark.parametrize(
    ("passages", "content", "wanted"),
    [
        (broad.quotations, b"One.\n%\nTwo.\n%\n" + b"A.\n%\n" * 11, ["One.\n\nTwo." + "\n\nA." * 10, "A.\n\n"]),
        (broad.quotations, b"\x00\x02an index", []),
        (broad.novels, lazy_load(string("It is") + b"\x01\x02" + string("a truth"), string("")), ["It is\na truth\n"]),
        (broad.sections("=head1"), b"=head1 A\n\nx\n\n=head1 B\n\ny", ["=head1 A\n\nx\n", "=head1 B\n\ny"]),
        (broad.sections("## "), gzip.compress(b"# A\n### a\n## B"), ["# A\n### a", "## B"]),
        (broad.page, b"as it is\n", ["as it is\n"]),
        (broad.page, gzip.compress(b"packed\n"), ["packed\n"]),
        (broad.entries(), gzip.compress(b"Ab, n.\n   The hub.\nBa"), ["Ab, n.\n   The hub.\n\nBa"]),
        (broad.entries("[A-Z-]{2,}, "), b"ABLE, adj.  So\nso.\nBAD-LY, adv.", ["ABLE, adj.  So\nso.\n\nBAD-LY, adv."]),
        (
            broad.spoken(broad.STRING),
            b'{"%s": "short", "text": "%s \\"No.\\"",\n "a": "%s\n"}' % ((b"x" * 60,) * 3),
            ["x" * 60 + "\n\n" + "x" * 60 + ' \\"No.\\"'],
        ),
        (broad.spoken('_"(.+)"'), b'[a]\n b=_"Well?"\n[/a]' + b'_"So."\n' * 40, ["Well?" + "\n\nSo." * 39, "So."]),
        (
            broad.spoken(broad.LINE),
            b'\tlog "%s"\n\t`%s`\n\t`short`\nname "%s"' % ((b"x" * 40,) * 3),
            ["x" * 40 + "\n\n" + "x" * 40],
        ),
        (broad.shown, b"<head>t</head><p>A <b>page</b></p><script>x</script><p>ends", ["A page\n\nends"]),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_kind_of_text_becomes_passages(passages, content, wanted):
    assert list(passages(content)) == wanted


def test_passages_are_spread_over_the_whole():
    passages = [str(number) * 10 for number in range(10)]
    assert broad.spread(passages, 50) == passages[::2]
    assert broad.spread(passages, 1000) == passages


@pytest.mark.parametrize("name", ["broad", "wide"])
def test_what_rows_are_measured_on_is_left_out_and_the_rest_is_read(name, tmp_path, monkeypatch):
    """A passage that shares 13 words with an unseen text goes, marks and capitals apart; one that shares 12 stays."""
    words = [f"word{number}" for number in range(20)]
    texts, folder = tmp_path / "texts", tmp_path / "unpacked"
    texts.mkdir()
    (texts / "jargon.txt").write_text(" ".join(words[:13]))
    (texts / "readmes.jsonl").write_text(json.dumps({"text": "nothing of it"}))
    stays, goes = ", ".join(words[1:]) + " more" * 40, "; ".join(words).upper() + " more" * 40
    (folder / "here").mkdir(parents=True)
    for file, text in (("a", stays), ("b", goes), ("c", "too short")):
        (folder / "here" / f"{file}.txt").write_text(text)
    (folder / "more").mkdir()
    (folder / "more" / "a.md").write_text("more " * 99)
    here, more = broad.Kind("here", "*.txt", broad.page), broad.Kind("more", "*.md", broad.page)
    requested = ["--set", name] if name != "broad" else []
    monkeypatch.setattr(sys, "argv", ["broad.py", *requested, "--out", str(texts), "--folder", str(folder)])
    broad.main({"broad": (here,), "wide": (here, more)})
    records = [json.loads(line)["text"] for line in (texts / f"{name}.jsonl").read_text().splitlines()]
    assert records == [stays] + ["more " * 99] * (name == "wide")
    assert run.located(name, texts) == str(texts / f"{name}.jsonl")


@pytest.mark.parametrize("missing", ["jargon", "package", "files"])
def test_text_of_many_kinds_is_refused_without_what_it_needs(missing, tmp_path, monkeypatch):
    if missing != "jargon":
        (tmp_path / "jargon.txt").write_text("a lexicon")
    if missing == "files":
        (tmp_path / "unpacked" / "fortunes").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["broad.py", "--out", str(tmp_path), "--folder", str(tmp_path / "unpacked")])
    result = {"jargon": "has no jargon.txt", "package": "fortunes does not exist", "files": "fortunes has no text in"}
    with pytest.raises(SystemExit, match=result[missing]):
        broad.main()
    assert not (tmp_path / "broad.jsonl").exists()


def test_tokens_are_named_by_what_they_are_and_whether_they_can_be_copied():
    result = {1: " the", 2: "re", 3: "3.11", 4: "\n", 5: "->", 6: " x1"}
    assert where.kinds([[1, 2, 3, 4, 5, 6], [1, 2]], result) == [
        "new rest of a word", "new number", "new space", "new mark", "new number", "new rest of a word"
    ]  # fmt: skip
    assert where.kinds([[1, 2, 5, 1, 2, 5]], result) == [
        "new rest of a word", "new mark", "new word", "new rest of a word", "seen mark"
    ]  # fmt: skip


def test_what_kinds_lose_adds_up_to_the_perplexity_over_the_dense_models():
    """Shares are of the whole, and the whole is what the pipeline measures as perplexity."""
    models = [tiny_model("llama", seed=seed).eval() for seed in (0, 1)]
    rows = torch.randint(models[0].config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    dense, student = (where.loss_of(model, rows) for model in models)
    perplexities = [quality(tally(model, [rows], 64), 1).perplexity for model in models]
    *lines, _, last = where.table(["a"] * 8 + ["b"] * 16, dense, student)
    assert float(last.split()[1]) == pytest.approx(perplexities[1] / perplexities[0], rel=1e-3)
    means = (student - dense).mean(1)
    assert float(last.split()[3]) == pytest.approx(float(last.split()[1]) * float(means.std()) / 3**0.5, abs=1e-3)
    extra = (student - dense).flatten().split([8, 16])
    rows_told = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2:]}
    for name, part, share in zip("ab", extra, (1 / 3, 2 / 3), strict=True):
        assert rows_told[name][1] == f"{share:.1%}" and rows_told[name][3] == f"{float(part.mean()):.2f}"
        assert rows_told[name][4] == f"{float(part.sum() / sum(each.sum() for each in extra)):.0%} |"
