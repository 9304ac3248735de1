"""What it costs to verify artifacts before use: hashing a file of weights beside reading it.

    python benchmarks/verification.py [--gib 1] [--folder FOLDER]

Reads, then reads and hashes, a file of random bytes that is in the page cache. Printed are processor seconds per GB, so
that other programs on the machine count little: the smallest of eight passes each. SHA-256 is given for comparison.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import xxhash
from arguments import at_least, described

from pipeline.runtime.hashing import BLOCK

PASSES = 8
PIECE = 1 << 24  # bytes


def seconds(path: Path, update: Callable[[memoryview], object]) -> float:
    """Return the processor seconds of one pass over the file."""
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        begin = time.process_time()
        while count := file.readinto(block):
            update(block[:count])
        return time.process_time() - begin


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--gib", type=at_least(1), default=1, help="size of the file")
    parser.add_argument("--folder", help="where the file is written (default: the system's temporary folder)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as place:
        path, piece = Path(place) / "weights", os.urandom(PIECE)
        with path.open("wb") as file:
            for _ in range((chosen.gib << 30) // PIECE):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        ways = {
            "reading": lambda: len,
            "reading with XXH3, 128 bits": lambda: xxhash.xxh3_128().update,
            "reading with SHA-256": lambda: hashlib.sha256().update,
        }
        rounds = [[seconds(path, make()) for make in ways.values()] for _ in range(PASSES)]  # in turn
        best = [min(times) * 1e9 / path.stat().st_size for times in zip(*rounds)]
        for name, each in zip(ways, best):
            print(f"{name}: {each:.3f} s per GB, {each / best[0] - 1:+.0%}")


if __name__ == "__main__":
    main()
