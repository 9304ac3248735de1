"""The table of a model family: every checkpoint tensor with the named axes of its shape, and the facts of its class.

Axes are letters: `v` vocabulary, `h` hidden channels, `n` query heads, `k` key/value heads, `d` head size, `f` FFN
neurons. A family may name further axes in `lengths`; they are carried whole. Letters in parentheses share a dimension,
the last letter running fastest: `(n d) h` is a matrix whose rows run over heads and head size and whose columns run
over hidden channels. `q+2` counts the query heads of a KV group, its key and its value: `(k q+2 d) h` is a fused
projection interleaved by group. Outside the layers `L` counts the layers: `(L p) h` has `p` rows for each. A number is
a dimension of that length. Blocks joined by `+` are concatenated along the first dimension in which they differ, or
along the rows: `(n d) h + (k d) h + (k d) h`. An empty pattern is a scalar.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.model.sizes import LayerSizes

AXES = ("layers", "hidden", "heads", "groups", "neurons")  # that a student may have fewer of
SUBLAYERS = {"attention_layers": "groups", "ffn_layers": "neurons"}  # what a layer can lose: the width that is then 0
FIELDS: Mapping[str, str | None] = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "neurons": "intermediate_size",
    "head_size": "head_dim",
    "vocabulary": "vocab_size",
}


@dataclass(frozen=True)
class Sublayer:
    """A sub-layer, attention or FFN: its module, and the norms that serve no other part of the layer."""

    module: str
    norms: tuple[str, ...]

    def owns(self, name: str) -> bool:
        """Whether a tensor of a layer, by its name in the table, is one of this sub-layer."""
        return name.startswith(tuple(f"{part}." for part in (self.module, *self.norms)))


@dataclass(frozen=True)
class Family:
    """One model type as data. Names of layer tensors and modules are relative to `prefix`.

    Every `.weight` of the table must be in a checkpoint unless `optional` covers it; a `.bias` may be absent, in all
    layers alike. Tensors under one prefix of `optional` are there together or not at all, layer by layer.
    """

    model_type: str
    architecture: str
    layer: Mapping[str, str]  # tensor names inside a layer: axes
    pre_norms: Mapping[str, tuple[str, ...]]  # norm: the projections that read it, attention's norm first
    post_norms: Mapping[str, str] = field(default_factory=dict)  # norm: the projection whose output it normalises

    prefix: str = "model.layers.{layer}."
    embedding: str = "model.embed_tokens"  # module names
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"  # modules of a layer
    ffn: str = "mlp"
    disk: tuple[tuple[str, str], ...] = ()  # parts of names in files, and the class's own part that the table has
    aliases: tuple[tuple[str, str], ...] = ()  # the same for parts that some files have, and students do not
    outer: Mapping[str, str] = field(default_factory=dict)  # further tensors outside the layers, where present
    optional: tuple[str, ...] = ()  # prefixes of layer tensors that some checkpoints or layers lack
    left_out: tuple[str, ...] = ()  # patterns of checkpoint names that the class ignores

    fields: Mapping[str, str | None] = field(
        default_factory=dict
    )  # config fields other than FIELDS; None: no such field
    lengths: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # own axes: config fields whose sum is the length
    # By entry of `layer_types`: the lengths of own axes that differ there
    lengths_by_type: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    layer_fields: str | None = None  # config field: by layer number, the fields of which that layer has its own values
    # By such a field: the config field that states its value where all of these layers have the same
    shared_fields: Mapping[str, str] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)  # config fields that repeat a width of FIELDS
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # config values this table holds for
    variants: tuple["Family", ...] = ()  # tables of the same type for other config values
    layer_list: str | None = None  # config field whose length is the number of layers where that is not stated
    layer_groups: Mapping[str, str] = field(
        default_factory=dict
    )  # config field of repeated kinds: that of each layer's
    repeated: tuple[str, ...] = ()  # config fields whose list of kinds is repeated over the layers
    stated_neurons: int = 1  # the neurons that the config states are this many times those of a layer
    depth_scaled: tuple[str, ...] = ()  # config fields that the class divides by the square root of the layers
    parallel: bool = False  # attention and FFN both read the stream that the layer is given
    residual_weights: bool = False  # its layers multiply the residual stream by learned weights
    keeps_last: str | None = None  # why the last layer of a student is the last of its source
    # Prefixes of tensors: a layer without them reuses what the last layer of its type before it computed with them
    reused: tuple[str, ...] = ()
    reusing: str | None = None  # config field: how many last layers have none of them, also where a file does
    double_wide: str | None = None  # config field: whether these layers have twice the neurons that the config states
    passes_on: str | None = None  # argument of a layer that is the second output of the layer before
    layer_indices: tuple[str, ...] = ()  # config fields that list numbers of layers
    superseded: tuple[str, ...] = ()  # config fields of older files, which a later field of the class replaces
    # A config field by which the class changes the neurons that the config states, and the tensor whose rows they are
    adjusted: tuple[str, str] | None = None
    # Of AXES and SUBLAYERS: those that cannot be cut, with the reason
    fixed: Mapping[str, str] = field(default_factory=dict)

    norm_offset: float = 0.0  # the checkpoint stores gain - offset
    transposed: bool = False  # matrices are stored [in, out]
    tuples: bool = False  # its layers return a tuple whose first entry is the hidden state
    gainless: bool = False  # norms over hidden channels have no weights
    layer_norm: bool = False  # norms over hidden channels subtract the mean
    experts: tuple[str, ...] = ()  # config fields of the number of experts, under each of their names
    expert_module: str = "mlp.experts"  # module of a layer that holds all experts, fused
    scaled_inputs: bool = False  # what an expert reads, and not what it writes, is multiplied by the router's weight
    shared_module: str | None = None  # W_down of shared experts in the class, where files name it otherwise
    top_k: str | None = None  # config field of the experts per token
    expert_groups: str | None = None  # config field of the groups that experts are routed by
    chosen_groups: str | None = None  # config field of the groups that a token's experts are taken from
    leading_dense: str | None = None  # config field of the number of first layers that have no experts
    # Pairs of elements that a rotation mixes: half (i, i + d/2) | interleave (2i, 2i + 1) | class (in a way of its own,
    # which no operator computes)
    rotary: str = "half"
    embedding_times_root_hidden: bool = False  # the model multiplies embeddings by sqrt(hidden size)
    divided_by_root_hidden: tuple[str, ...] = ()  # tensors that the class divides by sqrt(hidden size)
    folded: str | None = None  # model_type without post-norms, once they are absorbed
    even_heads: bool = False  # its config class refuses hidden sizes that are no multiple of the query heads
    uneven: str | None = None  # model_type of the same network, without biases, that accepts them
    whole_heads: bool = False  # its class computes the head size as hidden size / query heads
    whole_heads_ropes: tuple[str, ...] = ()  # rope types under which that holds
    neurons_per_channel: int | None = None  # neurons / channels where the config does not state the neurons
    groups: int | None = None  # KV groups, where the class has that many whatever its config states
    logit_scale: str | None = None  # config field that multiplies the logits
    logit_divisor: str | None = None  # config field that divides the logits
    logit_cap: str | None = "final_logit_softcapping"  # config field c: logits are c tanh(logits / c)

    @property
    def sandwich(self) -> bool:
        """Whether every sublayer is normalised before and after (Pangu Ultra's sandwich norm, Gemma 2/3, GLM-4)."""
        return bool(self.pre_norms and self.post_norms)

    @cached_property
    def kept(self) -> Mapping[str, str]:
        """Return the axes that cannot be cut, `fixed` and what follows from the table, each with the reason."""
        reasons = dict(self.fixed)
        for axis, module in (("attention_layers", self.attention), ("ffn_layers", self.ffn)):
            widths = ("heads", "groups") if axis == "attention_layers" else ("neurons",)
            of_widths = [self.fixed[width] for width in widths if width in self.fixed]
            if axis not in reasons and of_widths:
                reasons[axis] = of_widths[0]
            elif axis not in reasons and not any(name.startswith(f"{module}.") for name in self.layer):
                reasons[axis] = f"a layer of it has no module {module}"
        return reasons

    @cached_property
    def sublayers(self) -> Mapping[str, Sublayer]:
        """Return the sub-layers that a layer can lose, by axis of SUBLAYERS."""
        modules = {"attention_layers": self.attention, "ffn_layers": self.ffn}
        return {axis: self._sublayer(module) for axis, module in modules.items() if axis not in self.kept}

    def _sublayer(self, module: str) -> Sublayer:
        own = f"{module}."
        before = [
            norm
            for norm, readers in self.pre_norms.items()
            if readers and all(name.startswith(own) for name in readers)
        ]
        after = [norm for norm, writer in self.post_norms.items() if writer.startswith(own)]
        return Sublayer(module, (*before, *after))

    def removed(self, widths: "LayerSizes") -> tuple[Sublayer, ...]:
        """Return the sub-layers that a layer of these widths has lost."""
        return tuple(sublayer for axis, sublayer in self.sublayers.items() if not getattr(widths, SUBLAYERS[axis]))

    def named(self, stored: str) -> str:
        """Return the table's name of a tensor by its name in a file."""
        for part, own in (*self.aliases, *self.disk):
            stored = stored.replace(part, own)
        return stored

    def stored(self, name: str) -> str:
        """Return the name in a file of a tensor by the table's name."""
        for part, own in reversed(self.disk):
            name = name.replace(own, part)
        return name

    @property
    def decoder(self) -> str:
        """Return the name of the module that holds the layers: `model` for `model.layers.{layer}.`."""
        return self.prefix.rsplit(".", 3)[0]

    def field(self, width: str) -> str | None:
        """Return the config field of a width of FIELDS; None where the class has none."""
        return self.fields.get(width, FIELDS[width])

    def width(self, config: Mapping[str, Any], width: str) -> Any:
        """Return a width as the config states it; None where it does not."""
        name = self.field(width)
        value = None if name is None else config.get(name)
        if value is None and width == "layers" and self.layer_list is not None:
            kinds = config.get(self.layer_list)
            return len(kinds) if isinstance(kinds, list) else None
        return value // self.stated_neurons if width == "neurons" and value is not None else value


ATTENTION = {
    "self_attn.q_proj.weight": "(n d) h",
    "self_attn.k_proj.weight": "(k d) h",
    "self_attn.v_proj.weight": "(k d) h",
    "self_attn.o_proj.weight": "h (n d)",
}
ATTENTION_BIASES = {
    "self_attn.q_proj.bias": "(n d)",
    "self_attn.k_proj.bias": "(k d)",
    "self_attn.v_proj.bias": "(k d)",
    "self_attn.o_proj.bias": "h",
}
GATED = {"mlp.gate_proj.weight": "f h", "mlp.up_proj.weight": "f h", "mlp.down_proj.weight": "h f"}
GATED_BIASES = {"mlp.gate_proj.bias": "f", "mlp.up_proj.bias": "f", "mlp.down_proj.bias": "h"}
GATED_FUSED = {"mlp.gate_up_proj.weight": "f h + f h", "mlp.down_proj.weight": "h f"}
PLAIN = {"mlp.up_proj.weight": "f h", "mlp.down_proj.weight": "h f"}
PLAIN_BIASES = {"mlp.up_proj.bias": "f", "mlp.down_proj.bias": "h"}
QK_NORM = {"self_attn.q_norm.weight": "d", "self_attn.k_norm.weight": "d"}
QK_NORM_ALL = {"self_attn.q_norm.weight": "(n d)", "self_attn.k_norm.weight": "(k d)"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
PRE = {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}
NORMS = {"input_layernorm.weight": "h", "post_attention_layernorm.weight": "h"}
NO_HEAD_SIZE: dict[str, str | None] = {"groups": None, "head_size": None}
NORM_BIASES = {"input_layernorm.bias": "h", "post_attention_layernorm.bias": "h"}
POST = {"post_attention_layernorm": "self_attn.o_proj", "post_feedforward_layernorm": "mlp.down_proj"}
POST_NORMS = {"post_attention_layernorm.weight": "h", "post_feedforward_layernorm.weight": "h"}
LLAMA = ATTENTION | ATTENTION_BIASES | GATED | GATED_BIASES | NORMS
