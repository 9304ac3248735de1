"""Stage onpolicy: when it runs and from what, what its tokens buy, and what is refused before any work."""

import json

import pytest

from pipeline import graph
from pipeline.config import Config
from pipeline.stages.recover import onpolicy
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import configured

ON = ("onpolicy.tokens=4096", "onpolicy.prompt_tokens=16")
SMALL = (*ON, "onpolicy.min_new_tokens=8", "onpolicy.max_new_tokens=24", "distill.global_batch_size=4")


def test_it_is_off_until_tokens_are_given():
    assert not onpolicy.enabled(configured()) and onpolicy.enabled(configured(*ON))
    assert "onpolicy" in graph.stages_of(configured())


@pytest.mark.parametrize(("changed", "steps"), [((), 64), (("onpolicy.max_steps=5",), 5), (("onpolicy.tokens=64",), 1)])
def test_tokens_are_those_of_answers(changed, steps):
    """A step has four answers, of 16 tokens in the mean; all steps together have no more tokens than given."""
    assert onpolicy.steps_of(configured(*SMALL, *changed)) == steps


def test_it_trains_the_recovered_student_and_what_follows_reads_its_own():
    config = configured(*ON)
    assert graph.needs_of(config, onpolicy.STAGE) == ("teacher", "initial_student", "tokens", "recovered")
    for name in ("export", "evaluate", "report"):
        assert "onpolicy_student" in graph.needs_of(config, graph.STAGES[name])
        assert "onpolicy_student" not in graph.needs_of(configured(), graph.STAGES[name])
    assert onpolicy.STAGE.becomes == ("recovered",)
    graph._check_order(config)


def test_a_student_cut_elsewhere_needs_no_recovery():
    config = configured("recipe=recover", "model.start=folder", *ON)
    stages = ["external_student", "onpolicy", "export", "evaluate"]
    alone = config.model_copy(update={"recipe": config.recipe.model_copy(update={"stages": stages})})
    assert "recovered" not in graph.needs_of(alone, onpolicy.STAGE)
    graph._check_order(alone)


@pytest.mark.parametrize("stages", ["onpolicy,distill,export", "distill,export,onpolicy"])
def test_another_order_is_refused(stages):
    config = configured(*ON, f"recipe.stages=[importance,shape,plan,cut,{stages}]")
    with pytest.raises(ValueError, match=r"^recipe\.stages: \w+ reads \w+, which is not made yet"):
        graph._check_order(config)


def test_prompts_come_from_what_no_training_read_before():
    """Recovery reads 12 steps of 4 sequences of 32 tokens here, teacher correction 2."""
    given = ("distill.tokens=1536", "distill.global_batch_size=4")
    assert onpolicy.settings(configured(*ON, *given))["after"] == 48
    assert onpolicy.settings(configured(*ON, *given, "teacher_correction.tokens=256"))["after"] == 56
    alone = configured(*ON, "recipe=recover", "model.start=folder", "recipe.stages=[external_student,onpolicy,export]")
    assert "after" not in onpolicy.settings(alone)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("onpolicy.tokens=60",), r"onpolicy\.tokens: 60 .* answers of 16 tokens"),
        (("onpolicy.global_batch_size=6", "onpolicy.micro_batch_size=4"), r"onpolicy\.global_batch_size: 6 "),
        (("distill.loss.kernel=triton", "onpolicy.divergence=mixed_kl"), r"distill\.loss\.kernel: triton "),
        (
            ("onpolicy.max_new_tokens=49",),
            r"onpolicy\.prompt_tokens \+ onpolicy\.max_new_tokens is 65, .* 64 positions",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(tmp_path, overrides, message):
    folder = tmp_path / "model"
    save_tiny(tiny_model("llama"), folder)
    with pytest.raises(ValueError, match=rf"^{message}"):
        onpolicy.check(configured(*SMALL, f"model.path={folder}", *overrides))
    onpolicy.check(configured(*SMALL, f"model.path={folder}", "onpolicy.max_new_tokens=48"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("onpolicy.min_new_tokens=257",), r"onpolicy: min_new_tokens is 257, more than max_new_tokens \(256\)"),
        (("onpolicy.mix=1.0",), r"onpolicy\.mix: 1\.0 is not valid"),
        (("onpolicy.temperature=-1",), r"onpolicy\.temperature: -1"),
    ],
)
def test_settings_outside_their_range_are_refused(overrides, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        configured(*overrides)


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match=r"^onpolicy\.divergence: unknown value 'kl'; choose from forward_kl"):
        graph.check(configured("onpolicy.divergence=kl"))


@pytest.mark.parametrize(
    ("own", "generation", "ends"),
    [(2, None, {2}), (2, [5, 7], {5, 7}), (None, None, set())],
)
def test_an_answer_ends_where_the_teacher_ends_its_own(tmp_path, own, generation, ends):
    """As generation_config.json says, or config.json where there is none."""
    save_tiny(tiny_model("llama"), tmp_path)
    for name, value in (("config.json", own), ("generation_config.json", generation)):
        fields = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(fields | {"eos_token_id": value}))
    if generation is None:
        (tmp_path / "generation_config.json").unlink()
    assert onpolicy._ends(tmp_path) == ends


def test_values_of_recovery_are_taken_where_none_are_given():
    config: Config = configured("distill.global_batch_size=16", "distill.micro_batch_size=2", "distill.eval_tokens=64")
    assert (config.onpolicy.global_batch_size, config.onpolicy.micro_batch_size) == (16, 2)
    assert config.onpolicy.eval_tokens == 64 and config.onpolicy.learning_rate != config.distill.learning_rate
