"""Published throughputs of Pangu and Qwen3 models beside the chip model's, under one stated assumption.

    python benchmarks/pangu_light_ratios.py

Assumed, because unpublished: two 910B1 devices, as many sequences as their memory holds, and a 38B model of 64 layers,
hidden 5632, 64/8 heads of 128, 27648 neurons. Workload as published: half 128 -> 1024 tokens, half 256 -> 2048.
"""

from pathlib import Path

import yaml
from arguments import described

from pipeline.costmodel.chip import Chip
from pipeline.costmodel.cost import generation_rate, largest_batch
from pipeline.costmodel.shapes import ModelShape, multiples_for, shape_for

DEVICES, REQUESTS, LONGEST = 2, [(128, 1024), (256, 2048)], 256 + 2048
PANGU_38B = ModelShape(64, 5632, 64, 8, 128, 27648, 153376, False)
QWEN3_32B = ModelShape(64, 5120, 64, 8, 128, 25600, 151936, False)
QWEN3_14B = ModelShape(40, 5120, 40, 8, 128, 17408, 151936, False)
ROWS = [
    ("Pangu-38B (stand-in)", PANGU_38B, 1631),
    ("Qwen3-32B", QWEN3_32B, 2225),
    ("Qwen3-14B", QWEN3_14B, 6254),
    ("Pangu Light 32B (balanced 0.84)", shape_for(PANGU_38B, 0.84, multiples_for(PANGU_38B, DEVICES)), 2585),
]
SPEEDUPS = (2585 / 1631, 3403 / 1631, 6831 / 1631)


def main() -> None:
    described(__doc__).parse_args()
    chip = Chip(**yaml.safe_load((Path(__file__).parents[1] / "conf/device/chip/910B1.yaml").read_text()))

    def rate(shape: ModelShape, batch: int) -> float:
        return generation_rate(chip, shape, REQUESTS, batch, "bf16", DEVICES)

    def fullest(shape: ModelShape) -> int:
        return largest_batch(chip, shape, LONGEST, "bf16", DEVICES)

    same = fullest(PANGU_38B)
    base, base_published = rate(PANGU_38B, same), ROWS[0][2]
    print("model | billions | batch | tok/s predicted | published | ratio predicted | at equal batch | published")
    for name, shape, published in ROWS:
        batch = fullest(shape)
        print(
            f"{name} | {shape.parameters() / 1e9:.1f} | {batch} | {rate(shape, batch):.0f} | {published} | "
            f"{rate(shape, batch) / base:.2f} | {rate(shape, same) / base:.2f} | {published / base_published:.2f}"
        )
    print("published speed-up | largest balanced share that reaches it | billions")
    for wanted in SPEEDUPS:
        for percent in range(99, 1, -1):
            shape = shape_for(PANGU_38B, percent / 100, multiples_for(PANGU_38B, DEVICES))
            if rate(shape, fullest(shape)) >= wanted * base:
                print(f"{wanted:.2f} | {percent} % | {shape.parameters() / 1e9:.1f}")
                break


if __name__ == "__main__":
    main()
