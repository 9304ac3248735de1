"""How well the chip model predicts this processor: matrix products it was not fitted to, and whole models.

    python benchmarks/chip_calibration.py [rounds] [threads] [rounds-of-models] [chip-file]

Products: `pipeline.costmodel.calibrate`. Models: SmolLM2's shape and students of it with random bf16 weights, prefill
of 512 tokens and decoding at a context of 256, batch 1, the models in turn and the shortest time of each kept.
The time a layer takes beyond its operations is fitted to the teacher's decoding; no student is fitted.
"""

import datetime
import json
import platform
from dataclasses import replace
from math import exp
from pathlib import Path

import torch
import yaml
from arguments import at_least, described
from transformers import AutoModelForCausalLM, MistralConfig

from pipeline.costmodel.calibrate import calibrate, clock, misfit, with_layer_overhead, write_chip
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.cost import Work, pass_seconds
from pipeline.costmodel.shapes import ModelShape, shape_for
from pipeline.model.decoding import cache_name, cache_of

ROOT = Path(__file__).parents[1]
TEACHER = ModelShape(30, 576, 9, 3, 64, 1536, 49152, True)
STUDENTS = {
    "balanced 0.75": shape_for(TEACHER, 0.75),
    "balanced 0.5": shape_for(TEACHER, 0.5),
    "20 layers": ModelShape(20, 576, 9, 3, 64, 1536, 49152, True),
    "768 neurons": ModelShape(30, 576, 9, 3, 64, 768, 49152, True),
}
WORKS = {"prefill": Work(1, 512, 512, "bf16", row_major=True), "decode": Work(1, 1, 256, "bf16", row_major=True)}


def build(shape: ModelShape):
    """The same layers as Llama's, in the class that takes any number of heads for any hidden size."""
    config = MistralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
        sliding_window=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@torch.inference_mode()
def shortest_passes(models: dict, rounds: int) -> dict[tuple[str, str], float]:
    """Seconds of both passes of every model, [(model, pass)]."""
    now, shortest = clock(torch.device("cpu")), {}
    for _ in range(rounds):
        for name, model in models.items():
            prompt = torch.randint(0, TEACHER.vocabulary, (1, WORKS["prefill"].queries))
            cache = cache_of(model(prompt[:, : WORKS["decode"].context - 1], use_cache=True))
            for word, tokens, past in (("prefill", prompt, None), ("decode", prompt[:, :1], cache)):
                begin = now()
                model(tokens, use_cache=True, logits_to_keep=1, **{cache_name(model): past})
                shortest[name, word] = min(now() - begin, shortest.get((name, word), float("inf")))
    return shortest


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("rounds", nargs="?", type=at_least(1), default=6)
    parser.add_argument("threads", nargs="?", type=at_least(1), default=1)
    parser.add_argument("model_rounds", nargs="?", type=at_least(1), default=18, metavar="rounds-of-models")
    parser.add_argument("chip_file", nargs="?", type=Path, metavar="chip-file", help="where the fitted chip is written")
    options = parser.parse_args()
    if options.chip_file and not options.chip_file.parent.is_dir():
        parser.error(f"chip-file: {options.chip_file.parent} is no folder; make it, or write the file elsewhere")
    torch.set_num_threads(options.threads)
    base = Chip(**yaml.safe_load((ROOT / "conf/device/chip/CPU.yaml").read_text()))
    found = calibrate(base, base.name, torch.device("cpu"), lambda: None, options.rounds)
    origin = f"{processor()}, {options.threads} thread(s), torch {torch.__version__}, {datetime.date.today()}"
    print(origin, {name: round(value, 3) for name, value in found.summary().items()})
    for timing in found.held_out:
        error = exp(misfit(found.chip, timing)) - 1
        size = f"{timing.precision} {timing.m:5d} x {timing.n} x {timing.k}"
        print(f"{size}: {1e6 * timing.seconds:8.0f} us {error:+.0%}")
    shapes = {"teacher": TEACHER, **STUDENTS}
    measured = shortest_passes({name: build(shape) for name, shape in shapes.items()}, options.model_rounds)
    decoding = measured["teacher", "decode"]
    found = replace(found, chip=with_layer_overhead(found.chip, TEACHER, WORKS["decode"], decoding))
    if options.chip_file:
        write_chip(found, options.chip_file, origin)
    rows = []
    for (name, word), seconds in measured.items():
        predicted = pass_seconds(found.chip, shapes[name], WORKS[word])
        dense = pass_seconds(found.chip, TEACHER, WORKS[word])
        row = {
            "model": name,
            "pass": word,
            "milliseconds": 1e3 * seconds,
            "predicted": 1e3 * predicted,
            "speedup": measured["teacher", word] / seconds,
            "predicted_speedup": dense / predicted,
        }
        rows.append(row)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    rounds = [options.rounds, options.model_rounds]
    report = {"origin": origin, "rounds": rounds, "products": found.summary(), "models": rows}
    (results / "chip_calibration.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
