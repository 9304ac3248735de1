"""The calibration text, as every stage that measures on it reads it."""

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import Beginning, beginning
from pipeline.runtime.ranks import Ranks
from pipeline.stages.stage import Inputs


def calibration_text(inputs: Inputs) -> Packed:
    """Return all packed calibration sequences."""
    return Packed(inputs["tokens"] / "calibration")


def calibration(config: Config, inputs: Inputs, tokens: int, ranks: Ranks) -> Beginning:
    """Return this rank's share of the first `tokens` calibration tokens, in batches of `calibration.batch_size`.

    The order is drawn from `seed`, so stages that read as many tokens read the same ones. `packed` of what is returned
    is the whole text.
    """
    text = calibration_text(inputs)
    return beginning(text, tokens, config.calibration.batch_size, ranks.rank, ranks.world, config.seed)
