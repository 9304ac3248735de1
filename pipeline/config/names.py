"""Answer a key that is no setting with the setting that was meant: earlier and common names, and misspellings."""

from collections.abc import Collection
from difflib import get_close_matches

# Sections and fields by the names they had before.
SECTIONS = {
    "basis": "rotate",
    "blocks": "local_distill",
    "correct": "teacher_correction",
    "depth": "layer_loss",
    "gates": "layer_gates",
    "generate": "self_generate",
    "search": "shape_search",
    "settle": "regularize",
    "train": "distill",
    "training": "distill",
    "distillation": "distill",
    "on_policy": "onpolicy",
}
FIELDS = {
    "batch": "batch_size",
    "betas": "adam_betas",
    "clip": "max_grad_norm",
    "floor": "min_lr_ratio",
    "keep": "save_total_limit",
    "lr": "learning_rate",
    "micro_batch": "micro_batch_size",
    "save_every": "save_steps",
    "schedule": "lr_scheduler",
    "validate_every": "eval_steps",
    "validate_tokens": "eval_tokens",
    "warmup": "warmup_ratio",
}
TRAINING = ("distill", "teacher_correction", "regularize", "onpolicy")  # sections of settings of a training run

# Whole keys: earlier ones that moved, and those of other tools (Hugging Face, Megatron, DeepSpeed, ModelOpt).
KEYS = {
    "adopt": "model.start",
    "attn_implementation": "device.attention",
    "basis.sequence": "restore.sequential",
    "blocks.batch": "local_distill.batch_tokens",
    "calibration_tokens": "score.tokens",
    "chip": "device/chip",
    "correct.chunk": "logits.chunk",
    "data.sequence": "data.sequence_length",
    "dataset": "data.recovery.path",
    "device.stream": "device.layer_streaming",
    "distill.loss.chunk": "logits.chunk",
    "dtype": "export.dtype",
    "max_completion_length": "onpolicy.max_new_tokens",
    "max_prompt_length": "onpolicy.prompt_tokens",
    "evaluate.chunk": "logits.chunk",
    "export.shard_bytes": "checkpoint.shard_bytes",
    "ffn_hidden_size": "shape.neurons",
    "gates.chunk": "logits.chunk",
    "hidden_size": "shape.hidden",
    "intermediate_size": "shape.neurons",
    "kd_temperature": "distill.loss.temperature",
    "kl_loss": "distill.loss.kind",
    "limit": "evaluate.tokens",
    "model_id": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "num_attention_heads": "shape.heads",
    "num_hidden_layers": "shape.layers",
    "num_key_value_heads": "shape.groups",
    "num_layers": "shape.layers",
    "num_query_groups": "shape.groups",
    "order": "restore.order",
    "out": "runs",
    "pretrained": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "prune_ratio": "budget.parameters",
    "pruning_ratio": "budget.parameters",
    "ratio": "budget.parameters",
    "recipe.line": "recipe.stages",
    "line": "recipe.stages",
    "run_name": "run",
    "score.batch": "calibration.batch_size",
    "settle.chunk": "logits.chunk",
    "sparsity": "budget.parameters",
    "student": "model.start",
    "tasks": "evaluate.tasks",
    "teacher": "model.path",
    "torch_dtype": "export.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "vocab_size": "budget.vocabulary",
    "wandb": "track.mode",
    "wandb_project": "track.project",
    "zero_stage": "deepspeed.stage",
}
# Of a training run, by the last part of the key; a section before it is kept where it trains.
COMMON = {
    "adam_beta1": "adam_betas",
    "adam_beta2": "adam_betas",
    "batch": "global_batch_size",
    "batch_size": "global_batch_size",
    "beta": "loss.beta",
    "betas": "adam_betas",
    "bf16": "precision",
    "clip_grad": "max_grad_norm",
    "epochs": "tokens",
    "eval_every": "eval_steps",
    "eval_interval": "eval_steps",
    "fp16": "precision",
    "gbs": "global_batch_size",
    "grad_clip": "max_grad_norm",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_clipping": "max_grad_norm",
    "logging_steps": "eval_steps",
    "lr_decay_style": "lr_scheduler",
    "lr_scheduler_type": "lr_scheduler",
    "mbs": "micro_batch_size",
    "min_lr": "min_lr_ratio",
    "num_epochs": "tokens",
    "num_train_epochs": "tokens",
    "per_device_batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "save_interval": "save_steps",
    "scheduler": "lr_scheduler",
    "steps": "max_steps",
    "train_batch_size": "global_batch_size",
    "train_iters": "max_steps",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "train_steps": "max_steps",
    "train_tokens": "tokens",
    "warmup_fraction": "warmup_ratio",
    "warmup_steps": "warmup_ratio",
    "wd": "weight_decay",
}
DATA = {"block_size", "cutoff_len", "max_length", "max_seq_len", "max_seq_length", "seq_len", "seq_length", "sequence"}
STAGES = {
    "absorb": "absorb_norms",
    "adopt": "external_student",
    "basis": "rotate",
    "blocks": "local_distill",
    "correct": "teacher_correction",
    "dense": "evaluate_reference",
    "depth": "layer_loss",
    "gates": "layer_gates",
    "generate": "self_generate",
    "gram": "hessian",
    "order": "obs_order",
    "score": "importance",
    "search": "shape_search",
    "sequence": "sequential",
    "settle": "regularize",
}

