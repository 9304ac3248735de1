"""Tokenizers trained on the spot on a few words, one of each kind: byte-level BPE, BPE with byte fallback, Unigram."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.prune.vocabulary.pieces import BYTES

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
LINES = [
    "the quick brown fox jumps over the lazy dog, then the dog jumps over the quick fox",
    "a lowest low lower slowest slow slower newest new newer widest wide wider, naïve café déjà",
    "def f(x): return x ** 2  # twice;  for i in range(10): print(i)\n\treturn None",
    "das Größte und die größeren Häuser, où sont les garçons; Привет, мир",
] * 4
PROBES = [
    *LINES[:4],
    "unseen wordings: zyxw QUACK 3.14159 \t\n\n  spaces   ",
    "你好，世界 🙂 \u200b∑ ≤ ½ नमस्ते",
    "<s> and </s> are written out",
]


def byte_level() -> Tokenizer:
    """Return a byte-level BPE that opens texts with <s>, as GPT-2's or Llama 3's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(LINES, trainer)
    template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    core.post_processor = processors.Sequence([processors.ByteLevel(), template])
    core.add_special_tokens([AddedToken("<turn>", special=True)])  # behind the pieces
    return core


def byte_fallback() -> Tokenizer:
    """Return a BPE over characters whose unknown ones are bytes, as Gemma's, with every split of a piece a merge."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False))
    model = json.loads(core.to_str())["model"]
    trained = [piece for piece in model["vocab"] if piece not in SPECIAL]
    vocab = {piece: number for number, piece in enumerate([*SPECIAL, *BYTES, *trained])}
    merges = [
        (piece[:place], piece[place:])
        for piece in trained
        for place in range(1, len(piece))
        if piece[:place] in vocab and piece[place:] in vocab
    ]
    whole = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    whole.normalizer = core.normalizer
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    whole.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    whole.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return whole


def unigram(fallback: bool) -> Tokenizer:
    """Return a Unigram, as T5's; with `fallback` its unknown characters are bytes."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    core.train_from_iterator(LINES, trainer)
    parts = [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if fallback else []), decoders.Fuse()]
    if fallback:
        pieces = json.loads(core.to_str())["model"]["vocab"]
        vocab = [*pieces[:4], *((byte, -20.0) for byte in BYTES), *pieces[4:]]
        core.model = models.Unigram([tuple(piece) for piece in vocab], 1, True)
    core.decoder = decoders.Sequence(parts)
    core.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2), trim_offsets=False)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return core


KINDS = {
    "byte-level BPE": byte_level,
    "BPE with byte fallback": byte_fallback,
    "Unigram": lambda: unigram(False),
    "Unigram with byte fallback": lambda: unigram(True),
}


def tokenizer_folder(folder: Path, text: str, size: int = 96) -> Path:
    """Train a tiny byte-level BPE tokenizer on a text and save it in a folder."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([text], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    return folder
