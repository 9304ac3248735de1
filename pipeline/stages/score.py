"""score: how much every channel, head, neuron and layer of a model matters, in one forward-only pass."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from torch import Tensor

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import stream
from pipeline.prune.measure import measure
from pipeline.runtime.checkpoint import load_model, open_checkpoint

MAKES = "scores"
NEEDS = ("teacher", "tokens")
EVERY_RANK = True


def settings(config: Config) -> dict:
    """Give the score section and the seed that orders the calibration text."""
    return config.score.model_dump() | {"seed": config.seed}


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write scores.safetensors: eq. 1-4 over `score.tokens` calibration tokens, added over ranks."""
    device, ranks = machine.device, machine.ranks
    anatomy = open_checkpoint(inputs["teacher"], config.model.allow_pickle).anatomy
    model = load_model(inputs["teacher"], device.compute_dtype, device.attention, config.model.trust_remote_code)
    text = Packed(inputs["tokens"] / "calibration")
    wanted = min(max(1, config.score.tokens // config.data.sequence), len(text))
    if wanted * config.data.sequence < config.score.tokens - config.data.sequence:
        machine.say(f"score: the calibration text has {len(text)} sequences of {config.data.sequence}; all are used")
    batches = _batches(text, wanted, config.score.batch, ranks.rank, ranks.world, config.seed)
    count = -(-len(range(ranks.rank, wanted, ranks.world)) // config.score.batch)
    sums = measure(
        model.get_decoder().to(device.torch),
        anatomy,
        machine.progress(batches, count, "score"),
        config.score.aggregation,
        config.score.norms,
    )
    ranks.sum_(sums.tensors())
    if ranks.rank == 0:
        sums.scores().save(out / "scores.safetensors")


def _batches(text: Packed, wanted: int, batch: int, rank: int, world: int, seed: int) -> Iterator[Tensor]:
    """Give this rank's share of the first `wanted` sequences of the shuffled text, in batches."""
    whole = wanted // (batch * world)
    yield from islice(stream(text, batch, rank, world, 0, seed), whole)
    begun = whole * batch * world
    rest = len(range(rank, wanted - begun, world))
    if rest:
        yield next(stream(text, rest, rank, world, begun, seed))
