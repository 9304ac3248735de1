"""Names that settings select from registries, read from the registries' source text so that nothing heavy is imported.

The stages check the same settings against the registries themselves; here a wrong name is refused before torch loads.
"""

import ast
from functools import cache
from operator import attrgetter
from pathlib import Path

from pipeline.config import Config
from pipeline.config.names import suggested_word

PACKAGE = Path(__file__).resolve().parents[1]
REGISTRIES = {  # setting -> (file, variable) of the dictionaries and tuples whose names it accepts
    "budget.axes": (("stages/student_shape.py", "BUDGET_AXES"),),
    "distill.loss.kind": (("distill/divergences.py", "DIVERGENCES"),),
    "onpolicy.divergence": (("distill/divergences.py", "DIVERGENCES"),),
    "plan.depth": (("prune/plan.py", "DEPTH_POLICIES"), ("config/methods.py", "MEASURED_DEPTH")),
    "plan.widths": (("stages/widths.py", "WIDTH_POLICIES"),),
    "restore.local": (("prune/second_order/narrow.py", "LOCAL_ORDERS"),),
    "score.experts": (("prune/importance/experts.py", "EXPERT_SCORES"),),
    "score.kind": (("prune/importance/__init__.py", "SCORES"),),
}


@cache
def registered(setting: str) -> tuple[str, ...]:
    """Return the names that a setting accepts, in the order of their registries; empty where it uses none."""
    return tuple(name for place in REGISTRIES.get(setting, ()) for name in _names(*place))


def check_registered(config: Config) -> None:
    """Raise ValueError, with the nearest name, for a setting that no registry knows."""
    for setting in REGISTRIES:
        value, names = attrgetter(setting)(config), registered(setting)
        if value not in names:
            near = suggested_word(value, names)
            meant = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"{setting}: unknown value {value!r}; {meant}choose from {', '.join(names)}")


def _names(file: str, variable: str) -> list[str]:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            if isinstance(node.value, ast.Dict):
                return [ast.literal_eval(key) for key in node.value.keys if key is not None]
            if isinstance(node.value, ast.Tuple):
                return [ast.literal_eval(name) for name in node.value.elts]
    raise LookupError(f"{file} has no dictionary or tuple {variable}")
