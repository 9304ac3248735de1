"""A text of another domain than the built-in ones: the Jargon File 4.4.7, prose about programmers' words.

    python benchmarks/quality/texts.py [--out runs/texts] [--folder UNPACKED] [--freeze]

It is in the public domain (its preface: "to be freely used, shared, and modified"). Debian has it as the package
`jargon-text`; it is fetched with `apt-get download` and unpacked without being installed, or read from --folder, where
somebody unpacked it before (`dpkg -x FILE.deb UNPACKED`). Written is jargon.txt: the lexicon without its contents and
appendices, one paragraph a line, without the marks of cross references.

--freeze also writes down the built-in texts, topics.jsonl, docstrings.jsonl and readmes.jsonl, as they are in this
installation: with the folder another machine, of another Python and other packages, reads the same text.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.data.builtin import BUILTINS

PACKAGE = "jargon-text"
INSIDE = Path("usr/share/doc/jargon-text/jargon.txt.gz")
AFTER = "Part III. Appendices"
HEAD = re.compile(r":(?P<word>[^:]+): ?(?P<rest>.*)")
SAID = re.compile(r"/[^/]*/,? ?")  # how it is pronounced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/texts"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--freeze", action="store_true", help="write down the built-in texts too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = (options.folder or fetched(PACKAGE, Path(scratch))) / INSIDE
        if not source.is_file():
            raise SystemExit(f"error: --folder: {source} does not exist; unpack {PACKAGE} there with dpkg -x")
        text = cleaned(gzip.decompress(source.read_bytes()).decode())
        options.out.mkdir(parents=True, exist_ok=True)
        target = options.out / "jargon.txt"
        target.write_text(text)
    print(f"{target}: {len(text) / 1e6:.2f} MB, {text.count(chr(10) * 2)} paragraphs, public domain")
    for name in BUILTINS if options.freeze else ():
        print(frozen(name, options.out))


def frozen(name: str, folder: Path) -> Path:
    """Write a built-in text down, a record a document; give the file."""
    target = folder / f"{name}.jsonl"
    target.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in BUILTINS[name]()))
    return target


def fetched(package: str, folder: Path) -> Path:
    """Download a package of Debian and unpack it into a folder of its name in `folder`."""
    subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
    (deb,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", str(deb), str(folder / package)], check=True)
    return folder / package


def cleaned(text: str) -> str:
    """Return the entries of the lexicon as paragraphs, parted by empty lines; ValueError where there are none.

    Lines of a paragraph become one line; `:word: /how/, n.` becomes `word, n.`, and `{word}` `word`. The table of
    contents before the first entry and the appendices after the last are left out.
    """
    paragraphs = list(_paragraphs(text))
    heads = [place for place, each in enumerate(paragraphs) if HEAD.match(each)]
    if not heads:
        raise ValueError("the text has no entry that begins with :word:, so it is not the Jargon File of jargon-text")
    kept = []
    for place in range(heads[0], len(paragraphs)):
        paragraph = paragraphs[place]
        if paragraph == AFTER:
            break
        head = HEAD.fullmatch(paragraph)
        kept.append(f"{head['word']}, {SAID.sub('', head['rest'])}".rstrip(", ") if head else paragraph)
    return "\n\n".join(re.sub(r"\{([^{}]*)\}", r"\1", each) for each in kept) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        joined = " ".join(line.strip() for line in block.splitlines() if line.strip())
        if joined and re.search(r"\w", joined):
            yield joined


if __name__ == "__main__":
    main()
