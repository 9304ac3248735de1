"""Kill runs of every recipe at random moments, run them again, and compare what they made with runs left alone.

    python benchmarks/faults/kill_loop.py [--kills 50] [--recipes best,tyr] [--kinds kill,after] [--seed 0]

Tiny random models; needs a C compiler. A kill is SIGKILL before or after a random operation on files (kinds `kill`,
`after`); `enospc` is a full disk from an operation on, `eio` one error of the disk. A walk repeats one command until it
finishes; walks over the recipes follow until there were enough faults. Compared are student and artifacts.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from arguments import at_least, described, some_of  # noqa: E402

from tests.injection import Driver, driver, leftovers, made_of, student_of, walk  # noqa: E402
from tests.world import make_world, settings  # noqa: E402

SMALL = {
    "data__sequence_length": 16,
    "score__tokens": 128,
    "restore__tokens": 256,
    "distill__tokens": 512,
    "distill__save_steps": 1,
    "evaluate__tokens": 128,
    "evaluate__words": 0,
    "evaluate__speed": "false",
    "report__samples": 0,
}
NO_SHAPE = {"shape__layers": None, "shape__neurons": None}
RECIPES = {
    "pangu_light": {},
    "minitron": {},
    "best": {"local_distill__tokens": 1024, "local_distill__batch_tokens": 64},
    "flap": NO_SHAPE | {"budget__parameters": 0.6},
    "adapt_pruner": {"recipe__rounds": 2, "distill__tokens": 1024, "plan__amplitude": 0},
    "trsp": {"layer_gates__tokens": 64, "layer_gates__batch_size": 2, "regularize__tokens": 128,
             "regularize__global_batch_size": 4, "regularize__micro_batch_size": 4},
    "tyr": {"supernet__rounds": 1, "supernet__multiple": 4, "supernet__generations": 1, "supernet__offspring": 2},
    "generate": NO_SHAPE | {"self_generate__tokens": 64, "self_generate__length": 8, "self_generate__batch_size": 4},
}  # fmt: skip


def command(world: Path, place: Path, recipe: str) -> list[str]:
    """Return the settings of a small run of a recipe, its folders inside `place`."""
    changed = {"runs": place / "runs", "artifacts": place / "artifacts"} | SMALL | RECIPES[recipe]
    return [*settings(world, **changed), f"recipe={recipe}", "run=x"]


def delivered(place: Path) -> dict[str, str]:
    """Return the digests of what a run delivered, but for the report, which holds times."""
    student = place / "runs/x/student"
    return student_of(student if student.exists() else place / "runs/x/generated.jsonl")


def loop(folder: Path, kills: int, recipes: list[str], kinds: tuple[str, ...], seed: int) -> int:
    draw, world, faults, walks, same = random.Random(seed), make_world(folder / "world"), 0, 0, 0
    references: dict[str, tuple[Path, int]] = {}

    def reference(process: Driver, recipe: str) -> tuple[Path, int]:
        if recipe not in references:
            place = folder / f"reference-{recipe}"
            outcome = process.run(command(world, place, recipe), place)
            if outcome.status != 0:
                raise RuntimeError(f"{recipe} does not run: {outcome.output[-2000:]}")
            references[recipe] = place, outcome.operations
        return references[recipe]

    begin = time.monotonic()
    with driver(folder / "driver") as process:
        while faults < kills:
            recipe = recipes[walks % len(recipes)]
            wanted, operations = reference(process, recipe)
            place = folder / f"walk-{walks}"
            struck = walk(process, command(world, place, recipe), place, kinds, operations // 3, draw)
            equal = (
                delivered(place) == delivered(wanted)
                and made_of(place / "artifacts") == made_of(wanted / "artifacts")
                and not leftovers(place / "artifacts")
            )
            faults, walks, same = faults + len(struck), walks + 1, same + equal
            result = "byte-identical" if equal else f"DIFFERENT, see {place}"
            print(f"{recipe}: {len(struck)} faults, {result}", flush=True)
    print(f"{faults} faults, {same} of {walks} runs byte-identical, {time.monotonic() - begin:.0f} s, seed {seed}")
    return 0 if same == walks else 1


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--kills", type=at_least(1), default=50, help="faults, all together")
    parser.add_argument("--recipes", type=some_of(list(RECIPES)), default=list(RECIPES))
    parser.add_argument("--kinds", type=some_of(["kill", "after", "enospc", "eio"]), default=["kill", "after"])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--folder", type=Path, help="where runs are made and kept (default: temporary)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        sys.exit(loop(folder, chosen.kills, chosen.recipes, tuple(chosen.kinds), chosen.seed))


if __name__ == "__main__":
    main()
