"""Check that the repository's text is plain technical English: no phrase of the list below, no docstring "Give ...".

    python .ci/check_language.py                 print every hit as file:line, exit with 1 where there is one
    python .ci/check_language.py --list          print the number of hits of each file, most first
    python .ci/check_language.py FILE FOLDER     the same, of these alone

In Python files comments, strings and the names in NAMES are read; in Markdown all but code spans; in others every line.
Released sections of CHANGELOG.md are history and are left as they are.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".sh", ".sbatch", ".html", ".toml")
EXEMPT = (".ci/check_language.py", "tests/docs/test_language.py")  # the list itself, and the test that quotes it
PHRASES = {  # regular expression, matched without regard to case: what to write in its place
    r"told|tells?": "reported, prints, means; name what reports",
    r"asked": "requested, requires, configured",
    r"go(es)? on|went on": "resume, continue",
    r"go(es)? by": "are selected by",
    r"stands? (for|in(?! for\b)|at|there|here|beside|on|under|as|between)": "is; say what it is",
    r"anew": "again",
    r"learnt": "learned, trained",
    r"mend(s|ed|ing)?": "correct, compensate for",
    r"settl(e|es|ed|ing)(?!\.\w|[\"'`*\]])": "regularize, solve",  # as a word, not as the name of a former setting
    r"sift(s|ed|ing)?": "filter, rank",
    r"as it (then )?is(?= cut\b|[.,;:)]|$)": "the current model, unchanged",
    r"sure to( about)? a": "standard error",
    r"makes? (it )?good for|made good for": "compensates for",
    r"(text|tokens) of (all|many|more) kinds|of more kinds": "mixed-domain text",
    r"learns? by (itself|themselves)": "local distillation",
    r"the whole line|the recipe's line|its line ends": "the pipeline, the recipe's stages",
    r"(gives?|gave) no sign of life": "sent no heartbeat",
}
NAMES = ("told", "asked")  # local names of no meaning
OPENING = re.compile(r"(give|gives|tell|tells|let|lets|ask|asks|say|says)\b", re.IGNORECASE)
PATTERN = re.compile(
    r"\b(" + "|".join(f"(?:{phrase})" for phrase in PHRASES).replace(" ", " +") + r")\b", re.IGNORECASE
)


class Hit(NamedTuple):
    """One banned phrase: its line, counted from 1, and its words."""

    line: int
    words: str


def main() -> int:
    """Print the hits of the files named, or of all tracked ones; return 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="files and folders; default: all that git tracks")
    parser.add_argument("--list", action="store_true", help="print counts per file")
    options = parser.parse_args()
    found = {path: hits for path in tracked(options.paths) if (hits := list(check(path)))}
    if options.list:
        for path, hits in sorted(found.items(), key=lambda item: -len(item[1])):
            most = Counter(hit.words.lower() for hit in hits).most_common(6)
            words = ", ".join(f"{word} {count}" for word, count in most)
            print(f"{len(hits):5d}  {path.relative_to(ROOT)}  ({words})")
    else:
        for path, hits in found.items():
            for hit in hits:
                print(f"{path.relative_to(ROOT)}:{hit.line}: {hit.words!r}: {remedy(hit.words)}")
    print(f"{sum(map(len, found.values()))} phrases in {len(found)} files", file=sys.stderr)
    return 1 if found else 0


def tracked(paths: list[Path]) -> list[Path]:
    """Return the text files that git tracks, all of them or those at and below `paths`."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *(str(path.resolve()) for path in paths)]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in names if name.endswith(SUFFIXES) and name not in EXEMPT]
    return [file for file in files if file.is_file()]


def check(path: Path) -> Iterator[Hit]:
    """Yield the hits of one file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from of_python(text)
        return
    if path.name == "CHANGELOG.md":
        text = re.split(r"(?m)^## \[\d", text)[0]
    if path.suffix == ".md":
        text = re.sub(r"`[^`\n]+`", lambda span: " " * len(span[0]), text)  # names in code are not language
    yield from of_text(text)


def of_text(text: str, first: int = 1) -> Iterator[Hit]:
    """Yield the banned phrases of a text whose first line has the number `first`; a phrase may cross a line break."""
    joined = re.sub(r"\n[ \t#>*]*", lambda match: "\n" + " " * (len(match[0]) - 1), text)
    for match in PATTERN.finditer(re.sub(r"\s", " ", joined)):
        yield Hit(first + joined.count("\n", 0, match.start()), " ".join(match[0].split()))


def of_python(source: str) -> Iterator[Hit]:
    """Yield the banned phrases in comments and strings, the banned names, and docstrings that begin with OPENING."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in NAMES:
            yield Hit(token.start[0], token.string)
        elif token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield from of_text(token.string, token.start[0])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text and (opening := OPENING.match(text)):
            yield Hit(node.body[0].lineno, f'"{opening[0]} ..."')


def remedy(words: str) -> str:
    """Return what to write in the place of a banned phrase."""
    if words.startswith('"'):
        return "begin a docstring with Return, Raise, Write, Run"
    matching = (use for phrase, use in PHRASES.items() if re.fullmatch(phrase, words, re.IGNORECASE))
    return next(matching, "another word")


if __name__ == "__main__":
    sys.exit(main())
