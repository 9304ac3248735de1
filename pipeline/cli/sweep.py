"""Run a sweep by Hydra's own sweeper and launcher, so that its plugins (Optuna, submitit, joblib and others) work."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pipeline.cli.auto_recipe import AUTO
from pipeline.cli.compose import CONF, QUOTES, as_values, checked, compose_point, composed, groups, swept
from pipeline.cli.words import Setting

Job = Callable[[dict[str, Any], str], Mapping[str, Path]]  # (configuration, swept settings) -> artifacts by name


def run_sweep(settings: Sequence[str], config_dir: Path | None, job: Job) -> Path:
    """Run `job` for each point that the sweeper chooses: its configuration, and its swept settings as one name.

    Return the folder of the sweep, runs/NAME.

    `settings` are those of the command, `hydra/sweeper=NAME` and the like among them. Sweepers that search see the
    objective of a point, see `objective`.
    """
    typed = checked(settings, groups(config_dir), multirun=True)
    fixed = {setting.key for setting in typed if not swept(setting)}

    def point(config: DictConfig) -> float | None:
        chosen = HydraConfig.get().overrides.task
        name = ",".join(word.translate(QUOTES) for word in chosen if Setting.of(word).key not in fixed)
        values = as_values(config)
        if values["recipe"]["name"] == AUTO:
            values = compose_point([word for word in chosen if not word.startswith("hydra")], config_dir)
        return objective(job(values, name))

    common = [str(setting) for setting in typed if setting.key in fixed and not setting.key.startswith("hydra")]
    values = composed(common, config_dir)  # before sys.argv and Hydra's state change
    own = ["--config-dir", str(config_dir)] if config_dir is not None else []
    sys.argv[1:] = ["--multirun", *own, *map(str, typed)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach the caller as they are
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(point)()
    return Path(values["runs"]) / values["run"]


def objective(artifacts: Mapping[str, Path]) -> float | None:
    """Return the geometric mean over the evaluation texts of perplexity over the reference's: lower is better.

    None where the run measured nothing.
    """
    if "evaluation" not in artifacts:
        return None
    texts = json.loads((artifacts["evaluation"] / "evaluation.json").read_text(encoding="utf-8"))["texts"]
    ratios = [each["student"]["perplexity"] / each["teacher"]["perplexity"] for each in texts.values()]
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
