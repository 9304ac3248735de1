"""Processor seconds of commands that compute nothing: the help, a wrong setting, and a finished run that is run again.

    python benchmarks/startup.py runs/NAME/run.json [--passes 3]

The run of run.json must be finished. Printed are user and system seconds of the command, the smallest of all passes, so
that other programs on the machine count little. They hold the import of torch, where a command needs it, and for the
run the verification of its artifacts (`verify`).
"""

import resource
import subprocess
import sys

from arguments import at_least, described, existing


def seconds(*words: str, status: int = 0) -> float:
    """Return the processor seconds of a command; raise RuntimeError where it ends with another exit status."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("run", type=existing, help="run.json of a finished run")
    parser.add_argument("--passes", type=at_least(1), default=3)
    options = parser.parse_args()
    commands = {
        "--help": lambda: seconds("--help"),
        "a wrong setting": lambda: seconds("run=x", "distill.epochs=3", status=2),
        "a finished run": lambda: seconds("--from", str(options.run)),
    }
    for name, command in commands.items():
        print(f"{name}: {min(command() for _ in range(options.passes)):.2f} s", flush=True)


if __name__ == "__main__":
    main()
