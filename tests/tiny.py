"""Tiny random models of the real classes: every weight random, also gains and biases, so that nothing hides in ones."""

import json
from collections import Counter
from pathlib import Path

import torch
import transformers

from pipeline.model.anatomy import Anatomy, Sizes
from pipeline.model.families import FAMILIES

BASE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama-biases": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"query_pre_attn_scalar": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "glm": ("GlmConfig", "GlmForCausalLM", {"attention_bias": True}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {"attention_bias": True}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
}


def tiny_config(kind: str, **changed):
    config_class, _, special = CLASSES[kind]
    return getattr(transformers, config_class)(**{**BASE, **special, **changed}, attn_implementation="eager")


def tiny_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changed):
    """Give a tiny model of a kind, in evaluation mode, every parameter drawn from a normal of deviation 0.3."""
    config = tiny_config(kind, **changed)
    model = getattr(transformers, CLASSES[kind][1])(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def save_tiny(model, folder: Path) -> Path:
    """Save a model as a folder through safetensors, the tied output matrix left out as transformers does."""
    model.save_pretrained(folder)
    return folder


def anatomy_with(sizes: Sizes, kind: str = "llama", tied: bool = True) -> Anatomy:
    """Give the anatomy of a family's model of these sizes, with the weights of its table alone."""
    family = FAMILIES[kind]
    weights = frozenset(name for name in family.layer if name.endswith(".weight"))
    return Anatomy(family, sizes, weights, tied, ("full_attention",) * len(sizes.layers))


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Give the checkpoint tensors of a model: its state without the tied copy."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def config_of(model) -> dict:
    return json.loads(json.dumps(model.config.to_dict()))


def tokens(batch: int = 2, length: int = 12, vocabulary: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def counted(model: torch.nn.Module, runs: Counter) -> torch.nn.Module:
    """Count by layer how often its FFN runs."""
    for index, layer in enumerate(model.get_decoder().layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.update([index]))
    return model


def tokenizer_folder(folder: Path, text: str, size: int = 96) -> Path:
    """Train a tiny byte-level BPE tokenizer on a text and save it in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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


def inputs_of(model, ids, names):
    """Return what some modules read of ids, [tokens, width] each, by module name."""
    record = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, i, n=n: record.update({n: i[0].flatten(0, 1)}))
        for n in names
    ]
    with torch.no_grad():
        model.model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return record
