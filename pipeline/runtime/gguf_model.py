"""A GGUF file as a model folder: unpacked by transformers once its header has been validated."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations import GGUF_CONFIG_MAPPING

from pipeline.model.families import FAMILIES, family_of
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.config_bounds import one_line
from pipeline.runtime.described import LIMITS, OPTIONAL, checked_config
from pipeline.runtime.gguf_header import OTHERS, TOKENIZER, Header, concatenate, join, read_header
from pipeline.runtime.log import bars_on_terminals_only
from pipeline.runtime.model_class import class_shapes
from pipeline.runtime.model_loader import load_whole

WHOLE = "whole.gguf"
MODEL_TYPES = {  # by general.architecture, where it is not the model_type of transformers
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
ARCHITECTURES = sorted(
    name for name in {*GGUF_CONFIG_MAPPING, *MODEL_TYPES} if MODEL_TYPES.get(name, name) in FAMILIES
)  # that transformers converts to a model of the table of families
COUNTS = {  # the largest value of fields ARCHITECTURE.NAME, which transformers believes before it reads a tensor
    "block_count": LIMITS["layers"],
    "embedding_length": LIMITS["hidden"],
    "feed_forward_length": LIMITS["neurons"],
    "expert_feed_forward_length": LIMITS["neurons"],
    "expert_count": 1 << 14,
    "expert_used_count": 1 << 14,
    "attention.head_count": LIMITS["heads"],
    "attention.head_count_kv": OPTIONAL["groups"],
    "attention.key_length": OPTIONAL["head_size"],
    "attention.value_length": OPTIONAL["head_size"],
    "rope.dimension_count": OPTIONAL["head_size"],
    "vocab_size": LIMITS["vocabulary"],
    "context_length": 1 << 30,
    "shortconv.l_cache": 1 << 14,
}
PER_TOKEN = 8  # the most entries of all arrays of the tokenizer, for each row of the embedding


def check_parts(parts: Sequence[Path]) -> None:
    """Validate the headers of a GGUF file or of the parts of a split one; ValueError, naming the file.

    The pieces of a file that was cut bytewise have no headers of their own and are checked once they are put together.
    """
    if all(part.suffix == ".gguf" for part in parts):
        headers = [read_header(part) for part in parts]
        if len(parts) == 1 and headers[0].parts > 1:
            raise ValueError(
                f"{parts[0]} is one of {headers[0].parts} parts; put all of them, named NAME-00001-of-0000N.gguf, into "
                "one folder"
            )
        _check_fields(headers)


def unpack(parts: Sequence[Path], folder: Path, shard_bytes: float) -> None:
    """Write the model of a GGUF file, or of its parts, as a model folder in bfloat16, without quantisation.

    Raise ValueError, naming the file, where it is damaged, and unless its tensors are those of its class exactly.
    """
    check_parts(parts)
    file = parts[0] if len(parts) == 1 else folder / WHOLE
    try:
        if len(parts) > 1:
            if all(part.suffix == ".gguf" for part in parts):
                join([read_header(part) for part in parts], file)
            else:
                concatenate(parts, file)
        _convert(read_header(file), folder, shard_bytes)
    except ValueError as fault:
        given = " and ".join(map(str, parts))  # not what they were joined to
        raise ValueError(str(fault).replace(str(file), given)) from fault
    finally:
        (folder / WHOLE).unlink(missing_ok=True)


def _check_fields(headers: Sequence[Header]) -> None:
    """Raise ValueError where what transformers would read of a file, given its parts, is no model or out of bounds."""
    first, tensors = headers[0], [tensor for header in headers for tensor in header.tensors]
    path, kind = first.path, first.fields.get("general.architecture")
    if not tensors:
        raise ValueError(f"{path} holds no tensors, a vocabulary alone; give the model's GGUF")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture is {kind!r:.60}, not one that is converted ({', '.join(ARCHITECTURES)}); "
            "give the model as a Hugging Face folder"
        )
    for key in first.fields:  # under any architecture: transformers reads them all
        limit = COUNTS.get(key.partition(".")[2])
        if limit is not None:
            _check_counts(first, key, limit)
    rows = sum(tensor.dimensions[-1] for tensor in tensors if tensor.name == "token_embd.weight")
    entries = first.entries(TOKENIZER)
    if entries > PER_TOKEN * rows + OTHERS:
        raise ValueError(
            f"{path}: the arrays {TOKENIZER}* have {entries} entries, too many for the {rows} rows of "
            "token_embd.weight; fetch it again"
        )


def _check_counts(header: Header, key: str, limit: int) -> None:
    """Raise ValueError where a field holds, also in an array, anything but integers from 0 to a limit."""
    numbers = header.numbers(key)
    for number in ("a text",) if numbers is None else numbers:
        if type(number) is not int or not 0 <= number <= limit:
            fault = f"{header.path}: {one_line(key):.80} is {number}, not an integer from 0 to {limit}"
            raise ValueError(f"{fault}; fetch it again")


def _convert(header: Header, folder: Path, shard_bytes: float) -> None:
    path = header.path
    _check_fields([header])
    options = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        whole = AutoConfig.from_pretrained(path.parent, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except Exception as fault:  # transformers raises whatever a field's value leads to
        reason = " ".join(str(fault).split())
        raise ValueError(f"{path} cannot be read as GGUF ({type(fault).__name__}: {reason:.160})") from fault
    unset = ("architectures", "quantization_config")  # none, and that of the file
    config = checked_config({field: value for field, value in whole.to_dict().items() if field not in unset}, path)
    _check_elements(header, config)
    with bars_on_terminals_only():
        model = load_whole(
            AutoModelForCausalLM,
            path.parent,
            gguf_file=path.name,
            config=whole,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    tokenizer.save_pretrained(folder)
    write_checkpoint(folder, config, _tensors(model), shard_bytes)


def _check_elements(header: Header, config: dict) -> None:
    """Compare the number of weights of the file with that of its class, before memory is taken for them.

    transformers draws absent weights at random and leaves out tensors it does not know; both change the network.
    """
    layers = {tensor.name.split(".")[1] for tensor in header.tensors if tensor.name.startswith("blk.")}
    count = family_of(config["model_type"]).width(config, "layers")
    if len(layers) < count:  # before a class of that many layers is built
        raise ValueError(f"{header.path} lacks tensors: {len(layers)} of {count} layers are there; fetch it again")
    needed = sum(torch.Size(shape).numel() for shape in class_shapes(config, header.path.parent).values())
    held = sum(tensor.elements for tensor in header.tensors)
    if needed == held:
        return
    counts = f"{header.path} holds {held} weights and its class has {needed}"
    if needed > held:
        raise ValueError(f"{counts}: it lacks tensors; fetch it again")
    extra = [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_")]
    names = f" (such as {', '.join(extra[:3])})" if extra else ""
    raise ValueError(
        f"{counts}: transformers does not read all of its tensors{names}; give the model as a Hugging Face folder"
    )


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in bfloat16; a tied output matrix is left out."""
    head = f"{family_of(model.config.model_type).head}.weight"
    for name, tensor in model.state_dict().items():
        if name != head or not model.config.tie_word_embeddings:
            yield name, tensor.to(torch.bfloat16)
