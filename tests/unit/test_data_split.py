"""A split of a text loses nothing and repeats nothing."""

import json

import pytest

from pipeline.data.sources import locate, read
from pipeline.data.split import Part, assign, passages

PURPOSES = ("calibration", "recovery", "evaluation")


def corpora(**given):
    return {purpose: [locate(str(path)) for path in given.get(purpose, [])] for purpose in PURPOSES}


def spans(parts):
    return {purpose: [(part.start, part.stop) for part in several] for purpose, several in parts.items()}


@pytest.fixture
def book(tmp_path):
    paragraphs = [f"Paragraph {i} of the book.\n{'words ' * (i % 7)}\n\n" for i in range(200)]
    (tmp_path / "book.txt").write_text("".join(paragraphs))
    return tmp_path / "book.txt"


@pytest.fixture
def records(tmp_path):
    lines = [json.dumps({"text": f"Record {i}.\n\n{'words ' * (i % 11)}"}) for i in range(150)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    return tmp_path / "records.jsonl"


@pytest.mark.parametrize("source", ["book", "records", "builtin:topics"])
def test_the_three_parts_of_a_shared_text_make_up_the_text_in_order(source, request):
    given = source if source.startswith("builtin:") else request.getfixturevalue(source)
    parts = assign(corpora(calibration=[given], recovery=[given], evaluation=[given]), 0.2, 0.3)
    assert spans(parts) == {"evaluation": [(0, 0.2)], "calibration": [(0.2, 0.5)], "recovery": [(0.5, 1)]}
    cut = [list(passages(parts[purpose][0], "text")) for purpose in ("evaluation", "calibration", "recovery")]
    whole = list(read(locate(str(given)), "text"))
    assert [piece.text for part in cut for piece in part] == [piece.text for piece in whole]
    assert all(part[-1].ends for part in cut), "a document cut at an edge ends there"
    lengths = [sum(len(piece.text) for piece in part) for part in cut]
    largest = max(len(piece.text) for piece in whole)
    for length, share in zip(lengths, (0.2, 0.3, 0.5)):
        assert abs(length - share * sum(lengths)) <= largest + 1


def test_an_edge_between_two_records_gives_the_second_to_the_later_part(tmp_path):
    (tmp_path / "ten.jsonl").write_text("".join(f'{{"text": "Record {i}"}}\n' for i in range(10)))
    corpus = locate(str(tmp_path / "ten.jsonl"))
    cut = [
        [piece.text[-1] for piece in passages(Part(corpus, *span), "text")] for span in ((0, 0.2), (0.2, 0.5), (0.5, 1))
    ]
    assert ["".join(part) for part in cut] == ["01", "234", "56789"]


def test_records_are_never_cut(records):
    part = Part(locate(str(records)), 0.1, 0.6)
    assert all(piece.ends and piece.text.startswith("Record") for piece in passages(part, "text"))


@pytest.mark.parametrize(
    "users, expected",
    [
        (("calibration", "recovery"), {"calibration": [(0, 1)], "recovery": [(0, 1)], "evaluation": []}),
        (("calibration", "evaluation"), {"calibration": [(0.2, 1)], "recovery": [], "evaluation": [(0, 0.2)]}),
        (("recovery", "evaluation"), {"calibration": [], "recovery": [(0.2, 1)], "evaluation": [(0, 0.2)]}),
        (("evaluation",), {"calibration": [], "recovery": [], "evaluation": [(0, 1)]}),
    ],
)
def test_only_evaluated_texts_are_split_and_only_among_their_users(book, users, expected):
    assert spans(assign(corpora(**{user: [book] for user in users}), 0.2, 0.3)) == expected


def test_each_text_of_a_list_is_split_by_itself(book, records):
    parts = assign(corpora(calibration=[records], recovery=[book, records], evaluation=[book]), 0.2, 0.3)
    assert spans(parts) == {"calibration": [(0, 1)], "recovery": [(0.2, 1), (0, 1)], "evaluation": [(0, 0.2)]}


@pytest.mark.parametrize("evaluation, calibration, purpose", [(0.0, 0.3, "evaluation"), (0.2, 0.0, "calibration")])
def test_a_share_of_nothing_is_refused(book, evaluation, calibration, purpose):
    with pytest.raises(ValueError, match=f"data.split leaves {purpose} no part of .*book.txt"):
        assign(corpora(calibration=[book], recovery=[book], evaluation=[book]), evaluation, calibration)


def test_a_text_inside_an_evaluated_folder_is_refused(book):
    with pytest.raises(ValueError, match="data.evaluation.path .* overlaps data.recovery.path .*book.txt"):
        assign(corpora(recovery=[book], evaluation=[book.parent]), 0.2, 0.3)
    assign(corpora(recovery=[book], calibration=[book.parent]), 0.2, 0.3)


def test_a_text_given_twice_to_one_purpose_is_refused(book):
    with pytest.raises(ValueError, match="data.recovery.path names .*book.txt twice"):
        assign(corpora(recovery=[book, book.parent / "." / "book.txt"]), 0.2, 0.3)
