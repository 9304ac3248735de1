"""The stages by name, what each needs, and whether a recipe's line of them can work."""

from types import ModuleType

from pipeline.config import Config
from pipeline.stages import (
    absorb,
    adopt,
    basis,
    blocks,
    correct,
    cut,
    dense,
    depth,
    distill,
    evaluate,
    export,
    gates,
    generate,
    gram,
    order,
    plan,
    report,
    score,
    search,
    sensitivity,
    sequence,
    settle,
    shape,
    supernet,
    teacher,
    tokens,
)

STAGES: dict[str, ModuleType] = {
    "teacher": teacher,
    "tokens": tokens,
    "generate": generate,
    "correct": correct,
    "score": score,
    "shape": shape,
    "search": search,
    "depth": depth,
    "gates": gates,
    "settle": settle,
    "sequence": sequence,
    "supernet": supernet,
    "basis": basis,
    "gram": gram,
    "order": order,
    "sensitivity": sensitivity,
    "plan": plan,
    "cut": cut,
    "adopt": adopt,
    "blocks": blocks,
    "absorb": absorb,
    "distill": distill,
    "export": export,
    "dense": dense,
    "evaluate": evaluate,
    "report": report,
}
FIRST = ("teacher", "tokens")  # every line begins with them; they are called as what they make


def check(config: Config) -> list[str]:
    """Refuse what cannot work, before anything starts; give the stages of the line in order."""
    unknown = [name for name in config.recipe.line if name not in STAGES]
    if unknown:
        raise ValueError(f"recipe.line names {unknown}; stages are {list(STAGES)}")
    for name in (*FIRST, *config.recipe.line):
        if hasattr(STAGES[name], "check"):
            STAGES[name].check(config)
    absent = [name for name in STAGES if name not in (*FIRST, *config.recipe.line) and _needed(config, name)]
    if absent and not {"plan", "export"}.isdisjoint(config.recipe.line):  # other lines make no student
        told = f"recipe.line has no {', '.join(absent)}, which this configuration needs"
        raise ValueError(f"{told}; conf/recipe/pangu_light.yaml shows every stage in its place")
    _check_order(config)
    if config.corrects:
        _check_correction(config)
    if config.recipe.rounds > 1:
        _check_rounds(config)
    return [*FIRST, *config.recipe.line]


def _check_order(config: Config) -> None:
    """Refuse a line in which a wanted stage comes before, or without, one that makes what it needs."""
    made: set[str] = set()
    for name in (*FIRST, *config.recipe.line):
        missing = [need for need in needs_of(config, STAGES[name]) if need not in made]
        if idle(config, name) or (missing and not is_wanted(config, name)):
            continue
        if missing:
            maker = makers_of(config).get(missing[0], "what makes it")
            raise ValueError(f"recipe.line comes to {name} without the {missing[0]} it needs; put {maker} before it")
        made.add(STAGES[name].MAKES)


def _check_correction(config: Config) -> None:
    """Refuse a correction that is not one, before the rounds and before the student learns."""
    line, repeat = config.recipe.line, config.recipe.repeat if config.recipe.rounds > 1 else []
    before = line[: line.index("correct")]
    if line.count("correct") > 1 or "correct" in repeat or not {"distill", *repeat}.isdisjoint(before):
        raise ValueError(
            f"recipe.line is {line}, recipe.repeat {repeat}; the teacher is corrected once, before the rounds and "
            "before distill: put correct first, and not into recipe.repeat"
        )


def _check_rounds(config: Config) -> None:
    """Refuse rounds in which a stage would read what an earlier round, or the time before all, measured."""
    repeat, line, makers = config.recipe.repeat, config.recipe.line, makers_of(config)
    for name in repeat:
        if idle(config, name):
            continue
        stale = [makers[need] for need in needs_of(config, STAGES[name]) if makers[need] not in (*FIRST, *repeat)]
        if stale:
            raise ValueError(f"recipe.repeat has no {', '.join(stale)}, which {name} needs anew in every round; add it")
    absent = [name for name in ("plan", "cut") if name not in repeat]
    places = [line.index(name) for name in repeat]
    absent += [name for name in line[min(places) : max(places)] if name not in repeat and not idle(config, name)]
    if absent:
        raise ValueError(f"recipe.repeat has no {', '.join(absent)}, which belongs to every round; add it")


def makers_of(config: Config) -> dict[str, str]:
    """Give the first stage that makes each artifact in this configuration, by artifact."""
    makers: dict[str, str] = {}
    for name, stage in STAGES.items():
        if not hasattr(stage, "needed") or stage.needed(config):
            makers.setdefault(stage.MAKES, name)
    return makers


def needs_of(config: Config, stage: ModuleType) -> tuple[str, ...]:
    """Give what a stage reads: always, as configured, and of its optional inputs those this configuration asks for."""
    makers = makers_of(config)
    asked = (need for need in getattr(stage, "OPTIONAL", ()) if need in makers and _needed(config, makers[need]))
    return (*stage.NEEDS, *(stage.needs(config) if hasattr(stage, "needs") else ()), *asked)


def _needed(config: Config, name: str) -> bool:
    """Whether a configuration asks for a stage that not every line needs."""
    return hasattr(STAGES[name], "needed") and STAGES[name].needed(config)


def idle(config: Config, name: str) -> bool:
    """Whether a configuration does not ask for a stage."""
    return hasattr(STAGES[name], "needed") and not STAGES[name].needed(config)


def is_wanted(config: Config, name: str) -> bool:
    """Whether a stage is to be done where it was not before: what makes the teacher or the tokens always is."""
    return config.stages is None or name in config.stages or STAGES[name].MAKES in FIRST
