"""Mixed-domain text to calibrate on and recover from: quotations, novels, two manuals, a handbook and a dictionary.

    python benchmarks/quality/texts.py
    python benchmarks/quality/broad.py [--set broad|wide|widest|all] [--out runs/texts] [--folder UNPACKED]

They come from packages of Debian, fetched with `apt-get download` and unpacked without being installed, or from
--folder, where somebody unpacked each into a folder of its name before (`dpkg -x FILE.deb UNPACKED/PACKAGE`). Of each
kind about a million characters are taken, evenly over the whole. Passages that share 13 words in a row with a text that
rows are measured on are left out. Written is broad.jsonl in the folder of texts.py: a record a passage. `wide` is these
kinds and seven of technical text: marked-up documentation of a kernel, a runtime, a language, a database and an editor,
modules of source code, and help for users of a desktop. `widest` is these thirteen and six more, most of them
not explained: what is said in two games of war and of trade, the beings and things of a third, short definitions,
and two manuals in prose, of a program for pictures and of another database. `all` is these nineteen and nine more:
documentation of six kinds of programs, some of it of Python's, a standard of how to write others, what is said and
described in a game of survival, and a dictionary that mocks.
"""

import argparse
import gzip
import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rows import UNSEEN
from texts import fetched

from pipeline.data.builtin import BUILTINS

CHARACTERS = 1_000_000  # of a kind
SHORTEST = 200
SHARED = 13  # words in a row that make a passage one of a text that is measured on
BREAKS = {"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre", "br", "dt", "dd"}
UNREAD = {"script", "style", "head"}
LINE = r"^\s+(?:\w+ )?[`\"]([^`\n]{40,})[`\"]$"  # of a game's script, quoted as a whole behind its kind, if any
STRING = r'"((?:[^"\\\n]|\\.){60,})"'  # of JSON, long enough to say something


@dataclass(frozen=True)
class Kind:
    """Where a kind of text is: files of a package, and how one of them becomes passages."""

    package: str
    files: str  # pattern
    passages: Callable[[bytes], Iterable[str]]


def quotations(content: bytes) -> Iterator[str]:
    """Return a dozen at a time of what `fortune` prints one of; nothing of its indices, which are binary."""
    return _joined([] if b"\0" in content else content.decode(errors="replace").split("\n%\n"), 12)


def novels(content: bytes) -> Iterator[str]:
    """Return the chapters' lines of a lazy-load database of R, 200 at a time; its strings follow their lengths."""
    lines = []
    while content:
        opened = zlib.decompressobj()
        block = opened.decompress(content[4:])  # behind the size of what is compressed
        content = opened.unused_data
        for found in re.finditer(rb"\x00\x04\x00\x09", block):
            length = int.from_bytes(block[found.end() : found.end() + 4])
            lines.append(block[found.end() + 4 :][:length].decode("ascii", "replace"))
    return ("\n".join(lines[place : place + 200]) for place in range(0, len(lines), 200))


def sections(begins: str) -> Callable[[bytes], Iterable[str]]:
    """Return what parts a text at lines that begin so (a pattern), marks included."""
    return lambda content: re.split(rf"\n(?={begins})", _plain(content))


def spoken(pattern: str) -> Callable[[bytes], Iterable[str]]:
    """Return the sentences of a game's script, forty at a time: what a pattern finds."""
    return lambda content: _joined(re.findall(pattern, _plain(content), re.MULTILINE), 40)


def page(content: bytes) -> list[str]:
    """Return a plain text unchanged."""
    return [_plain(content)]


def entries(begins: str = r"\S") -> Callable[[bytes], Iterable[str]]:
    """Return ten entries at a time of a dictionary of dictd, split at lines that match `begins`: not indented."""
    return lambda content: _joined(list(sections(begins)(content)), 10)


def shown(content: bytes) -> list[str]:
    """Return what a browser shows of a page."""
    reader = _Shown()
    reader.feed(_plain(content))
    return [re.sub(r"\n\s*\n", "\n\n", "".join(reader.parts)).strip()]


