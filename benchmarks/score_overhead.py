"""How much longer the scoring pass takes than the bare forward pass over the same tokens, and what memory it adds.

    python benchmarks/score_overhead.py artifacts/teacher-<digest> [tokens]

The two are run in turn (A B A B ...); the figure is the median of the paired ratios.
"""

import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from pipeline.prune.measure import measure
from pipeline.runtime.checkpoint import load_model, open_checkpoint

BATCH, SEQUENCE, PAIRS = 8, 512, 5


def main(folder: str, tokens: int = 8192) -> None:
    anatomy = open_checkpoint(Path(folder)).anatomy
    body = load_model(Path(folder), torch.bfloat16, "sdpa").get_decoder()
    ids = torch.randint(0, anatomy.sizes.vocabulary, (tokens // SEQUENCE, SEQUENCE))
    batches = ids.split(BATCH)

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                body(input_ids=batch, use_cache=False)

    def scored() -> None:
        measure(body, anatomy, batches)

    bare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scored()
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ratios = []
    for _ in range(PAIRS):
        one, other = _seconds(bare), _seconds(scored)
        ratios.append(other / one)
        print(f"processor seconds: bare {one:.2f}, scored {other:.2f}, ratio {other / one:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} over {tokens} tokens; peak memory +{added / 1024:.0f} MiB")


def _seconds(work) -> float:
    began = time.process_time()  # the processor time of this process: other work on the machine does not count
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
