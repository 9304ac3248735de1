"""Examples of reports for tests: a small cut, what was measured of it, and the page's parser."""

import math
from dataclasses import replace
from html.parser import HTMLParser

import torch

from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything
from pipeline.model.scores import Scores
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.report.facts import cut_facts, gather, perplexity_of, recovery_facts
from pipeline.report.figures import curve, cut_figures, perplexities, stage_costs

SIZES = Sizes(96, 32, 8, (LayerSizes(4, 2, 24),) * 4)


def example_scores(sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    heads = tuple(torch.rand(w.heads, generator=generator) + 0.5 for w in sizes.layers)
    neurons = tuple(torch.rand(w.neurons, generator=generator) + 0.5 for w in sizes.layers)
    layers = torch.rand(len(sizes.layers), generator=generator).double() + 0.1
    return Scores(torch.rand(sizes.hidden, generator=generator) + 0.1, heads, neurons, layers, 1024)


def donating():
    """Layer 2 is dropped and gives KV group 1 to layer 1; layer 1 keeps its group 0; heads are cut in layer 3."""
    whole = everything(SIZES).layers
    first, last = whole[0], whole[3]
    host = LayerPlan(1, (Group(1, 0, (0, 1)), Group(2, 1, (2, 3))), tuple(range(0, 24, 2)))
    thin = LayerPlan(3, (Group(3, 0, (0,)), Group(3, 1, (3,))), last.neurons)
    return Blueprint(tuple(range(24)), (first, host, thin))


BLUEPRINTS = {
    "donating": donating(),
    "everything": everything(SIZES),
    "sublayers": Blueprint(
        tuple(range(32)),
        (
            everything(SIZES).layers[0],
            replace(everything(SIZES).layers[1], groups=()),
            replace(everything(SIZES).layers[2], neurons=()),
        ),
    ),
    "depth only": Blueprint(tuple(range(32)), everything(SIZES).layers[:2]),
    "width only": Blueprint(
        tuple(range(16)), tuple(LayerPlan(i, everything(SIZES).layers[i].groups, (0, 5, 7)) for i in range(4))
    ),
}


def example_evaluation(texts=("news",), speed=True):
    def quality(perplexity):
        return {
            "loss": math.log(perplexity),
            "perplexity": perplexity,
            "accuracy": 0.4,
            "bits_per_byte": 1.2,
            "next_word": 0.3,
        }

    shape = {"layers": 4, "hidden": 32, "heads": 4, "groups": 2, "neurons": 24, "head_size": 8, "vocabulary": 96}
    thin = {**shape, "layers": 3, "heads": [4, 4, 2], "neurons": [24, 12, 24]}
    sizes = {"parameters": 2_000_000, "non_embedding_parameters": 1_000_000, "checkpoint_bytes": 4_000_000}
    small = {"parameters": 1_500_000, "non_embedding_parameters": 500_000, "checkpoint_bytes": 3_000_000}
    how = {"sequence": 32, "stride": 32, "sequences": 4, "tokens": 124, "bytes": 500}
    who = {"teacher": quality(20.0), "start": quality(80.0), "student": quality(25.0)}
    runs = {"prefill_runs": [1000.0, 1100.0], "decode_runs": [40.0, 41.0]}
    times = {"teacher": {"prefill": 1000.0, "decode": 40.0, **runs}}
    times["student"] = {"prefill": 1500.0, "decode": 60.0, **runs}
    return {
        "device": {"kind": "cpu", "name": "chip", "dtype": "float32", "attention": "sdpa", "ranks": 1, "threads": 2},
        "models": {
            "teacher": {**sizes, "kv_bytes_per_token": 1024, "shape": shape},
            "student": {**small, "kv_bytes_per_token": 768, "shape": thin},
        },
        "texts": {name: {**how, **who} for name in texts},
        "tasks": {"teacher": {}, "student": {}},
        "speed": {"batch": 1, "prefill": 64, "decode": 8, "repeats": 3, **times} if speed else None,
        "samples": [{"text": "news", "prompt": "A <b>bold</b>", "reference": " day", "teacher": " a", "student": " b"}],
    }


MADE = {
    "model": "tiny",
    "run": "demo",
    "recipe": "pangu_light",
    "created": "2025-01-02T03:04:05+00:00",
    "command": "python -m pipeline run=demo",
    "settings": {"seed": 0, "score": {"tokens": 1024}},
    "versions": {"revision": "abc", "torch": "2"},
    "artifacts": {"teacher": "teacher-0"},
}
STAGES = {
    "score": {"seconds": 3.0, "peak_memory": 2_000_000_000, "devices": ["chip"]},
    "cut": {"seconds": 300.0, "peak_memory": 1, "devices": ["chip"]},
}
CURVES = {"loss": [(64.0, 3.0), (128.0, 2.0)], "held_out_kl": [(0.0, 2.5), (128.0, 1.0)]}


def example_report(blueprint=BLUEPRINTS["donating"], recovered=True, stages=STAGES, **evaluation):
    recovery = recovery_facts(CURVES, "tokens") if recovered else None
    cut = cut_facts(SIZES, blueprint, example_scores())
    return gather(example_evaluation(**evaluation), cut, recovery, stages, MADE)


def example_drawings(report, blueprint=BLUEPRINTS["donating"]):
    drawings = cut_figures(SIZES, blueprint, example_scores())
    drawings["perplexity"] = perplexities(perplexity_of(report))
    if report["recovery"]:
        drawings["loss"] = curve("Distillation loss", CURVES["loss"], "tokens", "3 → 2", dots=True)
    if report["stages"]:
        drawings["stages"] = stage_costs(report["stages"])
    return drawings


class Balanced(HTMLParser):
    """Collects the tags that were not closed, the ids, the links, and the visible words of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.faults, self.attributes, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)


EXPORT = {"class": "LlamaForCausalLM", "difference": 0.0, "form": "stock", "folded": False, "padded": None,
          "bytes": 4_000_000, "folder": "runs/demo/student"}  # fmt: skip
GGUF = {"file": "model.gguf", "type": "f16", "architecture": "gemma3", "tensors": {"F16": 8, "F32": 5},
        "bytes": 3_000_000, "query_factor": 2.0, "windows": True}  # fmt: skip
