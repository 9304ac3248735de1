"""A tiny byte-level tokenizer, trained on the spot, and the documents it was trained on."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

DOCUMENTS = [f"Document {i} says {'again and ' * (i % 5)}hello.\n\nAnd ends, é." for i in range(40)]


def byte_tokenizer(bos: bool = False, eos: bool = True, entries: int = 300) -> PreTrainedTokenizerFast:
    """Give a byte-level BPE tokenizer that tokenises any text; one with BOS opens texts with it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<s>"] * bos + ["</s>"] * eos, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(DOCUMENTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