class _Shown(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.unread = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.unread += tag in UNREAD
        self.parts += ["\n"] if tag in BREAKS else []

    def handle_endtag(self, tag: str) -> None:
        self.unread -= tag in UNREAD
        self.parts += ["\n"] if tag in BREAKS else []

    def handle_data(self, data: str) -> None:
        self.parts += [] if self.unread else [data]


KINDS = (
    Kind("fortunes", "usr/share/games/fortunes/*", quotations),
    Kind("r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", novels),
    Kind("perl-doc", "usr/share/perl/*/pod/*.pod", sections("=head1")),
    Kind("git-doc", "usr/share/doc/git-doc/**/*.txt", page),
    Kind("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", shown),
    Kind("dict-gcide", "usr/share/dictd/gcide.dict.dz", entries()),
)
TECHNICAL = (
    Kind("linux-doc-6.1", "usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz", page),
    Kind("nodejs-doc", "usr/share/doc/nodejs/api/*.md.gz", sections("## ")),
    Kind("rust-doc", "usr/share/doc/rust-doc/html/book/*.html", shown),
    Kind("sqlite3-doc", "usr/share/doc/sqlite3/*.html", shown),
    Kind("vim-runtime", "usr/share/vim/vim*/doc/*.txt", sections("===")),
    Kind("cmake-data", "usr/share/cmake-*/Modules/**/*.cmake", page),
    Kind("gnome-user-docs", "usr/share/help/C/gnome-help/*.page", shown),
)
TOLD = (
    Kind("dict-wn", "usr/share/dictd/wn.dict.dz", entries()),
    Kind("crawl-common", "usr/share/crawl/dat/descript/*.txt", sections("%%%%")),
    Kind("wesnoth-1.16-data", "usr/share/games/wesnoth/1.16/data/**/*.cfg", spoken(r'_ ?"((?:[^"]|""){20,})"')),
    Kind("endless-sky-data", "usr/share/games/endless-sky/data/**/*.txt", spoken(LINE)),
    Kind("gimp-help-en", "usr/share/gimp/2.0/help/en/*.html", shown),
    Kind("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html", shown),
)
TAUGHT = (
    Kind("python-django-doc", "usr/share/doc/python-django-doc/html/[fht]*/**/*.html", shown),
    Kind("python-sqlalchemy-doc", "usr/share/doc/python-sqlalchemy-doc/rst/[!c]*/**/*.rst", page),
    Kind("sphinx-doc", "usr/share/doc/sphinx-doc/html/_sources/[dtu]*/**/*.txt", page),
    Kind("apache2-doc", "usr/share/doc/apache2-doc/manual/en/**/*.html", shown),
    Kind("postfix-doc", "usr/share/doc/postfix/html/*.html", shown),
    Kind("debian-reference-en", "usr/share/debian-reference/*.en.html", shown),
    Kind("gnu-standards", "usr/share/doc/gnu-standards/*.text.gz", sections(r"\d+[.\d]* ")),
    Kind("cataclysm-dda-data", "usr/share/games/cataclysm-dda/json/[fnis]*/**/*.json", spoken(STRING)),
    Kind("dict-devil", "usr/share/dictd/devil.dict.dz", entries("[A-Z-]{2,}, ")),
)
SETS = {
    "broad": KINDS,
    "wide": (*KINDS, *TECHNICAL),
    "widest": (*KINDS, *TECHNICAL, *TOLD),
    "all": (*KINDS, *TECHNICAL, *TOLD, *TAUGHT),
}


def main(sets: Mapping[str, Sequence[Kind]] = SETS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/texts"), help="where texts.py wrote")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--set", choices=sets, default="broad", help="how many kinds; also the name of what is written")
    options = parser.parse_args()
    measured = set().union(*(runs_of_words(text) for text in measured_on(options.out)))
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in sets[options.set]:
            files = sorted(unpacked(kind, options.folder, Path(scratch)).glob(kind.files))
            own = [file for file in files if file.is_file() and not file.is_symlink()]
            passages = [text for file in own for text in kind.passages(file.read_bytes())]
            taken = spread([text for text in passages if len(text) >= SHORTEST], CHARACTERS)
            kept = [text for text in taken if measured.isdisjoint(runs_of_words(text))]
            if not kept:
                raise SystemExit(f"error: {kind.package} has no text in {kind.files}; this is written for Debian 12")
            amount = f"{sum(map(len, kept)) / 1e6:.2f} MB in {len(kept)} passages"
            print(f"{kind.package}: {amount}, {len(taken) - len(kept)} left out for what they share")
            records += [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept]
    target = options.out / f"{options.set}.jsonl"
    target.write_text("".join(records))
    os.utime(target, (0, 0))  # one text, one time: runs that read it find each other


def measured_on(folder: Path) -> Iterator[str]:
    """Return the texts that no row may see: files of the folder, or built in."""
    for name in UNSEEN:
        files = [file for file in (folder / f"{name}.jsonl", folder / f"{name}.txt") if file.is_file()]
        if not files and name not in BUILTINS:
            raise SystemExit(f"error: --out: {folder} has no {name}.txt; benchmarks/quality/texts.py writes it")
        yield from [file.read_text() for file in files] or BUILTINS[name]()


def unpacked(kind: Kind, folder: Path | None, scratch: Path) -> Path:
    """Return the folder of a package's files, fetched unless there is one."""
    if folder:
        if not (folder / kind.package).is_dir():
            raise SystemExit(f"error: --folder: {folder / kind.package} does not exist; unpack the package there")
        return folder / kind.package
    return fetched(kind.package, scratch)


def spread(passages: list[str], characters: int) -> list[str]:
    """Return every n-th passage, n the least number that leaves about so many characters."""
    step = max(1.0, sum(map(len, passages)) / characters)
    return [passages[int(number * step)] for number in range(int(len(passages) / step))]


def runs_of_words(text: str) -> set[str]:
    """Return all runs of SHARED words, without marks and capitals."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[place : place + SHARED]) for place in range(len(words) - SHARED + 1)}


def _plain(content: bytes) -> str:
    """Return a file's text, unpacked where it is packed."""
    return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode(errors="replace")


def _joined(pieces: list[str], together: int) -> Iterator[str]:
    for place in range(0, len(pieces), together):
        yield "\n\n".join(piece.strip("\n") for piece in pieces[place : place + together])


if __name__ == "__main__":
    main()
