"""Break one line of a copy of the source and run the line on the simulated NPU; print what each copy came to, as JSON.

One process imports what is slow and forks a child for each copy, which imports the package from there.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)

from tests.npu.simulated import install  # noqa: E402

STAGES = "stages=[importance,shape,plan,cut,distill]"
FAULTS = {
    "sound": None,
    "a hard-coded device": (
        "pipeline/runtime/engine.py",
        "loss, parts = self._engine(batch.to(self._device.torch))",
        'loss, parts = self._engine(batch.to("cuda"))',
    ),
    "a missing .to": (
        "pipeline/prune/importance/measure.py",
        "model(input_ids=ids.to(device), use_cache=False)\n    for total",
        "model(input_ids=ids, use_cache=False)\n    for total",
    ),
    "a tensor made on the CPU": (
        "pipeline/distill/next_token.py",
        "torch.full_like(tokens[:, :1], IGNORED)",
        "torch.full(tokens[:, :1].shape, IGNORED)",
    ),
}  # what is wrong -> (file, its line, the line in its place)


def copied(folder: Path, fault: tuple[str, str, str] | None) -> Path:
    """Copy the source that runs, with one line changed; ValueError where that line is not, or not once, there."""
    for part in ("pipeline", "kernels", "conf"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    if fault:
        file, line, broken = fault
        text = (folder / file).read_text()
        if text.count(line) != 1:
            raise ValueError(f"{file} has {text.count(line)} times the line to break, {line!r}; name another")
        (folder / file).write_text(text.replace(line, broken))
    return folder


def run(source: Path, arguments: list[str], said: Path) -> int:
    """Run the pipeline of a copied source in a forked child that writes to `said`; give its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with said.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pipeline", "fused")]:
        del sys.modules[name]
    sys.path[:0] = [str(source), str(source / "kernels")]
    sys.argv = ["pipeline", *arguments]
    try:
        from pipeline.__main__ import main

        assert Path(sys.modules["pipeline"].__file__).is_relative_to(source)
        main()
        code = 0
    except BaseException as fault:  # whatever ends the run ends this child, and is reported
        code = fault.code if isinstance(fault, SystemExit) else 1
        print(f"\n{type(fault).__name__}: {fault}", flush=True)
    sys.stdout.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    install()
    os.environ["DS_ACCELERATOR"] = "npu"
    import deepspeed  # noqa: F401

    import pipeline.runner  # noqa: F401
    from tests.world import make_world, settings

    with tempfile.TemporaryDirectory() as scratch:
        world, result = make_world(Path(scratch) / "world"), {}
        for place, (name, fault) in enumerate(FAULTS.items()):
            folder = Path(scratch) / str(place)
            places = {"runs": folder / "runs", "artifacts": folder / "artifacts"}
            own = settings(world, **places, device="npu", distill__tokens=512)
            code = run(copied(folder, fault), ["run=sabotaged", *own, STAGES], Path(scratch) / f"{place}.txt")
            said = (Path(scratch) / f"{place}.txt").read_text()
            tracebacks = "".join(path.read_text() for path in folder.glob("runs/*/traceback-*.txt"))
            result[name] = {"exit": code, "said": (tracebacks + said)[-6000:]}
    print(json.dumps(result))
