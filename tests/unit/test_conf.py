"""Every YAML in conf/ composes and validates, and Python holds no other field."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.__main__ import for_the_chip_found
from pipeline.config import validate
from pipeline.runner import STAGES
from pipeline.runtime.device import chip_model, open_device

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
CHOICES = sorted(
    f"{path.parent.relative_to(CONF)}={path.stem}" for path in CONF.rglob("*.yaml") if path.parent != CONF
)


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_validates(choice):
    config = validate(composed(choice))
    assert set(config.recipe.stages) <= set(STAGES)


def test_python_holds_no_default_that_the_yaml_lacks():
    values = composed()
    config = validate(values)
    assert config.model_dump(mode="json").keys() == values.keys()
    for section, fields in config.model_dump(mode="json").items():
        if isinstance(fields, dict):
            assert fields.keys() == values[section].keys(), section


def test_an_unknown_key_is_refused_by_its_name():
    with pytest.raises(Exception, match="epochs"):
        composed("distill.epochs=3")
    values = composed()
    values["distill"]["epochs"] = 3
    with pytest.raises(ValueError, match="distill.epochs: Extra inputs"):
        validate(values)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train_batch_size=8", "distill.global_batch_size"),
        ("gradient_accumulation_steps=2", "distill.micro_batch_size"),
        ("optimizer={type: Adam}", "distill.learning_rate"),
        ("scheduler={type: WarmupLR}", "distill.warmup_ratio"),
    ],
)
def test_raw_deepspeed_settings_say_nothing_that_the_pipeline_says(override, remedy):
    with pytest.raises(ValueError, match=f"deepspeed: .*extra.{override.split('=')[0]} .*{remedy}"):
        validate(composed(f"+deepspeed.extra.{override}"))


@pytest.mark.parametrize("chosen", [[], ["dry_run=true", "seed=3"]])
def test_where_no_chip_is_chosen_a_run_takes_the_model_of_the_device_it_found(chosen, capsys):
    device = open_device("auto", "auto", False, 0, 0)
    file, told = chip_model(device.kind, device.name)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(compose("config", overrides=chosen), resolve=True)
        config = for_the_chip_found(values, chosen)
    assert capsys.readouterr().out == f"{told}\n"
    assert config.model_dump(mode="json") == validate(composed(*chosen, f"device/chip={file}")).model_dump(mode="json")


def test_the_student_of_no_chip_is_refused_where_a_chip_decides():
    with pytest.raises(ValueError, match="device.chip is null.*device/chip=910B3"):
        validate(composed()).device.chip_facts  # noqa: B018


@pytest.mark.parametrize(
    ("override", "predicts"),
    [("shape.layers=9", False), ("dry_run=true", True), ("recipe.shape=search", True), ("budget.speedup=2", True)],
)
def test_the_chip_matters_where_its_model_is_asked(override, predicts):
    assert validate(composed(override)).predicts == predicts


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["restore.order=obs"], "restore.order=obs ranks KV groups"),
        (["data.split.evaluation=0.5", "data.split.calibration=0.5"], "data.split: evaluation + calibration is 1"),
    ],
)
def test_settings_that_do_not_go_together_are_told_without_all_the_others(overrides, start):
    with pytest.raises(ValueError) as told:
        validate(composed(*overrides))
    assert str(told.value).startswith(start) and "got {" not in str(told.value)


def test_no_run_leaves_its_folder():
    values = composed()
    for name in ("..", ".", "a/../../b", "../a", "a/.", "a/...", "/a", "a/"):
        with pytest.raises(ValueError, match="^run: "):
            validate(values | {"run": name})
    for name in ("a", "a.b", ".a", "a/..b", "v1.2/x=1,2"):
        assert validate(values | {"run": name}).run == name


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("distill.learning_rate=inf", "distill.learning_rate"),
        ("distill.max_grad_norm=nan", "distill.max_grad_norm"),
        ("distill.adam_betas=[0.9,1.0]", "distill.adam_betas.1"),
        ("distill.adam_betas=[-0.1,0.9]", "distill.adam_betas.0"),
        ("seed=-1", "seed"),
        ("seed=4294967296", "seed"),
    ],
)
def test_numbers_that_nothing_could_be_done_with_are_refused(override, field):
    with pytest.raises(ValueError, match=rf"(^|; ){field}: "):
        validate(composed(override))
