"""How much longer the scoring pass takes than the bare forward pass over the same tokens, and what memory it adds.

    python benchmarks/score_overhead.py artifacts/teacher-<digest> [tokens]

The two are run in turn (A B A B ...); the figure is the median of the paired ratios.
"""

import resource
import statistics
import time

import torch
from arguments import at_least, described, folder_with

from pipeline.model.causal import decoder_of
from pipeline.prune.importance.measure import measure
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.model_loader import load_model

BATCH, SEQUENCE, PAIRS = 8, 512, 5


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("folder", type=folder_with("config.json"), help="a Hugging Face model")
    parser.add_argument("tokens", nargs="?", type=at_least(SEQUENCE), default=8192)
    options = parser.parse_args()
    anatomy = open_checkpoint(options.folder).anatomy
    body = decoder_of(load_model(options.folder, torch.bfloat16, "sdpa"))
    ids = torch.randint(0, anatomy.sizes.vocabulary, (options.tokens // SEQUENCE, SEQUENCE))
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
    memory = f"peak memory +{added / 1024:.0f} MiB"
    print(f"median ratio {statistics.median(ratios):.3f} over {options.tokens} tokens; {memory}")


def _seconds(work) -> float:
    began = time.process_time()  # the processor time of this process: other work on the machine does not count
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
