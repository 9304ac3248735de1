"""What the report says of answers: the student beside the teacher, and what recovery changed."""

from pipeline.report.answers import MEANING, answer_lines
from pipeline.report.card import card
from pipeline.report.page import page
from tests.reports import EXPORT, Balanced, example_drawings, example_report

FOUND = {
    "teacher": {"perplexity": 2.0}, "student": {"perplexity": 3.0}, "kl": 0.25, "kl_error": 0.01, "agreement": 0.7,
    "greedy": {"answers": 8, "identical": 0.5, "shared": 0.75},
}  # fmt: skip
BEFORE = FOUND | {"kl": 1.5, "agreement": 0.4, "greedy": {"answers": 8, "identical": 0.0, "shared": 0.1}}


def test_the_change_of_answers_is_from_the_student_before_recovery():
    lines = {label: cells for label, *cells in answer_lines("chats", FOUND | {"start": BEFORE})}
    assert lines["KL of answers, chats, nats"] == ["", "0.2500 ± 0.0100", "from 1.5000"]
    assert lines["equal first choices, chats"] == ["", "70.0%", "from 40.0%"]
    assert lines["greedy answers up to a difference, chats"] == ["", "75.0%", "from 10.0%"]
    assert lines["perplexity of answers, chats"] == ["2.00", "3.00", "×1.50"]


def test_without_a_recovery_nothing_is_said_of_it():
    assert all(not change.startswith("from") for *_, change in answer_lines("chats", FOUND))


def with_answers(**found):
    report = example_report()
    report["perplexity"]["news"]["assistant"] = found
    return report


def test_the_page_shows_answers_in_its_headline_and_says_what_they_mean():
    report = with_answers(**FOUND, start=BEFORE)
    text = page(report, example_drawings(report))
    seen = Balanced(text)
    words = " ".join(seen.words)
    assert not seen.faults and not seen.open
    assert "KL of answers, news 0.25 70% equal first choices, KL 1.50 before recovery" in words
    assert MEANING in words
    assert MEANING not in " ".join(Balanced(page(example_report(), example_drawings(example_report()))).words)


def test_the_card_shows_answers_as_quality_and_how_to_chat():
    text = card(with_answers(**FOUND) | {"export": EXPORT, "recipe": "best"}, {})
    removed, quality = (text.index(f"## {title}") for title in ("What was removed", "Quality"))
    assert removed < quality < text.index("KL of answers, news, nats")
    assert MEANING in text and "apply_chat_template" in text
    assert "by the recipe `best`" in text and "2505.20155" not in text
    plain = card(example_report() | {"export": EXPORT}, {})
    assert "apply_chat_template" not in plain and MEANING not in plain and "2505.20155" in plain
