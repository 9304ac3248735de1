"""What the report says of answers: the student beside the teacher, and what recovery changed."""

from pipeline.report.answers import answer_lines

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
