"""Targets: settings, and files that the pipeline writes itself."""

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from pipeline.config import Config, validate
from pipeline.graph import check
from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.artifacts import Store
from pipeline.runtime.manifest import damage
from pipeline.runtime.ranks import Ranks
from tests.composing import composed
from tests.fuzz import Refused, Target
from tests.fuzz.values import VALUES, mutated, mutated_text
from tests.students import MIXED
from tests.tiny import config_of, tensors_of, tiny_model
from tests.world import make_world
from tests.world import settings as small

ORDINARY = st.one_of(st.integers(0, 9), st.sampled_from([0.5, 1.5, 16, 64, 1e-3, True, False, None]))


def _same(given: Any, taken: Any) -> bool:
    """Return whether a setting has the value that was given; a number may become a float, and 0 and 1 a truth value."""
    if isinstance(given, dict) and isinstance(taken, dict):
        return given.keys() == taken.keys() and all(_same(given[key], taken[key]) for key in given)
    if isinstance(given, list) and isinstance(taken, list):
        return len(given) == len(taken) and all(map(_same, given, taken))
    if isinstance(given, int) and isinstance(taken, float):
        return float(given) == taken
    return given == taken and not (isinstance(given, bool) and not isinstance(taken, bool))


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def settings(folder: Path) -> Target:
    """Mutated settings: refused, or taken as they were given."""

    def verify(case: Any, config: Config) -> None:
        dumped = config.model_dump(mode="json")
        changed = {key: (case[key], dumped.get(key)) for key in case if not _same(case[key], dumped.get(key))}
        assert not changed, changed
        assert _finite(dumped), "a number that is not finite"
        assert validate(dumped) == config

    return Target(mutated(composed(*small(folder)), ORDINARY | VALUES), validate, verify)


def checked_settings(folder: Path) -> Target:
    """Mutated settings of a model and texts that exist: refused before any work, or a list of stages."""
    values = composed(*small(make_world(folder / "world")))

    def verify(case: Any, stages: list[str]) -> None:
        assert stages[:2] == ["teacher", "tokens"]

    return Target(mutated(values, ORDINARY), lambda case: check(validate(case)), verify)


def blueprint(folder: Path) -> Target:
    """Mutated blueprints: refused for a model, or cut from it."""
    model = tiny_model("llama")
    anatomy, tensors = anatomy_of(config_of(model), tensors_of(model)), tensors_of(model)
    place = folder / "plan"
    place.mkdir()
    Blueprint(tuple(range(32)), MIXED).save(place)
    path = place / Blueprint.FILE
    value = json.loads(path.read_text())
    indices = st.one_of(st.integers(-2, 33), st.lists(st.integers(0, 9), max_size=3), st.none(), st.floats())

    def read(case: bytes) -> Blueprint:
        path.write_bytes(case)
        plan = Blueprint.load(place)
        plan.student(anatomy)
        return plan

    def verify(case: bytes, plan: Blueprint) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in cut(anatomy, plan, tensors)}
        assert shapes == plan.student(anatomy).shapes()

    ours = mutated(value, indices).map(lambda each: json.dumps(each).encode())
    return Target(st.one_of(ours, mutated_text(value)), read, verify)


def manifest(folder: Path) -> Target:
    """Mutated manifests of an artifact: any change is damage."""
    store = Store(folder / "artifacts", Ranks(0, 1, 0), "r1")
    with store.open("score", "a" * 12) as partial:
        assert partial is not None
        (partial / "scores.json").write_text("[0.5, 1.25]")
        made = store.publish("score", "a" * 12, {"tokens": 3}, {}, 1.5, 10)
    path = made / "manifest.json"
    value = json.loads(path.read_text())

    def read(case: bytes) -> None:
        path.write_bytes(case)
        fault = damage(made, content=True)
        if fault is not None:
            assert "\n" not in fault
            raise Refused(fault)

    def verify(case: bytes, _: None) -> None:
        assert json.loads(case) == value, "a changed manifest is trusted"

    return Target(mutated_text(value), read, verify)
