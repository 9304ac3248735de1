"""The DeciLM form (Nemotron-NAS): a config.json with a block per layer, for engines that serve DeciLMForCausalLM.

The rules are those of vLLM's class (vllm/model_executor/models/nemotron_nas.py): Llama layers, all with the same number
H of query heads; a layer's KV heads are H // n_heads_in_group; its neurons int(2 * ffn_mult * hidden / 3), rounded up
to a multiple of 256; an attention or FFN that is `no_op` has neither weights nor a norm, and caches nothing; the first
layer has attention; biases are on all four attention projections (attention_bias) or on Q, K and V (qkv_bias); no
sliding window; SiLU. A student is padded with zeros to the nearest widths these rules can say.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.model.anatomy import Anatomy, anatomy_of
from pipeline.model.export_forms import least, refuse_scales
from pipeline.model.families import FAMILIES
from pipeline.model.hf_config import accepts_heads, per_layer
from pipeline.model.sizes import LayerSizes, Sizes

MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"
CONFIGURATION_FILE = "configuration_decilm.py"
SERVED = ("llama", "mistral", "qwen2")
ROPE = ("default", "linear", "llama3")  # what the reader that proves the export computes
MULTIPLE = 256
DROPPED = {"pruned", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "rope_scaling"}


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError, one line, where DeciLMForCausalLM computes another network than this config's class."""
    refuse_scales(config, "decilm")
    kind, rope = config["model_type"], rotary(config)["rope_type"]
    windowed = kind == "mistral" or config.get("use_sliding_window")
    faults = {
        f"model_type {kind!r} is not one of {', '.join(SERVED)}": kind not in SERVED,
        f"hidden_act is {config.get('hidden_act', 'silu')!r}, not 'silu'": config.get("hidden_act", "silu") != "silu",
        "attention slides over a window": bool(windowed and config.get("sliding_window")),
        f"rope_type {rope!r} is not one of {', '.join(ROPE)}": rope not in ROPE,
    }
    for fault, holds in faults.items():
        if holds:
            raise ValueError(f"export.form is decilm, and {fault}; set export.form=padded or own")


