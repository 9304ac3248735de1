"""Runs a stage that trains on a prepared folder: resume_run.py <folder> <stage> <out>[:<step to die before>] ..."""

import os
import signal
import sys
from pathlib import Path

from pipeline.runtime.device import open_device
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import join, leave, place

OVERRIDES = (
    "data.sequence_length=16",
    "distill.global_batch_size=4",
    "distill.micro_batch_size=1",
    "distill.tokens=512",
    "distill.learning_rate=0.01",
    "distill.save_steps=3",
    "distill.eval_steps=4",
    "distill.eval_tokens=64",
    "distill.precision=bf16",
    "distill.loss.hidden=0.2",
    "teacher_correction.tokens=512",
    "teacher_correction.learning_rate=0.03",
    "onpolicy.tokens=400",
    "onpolicy.prompt_tokens=6",
    "onpolicy.min_new_tokens=5",
    "onpolicy.max_new_tokens=20",
    "onpolicy.learning_rate=0.01",
    "regularize.learning_rate=0.03",
    "regularize.weight=1.0",
    "regularize.norm=l2",
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
    from pipeline.runner import STAGES
    from pipeline.runtime.tracker import Track
    from tests.tiny_text import configured

    device = open_device("cpu", "auto", False, place()[2], 0)
    machine = Doomed(device, join(device, 60), Track())
    config = configured(*OVERRIDES)
    module = STAGES[stage]
    module.check(config)
    (folder / name).mkdir(exist_ok=True)
    wanted = (*module.needs, *module.optional)
    inputs = {each: folder / each for each in wanted if (folder / each).exists()}
    module.run(config, inputs, folder / name, machine)


if __name__ == "__main__":
    for requested in sys.argv[3:]:
        out, _, step = requested.partition(":")
        DIES = int(step) if step else None
        main(Path(sys.argv[1]), sys.argv[2], out)
    leave()
