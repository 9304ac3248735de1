"""Compose conf/ and the settings of a command with Hydra, after each key and choice has been looked up."""

import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.cli.auto_recipe import AUTO, Choice, recipe_for
from pipeline.cli.words import Setting, quoted
from pipeline.config import SETTINGS, unknown_key
from pipeline.config.names import CHOICES, STAGES, suggested_word
from pipeline.config.schema import expected
from pipeline.runtime.records import read_record

HERE = Path(__file__).resolve().parents[1]
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"
OPEN = ("deepspeed.extra.",)  # below these keys any name is a setting
SECTIONS = {key.rpartition(".")[0] for key in SETTINGS} | {key.partition(".")[0] for key in SETTINGS if "." in key}
HYDRA = ("hydra.", "hydra/")  # settings of Hydra itself: its sweepers and launchers
INTERPOLATION = re.compile(r"(\\*)\$\{")
QUOTES = str.maketrans("", "", "'\"")
WHOLE = ("recipe", "experiment")  # groups that set values of any section


def composed(settings: Sequence[str], config_dir: Path | None = None, source: Path | None = None) -> dict[str, Any]:
    """Return the configuration as a mapping, not validated.

    `settings`: as typed, without sweeps; `config_dir`: a folder of own groups, such as recipe/NAME.yaml; `source`: a
    run.json whose configuration replaces conf/config.yaml. Raise ValueError in one line for a key or a
    choice that does not exist, with the nearest one, and for a value that cannot be read.
    """
    return _composed(checked(settings, groups(config_dir), multirun=False), config_dir, source)