def decilm(config: Mapping[str, Any], student: Anatomy) -> tuple[dict[str, Any], Sizes]:
    """Return the config.json of a student in this form, and the widths its layers must be padded to.

    ValueError if the form cannot say it.
    """
    check(config)
    biases = _biases(student)
    layers = _widths(student)
    hidden, heads = student.sizes.hidden, layers[0].heads
    rope = rotary(config)
    blocks = [
        {
            "attention": _block("n_heads_in_group", heads // w.groups if w.groups else None),
            "ffn": _block("ffn_mult", 3 * w.neurons / (2 * hidden) if w.neurons else None),
        }
        for w in layers
    ]
    written = {key: value for key, value in config.items() if key not in DROPPED} | {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{CONFIGURATION_FILE.removesuffix('.py')}.DeciLMConfig"},
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "head_dim": student.sizes.head_size,
        "hidden_act": "silu",
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "tie_word_embeddings": student.tied,
        "block_configs": blocks,
        **biases,
    }
    if block_widths(written) != layers:
        raise ValueError(f"export.form is decilm: its blocks say {block_widths(written)}, the layers are {layers}")
    return written, replace(student.sizes, layers=layers)


def _block(field: str, value: float | None) -> dict[str, Any]:
    """Return a part of a block; None: the layer has no such part."""
    return {field: value, "no_op": value is None, "replace_with_linear": False}


def block_widths(config: Mapping[str, Any]) -> tuple[LayerSizes, ...]:
    """Return the widths that the class builds from `block_configs`; ValueError if it would not build the model."""
    heads, blocks = config["num_attention_heads"], config["block_configs"]
    if len(blocks) != config["num_hidden_layers"]:
        raise ValueError(f"block_configs has {len(blocks)} blocks; num_hidden_layers is {config['num_hidden_layers']}")
    layers = []
    for place, block in enumerate(blocks):
        attention, ffn = block["attention"], block["ffn"]
        for part, settings in (("attention", attention), ("ffn", ffn)):
            if settings.get("replace_with_linear"):
                raise ValueError(f"block_configs[{place}].{part} is linear, which is not supported; give another model")
        absent = bool(attention.get("no_op"))
        each = heads if absent else attention["n_heads_in_group"]
        if each < 1 or heads % each:
            raise ValueError(f"block_configs[{place}].attention.n_heads_in_group is {each}, no divisor of {heads}")
        neurons = 0 if ffn.get("no_op") else _up(int(2 * ffn["ffn_mult"] * config["hidden_size"] / 3))
        layers.append(LayerSizes(0 if absent else heads, 0 if absent else heads // each, neurons))
    return tuple(layers)


def plain(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the config of the same network for our own modelling code: a stock class with widths per layer.

    `names` are the checkpoint's tensors. ValueError for blocks that are no whole layers.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kind = "qwen2" if config.get("qkv_bias") else "mistral" if hidden % heads else "llama"
    layers = block_widths(config)
    gone = ("block_configs", "auto_map", "qkv_bias", "rope_theta")
    edited = {key: value for key, value in config.items() if key not in gone} | {
        "model_type": kind,
        "architectures": [FAMILIES[kind].architecture],
        "num_key_value_heads": max(w.groups for w in layers),
        "intermediate_size": max(w.neurons for w in layers),
        "rope_parameters": rotary(config),
        **({"sliding_window": None} if kind == "mistral" else {}),
    }
    pruned = {"base": FAMILIES[kind].architecture, "layers": [widths.entry for widths in layers]}
    student = anatomy_of(edited | {"pruned": pruned}, names)
    return edited | {"pruned": pruned | per_layer(edited, student)}


def rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters of a config, written as today or as `rope_theta` and `rope_scaling`."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    return {"rope_type": kind, "rope_theta": theta, **given}


def _widths(student: Anatomy) -> tuple[LayerSizes, ...]:
    """Return the cheapest widths: one number of query heads H, and per layer the fewest KV groups dividing H that hold
    its groups and its heads per group."""
    narrow, hidden = student.sizes.layers, student.sizes.hidden
    if not narrow[0].groups:
        raise ValueError(
            "export.form is decilm, whose first layer must have attention, and the student's has none; set "
            "export.form=own or padded"
        )
    groups, each = least(narrow)
    found = []
    for heads in range(max(w.heads for w in narrow), max(groups * each, hidden) + 1):
        if accepts_heads(student, hidden, heads):
            possible = [_groups(w, heads) for w in narrow]
            held = [groups for groups in possible if groups is not None]
            if len(held) == len(possible):
                found.append((heads * len(held) + sum(held), heads, held))
    if not found:
        raise ValueError(
            f"export.form is decilm: no number of query heads that {student.family.architecture} takes at hidden size "
            f"{hidden} holds every layer; set export.form=own"
        )
    _, heads, held = min(found)
    return tuple(LayerSizes(heads if k else 0, k, _up(w.neurons)) for k, w in zip(held, narrow))


def _groups(widths: LayerSizes, heads: int) -> int | None:
    if not widths.groups:
        return 0
    fitting = (k for k in range(widths.groups, heads // widths.each + 1) if heads % k == 0)
    return next(fitting, None)


def _up(neurons: int) -> int:
    return -(-neurons // MULTIPLE) * MULTIPLE


def _biases(student: Anatomy) -> dict[str, bool]:
    has = {name: f"{name}.bias" in student.optional for name in ("self_attn.q_proj", "self_attn.o_proj")}
    query, output = has.values()
    if output and not query:
        raise ValueError("export.form is decilm, and only W_O has a bias; set export.form=padded or own")
    fields = {"attention_bias": output, "mlp_bias": "mlp.gate_proj.bias" in student.optional}
    return fields | ({"qkv_bias": True} if query and not output else {})
