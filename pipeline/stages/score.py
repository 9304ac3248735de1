"""score: how much every channel, head, neuron and layer of a model matters, in one forward-only pass."""

from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
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
    batches = beginning(text, config.score.tokens, config.score.batch, ranks.rank, ranks.world, config.seed)
    if batches.wanted * config.data.sequence < config.score.tokens - config.data.sequence:
        machine.say(f"score: the calibration text has {len(text)} sequences of {config.data.sequence}; all are used")
    sums = measure(
        model.get_decoder().to(device.torch),
        anatomy,
        machine.progress(batches, len(batches), "score"),
        config.score.aggregation,
        config.score.norms,
    )
    ranks.sum_(sums.tensors())
    if ranks.rank == 0:
        sums.scores().save(out / "scores.safetensors")