def sweep(settings: Sequence[str], config_dir: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield each point of a sweep: the swept settings, as one name, and all settings, as `compose_point` takes them."""
    words = checked(settings, groups(config_dir), multirun=True)
    lists = []
    for setting, override in zip(words, map(_parsed, words), strict=True):
        if override.is_sweep_override():
            key, values = override.get_key_element(), override.sweep_string_iterator()
            lists.append([(f"{setting.key}={value.translate(QUOTES)}", f"{key}={value}") for value in values])
        else:
            lists.append([("", str(setting))])
    for point in product(*lists):
        yield ",".join(name for name, _ in point if name), [word for _, word in point]


def compose_point(point: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """Return the configuration of one point of a sweep."""
    return _composed([Setting.of(word) for word in point], config_dir, None)


def as_values(config: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as a plain mapping, interpolations resolved."""
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def as_yaml(values: dict[str, Any]) -> str:
    """Return a composed configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(values))


def checked(settings: Sequence[str], known: dict[str, set[str]], multirun: bool) -> list[Setting]:
    """Return settings that Hydra can read; of a setting that is given several times, the last.

    Raise ValueError for unknown keys, unknown choices and unreadable values.
    """
    found = []
    for word in settings:
        setting = Setting.of(word)
        if multirun and setting.key.startswith(HYDRA):
            found.append(setting)
            continue
        if setting.key == "model" and setting.value not in (None, *known["model"]):
            setting = Setting(setting.prefix, "model.path", setting.value)  # model=org/name
        _check_key(setting, known, multirun)
        setting = quoted(setting, multirun)
        if setting.key in ("stages", "recipe.stages", "recipe.repeat"):
            _check_stages(setting)
        if swept(setting) and not multirun:
            raise ValueError(
                f"{setting.key}: {setting.value} is several values; write {setting.key}=[{setting.value}] for a list, "
                "or add --multirun for a sweep"
            )
        found.append(setting)
    last = {setting.key: setting for setting in found}
    return [setting for setting in found if last[setting.key] is setting]


def groups(config_dir: Path | None = None) -> dict[str, set[str]]:
    """Return the groups of conf/, and of a folder of own ones, with their choices."""
    found: dict[str, set[str]] = {}
    for root in (CONF, *([config_dir] if config_dir is not None else [])):
        for path in sorted(root.rglob("*.yaml")):
            if path.parent != root:
                found.setdefault(path.parent.relative_to(root).as_posix(), set()).add(path.stem)
    return found


def _check_key(setting: Setting, known: dict[str, set[str]], multirun: bool) -> None:
    key, value = setting.key, setting.value
    if setting.prefix == "~" and not key.startswith(OPEN):
        raise ValueError(f"{setting}: a setting cannot be removed; give it another value")
    if setting.prefix == "+" and key in SETTINGS:
        raise ValueError(f"{setting}: {key} exists already; leave out the +")
    if key in known:
        options = [] if value is None else value.split(",") if multirun else [value]
        for option in options:
            if option.strip() not in known[key] and not option.startswith(("choice(", "glob(")):
                raise ValueError(_no_choice(key, option, known[key]))
    elif key in SECTIONS and not (value or "").startswith("{"):
        if key.replace(".", "/") in known:
            raise ValueError(f"{key}: a group; choose with {key.replace('.', '/')}={value}")
        example = next(each for each in SETTINGS if each.startswith(f"{key}."))
        raise ValueError(f"{key}: a section of settings; set one of them, e.g. {example}=VALUE")
    elif key not in SETTINGS and key not in SECTIONS and not key.startswith(OPEN):
        near = suggested_word(key, {*known, *SECTIONS}) if not {".", "/"} & set(key) else None
        raise ValueError(f"unknown key {key!r}; did you mean {near!r}?" if near else unknown_key(key))


def _no_choice(group: str, option: str, known: set[str]) -> str:
    near = CHOICES.get((group, option)) or suggested_word(option, known)
    meant = f"did you mean {near!r}? " if near else ""
    return f"{group}: there is no choice {option!r}; {meant}choose from {', '.join(sorted(known))}"


def _check_stages(setting: Setting) -> None:
    """Refuse stages that do not exist; their files are named like them."""
    names = {path.stem for path in (HERE / "stages").glob("*/*.py")}
    parsed = _parsed(setting).value()
    for stage in parsed if isinstance(parsed, list) else ():
        name = str(getattr(stage, "text", stage))
        if name not in names:
            meant = STAGES.get(name) or suggested_word(name, names)
            hint = f"did you mean {meant!r}?" if meant else f"choose from {', '.join(sorted(names - {'__init__'}))}"
            raise ValueError(f"{setting.key}: there is no stage {name!r}; {hint}")


def swept(setting: Setting) -> bool:
    """Return whether a setting has several values."""
    return not setting.key.startswith(HYDRA) and _parsed(setting).is_sweep_override()


def _parsed(setting: Setting) -> Override:
    try:
        return OverridesParser.create().parse_override(str(setting))
    except HydraException:
        kind = SETTINGS.get(setting.key)
        wanted = f"give {expected(kind)}" if kind is not None else "put it in quotes"
        raise ValueError(f"{setting.key}: cannot read the value {setting.value}; {wanted}") from None


def _composed(settings: Sequence[Setting], config_dir: Path | None, source: Path | None) -> dict[str, Any]:
    words = [str(setting) for setting in settings]
    own = [f"hydra.searchpath=[{_url(config_dir)}]"] if config_dir is not None else []
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            if source is not None:
                return as_values(_repeated(source, settings, own))
            values = as_values(compose("config", overrides=[*own, *words]))
            if values["recipe"]["name"] != AUTO:
                return values
            chosen = _chosen(recipe_for(values), settings)
            return as_values(compose("config", overrides=[*own, *chosen]))
    except (HydraException, OmegaConfBaseException) as error:
        if any(setting.key.startswith("device.chip.") for setting in settings) and "chip" in str(error):
            raise ValueError("device.chip: null; choose a chip before its settings, e.g. device/chip=910B3") from None
        raise ValueError(" ".join(str(error).split())) from None


def _chosen(choice: Choice, settings: Sequence[Setting]) -> list[str]:
    """Return the settings of a command with the chosen recipe instead of recipe=auto; typed settings come last."""
    beside = {**choice.settings, "recipe": choice.recipe, "recipe.reason": choice.reason}
    others = [setting for setting in settings if setting.key not in ("recipe", "recipe.reason")]
    typed = {setting.key for setting in others}
    own = [quoted(Setting("", key, value), False) for key, value in beside.items() if key not in typed]
    return [str(setting) for setting in (*own, *others)]


def _url(folder: Path) -> str:
    if not folder.is_dir():
        raise ValueError(f"--config-dir: {folder} is no folder; give one that holds recipe/NAME.yaml or the like")
    return str(quoted(Setting("", "runs", f"file://{folder.resolve()}"), False).value)


def _repeated(source: Path, settings: Sequence[Setting], own: list[str]) -> DictConfig:
    """Return the configuration that a run.json records, with settings over it.

    A group replaces its section; groups that set values of any section cannot be taken back and are refused.
    """
    config = OmegaConf.create(recorded(source))
    chosen = [setting for setting in settings if setting.key not in SETTINGS]
    for setting in chosen:
        if setting.key in WHOLE or setting.prefix == "~":
            raise ValueError(f"--from: {setting} cannot be laid over a recorded run; give single settings")
    if chosen:
        defaults = compose("config", overrides=[*own, *map(str, chosen)])
        for section in dict.fromkeys(setting.key.partition("/")[0].partition(".")[0] for setting in chosen):
            OmegaConf.update(config, section, OmegaConf.select(defaults, section), merge=False)
    for setting in settings:
        if setting.key in SETTINGS:
            OmegaConf.update(config, setting.key, _parsed(setting).value(), merge=False)
    return config


def recorded(source: Path) -> dict[str, Any]:
    """Return the configuration in a run.json, in which OmegaConf finds no interpolation.

    Raise ValueError where the file holds none, or was changed.
    """
    file = source / "run.json" if source.is_dir() else source
    try:
        config = read_record(file).get("config")
    except ValueError as error:
        raise ValueError(f"--from: {file}: {error}; give an unchanged runs/NAME/run.json, settings follow it") from None
    if not isinstance(config, dict):
        raise ValueError(f"--from: {file} records no configuration; give runs/NAME/run.json")
    return _literal(config)


def _literal(value: Any) -> Any:
    """Return a value whose texts OmegaConf takes as they are."""
    if isinstance(value, dict):
        return {key: _literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_literal(each) for each in value]
    return INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value
