"""Model types without a table, each with the reason; also types that transformers has no class for."""

from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "its layers are a mixture of experts that no table describes yet": (
        "axk1 axk2 dbrx deepseek_v4 dots3_note_text hy_v4 jetmoe longcat_flash mimo_v2_flash sarvam_moe"
    ),
    "its residual additions are scaled by the layer's number": "beam",
    "some of its layers are a state-space model, linear attention or a convolution": (
        "bailing_hybrid falcon_mamba inkling2_loop_text inkling2_text inkling_text "
        "jamba mamba mamba2 minimax "
        "qwen4_exp_text rwkv xlstm zamba zamba2 zaya"
    ),
    "it is an encoder, has one, or is used as one": (
        "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert cohere_compass_text "
        "data2vec-text electra ernie git marian mbart megatron-bert mvp pegasus plbart prophetnet reformer rembert "
        "roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod"
    ),
    "it wraps a text model beside a vision, audio or assistant model": (
        "blt dots3_note emu3 fuyu gemma3n gemma4_assistant gemma4_unified_assistant "
        "got_ocr2 mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal "
        "qwen4_exp"
    ),
    "its layers are run several times over, by a hierarchy of states": "hrm_text",
    "norms over the outputs of all heads and over all neurons precede W_O and W_down, and its weights are ternary": (
        "bitnet"
    ),
    "its checkpoints fuse projections that its class holds apart": "lara_mini olmo_hybrid",
    "each layer's differential attention has a constant that follows from the layer's number": "diffllama",
    "its router takes one expert of every group, scaled by a learned factor, which no class of transformers computes": (
        "PanguProMoE"
    ),
    "it has per-layer embeddings and several streams that are updated in turn": "gemma3n_text",
    "its norms follow the addition of the residual": "openai-gpt",
    "its hidden states and matrices are normalised to a sphere": "dory",
    "its output matrix reads a further layer after the final norm": "modernbert-decoder",
    "its inputs are segments with a position bias shared by all layers": "cpmant",
}
REFUSED: Mapping[str, str] = {name: reason for reason, names in REASONS.items() for name in names.split()}
