"""The contract of stages: typed fields, one list, registered names, and inputs that something makes."""

from dataclasses import replace

import pytest
import torch

from pipeline import graph
from pipeline.config import validate
from pipeline.graph import FIRST, ROLES, STAGES
from pipeline.prune.plan import DEPTH_POLICIES, kept_layers
from pipeline.runner import PREVIOUS
from pipeline.stages.stage import Stage
from pipeline.stages.widths import WIDTH_POLICIES
from tests.tiny_text import configured

CHOICES = sorted({setting for stage in STAGES.values() for setting in stage.choices})


def no_run(config, inputs, out, machine):
    pass


def no_settings(config):
    return {}


def test_a_misspelt_field_of_a_stage_is_an_error():
    Stage(name="a", makes="b", run=no_run, settings=no_settings, resumable=True)
    with pytest.raises(TypeError, match="resumes"):
        Stage(name="a", makes="b", run=no_run, settings=no_settings, resumes=True)
    with pytest.raises(TypeError, match="settings"):
        Stage(name="a", makes="b", run=no_run)
    with pytest.raises(TypeError):
        replace(STAGES["plan"], need=("scores",))


def test_a_misspelt_setting_is_an_error_where_it_is_read():
    with pytest.raises(AttributeError, match="token"):
        configured().score.token  # noqa: B018


def test_stages_are_listed_once_under_their_names():
    assert len(STAGES) == len(graph.MODULES)
    for name, stage in STAGES.items():
        assert stage.name == name and stage.revision >= 1


def test_every_input_of_a_stage_is_made_by_a_stage_or_bound_by_the_runner():
    made = {each for stage in STAGES.values() for each in (stage.makes, *stage.becomes)} | set(PREVIOUS)
    before = set(ROLES)
    for stage in STAGES.values():
        assert {*stage.needs, *stage.optional} <= made, stage.name
        assert set(stage.becomes) <= before, stage.name
        before.add(stage.makes)
    assert set(FIRST) <= set(STAGES)


@pytest.mark.parametrize("setting", CHOICES)
def test_a_name_that_no_registry_knows_is_refused_whatever_the_recipe(setting):
    for recipe in ("pangu_light", "generate"):
        values = configured(f"recipe={recipe}").model_dump()
        section, name = setting.split(".")
        values[section][name] = "unheard_of"
        with pytest.raises(ValueError, match=rf"^{setting}: .*'unheard_of'"):
            graph.check(validate(values))


def test_registered_policies_are_what_the_settings_accept():
    accepted = {setting: set(names) for stage in STAGES.values() for setting, names in stage.choices.items()}
    assert accepted["plan.widths"] == set(WIDTH_POLICIES)
    assert accepted["plan.depth"] == set(DEPTH_POLICIES) | {"loss", "evolved", "gates"}
    with pytest.raises(ValueError, match=r"^plan\.depth: "):
        kept_layers(torch.arange(4.0), 2, "unheard_of", ())
