"""Tiny GGUF files for tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.tiny import tensors_of


def write_gguf(path: Path, model, split: int = 0, without: str = "", extra: Callable | None = None) -> Path:
    """Write a tiny tied Llama with a byte-level tokenizer as an unquantised GGUF file, and return its path.

    `split` is the number of tensors in a part, 0 for one file; tensors whose names contain `without` are left out;
    `extra` is called with the writer before it writes.
    """
    import gguf

    config, state = model.config, tensors_of(model)
    writer = gguf.GGUFWriter(path, "llama", **({"split_max_tensors": split} if split else {}))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "</s>", "!!", *(chr(33 + i) for i in range(92))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * 93)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
        name = name.replace("model.norm", "output_norm")
        if "attn_q." in name or "attn_k." in name:  # GGUF keeps the two halves of a rotary head interleaved
            tensor = tensor.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        if not without or without not in name:
            writer.add_tensor(name, tensor.numpy().astype(np.float32))
    if extra:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
