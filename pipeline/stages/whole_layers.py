"""Methods that need attention and an FFN in every layer, and models whose layers lack some."""

from pipeline.config import Config
from pipeline.model.anatomy import Anatomy
from pipeline.prune.importance import SCORES


def check_whole(config: Config, anatomy: Anatomy) -> None:
    """Raise ValueError where a method of the configuration measures every attention and FFN and a layer lacks one."""
    lacking = [str(layer) for layer in range(len(anatomy.sizes.layers)) if anatomy.removed(layer)]
    methods = (
        ("score.kind", "activation", "moments" in SCORES[config.score.kind].needs),
        ("plan.widths", "uniform", config.plan.widths != "uniform"),
        ("restore.outputs", "false", config.restore.outputs),
        ("restore.order", "scores", config.restore.order == "obs"),
        ("restore.sequential", "false", config.restore.sequential),
        ("reinit.bias_compensation", "false", config.reinit.bias_compensation),
        ("reinit.bypass", "false", config.reinit.bypass),
    )
    for setting, other, chosen in methods:
        if lacking and chosen:
            raise ValueError(
                f"{setting}: needs attention and an FFN in every layer, and layers {', '.join(lacking)} of the model "
                f"lack one; set {setting}={other}"
            )
