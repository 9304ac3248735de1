"""conf/ and pipeline.config agree, every choice validates, and what is refused is named with its remedy."""

import subprocess
import sys
from functools import partial

import pytest

from pipeline.cli import reference
from pipeline.cli.command import with_found_chip
from pipeline.cli.compose import CONF
from pipeline.cli.compose import composed as compose
from pipeline.cli.registered import REGISTRIES, check_registered, registered
from pipeline.config import SETTINGS, names, unknown_key, validate
from pipeline.config.schema import choices, expected
from pipeline.distill.divergences import DIVERGENCES
from pipeline.graph import STAGES
from pipeline.runtime.device import chip_model, open_device
from tests.composing import ROOT, composed, validated

CHOICES = sorted(f"{path.parent.relative_to(CONF)}={path.stem}" for path in CONF.rglob("*.yaml") if path.parent != CONF)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_validates(choice):
    assert set(validated(choice).recipe.stages) <= set(STAGES)


def test_python_holds_no_default_that_the_yaml_lacks():
    def keys(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict) and f"{prefix}{name}" not in SETTINGS:
                yield from keys(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    assert set(keys(composed("device/chip=910B3"))) == set(SETTINGS)


def test_every_setting_has_a_comment_and_the_document_is_that_of_conf():
    assert reference.undocumented() == []
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == reference.markdown()


def test_a_setting_without_a_comment_is_found(tmp_path):
    for path in CONF.rglob("*.yaml"):
        copy = tmp_path / path.relative_to(CONF)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    config = tmp_path / "config.yaml"
    text = config.read_text(encoding="utf-8").replace("# Samples", "")
    bare = [line.partition("#")[0].rstrip() if line.startswith("seed:") else line for line in text.splitlines()]
    config.write_text("\n".join(bare), encoding="utf-8")
    assert reference.undocumented(tmp_path) == ["seed"]


def test_the_help_holds_every_setting_and_its_choices():
    whole = reference.help_text("")
    assert all(f" {key}=" in whole for key in SETTINGS if not key.startswith("device.chip."))
    assert "recipe=NAME: adapt_pruner, auto, best" in whole
    group = reference.help_text("distill")
    assert group.startswith("distill\n") and "distill.learning_rate=3.0e-4" in group and "plan.depth" not in group
    assert "reverse_kl" in reference.help_text("distill.loss.kind")
    assert "device.chip.cube_cores" in reference.help_text("device/chip")
    with pytest.raises(ValueError, match="'distill.lr'; did you mean 'distill.learning_rate'"):
        reference.help_text("distill.lr")


def test_the_names_that_are_read_from_registries_are_those_of_the_stages():
    of_stages = {setting: tuple(words) for stage in STAGES.values() for setting, words in stage.choices.items()}
    of_stages["distill.loss.kind"] = tuple(DIVERGENCES)
    assert {setting: registered(setting) for setting in REGISTRIES} == of_stages
    for setting, words in of_stages.items():
        assert expected(SETTINGS[setting]) == "text" or set(words) == set(choices(SETTINGS[setting]))
    config = validated("score.kind=activations")
    with pytest.raises(ValueError, match="^score.kind: unknown value 'activations'; did you mean 'activation'"):
        check_registered(config)


def test_what_a_setting_accepts_is_described():
    assert not [key for key, kind in SETTINGS.items() if "a value" in expected(kind)]


MEANT = {
    "distill.batch": "distill.global_batch_size",
    "distill.lr": "distill.learning_rate",
    "lr": "distill.learning_rate",
    "learning_rate": "distill.learning_rate",
    "num_train_epochs": "distill.tokens",
    "per_device_train_batch_size": "distill.micro_batch_size",
    "gradient_accumulation_steps": "distill.global_batch_size",
    "max_steps": "distill.max_steps",
    "score.batch": "calibration.batch_size",
    "evaluate.chunk": "logits.chunk",
    "distill.loss.chunk": "logits.chunk",
    "export.shard_bytes": "checkpoint.shard_bytes",
    "data.sequence": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "settle.batch": "regularize.global_batch_size",
    "correct.clip": "teacher_correction.max_grad_norm",
    "gates.batch": "layer_gates.batch_size",
    "blocks.batch": "local_distill.batch_tokens",
    "basis.kind": "rotate.kind",
    "depth.offspring": "layer_loss.offspring",
    "search.batch": "shape_search.batch_size",
    "recipe.line": "recipe.stages",
    "device.stream": "device.layer_streaming",
    "distill.learnin_rate": "distill.learning_rate",
    "distil.tokens": "distill.tokens",
    "temperature": "distill.loss.temperature",
    "model_name_or_path": "model.path",
    "hidden_size": "shape.hidden",
    "distill/tokens": "distill.tokens",
}


@pytest.mark.parametrize("key", MEANT)
def test_an_earlier_a_common_or_a_misspelt_key_is_answered_with_the_right_one(key):
    assert f"did you mean {MEANT[key]!r}?" in unknown_key(key)
    with pytest.raises(ValueError, match=f"unknown key {key!r}; did you mean {MEANT[key]!r}"):
        composed(f"{key}=1")


def test_an_unknown_key_of_a_composed_configuration_is_refused_too():
    values = composed()
    values["distill"]["lr"] = 1
    with pytest.raises(ValueError, match="unknown key 'distill.lr'; did you mean 'distill.learning_rate'"):
        validate(values)
    del values["distill"]["lr"], values["distill"]["tokens"]
    with pytest.raises(ValueError, match="^distill.tokens: missing"):
        validate(values)


def test_the_tables_of_names_lead_to_settings_that_exist():
    groups = {choice.partition("=")[0] for choice in CHOICES}
    assert set(names.KEYS.values()) <= set(SETTINGS) | groups
    assert not set(names.KEYS) & set(SETTINGS)
    sections = {key.rpartition(".")[0] for key in SETTINGS}
    assert set(names.SECTIONS.values()) <= sections and not set(names.SECTIONS) & sections
    assert {f"distill.{name}" for name in names.COMMON.values()} <= set(SETTINGS)
    assert set(names.STAGES.values()) <= set(STAGES) and not set(names.STAGES) & set(STAGES)


def test_a_stage_is_named_like_its_file():
    assert {path.stem for path in (ROOT / "pipeline" / "stages").glob("*/*.py")} - {"__init__"} == set(STAGES)


REFUSED = {
    "recipe=bset": "recipe: .*'bset'; did you mean 'best'",
    "experiment=8B": "experiment: .*'8B'; did you mean '8b'",
    "device=gpu": "device: .*'gpu'; did you mean 'cuda'",
    "device.chip=910B3": "device.chip: .*device/chip=910B3",
    "device.chip.hbm_bytes=1": "device.chip: null; .*device/chip=910B3",
    "distil=1": "unknown key 'distil'; did you mean 'distill'",
    "distill=1": "distill: .*distill.tokens",
    "stages=[score,plan]": "stages: .*'score'; did you mean 'importance'",
    "stages=[importance,pln]": "stages: .*'pln'; did you mean 'plan'",
    "stages=[hessian,sequential,self_generate]": "stages: self_generate .*pangu_light",
    "recipe.stages=[settle]": "recipe.stages: .*'settle'; did you mean 'regularize'",
    "shape.hidden=448,512": "shape.hidden: .*--multirun",
    "distill.tokens=(5": "distill.tokens: .*whole number",
    "distill.tokens=many": "^distill.tokens: 'many' .*whole number of at least 1$",
    "+distill.tokens=5": "distill.tokens",
    "~distill.tokens": "distill.tokens",
    "+distill.foo=5": "unknown key 'distill.foo'",
    "score.aggregation=summ": "score.aggregation: 'summ' .*did you mean 'sum'",
    "deepspeed.stage=4": "deepspeed.stage: .*0, 1, 2 or 3",
    "distill.loss.beta=1.5": "distill.loss.beta: 1.5 .*above 0 and below 1",
    "hydra.run.dir=x": "unknown key 'hydra.run.dir'",
    "distill.learning_rate=inf": "^distill.learning_rate: ",
    "distill.max_grad_norm=nan": "^distill.max_grad_norm: ",
    "distill.adam_betas=[0.9,1.0]": "^distill.adam_betas.1: ",
    "distill.adam_betas=[-0.1,0.9]": "^distill.adam_betas.0: ",
    "distill.tokens=true": "^distill.tokens: true .*whole number",
    "distill.learning_rate=true": "^distill.learning_rate: true .*number",
    "distill.adam_betas=[true,0.9]": "^distill.adam_betas: ",
    "shape.layers=false": "^shape.layers: false ",
    "seed=-1": "^seed: ",
    "seed=4294967296": "^seed: ",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_setting_is_one_line_with_its_remedy(override):
    with pytest.raises(ValueError, match=REFUSED[override]) as refusal:
        validated(override)
    assert "\n" not in str(refusal.value)


def test_a_hub_id_or_a_folder_as_model_is_its_path():
    for path in ("org/name", "./folder", "package:other"):
        assert validated(f"model={path}").model.path == path
    assert validated("model=smollm2") == validated()


TYPED = ["模型", "my model (1)", "step=500", "it's", 'say "hi"', "a,b", "[draft", "50%", "~x", "c:\\d\\", "+1", "1e5"]


@pytest.mark.parametrize("name", TYPED)
def test_text_is_taken_as_it_is_typed(name):
    config = validated(f"run={name}", f"model.path=/data/{name}", f"data.recovery.path=[{'/a b/x'},c.txt]")
    assert (config.run, config.model.path) == (name, f"/data/{name}")
    assert config.data.recovery.path == ["/a b/x", "c.txt"]
    assert validated(f"data.calibration.path={name}.txt").data.calibration.path == f"{name}.txt"


def test_values_that_hydra_interprets_stay_interpreted():
    same = "data.recovery.path=${data.evaluation.path}"
    config = validated("model.start=null", same, "track.tags=[a,'b c']", "run='x y'")
    assert config.model.start is None and config.track.tags == ["a", "b c"] and config.run == "x y"
    assert config.data.recovery.path == config.data.evaluation.path


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train_batch_size=8", "distill.global_batch_size"),
        ("gradient_accumulation_steps=2", "distill.micro_batch_size"),
        ("optimizer={type: Adam}", "distill.learning_rate"),
        ("scheduler={type: WarmupLR}", "distill.warmup_ratio"),
    ],
)
def test_a_deepspeed_setting_that_the_pipeline_writes_is_refused_with_the_one_to_set(override, remedy):
    with pytest.raises(ValueError, match=f"deepspeed: .*extra.{override.split('=')[0]} .*{remedy}"):
        validated(f"+deepspeed.extra.{override}")
    extra = validated("+deepspeed.extra.comms_logger.enabled=true").deepspeed.extra
    assert extra == {"comms_logger": {"enabled": True}}


