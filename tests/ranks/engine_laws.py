"""Trains tiny students under every ZeRO stage and writes down what happened; tests/ranks/test_engine.py judges it.

Run as: [torchrun] engine_laws.py <folder>; several processes write as one. Facts go to <folder>/facts-<world>.json.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.runtime import training_checkpoints
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.device import open_device
from pipeline.runtime.ranks import join, leave, place

GLOBAL, LENGTH, VOCABULARY, STEPS, BREAK = 4, 12, 97, 5, 2
ODD = {"num_hidden_layers": 2, "hidden_size": 27, "num_attention_heads": 3, "num_key_value_heads": 1}  # pads partitions
WIDE = {"hidden_size": 32, "vocab_size": VOCABULARY}


def main(folder: Path) -> None:
    device = open_device("cpu", "auto", False, place()[2], 0)
    ranks = join(device, 60)
    laws = Laws(folder, device, ranks)
    one = [(stage, bf16) for bf16 in (False, True) for stage in (0, 1, 2, 3)]
    two = [each for each in one if each != (0, True)]
    for stage, bf16 in one if ranks.world == 1 else two:
        laws.resume(stage, bf16)
    laws.options()
    if ranks.world == 2:
        laws.leave_for_others()
    else:
        laws.take_over()
        laws.starts()
        laws.poison()
    if ranks.rank == 0:
        (folder / f"facts-{ranks.world}.json").write_text(json.dumps(laws.facts))
    leave()


def flip(path):
    """Flip one bit in the middle of the largest file."""
    file = max(path.iterdir(), key=lambda each: each.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def reshape(path):
    """Return a tensor another shape and the digests of that: a sound file that is not of this training."""
    tensors = dict(open_checkpoint(path).items())
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name] = tensors[name].T.contiguous()
    training_checkpoints.write(path.parent, 6, tensors.items())


SPOILED = {
    "flip": flip,
    "cut": lambda path: os.truncate(path / "model.safetensors", 100),
    "absent": lambda path: (path / "model.safetensors").unlink(),
    "config": lambda path: (path / "config.json").write_text('{"step": 5}'),
    "no_digests": lambda path: (path / "digests.json").unlink(),
    "digests": lambda path: (path / "digests.json").write_text("[1"),
    "renamed": lambda path: path.rename(path.with_name("step-00000005")),
    "reshape": reshape,
}


class Laws:
    def __init__(self, folder, device, ranks):
        self.folder, self.device, self.ranks, self.facts = folder, device, ranks, {}

    def engine(self, stage, bf16, model="llama-tied", seed=1, checkpointing=False, decay=0.1, extra=None, **requested):
        from pipeline.distill.distiller import Distiller, Match, Objective
        from pipeline.runtime.engine import Engine
        from tests.tiny import tiny_model

        terms = {"kind": "forward_kl", "beta": 0.5, "temperature": 1.0, "cross_entropy": 0.0, "hidden": 0.0}
        objective = Objective(**{**terms, "embedding": 0.0, "chunk": 16, "kernel": "auto", **requested})
        teacher = tiny_model(model, 0, torch.float32, **WIDE)
        student = tiny_model(model, seed, torch.float32, **(WIDE | {"intermediate_size": 21} | ODD))
        match = Match(((0, 1), (1, 3)), tuple(range(2, 29)))
        return Engine(
            Distiller(teacher, student, objective, match, checkpointing),
            self.device,
            self.ranks,
            stage=stage,
            bf16=bf16,
            micro_batch=GLOBAL // 2 // self.ranks.world,
            accumulation=2,
            clip=0.1,
            betas=(0.9, 0.95),
            weight_decay=decay,
            extra=extra or {},
        )

    def steps(self, engine, first, last):
        """Train; give loss, gradient norm and held-out KL of every step."""
        from tests.tiny import tokens

        result = []
        for step in range(first, last):
            batch = tokens(GLOBAL, LENGTH, VOCABULARY, step)
            loss = 0.0
            for half in batch.split(GLOBAL // 2):
                loss += engine.average(engine.backward(half[self.ranks.rank :: self.ranks.world]))["loss"] / 2
            norm = engine.step(1e-2)
            result.append([loss, norm, engine.average(engine.measure(tokens(1, LENGTH, VOCABULARY, 1000)))["kl"]])
        return result

    def resume(self, stage, bf16):
        """Train straight; train from the checkpoint of the middle in an engine that was built from other weights."""
        place = self.folder / f"resume-{self.ranks.world}-{stage}-{bf16}"
        engine = self.engine(stage, bf16)
        before = self.steps(engine, 0, BREAK)
        engine.save(place, BREAK, keep=1, best=None)
        after = self.steps(engine, BREAK, STEPS)
        straight = dict(engine.student_state())
        engine.close()
        engine = self.engine(stage, bf16, seed=9)
        found, damaged = engine.newest_sound(place, STEPS, lambda step, is_sound: True)
        engine.load(place, found)
        again = self.steps(engine, BREAK, STEPS)
        resumed = dict(engine.student_state())
        engine.close()
        name = f"{'bf16' if bf16 else 'fp32'}-{stage}"
        self.facts[name] = {
            "curve": before + after,
            "found": found,
            "damaged": damaged,
            "same_curve": again == after,
            "same_weights": all(torch.equal(straight[key], resumed[key]) for key in straight),
            "types": sorted({str(tensor.dtype) for tensor in straight.values()}),
        }
        self.write(f"end-{self.ranks.world}-{name}", straight)

    def options(self):
        """Hidden-state terms, gradient checkpointing and an untied head, without ZeRO and under ZeRO-3."""
        terms = {"hidden": 0.5, "embedding": 0.2, "cross_entropy": 0.3, "temperature": 2.0, "kind": "jsd"}
        runs = {"plain": (0, False), "zero3": (3, False), "zero3-checkpointing": (3, True)}
        for name, (stage, checkpointing) in runs.items():
            if self.ranks.world == 2 and not checkpointing:
                continue
            engine = self.engine(stage, False, "llama", checkpointing=checkpointing, **terms)
            self.facts[f"options-{name}"] = self.steps(engine, 0, 3)
            engine.close()

    def leave_for_others(self):
        """Save on these ranks under ZeRO-3 for another number of ranks and another stage; and train on."""
        engine = self.engine(3, False)
        self.steps(engine, 0, BREAK)
        engine.save(self.folder / "moved", BREAK, keep=1, best=None)
        self.facts["moved"] = self.steps(engine, BREAK, STEPS)
        engine.close()

    def take_over(self):
        engine = self.engine(1, False, seed=9)
        engine.load(self.folder / "moved", BREAK)
        self.facts["moved"] = self.steps(engine, BREAK, STEPS)
        engine.close()

    def starts(self):
        """`take` gives the float32 weights that bf16 would have rounded; steps without a gradient change nothing."""
        for stage in (0, 1, 3):
            engine = self.engine(stage, True)
            other = dict(self.engine(0, False, seed=4).student_state())
            engine.take(other)
            taken = dict(engine.student_state())
            self.facts[f"taken-{stage}"] = all(torch.equal(taken[name], other[name]) for name in other)
            self.facts[f"rounded-{stage}"] = any((other[n].bfloat16().float() != other[n]).any() for n in other)
            engine.close()
        engine = self.engine(2, False)
        for step in (2, 3, 4, 6):
            engine.save(self.folder / "kept", step, keep=2, best=2)
        self.facts["kept"] = sorted(path.name for path in (self.folder / "kept").iterdir())
        self.facts["damage"] = self.damage(engine, self.folder / "kept")
        engine.close()
        engine = self.engine(2, False, "llama")
        try:
            engine.newest_sound(self.folder / "kept", 6, lambda step, is_sound: True)
        except ValueError as fault:
            self.facts["another"] = str(fault)
        engine.close()

    def damage(self, engine, place):
        """Spoil a copy of the newest checkpoint in one way after another: the step that is resumed from, and why."""
        facts = {}
        for name, spoil in SPOILED.items():
            copy = self.folder / f"spoiled-{name}"
            shutil.copytree(place, copy)
            spoil(copy / "step-00000006")
            facts[name] = engine.newest_sound(copy, 6, lambda step, is_sound: True)
        facts["beyond"] = engine.newest_sound(place, 5, lambda step, is_sound: True)
        facts["unusable"] = engine.newest_sound(place, 6, lambda step, is_sound: step < 3 and is_sound(4))
        facts["none"] = engine.newest_sound(place, 1, lambda step, is_sound: True)
        return facts

    def poison(self):
        """One gradient is not finite although the loss is: the norm that `step` gives."""
        for bf16 in (False, True):
            for stage in (0, 1, 2, 3):
                engine = self.engine(stage, bf16)
                engine._named["model.layers.1.mlp.up_proj.weight"].register_hook(lambda gradient: gradient * math.inf)
                self.facts[f"poisoned-{stage}-{bf16}"] = repr(self.steps(engine, 0, 1)[0][1])
                engine.close()

    def write(self, name, tensors):
        if self.ranks.rank == 0:
            dense = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(dense, self.folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
