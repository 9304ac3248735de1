"""A reader of the DeciLM form in plain torch: the network that a serving engine builds from such a folder.

It reads `config.json` through the folder's own configuration code and the safetensors files, and imports nothing of
this project, so its logits depend on the folder alone. It follows the rules of vLLM's class (nemotron_nas.py); it is
not vLLM. Run as a program it performs the check that an export of the stock classes passes.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, silu
from transformers import AutoConfig


def logits(folder, ids, dtype):
    """Return the logits [token, vocabulary] of one sequence of ids; ValueError if tensors are missing or not read."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    weights = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        weights |= {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    unread = set(weights)

    def take(name, *shape):
        if name not in weights or weights[name].shape != shape:
            actual = list(weights[name].shape) if name in weights else "absent"
            raise ValueError(f"{name} is {actual}, the class needs {list(shape)}")
        unread.discard(name)
        return weights[name]

    def project(x, name, rows, biased):
        bias = take(f"{name}.bias", rows) if biased else None
        return linear(x, take(f"{name}.weight", rows, x.shape[-1]), bias)

    def norm(x, name):
        exact = x.to(torch.promote_types(dtype, torch.float32))
        scaled = exact * (exact.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return scaled.to(dtype) * take(f"{name}.weight", x.shape[-1])

    hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    output_biased = getattr(config, "attention_bias", False) or getattr(config, "bias", False)
    biased = getattr(config, "qkv_bias", output_biased)
    embedding = take("model.embed_tokens.weight", config.vocab_size, hidden)
    turn = rotation(config, len(ids), size)
    stream = embedding[torch.tensor(ids)]
    for layer in range(config.num_hidden_layers):
        at, block = f"model.layers.{layer}", config.block_configs[layer]
        if not block.attention.no_op:
            groups = heads // block.attention.n_heads_in_group
            x = norm(stream, f"{at}.input_layernorm")
            q, k, v = (
                project(x, f"{at}.self_attn.{part}_proj", n * size, biased).view(len(ids), n, size).transpose(0, 1)
                for part, n in (("q", heads), ("k", groups), ("v", groups))
            )
            mixed = attend(turn(q), *(t.repeat_interleave(heads // groups, 0) for t in (turn(k), v)))
            mixed = mixed.transpose(0, 1).reshape(len(ids), heads * size)
            stream = stream + project(mixed, f"{at}.self_attn.o_proj", hidden, output_biased)
        if block.ffn.no_op:
            continue
        neurons = int(2 * block.ffn.ffn_mult * hidden / 3)
        neurons = neurons if neurons % 256 == 0 else neurons + 256 - neurons % 256
        mlp_biased = getattr(config, "mlp_bias", False)
        x = norm(stream, f"{at}.post_attention_layernorm")
        gate, up = (project(x, f"{at}.mlp.{name}_proj", neurons, mlp_biased) for name in ("gate", "up"))
        stream = stream + project(silu(gate) * up, f"{at}.mlp.down_proj", hidden, mlp_biased)
    head = embedding if config.tie_word_embeddings else take("lm_head.weight", config.vocab_size, hidden)
    scores = linear(norm(stream, "model.norm"), head)
    if unread:
        raise ValueError(f"the class does not read {sorted(unread)[:3]}; export the model again")
    return scores


def attend(q, k, v):
    """Return causal attention over [head, token, size], each query head beside its own key and value head."""
    scores = (q @ k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v


def rotation(config, tokens, size):
    """Return a function that applies the config's rotary embedding to [head, token, size], halves turned together."""
    rope = config.rope_parameters
    frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    elif rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (share + (1 - share) / rope["factor"])
    elif rope["rope_type"] != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not one that this reader computes")
    angle = torch.arange(tokens)[:, None] * frequency
    cos, sin = (torch.cat([wave, wave], -1) for wave in (angle.cos(), angle.sin()))

    def turn(x):
        one, other = x.chunk(2, -1)
        return x * cos.to(x.dtype) + torch.cat([-other, one], -1) * sin.to(x.dtype)

    return turn


if __name__ == "__main__":
    folder, dtype, ids, out, *_ = sys.argv[1:]
    torch.save(logits(folder, json.loads(ids), getattr(torch, dtype)).float(), out)
    print(json.dumps({"class": "DeciLMForCausalLM, by our reader of its rules"}))