@pytest.mark.parametrize("chosen", [[], ["dry_run=true", "seed=3"]])
def test_where_no_chip_is_chosen_a_run_takes_the_model_of_the_device_it_found(chosen, capsys):
    device = open_device("auto", "auto", False, 0, 0)
    file, message = chip_model(device.kind, device.name)
    values = composed(*chosen)
    config = with_found_chip(validate(values), values)
    assert capsys.readouterr().out == f"{message}\n"
    assert config == validated(*chosen, f"device/chip={file}")


def test_the_student_of_no_chip_is_refused_where_a_chip_decides():
    with pytest.raises(ValueError, match="device.chip: null.*device/chip=910B3"):
        validated().device.chip_facts  # noqa: B018


@pytest.mark.parametrize(
    ("override", "predicts"),
    [("shape.layers=9", False), ("dry_run=true", True), ("recipe.shape=search", True), ("budget.speedup=2", True)],
)
def test_the_chip_matters_where_its_model_predicts(override, predicts):
    assert validated(override).predicts == predicts


CLASHES = {
    ("restore.order=obs",): "restore.order: .*plan.clap=false",
    ("data.split.evaluation=0.5", "data.split.calibration=0.5"): "data.split: ",
    ("recipe.rounds=2", "recipe.repeat=[]"): "recipe.repeat: ",
    ("recipe.rounds=2", "recipe.repeat=[self_generate]"): "recipe.repeat: self_generate",
    ("recipe.rounds=2", "recipe.shape=search"): "recipe.rounds: .*recipe.shape=given",
    ("recipe.rounds=2", "rotate.kind=principal", "plan.channels=leading"): "recipe.rounds: .*rotate.kind=none",
    ("rotate.kind=principal",): "plan.channels: .*plan.channels=leading",
    ("plan.channels=leading",): "plan.channels: .*rotate.kind=principal",
    ("rotate.kind=principal", "plan.channels=leading", "distill.loss.hidden=1"): "distill.loss: .*loss.hidden=0",
    ("regularize.norm=l2",): "regularize.norm: .*plan.depth=gates",
    ("regularize.norm=l2", "plan.depth=loss", "restore.outputs=true"): "regularize.norm: .*restore.outputs=false",
    ("reinit.absorb=fitted", "recipe.stages=[importance,shape,plan,cut]"): "reinit.absorb: .*absorb_norms",
    ("restore.sequential=true",): "restore.sequential: .*plan.clap=false",
    ("plan.widths=evolved", "plan.clap=false", "plan.heads=random"): "plan.widths: .*plan.heads=scores",
    (
        *("rotate.kind=principal", "plan.channels=leading", "local_distill.epochs=1"),
        *("restore.sequential=true", "plan.clap=false"),
    ): "local_distill.epochs: .*local_distill.epochs=0",
}


