"""Kill one of two ranks at random moments of every stage of every recipe, run again, and compare what was made.

    python benchmarks/faults/rank_death.py [--deaths 50] [--recipes best,tyr] [--seed 0]

Tiny random models on two gloo ranks. A walk runs one command once for each stage of its recipe, a random rank killed
at a random call of this program's functions inside that stage, and then to its end; walks over the recipes follow until
there were enough deaths. Printed are how long the other rank ran on, of which the longest must stay below four times
device.timeout, and whether student and artifacts are byte-identical to those of a run left alone.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks/faults")]

from arguments import at_least, described, some_of  # noqa: E402
from kill_loop import RECIPES, command, delivered  # noqa: E402

from tests.injection import leftovers, made_of  # noqa: E402
from tests.injection.rank_death import Outcome, RankDriver, rank_driver, walk  # noqa: E402
from tests.world import make_world  # noqa: E402

TIMEOUT = 5.0  # device.timeout, seconds
TWO_RANKS = [f"device.timeout={TIMEOUT}", "regularize.micro_batch_size=2"]


def loop(folder: Path, deaths: int, recipes: list[str], seed: int) -> int:
    draw, world, count, walks, same = random.Random(seed), make_world(folder / "world"), 0, 0, 0
    references: dict[str, tuple[Path, Outcome]] = {}

    def reference(driver: RankDriver, recipe: str) -> tuple[Path, Outcome]:
        if recipe not in references:
            place = folder / f"reference-{recipe}"
            outcome = driver.run([*command(world, place, recipe), *TWO_RANKS])
            if outcome.status != [0, 0]:
                raise RuntimeError(f"{recipe} does not run: {outcome.outputs}")
            references[recipe] = place, outcome
        return references[recipe]

    begin, longest = time.monotonic(), 0.0
    with rank_driver(folder / "driver") as driver:
        while count < deaths:
            recipe = recipes[walks % len(recipes)]
            wanted, straight = reference(driver, recipe)
            place = folder / f"walk-{walks}"
            overrides = [*command(world, place, recipe), *TWO_RANKS]
            died = list(walk(driver, overrides, straight.calls, 4 * TIMEOUT, draw))
            equal = (
                delivered(place) == delivered(wanted)
                and made_of(place / "artifacts") == made_of(wanted / "artifacts")
                and not leftovers(place / "artifacts")
            )
            count, walks, same = count + len(died), walks + 1, same + equal
            longest = max(longest, *(death.seconds for death in died))
            result = "byte-identical" if equal else f"DIFFERENT, see {place}"
            print(f"{recipe}: {', '.join(f'{death.stage} rank {death.rank}' for death in died)}: {result}", flush=True)
    print(
        f"{count} deaths, {same} of {walks} runs byte-identical, the other rank ended within {longest:.1f} s"
        f" (device.timeout {TIMEOUT:g}), {time.monotonic() - begin:.0f} s, seed {seed}"
    )
    return 0 if same == walks else 1


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--deaths", type=at_least(1), default=50, help="killed ranks, all together")
    parser.add_argument("--recipes", type=some_of(list(RECIPES)), default=list(RECIPES))
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--folder", type=Path, help="where runs are made and kept (default: temporary)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(loop(chosen.folder or Path(scratch), chosen.deaths, chosen.recipes, chosen.seed))


if __name__ == "__main__":
    main()
