"""Recover a student that another tool pruned: distillation from its teacher, export, evaluation.

    python examples/recover_external_student.py --teacher FOLDER --student FOLDER --data text.jsonl

The student must be of a supported family and use the teacher's tokenizer.
"""

import argparse
import json

from pipeline import api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder, .gguf file or hub id of the model before pruning")
    parser.add_argument("--student", required=True, help="folder of the pruned model")
    parser.add_argument("--data", default="builtin:topics", help="text to recover on and to evaluate on")
    parser.add_argument("--run", default="recover", help="name of the run folder")
    parser.add_argument("settings", nargs="*", help="further settings, such as distill.tokens=100000")
    options = parser.parse_args()

    settings = dict(setting.split("=", 1) for setting in options.settings)
    settings["model.start"] = options.student
    run = api.prune(options.teacher, recipe="recover", data=options.data, run=options.run, settings=settings)

    evaluation = json.loads((run.artifacts["evaluation"] / "evaluation.json").read_text(encoding="utf-8"))
    for text, values in evaluation["texts"].items():
        before, after = (values[state]["perplexity"] for state in ("start", "student"))
        print(f"perplexity on {text}: {before:.2f} before recovery, {after:.2f} after")
    print(f"student: {run.folder / 'student'}")


if __name__ == "__main__":
    main()
