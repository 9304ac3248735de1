"""Draw malformed inputs of every kind and count what becomes of them.

    python benchmarks/faults/fuzz.py [--cases 100000] [--seed 0] [--targets settings,tokenizer]

Each case is read in this process as a run reads it. It must be refused in one line, or be read and then verified: a
model loads with the weights of its files, a blueprint is cut, settings are those that were given. Counted are cases
that were refused or read, and the faults: tracebacks, hangs (30 s a case) and cases that should have been refused. The
same cases and seed draw the same inputs. Cases are divided over the targets by how long one takes.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["HF_HUB_OFFLINE"] = "1"  # a drawn name may be a hub id

from arguments import at_least, described, some_of  # noqa: E402

from tests.fuzz import run  # noqa: E402
from tests.fuzz.targets import TARGETS  # noqa: E402

PART = 500  # cases drawn with one seed
SHARES = {  # of the cases, in the ratio of these; 10 where none is named: those that load a model take longest
    "checked settings": 3, "config.json": 3, "config.json of a student": 3, "safetensors header": 3, "index": 3,
    "GGUF header": 3, "tokenizer": 3, "template": 3,
}  # fmt: skip


def fuzz(name: str, cases: int, seed: int) -> tuple[Counter[str], dict[str, str]]:
    """Return what became of the cases of a target, and its faults; prints a line."""
    begin, counts, faults = time.monotonic(), Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[name](Path(folder))
        for part in range(0, cases, PART):
            found = run(target, min(PART, cases - part), seed + part)
            counts += found.counts
            faults = found.faults | faults
    rate = sum(counts.values()) / (time.monotonic() - begin)
    listed = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"{name}: {listed} ({rate:.0f}/s)", flush=True)
    for place, case in faults.items():
        print(f"  {place}\n    " + case.replace("\n", "\n    "), flush=True)
    return counts, faults


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--cases", type=at_least(1), default=100_000, help="all targets together")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--targets", type=some_of(list(TARGETS)), default=list(TARGETS))
    chosen = parser.parse_args()
    whole = sum(SHARES.get(name, 10) for name in chosen.targets)
    total: Counter[str] = Counter()
    faults = 0
    for name in chosen.targets:
        counts, found = fuzz(name, max(1, chosen.cases * SHARES.get(name, 10) // whole), chosen.seed)
        total += counts
        faults += len(found)
    listed = ", ".join(f"{count} {outcome}" for outcome, count in sorted(total.items()))
    print(f"{sum(total.values())} cases: {listed}; {faults} kinds of faults, seed {chosen.seed}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
