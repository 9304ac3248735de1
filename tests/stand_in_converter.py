"""Run in the place of convert_hf_to_gguf.py: writes a GGUF of the right tensors, widths and tokens, in float32.

No engine could read it: rows are not in llama.cpp's order. STAND_IN in the environment makes it wrong: `fails` ends
with an error, `loses` leaves a tensor out, `windows` states an order of layers.
"""

import argparse
import json
import os
from pathlib import Path

import gguf
from safetensors.numpy import load_file

ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "--outfile", "--outtype"):
        parser.add_argument(name)
    arguments, fault = parser.parse_args(), os.environ.get("STAND_IN")
    if fault == "fails":
        raise NotImplementedError("the tokenizer was not recognized")
    folder = Path(arguments.model)
    config = json.loads((folder / "config.json").read_text())
    architecture, layers = ARCHITECTURES[config["architectures"][0]], config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(architecture, layers)
    writer = gguf.GGUFWriter(arguments.outfile, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(layers)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_token_list([f"token {number}" for number in range(config["vocab_size"])])
    if fault == "windows":
        writer.add_sliding_window_pattern([False] * layers)
    tensors = {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    if fault == "loses":
        tensors.pop("model.layers.1.mlp.up_proj.weight")
    for name, tensor in tensors.items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
