"""The stages in order, what each reads, and the checks that a recipe's list of them can run."""

from operator import attrgetter

from pipeline.config import Config
from pipeline.stages.analyse import hessian, importance, layer_gates, layer_loss, obs_order, sensitivity, sublayers
from pipeline.stages.build import absorb_norms, bypass, cut, local_distill, regularize, rotate, sequential, supernet
from pipeline.stages.choose import plan, shape, shape_search
from pipeline.stages.deliver import evaluate, evaluate_reference, export, gguf, report
from pipeline.stages.prepare import (
    external_student,
    self_generate,
    teacher,
    teacher_correction,
    tokens,
    vocabulary,
)
from pipeline.stages.recover import distill, onpolicy
from pipeline.stages.stage import Stage, always

MODULES = (
    teacher,
    tokens,
    self_generate,
    vocabulary,
    teacher_correction,
    importance,
    shape,
    shape_search,
    layer_loss,
    layer_gates,
    sublayers,
    hessian,
    obs_order,
    sensitivity,
    regularize,
    sequential,
    supernet,
    rotate,
    plan,
    bypass,
    cut,
    external_student,
    local_distill,
    absorb_norms,
    distill,
    onpolicy,
    export,
    gguf,
    evaluate_reference,
    evaluate,
    report,
)
STAGES: dict[str, Stage] = {module.STAGE.name: module.STAGE for module in MODULES}
FIRST = ("teacher", "tokens")  # come before the stages of a recipe that read them; recipes do not list them
ROLES = ("teacher", "subject", "tokens", "reference_tokens")  # bound by the runner, see Stage


def check(config: Config) -> list[str]:
    """Return the names of the stages to run, in order.

    Raise ValueError, before any work, for a configuration that a stage refuses and for a list that cannot run.
    """
    _check_choices(config)
    unknown = [name for name in config.recipe.stages if name not in STAGES]
    if unknown:
        raise ValueError(f"recipe.stages: unknown stages {unknown}; choose from {list(STAGES)}")
    names = stages_of(config)
    for name in names:
        STAGES[name].check(config)
    absent = [name for name in STAGES if name not in names and _requested(config, name)]
    if absent and not {"plan", "export"}.isdisjoint(names):  # other recipes make no student
        raise ValueError(
            f"recipe.stages: this configuration needs {', '.join(absent)}; add it as conf/recipe/pangu_light.yaml does"
        )
    _check_order(config)
    if config.corrects:
        _check_correction(config)
    if config.recipe.rounds > 1:
        _check_rounds(config)
    return names


def stages_of(config: Config) -> list[str]:
    """Return the stages of a recipe in order, with those that a listed stage implies."""
    read = {need for name in config.recipe.stages for need in needs_of(config, STAGES[name])}
    names = [name for name in FIRST if not read.isdisjoint((STAGES[name].makes, *STAGES[name].becomes))]
    for name in config.recipe.stages:
        implied = [each for each in STAGES if STAGES[each].implied and STAGES[each].makes in STAGES[name].needs]
        names += [each for each in implied if each not in names and each not in config.recipe.stages]
        names.append(name)
    return names


def makers_of(config: Config) -> dict[str, str]:
    """Return, for each artifact and model role, the first stage that makes it in this configuration."""
    makers: dict[str, str] = {}
    for name, stage in STAGES.items():
        if stage.enabled(config):
            for artifact in (stage.makes, *stage.becomes):
                makers.setdefault(artifact, name)
    return makers


def needs_of(config: Config, stage: Stage) -> tuple[str, ...]:
    """Return the artifacts without which a stage cannot run: fixed ones, those that depend on the configuration, and
    those of its optional ones that the configuration asks for."""
    makers = makers_of(config)
    requested = (each for each in stage.optional if each in makers and _requested(config, makers[each]))
    return (*stage.needs, *stage.needs_also(config), *requested)


def is_wanted(config: Config, name: str) -> bool:
    """Return whether a stage runs where its artifact is missing; `stages` may limit a run to a part of the recipe."""
    stage = STAGES[name]
    selected = config.stages is None or name in config.stages
    readers = (each for each in config.recipe.stages if stage.makes in STAGES[each].needs)
    implied = stage.implied and any(is_wanted(config, each) for each in readers)
    return name in FIRST or selected or "teacher" in stage.becomes or implied


def _requested(config: Config, name: str) -> bool:
    """Return whether a configuration asks for a stage that not every configuration runs."""
    stage = STAGES[name]
    return stage.enabled is not always and stage.enabled(config)


def _check_choices(config: Config) -> None:
    """Refuse names that no registry knows, also in sections of stages that the recipe does not run."""
    for stage in STAGES.values():
        for setting, names in stage.choices.items():
            value = attrgetter(setting)(config)
            if value not in names:
                raise ValueError(f"{setting}: unknown value {value!r}; choose from {', '.join(names)}")


def _check_order(config: Config) -> None:
    """Refuse a list in which a stage comes before, or without, one that makes what it reads."""
    made: set[str] = set()
    for name in stages_of(config):
        stage = STAGES[name]
        missing = [need for need in needs_of(config, stage) if need not in made]
        if not stage.enabled(config) or (missing and not is_wanted(config, name)):
            continue
        if missing:
            maker = makers_of(config).get(missing[0], "the stage that makes it")
            raise ValueError(f"recipe.stages: {name} reads {missing[0]}, which is not made yet; put {maker} before it")
        made |= {stage.makes, *stage.becomes}


def _check_correction(config: Config) -> None:
    """Refuse a teacher correction that is not a single one before the rounds and before recovery."""
    stages, repeat = config.recipe.stages, config.recipe.repeat if config.recipe.rounds > 1 else []
    before = stages[: stages.index("teacher_correction")]
    late = not {"distill", *repeat}.isdisjoint(before)
    if stages.count("teacher_correction") > 1 or "teacher_correction" in repeat or late:
        raise ValueError(
            f"recipe.stages: {stages} with recipe.repeat {repeat} corrects the teacher late or more than once; put "
            "teacher_correction first, and not into recipe.repeat"
        )


def _check_rounds(config: Config) -> None:
    """Refuse rounds in which a stage would read what an earlier round, or the time before all rounds, measured."""
    repeat, stages, makers = config.recipe.repeat, config.recipe.stages, makers_of(config)
    for name in repeat:
        if not STAGES[name].enabled(config):
            continue
        fresh = (need for need in needs_of(config, STAGES[name]) if need not in ROLES)
        stale = [makers[need] for need in fresh if makers[need] not in (*FIRST, *repeat)]
        if stale:
            raise ValueError(f"recipe.repeat: {name} needs a new result of {', '.join(stale)} in every round; add it")
    absent = [name for name in ("plan", "cut") if name not in repeat]
    places = [stages.index(name) for name in repeat]
    between = stages[min(places) : max(places)]
    absent += [name for name in between if name not in repeat and STAGES[name].enabled(config)]
    if absent:
        raise ValueError(f"recipe.repeat: {', '.join(absent)} belongs to every round; add it")
