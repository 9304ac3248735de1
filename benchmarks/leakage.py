"""How much of an evaluation text also occurs in the calibration and recovery text that is split off the same source.

    python benchmarks/leakage.py --tokenizer runs/NAME/teacher [--path builtin:topics ...] [--sequence 512]

Packs every path as the tokens stage does with the default shares, once whole and once without what evaluation text
shares, and counts the evaluated tokens that belong to a run of 13 which any row of calibration or recovery has. The
count is made here by plain sets of tuples, common runs included, and shares no code with what leaves text out.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data.encoding import Encoder, batches, blocks, frame
from pipeline.data.overlap import RUN, EvaluationRuns
from pipeline.data.packing import Domain, Packed, build
from pipeline.data.sources import locate
from pipeline.data.split import assign, passages
from pipeline.runtime.model_loader import load_tokenizer

PURPOSES = ("evaluation", "calibration", "recovery")
SHARES = {"evaluation": 0.1, "calibration": 0.3}  # as in conf/data/default.yaml
SHARD = 1 << 26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--path", nargs="+", default=["builtin:topics"])
    parser.add_argument("--field", default="text")
    parser.add_argument("--sequence", type=int, default=512)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    for path in options.path:
        parts = assign({purpose: [locate(path)] for purpose in PURPOSES}, **SHARES)
        for apart in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                packed = pack(Path(folder), parts, tokenizer, options, apart)
                print(json.dumps({"path": path, "apart": apart, "run": RUN} | figures(packed)), flush=True)


def pack(folder: Path, parts: dict, tokenizer, options: argparse.Namespace, apart: bool) -> dict[str, Packed]:
    """Return the packed text of every purpose, without what evaluation text shares where `apart`."""
    around, runs, packed = frame(tokenizer), EvaluationRuns(RUN), {}
    for purpose in PURPOSES:
        (part,) = parts[purpose]
        overlap: dict = {"notes": runs} if purpose == "evaluation" else {"avoids": runs} if apart else {}
        if "avoids" in overlap:
            runs.forget()
            counted = Encoder(tokenizer, around, len(tokenizer), avoids=runs)
            counted.count(batches(blocks(passages(part, options.field, tokenizer))))
        domain = Domain(str(part), passages(part, options.field, tokenizer), None)
        place, size = folder / purpose, len(tokenizer)
        build(place, [domain], tokenizer, around, options.sequence, size, SHARD, lambda each, *_: each, **overlap)
        packed[purpose] = Packed(place)
    return packed


def figures(packed: dict[str, Packed]) -> dict:
    """Return counts of tokens, and the share of evaluated tokens in runs that calibration or recovery has."""
    seen = {run for purpose in PURPOSES[1:] for row in rows(packed[purpose]) for run in windows(row)}
    shared = total = 0
    for row in rows(packed["evaluation"]):
        marks = [False] * len(row)
        for place, run in enumerate(windows(row)):
            if run in seen:
                marks[place : place + RUN] = [True] * RUN
        shared, total = shared + sum(marks), total + len(row)
    tokens = {purpose: packed[purpose].domains[0]["tokens"] for purpose in PURPOSES}
    left_out = {purpose: packed[purpose].domains[0]["left_out_tokens"] for purpose in PURPOSES[1:]}
    share = round(shared / total, 4)
    return {"evaluated": total, "shared": shared, "share": share, "tokens": tokens, "left_out": left_out}


def rows(packed: Packed) -> list[list[int]]:
    return [packed[row].tolist() for row in range(len(packed))]


def windows(row: list[int]) -> list[tuple[int, ...]]:
    return [tuple(row[place : place + RUN]) for place in range(len(row) - RUN + 1)]


if __name__ == "__main__":
    main()
