"""Runs a stage that trains on a prepared folder: resume_run.py <folder> <stage> <out>[:<step to die before>] ..."""

import os
import signal
import sys
from pathlib import Path

from pipeline.runtime.device import open_device
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import join, leave, place

OVERRIDES = (
    "data.sequence=16",
    "distill.batch=4",
    "distill.micro_batch=1",
    "distill.tokens=512",
    "distill.learning_rate=0.01",
    "distill.save_every=3",
    "distill.validate_every=4",
    "distill.validate_tokens=64",
    "distill.precision=bf16",
    "distill.loss.hidden=0.2",
    "correct.tokens=512",
    "correct.learning_rate=0.03",
    "settle.learning_rate=0.03",
    "settle.weight=1.0",
    "settle.norm=l2",
    "plan.depth=gates",
    "deepspeed=zero2",
)


class Doomed(Machine):
    """A machine whose last rank is killed before a step."""

    def progress(self, iterable, total, label):
        for item in iterable:
            if item == DIES and self.ranks.rank == self.ranks.world - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


def main(folder: Path, stage: str, name: str) -> None:
    from pipeline.line import STAGES
    from pipeline.runtime.track import Track
    from tests.tiny_text import configured

    device = open_device("cpu", "auto", False, place()[2], 0)
    machine = Doomed(device, join(device, 60), Track(None))
    config = configured(*OVERRIDES)
    module = STAGES[stage]
    module.check(config)
    (folder / name).mkdir(exist_ok=True)
    wanted = (*module.NEEDS, *getattr(module, "OPTIONAL", ()))
    inputs = {each: folder / each for each in wanted if (folder / each).exists()}
    module.run(config, inputs, folder / name, machine)


if __name__ == "__main__":
    for asked in sys.argv[3:]:
        out, _, step = asked.partition(":")
        DIES = int(step) if step else None
        main(Path(sys.argv[1]), sys.argv[2], out)
    leave()
