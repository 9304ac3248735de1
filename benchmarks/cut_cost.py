"""What a start costs: the seconds of scoring, planning, cutting and restoring beside a bare forward pass.

    python benchmarks/cut_cost.py [--tokens 32768] [settings of the pipeline ...]

The stages run in a process of their own and an empty artifact folder, as a user runs them; the bare pass over as many
tokens, in batches of the same size, is timed before and after them, and the mean counts. These are seconds of a clock:
measure on a machine that does nothing else. Without settings `recipe=best` is measured.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from arguments import at_least, described
from composing import with_settings

from pipeline.model.causal import decoder_of
from pipeline.runtime.model_loader import load_model

STAGES = ("importance", "shape", "layer_loss", "rotate", "hessian", "obs_order", "plan", "cut")
BATCH, SEQUENCE = 8, 512


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--tokens", type=at_least(SEQUENCE), default=32768, help="of second moments and the bare pass")
    options, settings = with_settings(parser)
    with tempfile.TemporaryDirectory() as place:
        folders = [f"artifacts={place}/artifacts", f"runs={place}/runs", "run=cost"]
        tokens = [
            f"restore.tokens={options.tokens}",
            f"rotate.tokens={options.tokens}",
            f"calibration.batch_size={BATCH}",
        ]
        command = [sys.executable, "-m", "pipeline", *folders, *tokens, *(settings or ["recipe=best"])]
        _run([*command, "stages=[]"])
        model = decoder_of(load_model(Path(place) / "runs" / "cost" / "teacher", torch.bfloat16, "sdpa"))
        bare = [_bare(model, options.tokens)]
        _run([*command, f"stages=[{','.join(STAGES)}]"])
        bare.append(_bare(model, options.tokens))
        spent = {}
        for manifest in sorted((Path(place) / "artifacts").glob("*/manifest.json")):
            facts = json.loads(manifest.read_text())
            spent[facts["stage"]] = facts["seconds"]
    passes, mean = {stage: spent[stage] for stage in STAGES if stage in spent}, sum(bare) / 2
    for stage, seconds in passes.items():
        print(f"{stage:8} {seconds:7.1f} s  {seconds / mean:5.2f} bare passes")
    print(f"bare     {bare[0]:7.1f} s before, {bare[1]:.1f} s after, over {options.tokens} tokens")
    print(f"together {sum(passes.values()):7.1f} s  {sum(passes.values()) / mean:5.2f} bare passes")


def _run(command: list[str]) -> None:
    """Run the pipeline; where it fails, it has said why, and its status is this command's."""
    status = subprocess.run(command).returncode
    if status:
        sys.exit(status)


def _bare(model: torch.nn.Module, tokens: int) -> float:
    ids = torch.randint(0, model.config.vocab_size, (tokens // SEQUENCE, SEQUENCE))
    began = time.perf_counter()
    with torch.no_grad():
        for batch in ids.split(BATCH):
            model(input_ids=batch, use_cache=False)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
