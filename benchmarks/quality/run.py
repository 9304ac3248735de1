"""Run rows of the side-by-side table, one at a time, each a run of the pipeline: quality/<row>-<removed>-<seed>.

    python benchmarks/quality/texts.py
    python benchmarks/quality/run.py [--rows best,tyr] [--removed 12.5,25,37.5,50] [--seeds 0] [--no-recovery]
        [--peers PYTHON] [--written FILE] [settings of the pipeline ...]
    python benchmarks/quality/table.py

Rows (rows.py) share the teacher, the tokens and whatever else they have in common, resume where they were cut off, and
are not run twice. Without recovery a run ends with `-start`; it takes seconds to minutes where recovery takes the rest.
Settings at the end hold for every row and win: `evaluate.speed=false` on a busy machine. --peers is the Python of the
environment that peers.py describes; without it rows of other tools are left out. --written is text that the teacher
wrote elsewhere (`recipe=generate` on a faster machine); without it the teacher writes it here. A row that fails does
not stop the others; their names are printed at the end, and the exit status is 1.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import at_least, described, existing, percentage, several, some_of
from broad import SETS
from composing import composed, with_settings
from rows import COMMON, ROWS, TEXTS, UNCUT, UNSEEN, Row, Written

HERE = Path(__file__).resolve().parent
FETCHED = {"jargon": "texts.py"} | {name: f"broad.py --set {name}" for name in SETS}  # no installation has them
REFERENCE = "topics"  # held-out text of the domain that every row sees


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--rows", type=some_of(ROWS), default=",".join(ROWS))
    parser.add_argument("--removed", type=several(percentage), default="12.5,25,37.5,50", help="outside the embeddings")
    parser.add_argument("--seeds", type=several(at_least(0)), default="0")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--texts", type=Path, default=Path("runs/texts"), help="where texts.py wrote")
    parser.add_argument("--peers", help="the Python that has the other tools")
    parser.add_argument("--written", type=existing, help="text that the teacher wrote")
    parser.add_argument("--no-recovery", action="store_true")
    options, settings = with_settings(parser)
    settings += [f"runs={options.runs}"]
    names = options.rows
    if options.peers and not shutil.which(options.peers):
        parser.error(f"--peers: {options.peers} is no program; give the Python that peers.py describes")
    if not options.peers and any(ROWS[name].of_a_tool for name in names):
        names = [name for name in names if not ROWS[name].of_a_tool]
        print("rows of other tools are left out: --peers names no Python that has them", flush=True)
    failed = []
    for seed in options.seeds:
        for removed in options.removed:
            for name in names:
                run = run_name(name, removed, seed, not options.no_recovery)
                common = [*text_settings(options.texts), f"seed={seed}", *settings]
                start = []
                if ROWS[name].peer:
                    start = [f"model.start={peer_start(ROWS[name].peer, removed, options.runs, options.peers, common)}"]
                start += mix(ROWS[name], options, common)
                chosen = row_settings(ROWS[name], removed, not options.no_recovery, [*common, *start])
                print(f"== {run}", flush=True)
                if pipeline(f"run={run}", *chosen).returncode:
                    failed.append(run)
    if failed:
        sys.exit(f"error: {len(failed)} runs failed: {', '.join(failed)}")


def run_name(row: str, removed: float, seed: int, recovery: bool) -> str:
    return f"quality/{row}-{removed:g}-{seed}" + ("" if recovery else "-start")


def text_settings(texts: Path) -> list[str]:
    """Return the texts of every row."""
    read = ",".join(located(name, texts) for name in TEXTS)
    measured = ",".join(located(name, texts) for name in (*UNSEEN, REFERENCE))
    return [
        f"data.calibration.path=[{read}]", f"data.recovery.path=[{read}]", f"data.evaluation.path=[{measured}]"
    ]  # fmt: skip


def located(name: str, texts: Path) -> str:
    """Return the path of a text: a file that texts.py wrote, else the one of this installation, if it has one."""
    files = [texts / f"{name}{ending}" for ending in (".jsonl", ".txt")]
    found = next((str(file) for file in files if file.is_file()), None)
    if found is None and name in FETCHED:
        raise SystemExit(f"error: --texts: {texts} has no {name}; benchmarks/quality/{FETCHED[name]} writes it")
    return found or f"builtin:{name}"


def row_settings(row: Row, removed: float, recovery: bool, settings: Sequence[str]) -> list[str]:
    """Return the overrides of a row; its line gains the recovery that its recipe lacks, or loses the one it has."""
    chosen = [*COMMON, *row.settings, *(row.recovered if recovery else row.bare)]
    chosen += [] if row.peer else [f"budget.parameters={1.0 - removed / 100.0:g}"]
    chosen += settings
    recipe = composed(chosen)["recipe"]
    wanted = {"stages": recipe["stages"], "repeat": recipe["repeat"]}
    if not recovery:
        wanted = {name: [stage for stage in stages if stage != "distill"] for name, stages in wanted.items()}
    elif row.trains == "distill" and "distill" not in recipe["stages"]:
        place = recipe["stages"].index("export")
        wanted["stages"] = [*recipe["stages"][:place], "distill", *recipe["stages"][place:]]
    changed = [name for name in wanted if wanted[name] != recipe[name]]
    return [*chosen, *(f"recipe.{name}=[{','.join(wanted[name])}]" for name in changed)]


def own_text(wanted: Written, runs: Path, settings: Sequence[str]) -> Path:
    """Run `recipe=generate`, once."""
    options = [f"generate.{name}={getattr(wanted, name)}" for name in ("tokens", "length", "batch")]
    name = f"quality/text-{wanted.tokens}"
    pipeline(f"run={name}", *COMMON, *settings, "recipe=generate", *options).check_returncode()
    return runs / name / "generated.jsonl"


def mix(row: Row, options: argparse.Namespace, settings: Sequence[str]) -> list[str]:
    """Return the settings by which calibration and recovery read what a row reads beside the texts of all rows."""
    weights = {located(name, options.texts): 1 for name in TEXTS}
    if row.kinds:
        name, weight = row.kinds
        weights[located(name, options.texts)] = weight
    if row.writes:
        weights[str(options.written or own_text(row.writes, options.runs, settings))] = row.writes.weight
    if len(weights) == len(TEXTS):
        return []
    each = (f"path=[{','.join(weights)}]", f"weights=[{','.join(map(str, weights.values()))}]")
    return [f"data.{purpose}.{setting}" for purpose in ("calibration", "recovery") for setting in each]


def peer_start(peer: str, removed: float, runs: Path, python: str, settings: Sequence[str]) -> Path:
    """Return the folder of the student that another tool cut from this teacher, made once; or the teacher."""
    pipeline("run=quality/teacher", "stages=[]", *COMMON, *settings).check_returncode()
    view = runs / "quality" / "teacher"
    if peer == UNCUT:
        return view / "teacher"
    read = "-".join((view / name).resolve().name.partition("-")[2] for name in ("teacher", "tokens"))
    start = runs / "quality" / "starts" / f"{peer}-{removed:g}-{read}"
    if not start.is_dir():
        command = [python, str(HERE / "peers.py"), "--peer", peer, "--keep", f"{1.0 - removed / 100.0:g}"]
        command += ["--teacher", str(view / "teacher"), "--tokens", str(view / "tokens" / "calibration")]
        subprocess.run([*command, "--out", str(start)], check=True)
    return start


def pipeline(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments])


if __name__ == "__main__":
    main()