CHOICES = {  # of groups
    ("device", "ascend"): "npu",
    ("device", "gpu"): "cuda",
    ("device", "nvidia"): "cuda",
    ("recipe", "pangu"): "pangu_light",
}


def unknown_key(key: str, known: Collection[str]) -> str:
    """Return the line for a key that is no setting: "unknown key 'distill.lr'; did you mean 'distill.learning_rate'?".

    `known`: the dotted keys of all settings.
    """
    meant = suggested(key, known)
    if meant is None:
        section = key.partition(".")[0]
        group = f" {section}" if any(each.startswith(f"{section}.") for each in known) else ""
        return f"unknown key {key!r}; python -m pipeline --help{group} lists settings"
    return f"unknown key {key!r}; did you mean {meant!r}?"


def suggested(key: str, known: Collection[str]) -> str | None:
    """Return the setting that a key most likely means: by an earlier or a common name, else the nearest spelling."""
    key = key.replace("/", ".").replace("-", "_")
    if key in KEYS:
        return KEYS[key]
    for candidate in _candidates(key):
        if candidate in known:
            return candidate
    same_name = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
    if len(same_name) == 1:
        return same_name[0]
    near = get_close_matches(key, known, n=1, cutoff=0.75)
    if near:
        return near[0]
    by_name = {each.rpartition(".")[2]: each for each in sorted(known, key=lambda each: -each.count("."))}
    near = get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.8)
    return by_name[near[0]] if near else None


def suggested_word(word: str, choices: Collection[str]) -> str | None:
    """Return the choice that is spelt most like a word; None where none is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None


def _candidates(key: str) -> list[str]:
    """Return keys that a key may mean by the tables, the likeliest first."""
    section, _, name = key.rpartition(".")
    top, _, inner = section.partition(".")
    section = ".".join(filter(None, (SECTIONS.get(top, top), inner)))
    trains = section if section in TRAINING else "distill"
    candidates = [f"{section}.{name}"] if section else [f"distill.{name}", f"distill.loss.{name}"]
    if name in DATA:
        candidates.append("data.sequence_length")
    if section not in TRAINING and section:
        candidates.append(f"{section}.{FIELDS.get(name, name)}")
    if section in TRAINING or not section:
        candidates += [f"{trains}.{table[name]}" for table in (COMMON, FIELDS) if name in table]
    return candidates
