"""absorb: post-norms of the cut model become static scales, trained during recovery and folded at export."""

import shutil
from itertools import islice
from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import stream
from pipeline.model.settings import with_scales
from pipeline.prune.measure import inverse_rms
from pipeline.prune.reinit import absorb_post_norms, post_norm_modules
from pipeline.runtime.checkpoint import load_model, open_checkpoint, write_checkpoint

MAKES = "start"
NEEDS = ("start", "tokens")
EVERY_RANK = True


def applies(config: Config, inputs: dict[str, Path]) -> bool:
    """Whether the model has post-norms beside pre-norms, none of them a scale by now, and absorption is wanted."""
    if config.reinit.absorb != "auto":
        return False
    start = open_checkpoint(inputs["start"])
    return start.anatomy.family.sandwich and not start.config.get("pruned", {}).get("scales")


def settings(config: Config) -> dict:
    """Give the number of tokens measured, their batches, and the seed that orders them."""
    return {"tokens": config.reinit.absorb_tokens, "batch": config.score.batch, "seed": config.seed}


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write the model folder with frozen scales; 1/rms is measured on the cut model, added over ranks."""
    device, ranks = machine.device, machine.ranks
    source = open_checkpoint(inputs["start"])
    anatomy = source.anatomy
    model = load_model(inputs["start"], device.compute_dtype, device.attention).get_decoder().to(device.torch)
    text = Packed(inputs["tokens"] / "calibration")
    count = max(1, config.reinit.absorb_tokens // (config.data.sequence * config.score.batch * ranks.world))
    batches = islice(stream(text, config.score.batch, ranks.rank, ranks.world, 0, config.seed), count)
    sums = inverse_rms(model, post_norm_modules(anatomy), machine.progress(batches, count, "absorb"))
    ranks.sum_(sums.values())
    if ranks.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        means = {name: float(total / tokens) for name, (total, tokens) in sums.items()}
        frozen = absorb_post_norms(anatomy, source, means)
        write_checkpoint(out, with_scales(source.config, anatomy), frozen, config.export.shard_bytes, inputs["start"])
        machine.say(f"absorb: {len(means)} post-norms are static scales now")
