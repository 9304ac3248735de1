"""Measure, plan and cut a model in memory, and save the student as an ordinary checkpoint.

    python examples/prune_in_memory.py --model FOLDER --text text.txt --layers 26 --neurons 1152 --output student
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--text", required=True, help="a text file to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration sequence")
    parser.add_argument("--rows", type=int, default=64, help="calibration sequences")
    for axis in ("layers", "hidden", "heads", "groups", "neurons"):
        parser.add_argument(f"--{axis}", type=int, help=f"{axis} of the student; default: those of the model")
    parser.add_argument("--output", default="student", help="folder of the student")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Path(options.text).read_text(encoding="utf-8")
    batches = api.token_batches(tokenizer, text, length=options.length, limit=options.rows)

    scores = api.measure(model, batches)
    shape = {axis: getattr(options, axis) for axis in ("layers", "hidden", "heads", "groups", "neurons")}
    blueprint = api.plan(model, scores, **shape)
    student = api.cut(model, blueprint)

    print(f"parameters: {model.num_parameters():,} -> {student.num_parameters():,}")
    student.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
