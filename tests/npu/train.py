"""Train tiny models on the CPU and on the simulated NPU and print both loss curves as one line of JSON."""

import json
import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).parents[2])

from tests.npu.simulated import install  # noqa: E402

VOCABULARY = 64
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0,
)  # fmt: skip


def tiny(family: str, attention: str):
    """Return a freshly seeded model of `family`; tied embeddings in the Llama, sandwich norms in the GLM-4."""
    from transformers import Glm4Config, Glm4ForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, attn_implementation=attention))
    return Glm4ForCausalLM(Glm4Config(**SIZES, attn_implementation=attention))


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (2, 16), generator=generator) for _ in range(steps)]


def losses(family: str, attention: str, device: str, steps: int = 4) -> list[float]:
    """Return the loss before each AdamW step."""
    model = tiny(family, attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    curve = []
    for tokens in batches(steps):
        tokens = tokens.to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


if __name__ == "__main__":
    install()
    cases = [("llama", "sdpa"), ("llama", "eager"), ("glm4", "sdpa"), ("glm4", "eager")]
    print(json.dumps({f"{f} {a}": {d: losses(f, a, d) for d in ("cpu", "npu:0")} for f, a in cases}))
