"""The language check finds what it lists, where it is, and nothing else."""

import importlib.util
import subprocess
import sys

import pytest

from tests.world import ROOT

SCRIPT = ROOT / ".ci" / "check_language.py"
_spec = importlib.util.spec_from_file_location("check_language", SCRIPT)
language = importlib.util.module_from_spec(_spec)
sys.modules["check_language"] = language
_spec.loader.exec_module(language)


def test_a_phrase_is_found_on_its_line_also_across_a_line_break():
    text = "A title\n\nThe run goes\n  on where it was.\nNo hit: the category of a retold story.\nIt was told.\n"
    assert list(language.of_text(text)) == [(3, "goes on"), (6, "told")]


def test_python_is_read_in_comments_strings_names_and_docstrings():
    source = '"""Give the sum."""\n\n# it is told\ntold = f"{asked.told} goes on"\nretold = 1\n'
    assert sorted(language.of_python(source)) == [
        (1, '"Give ..."'), (3, "told"), (4, "asked"), (4, "goes on"), (4, "told"), (4, "told"),
    ]  # fmt: skip
    assert not list(language.of_python('"""Return the sum."""\n\nresumed = "the run resumes"\n'))


@pytest.mark.parametrize("phrase", language.PHRASES)
def test_every_phrase_has_a_remedy_and_is_written_once(phrase):
    assert language.PHRASES[phrase]
    assert language.remedy('"Give ..."') != language.remedy("told") == language.PHRASES["told|tells?"]


def test_released_sections_of_the_changelog_are_history(tmp_path):
    file = tmp_path / "CHANGELOG.md"
    file.write_text("# Changelog\n\n## [Unreleased]\nA line that was told.\n\n## [0.1.0]\nTold again.\n")
    assert list(language.check(file)) == [(4, "told")]


def test_names_in_code_are_no_language(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("`settle.norm` is now `regularize.norm`.\nIt settles.\n")
    assert list(language.check(file)) == [(2, "settles")]
    assert not list(language.of_python('old = {"settle.norm": "regularize.norm", "settle": "regularize"}\n'))


def test_a_file_with_a_hit_ends_the_check_with_1():
    ended = subprocess.run([sys.executable, SCRIPT, "LICENSE"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "0 phrases" in ended.stderr
