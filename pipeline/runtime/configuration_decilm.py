"""Configuration code of an exported checkpoint in the DeciLM form: its blocks, readable as attributes.

Needs transformers only, of version 4 or 5. Engines that know DeciLMForCausalLM read `block_configs[i].attention` and
`.ffn` as objects, and the rotary settings under their old or their new names.
"""

from transformers import PretrainedConfig


class Block(dict):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), rope_parameters=None, rope_theta=10000.0, **fields):
        super().__init__(**fields)
        self.block_configs = [Block({part: Block(value) for part, value in each.items()}) for each in block_configs]
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": rope_theta}
        self.rope_theta = rope_theta
        if not hasattr(type(self), "rope_scaling"):  # transformers 5 has a property of that name
            scaled = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
            self.rope_scaling = None if scaled.get("rope_type", "default") == "default" else scaled
