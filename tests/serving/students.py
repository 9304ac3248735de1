"""Students for the engines: tiny random models of real classes with a layer removed, exported by the stages."""

import shutil
from functools import cache
from pathlib import Path

import sentencepiece
import torch

from pipeline.model.blueprint import Group, LayerPlan
from pipeline.model.exported import Converted
from pipeline.stages.deliver import export, gguf
from tests.students import machine, student
from tests.tiny import TINY, model_type
from tests.tiny_text import configured
from tests.world import text

VOCABULARY = 384
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 128}  # engines take few head sizes
LAYERS = 8
PERIOD = ["sliding_attention"] * 3 + ["full_attention"]
CHANGED = {  # of the tiny models, by kind: 8 layers, windows and scales of attention as a student may have them
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma2-scaled": {"query_pre_attn_scalar": 24},
    "gemma3_text": {"layer_types": PERIOD * 2, "query_pre_attn_scalar": 32},
    "gemma3_text-scaled": {"layer_types": PERIOD * 2, "query_pre_attn_scalar": 24},
}


def alike(removed: int = 1, neurons: int = 64) -> tuple[LayerPlan, ...]:
    """Return the plan of a student without one layer, whose others lose a query head per KV group and neurons."""
    kept = (layer for layer in range(LAYERS) if layer != removed)
    groups = {layer: (Group(layer, 0, (0,)), Group(layer, 1, (3,))) for layer in range(LAYERS)}
    return tuple(LayerPlan(layer, groups[layer], tuple(range(neurons))) for layer in kept)


def differing() -> tuple[LayerPlan, ...]:
    """Return the plan of a student without one layer whose others have one or two KV groups and their own neurons."""
    plans = []
    for layer in (0, *range(2, LAYERS)):
        groups = (Group(layer, 0, (0, 1)), Group(layer, 1, (2, 3))) if layer % 2 else (Group(layer, 1, (2, 3)),)
        plans.append(LayerPlan(layer, groups, tuple(range(32 + 8 * layer))))
    return tuple(plans)


def lacking() -> tuple[LayerPlan, ...]:
    """Return the plan of `differing` whose third layer has no attention, and whose fifth has no FFN."""
    plans = list(differing())
    plans[2] = LayerPlan(plans[2].host, (), plans[2].neurons)
    plans[4] = LayerPlan(plans[4].host, plans[4].groups, ())
    return tuple(plans)


def exported(folder: Path, kind: str, form: str, plans: tuple[LayerPlan, ...] | None = None) -> Path:
    """Write the student of a tiny model of a kind by the stage `export`, in float32; return its folder."""
    changed = WIDTHS | SIZES | {"num_hidden_layers": LAYERS} | CHANGED.get(kind, {})
    tiny = kind if kind in TINY else model_type(kind)
    source = student(tiny, folder / "cut", plans or alike(), WIDTHS["hidden_size"], dtype=torch.float32, **changed)
    shutil.copyfile(tokenizer(folder.parent), source.folder / "tokenizer.model")
    chosen = configured(f"export.form={form}", "export.dtype=float32", "export.tolerance=1e-4")
    export.run(chosen, {"initial_student": source.folder}, folder / "student", machine())
    return folder / "student"


def converted(folder: Path, kind: str, converter: Path, out: Path) -> tuple[Path, Converted]:
    """Write the GGUF of an exported student by the stage `gguf`; return the file and what is recorded of it."""
    out.mkdir(parents=True)
    chosen = configured(f"export.gguf={kind}", f"export.gguf_converter={converter}")
    gguf.run(chosen, {"student": folder}, out, machine())
    return out / gguf.FILE, Converted.load(out)


@cache
def tokenizer(folder: Path) -> Path:
    """Train a SentencePiece tokenizer without byte tokens, of which llama.cpp would report whole characters alone."""
    (folder / "text.txt").write_text(text(400, 1))
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(prefix), model_type="bpe", vocab_size=VOCABULARY,
        unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")
