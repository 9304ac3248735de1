"""A tiny byte-level tokenizer trained on the spot, and the tokens stage run with it."""

import json
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.config import Config, validate
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import Ranks
from pipeline.stages.prepare import tokens

CONF = Path(__file__).parents[1] / "conf"

DOCUMENTS = [f"Document {i} says {'again and ' * (i % 5)}hello.\n\nAnd ends, é." for i in range(40)]


def byte_tokenizer(bos: bool = False, eos: bool = True, entries: int = 300) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that tokenises any text; one with BOS opens texts with it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<s>"] * bos + ["</s>"] * eos, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=entries, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(DOCUMENTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def configured(*overrides: str) -> Config:
    """Return the default configuration with short sequences and what is overridden."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", ["data.sequence_length=32", *overrides])
    return validate(OmegaConf.to_container(composed, resolve=True))


def run_tokens(config: Config, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> dict:
    """Run the tokens stage into folder/out for a teacher of 300 entries and 64 positions, and give its tokens.json."""
    teacher, out = folder / "teacher", folder / "out"
    (tokenizer or byte_tokenizer()).save_pretrained(teacher)
    (teacher / "config.json").write_text(json.dumps({"vocab_size": 300, "max_position_embeddings": 64}))
    tokens.check(config)
    out.mkdir(exist_ok=True)
    tokens.run(config, {"teacher": teacher}, out, Machine(None, Ranks(0, 1, 0), None))
    return json.loads((out / "tokens.json").read_text())
