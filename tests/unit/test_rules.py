"""Every rule between settings refuses a configuration, in one line that begins with a setting."""

import pytest

from pipeline.config.rules import RULES
from tests.tiny_text import configured

ROTATED = ("rotate.kind=principal", "plan.channels=leading", "plan.clap=false")
CASES = {  # rule -> (settings that it refuses, the setting that its message begins with)
    "stages_are_in_the_recipe": (("stages=[hessian,self_generate]",), "stages"),
    "rounds_repeat_stages_of_the_recipe": (("recipe.rounds=2", "recipe.repeat=[]"), "recipe.repeat"),
    "rounds_have_a_given_shape": (("recipe.rounds=2", "recipe.shape=search", "device/chip=CPU"), "recipe.rounds"),
    "rounds_keep_the_axes": (("recipe.rounds=2", *ROTATED), "recipe.rounds"),
    "scored_channels_are_not_rotated": (("rotate.kind=principal",), "plan.channels"),
    "leading_channels_are_rotated": (("plan.channels=leading",), "plan.channels"),
    "hidden_state_losses_keep_the_axes": (("distill.loss.hidden=1", *ROTATED), "distill.loss"),
    "obs_order_ranks_within_layers": (("restore.order=obs",), "restore.order"),
    "regularize_knows_its_layers": (("recipe=trsp", "plan.depth=influence"), "regularize.norm"),
    "restoration_reads_unregularized_layers": (("recipe=trsp", "restore.outputs=true"), "regularize.norm"),
    "measured_absorption_has_its_stage": (("recipe=trsp", "reinit.absorb=fitted"), "reinit.absorb"),
    "local_distillation_keeps_the_axes": (
        ("restore.sequential=true", "local_distill.epochs=1", *ROTATED),
        "local_distill.epochs",
    ),
    "layer_by_layer_methods_choose_alone": (("restore.sequential=true",), "restore.sequential"),
    "merged_experts_are_whole": (("plan.experts=merge", "shape.expert_neurons=8"), "plan.experts"),
    "sublayers_are_removed_to_one_target": (("budget.axes=sublayers", "shape.neurons=8"), "budget.axes"),
    "removed_sublayers_go_with_equal_widths": (
        ("shape.attention_layers=3", "reinit.bypass=true"),
        "shape.attention_layers",
    ),
    "external_students_keep_their_tokens": (
        ("recipe=recover", "model.start=folder", "budget.vocabulary=64"),
        "budget.vocabulary",
    ),
    "on_policy_begins_at_a_recovered_student": (("recipe=flap", "onpolicy.tokens=4096"), "onpolicy.tokens"),
    "on_policy_follows_the_rounds": (
        ("onpolicy.tokens=4096", "onpolicy.prompt_tokens=8", "recipe.rounds=2", "recipe.repeat=[plan,cut,onpolicy]"),
        "recipe.repeat",
    ),
    "on_policy_holds_out_what_recovery_did": (
        ("onpolicy.tokens=4096", "onpolicy.eval_tokens=64"),
        "onpolicy.eval_tokens",
    ),
    "prompts_fit_a_sequence": (("onpolicy.tokens=4096", "onpolicy.prompt_tokens=33"), "onpolicy.prompt_tokens"),
    "gguf_is_of_a_stock_class": (("export.gguf=f16", "plan.widths=adaptive"), "export.gguf"),
    "gguf_has_the_tokens_of_the_model": (("export.gguf=f16", "budget.vocabulary=64"), "export.gguf"),
    "drafts_have_the_tokens_of_the_teacher": (("evaluate.draft=true", "budget.vocabulary=64"), "evaluate.draft"),
}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_refuses_its_configuration(rule):
    settings, named = CASES[rule]
    with pytest.raises(ValueError, match=rf"^{named}: ") as refusal:
        configured(*settings)
    assert "\n" not in str(refusal.value)
    frames = [entry.name for entry in refusal.traceback]
    assert rule in frames, f"refused by {frames[-1]}"


def test_every_rule_has_a_case():
    assert set(CASES) == {rule.__name__ for rule in RULES}