@pytest.mark.parametrize("overrides", CLASHES)
def test_settings_that_do_not_go_together_are_refused_by_name(overrides):
    with pytest.raises(ValueError, match=f"^{CLASHES[overrides]}") as refusal:
        validated(*overrides)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_no_run_leaves_its_folder():
    values = composed()
    for name in ("..", ".", "a/../../b", "../a", "a/.", "a/...", "/a", "a/", "a//b", "a\nb", " a", "x" * 300):
        with pytest.raises(ValueError, match="^run: "):
            validate(values | {"run": name})
    for name in ("a", "a.b", ".a", "a/..b", "v1.2/x=1,2", "小模型", "it's (1)"):
        assert validate(values | {"run": name}).run == name


def test_own_groups_lie_in_a_folder_of_their_own(tmp_path):
    own = tmp_path / "my conf (1)"
    (own / "recipe").mkdir(parents=True)
    (own / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [best, _self_]\nrecipe: {name: mine}\ndistill: {tokens: 4096}\n"
    )
    own_compose = partial(compose, config_dir=own)
    config = validate(own_compose(["recipe=mine"]))
    assert config.recipe.name == "mine" and config.distill.tokens == 4096 and config.restore.order == "obs"
    with pytest.raises(ValueError, match="recipe: .*'min'; did you mean 'mine'"):
        own_compose(["recipe=min"])
    (own / "recipe" / "old.yaml").write_text("# @package _global_\ndefaults: [best, _self_]\ndistill: {lr: 1}\n")
    with pytest.raises(ValueError, match="distill.learning_rate"):
        validate(own_compose(["recipe=old"]))


def test_configuration_loads_neither_torch_nor_transformers():
    code = (
        "import sys, pipeline.config, pipeline.cli.command, pipeline.cli.compose, pipeline.cli.reference\n"
        "heavy = {'torch', 'transformers', 'numpy', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
