"""Rules between settings of different sections, one function each: raise ValueError where they do not go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config


def stages_are_in_the_recipe(config: Config) -> None:
    unknown = [stage for stage in config.stages or [] if stage not in config.recipe.stages]
    if unknown:
        raise ValueError(
            f"stages: {', '.join(unknown)} not in recipe {config.recipe.name}; "
            f"choose from {', '.join(config.recipe.stages)}"
        )


def rounds_repeat_stages_of_the_recipe(config: Config) -> None:
    if config.recipe.rounds == 1:
        return
    if not config.recipe.repeat:
        raise ValueError("recipe.repeat: empty, but recipe.rounds is above 1; list the stages that every round repeats")
    unknown = [stage for stage in config.recipe.repeat if stage not in config.recipe.stages]
    if unknown:
        raise ValueError(
            f"recipe.repeat: {', '.join(unknown)} not in recipe.stages; choose from {', '.join(config.recipe.stages)}"
        )


def rounds_have_a_given_shape(config: Config) -> None:
    if config.recipe.rounds > 1 and config.recipe.shape == "search":
        raise ValueError("recipe.rounds: rounds approach a given shape in equal steps; set recipe.shape=given")


def rounds_keep_the_axes(config: Config) -> None:
    if config.recipe.rounds > 1 and _rotated(config):
        raise ValueError(
            f"recipe.rounds: rounds cut the teacher's own channels, which rotate.kind={config.rotate.kind} replaces; "
            "set rotate.kind=none or recipe.rounds=1"
        )


def scored_channels_are_not_rotated(config: Config) -> None:
    if _rotated(config) and config.plan.channels == "scores":
        raise ValueError(
            "plan.channels: scores rank the teacher's own channels, which rotate.kind=principal replaces; "
            "set plan.channels=leading"
        )


def leading_channels_are_rotated(config: Config) -> None:
    if not _rotated(config) and config.plan.channels == "leading":
        raise ValueError("plan.channels: leading needs a principal basis; set rotate.kind=principal")


def hidden_state_losses_keep_the_axes(config: Config) -> None:
    if _rotated(config) and (config.distill.loss.hidden or config.distill.loss.embedding):
        raise ValueError(
            "distill.loss: the hidden-state terms compare channels with the teacher's, which rotate.kind=principal "
            "replaces; set distill.loss.hidden=0 and distill.loss.embedding=0"
        )


def obs_order_ranks_within_layers(config: Config) -> None:
    if config.restore.order == "obs" and config.plan.clap:
        raise ValueError(
            "restore.order: obs ranks KV groups within a layer, and plan.clap ranks them across layers; "
            "set plan.clap=false or restore.order=scores"
        )


def regularize_knows_its_layers(config: Config) -> None:
    if _regularized(config) and not config.plan.measures_depth:
        raise ValueError(
            f"regularize.norm: {config.regularize.norm} needs the removed layers before the plan is made, and "
            f"plan.depth={config.plan.depth} chooses them in the plan; set plan.depth=gates, loss or evolved"
        )


def restoration_reads_unregularized_layers(config: Config) -> None:
    if _regularized(config) and (config.restore.outputs or config.restore.order == "obs"):
        raise ValueError(
            f"regularize.norm: {config.regularize.norm} changes the layer inputs that restoration is computed from; "
            "set regularize.norm=none, or restore.outputs=false and restore.order=scores"
        )


def measured_absorption_has_its_stage(config: Config) -> None:
    if config.reinit.absorb in ("fitted", "removed") and "absorb_norms" not in config.recipe.stages:
        raise ValueError(
            f"reinit.absorb: {config.reinit.absorb} needs the stage absorb_norms; add it to recipe.stages after cut, "
            "or set reinit.absorb=false"
        )


def local_distillation_keeps_the_axes(config: Config) -> None:
    changed_by = [
        setting
        for setting, changes in (
            ("restore.sequential=true", config.restore.sequential),
            ("plan.widths=evolved", config.plan.widths == "evolved"),
            (f"regularize.norm={config.regularize.norm}", _regularized(config)),
        )
        if changes
    ]
    if _rotated(config) and config.local_distill.epochs and changed_by:
        raise ValueError(
            f"local_distill.epochs: rotate.kind=principal rotates a model that {changed_by[0]} has changed, so its "
            "axes are not the teacher's; set local_distill.epochs=0, or rotate.kind=none and plan.channels=scores"
        )


def layer_by_layer_methods_choose_alone(config: Config) -> None:
    methods = [
        name
        for name, chosen in (
            ("restore.sequential=true", config.restore.sequential),
            ("plan.widths=evolved", config.plan.widths == "evolved"),
        )
        if chosen
    ]
    if not methods:
        return
    remedies = [
        remedy
        for remedy, clashes in (
            ("plan.clap=false", config.plan.clap),
            ("plan.heads=scores", config.plan.heads != "scores"),
            ("plan.neurons=scores", config.plan.neurons != "scores"),
            ("restore.outputs=false", config.restore.outputs),
            ("restore.order=scores", config.restore.order != "scores"),
            ("regularize.norm=none", _regularized(config)),
        )
        if clashes
    ]
    if remedies:
        raise ValueError(
            f"{methods[0].partition('=')[0]}: {methods[0]} chooses heads and neurons and restores outputs itself; "
            f"set {', '.join(remedies)}"
        )


def external_students_keep_their_tokens(config: Config) -> None:
    if config.budget.vocabulary is not None and config.model.start is not None:
        raise ValueError(
            "budget.vocabulary: the student in model.start has its own tokens; set budget.vocabulary=null, or prune "
            "them with the rest of the model"
        )


def drafts_have_the_tokens_of_the_teacher(config: Config) -> None:
    if config.evaluate.draft and config.budget.vocabulary is not None:
        raise ValueError(
            "evaluate.draft: a student with budget.vocabulary has tokens of its own, which its teacher cannot accept; "
            "set evaluate.draft=false"
        )


def gguf_is_of_a_stock_class(config: Config) -> None:
    alike = config.plan.widths == "uniform" and not config.removes_sublayers
    stock = config.export.form == "padded" or (config.export.form == "auto" and alike)
    if config.export.gguf is not None and not stock:
        raise ValueError(
            "export.gguf: llama.cpp reads stock classes, whose layers are alike, and this student's are not, or "
            f"export.form={config.export.form} is not one; set export.form=padded"
        )


def gguf_has_the_tokens_of_the_model(config: Config) -> None:
    if config.export.gguf is not None and config.budget.vocabulary is not None:
        raise ValueError(
            "export.gguf: llama.cpp's converter recognises a tokenizer by the ids of its tokens, which "
            "budget.vocabulary changes; set one of them to null"
        )


def merged_experts_are_whole(config: Config) -> None:
    if config.plan.experts == "merge" and config.shape.expert_neurons is not None:
        raise ValueError(
            "plan.experts: merge averages whole experts, and shape.expert_neurons narrows each by its own scores; set "
            "plan.experts=scores, or leave shape.expert_neurons unset"
        )


def sublayers_are_removed_to_one_target(config: Config) -> None:
    if config.budget.axes == "sublayers" and config.shape.given:
        raise ValueError(
            "budget.axes: sublayers removes attentions and FFNs to a budget, and shape.* is given; leave it unset, or "
            "set budget.axes=all and shape.attention_layers or shape.ffn_layers"
        )


def removed_sublayers_go_with_equal_widths(config: Config) -> None:
    if not config.removes_sublayers:
        return
    remedies = [
        remedy
        for remedy, clashes in (
            ("recipe.rounds=1", config.recipe.rounds > 1),
            ("recipe.shape=given", config.recipe.shape == "search"),
            ("plan.widths=uniform", config.plan.widths != "uniform"),
            ("restore.sequential=false", config.restore.sequential),
            ("reinit.bias_compensation=false", config.reinit.bias_compensation),
            ("reinit.bypass=false", config.reinit.bypass),
        )
        if clashes
    ]
    if remedies:
        setting = f"shape.{next(iter(config.shape.sublayers))}" if config.shape.sublayers else "budget.axes"
        raise ValueError(
            f"{setting}: attentions and FFNs of single layers are removed once, from a student whose other layers have "
            f"equal widths and outputs; set {', '.join(remedies)}"
        )


def on_policy_begins_at_a_recovered_student(config: Config) -> None:
    if config.onpolicy.tokens and "distill" not in config.recipe.stages and config.model.start is None:
        raise ValueError(
            f"onpolicy.tokens: {config.onpolicy.tokens}, but recipe {config.recipe.name} does not recover the student, "
            "and answers of a model that was just cut teach little; add distill to recipe.stages before onpolicy, or "
            "set onpolicy.tokens=0"
        )


def on_policy_follows_the_rounds(config: Config) -> None:
    if config.onpolicy.tokens and config.recipe.rounds > 1 and "onpolicy" in config.recipe.repeat:
        raise ValueError("recipe.repeat: onpolicy trains once, after all rounds; remove it from recipe.repeat")


def on_policy_holds_out_what_recovery_did(config: Config) -> None:
    held, other = config.onpolicy.eval_tokens, config.distill.eval_tokens
    if config.onpolicy.tokens and held != other and "distill" in config.recipe.stages:
        raise ValueError(
            f"onpolicy.eval_tokens: {held}, and distill.eval_tokens is {other}; both hold out the same part of the "
            "recovery text: set them to one value"
        )


def prompts_fit_a_sequence(config: Config) -> None:
    if config.onpolicy.tokens and config.onpolicy.prompt_tokens > config.data.sequence_length:
        raise ValueError(
            f"onpolicy.prompt_tokens: {config.onpolicy.prompt_tokens}, more than a packed sequence has "
            f"(data.sequence_length={config.data.sequence_length}); lower it"
        )


def _rotated(config: Config) -> bool:
    return config.rotate.kind == "principal"


def _regularized(config: Config) -> bool:
    return config.regularize.norm != "none"


RULES: tuple[Callable[[Config], None], ...] = (
    stages_are_in_the_recipe,
    rounds_repeat_stages_of_the_recipe,
    rounds_have_a_given_shape,
    rounds_keep_the_axes,
    scored_channels_are_not_rotated,
    leading_channels_are_rotated,
    hidden_state_losses_keep_the_axes,
    obs_order_ranks_within_layers,
    regularize_knows_its_layers,
    restoration_reads_unregularized_layers,
    measured_absorption_has_its_stage,
    local_distillation_keeps_the_axes,
    layer_by_layer_methods_choose_alone,
    merged_experts_are_whole,
    sublayers_are_removed_to_one_target,
    removed_sublayers_go_with_equal_widths,
    external_students_keep_their_tokens,
    drafts_have_the_tokens_of_the_teacher,
    on_policy_begins_at_a_recovered_student,
    on_policy_follows_the_rounds,
    on_policy_holds_out_what_recovery_did,
    prompts_fit_a_sequence,
    gguf_is_of_a_stock_class,
    gguf_has_the_tokens_of_the_model,
)
