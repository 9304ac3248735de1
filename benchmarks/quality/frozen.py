"""Texts that no setting was chosen on: personal finance and the constellations of many cultures.

    python benchmarks/quality/frozen.py [--out runs/texts] [--folder UNPACKED]

`finance` is the user's guide of GnuCash (Debian package `gnucash-docs`, GNU FDL), `constellations` the descriptions of
sky cultures in Stellarium (`stellarium-data`, GPL). Packages are fetched with `apt-get download` and unpacked without
being installed, or read from --folder, which holds a folder per unpacked package. Written is one page a record.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import described
from broad import Kind, shown, unpacked

TEXTS = {
    "finance": Kind("gnucash-docs", "usr/share/doc/gnucash-docs/gnucash-guide-en/*.html", shown),
    "constellations": Kind("stellarium-data", "usr/share/stellarium/skycultures/*/description.en.utf8", shown),
}


def main() -> None:
    options = arguments().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, kind in TEXTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            files = sorted(unpacked(kind, options.folder, Path(scratch)).glob(kind.files))
            pages = [text for file in files for text in kind.passages(file.read_bytes())]
        if not pages:
            raise SystemExit(f"error: {kind.package} has no text in {kind.files}; this is written for Debian 12")
        target = options.out / f"{name}.jsonl"
        target.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in pages))
        print(f"{target}: {sum(map(len, pages)) / 1e6:.2f} MB in {len(pages)} pages")


def arguments() -> argparse.ArgumentParser:
    parser = described(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/texts"))
    parser.add_argument("--folder", type=Path, help="folder of unpacked packages")
    return parser


if __name__ == "__main__":
    main()
