"""A configuration that records which of its settings are read, and stages that record what they read of it."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.fields import Section
from pipeline.config.neutral import is_neutral
from pipeline.runtime.machine import Machine
from pipeline.stages.stage import Stage


class Recorded:
    """A section in whose place `reads` gets the dotted name of every setting that is read, also through properties."""

    def __init__(self, section: Section, reads: set[str], name: str = ""):
        self.__dict__.update(_section=section, _reads=reads, _name=name)

    def __getattr__(self, name: str) -> Any:
        section = self.__dict__["_section"]
        kind = type(section)
        if name in kind.model_fields:
            return self._read(name)
        if name in kind.__private_attributes__:
            return getattr(section, name)
        member = getattr(kind, name)
        if isinstance(member, property):
            return member.fget(self)
        return types.MethodType(member, self)

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """Return what the section dumps; record every setting in it."""
        values = self.__dict__["_section"].model_dump(**options)
        self._note(values, self.__dict__["_section"], self.__dict__["_name"])
        return values

    def _read(self, name: str) -> Any:
        value = getattr(self.__dict__["_section"], name)
        path = _join(self.__dict__["_name"], name)
        if isinstance(value, Section):
            return Recorded(value, self.__dict__["_reads"], path)
        self.__dict__["_reads"].add(path)
        return value

    def _note(self, values: Mapping[str, Any], section: Section, name: str) -> None:
        for key, value in values.items():
            inner = getattr(section, key)
            if isinstance(inner, Section):
                self._note(value, inner, _join(name, key))
            else:
                self.__dict__["_reads"].add(_join(name, key))


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


@dataclass
class Record:
    """What stages read: `unnamed` holds, by stage, settings that `run` read and nothing behind the artifact names."""

    unnamed: dict[str, set[str]] = field(default_factory=dict)
    named: dict[str, set[str]] = field(default_factory=dict)  # by artifact: settings behind it, those of inputs too
    ran: set[str] = field(default_factory=set)

    def violations(self) -> dict[str, list[str]]:
        """Return by stage the settings that it read and nothing names."""
        return {stage: sorted(names) for stage, names in self.unnamed.items() if names}

    def watched(self, stage: Stage) -> Stage:
        """Return the stage with `settings` and `run` that are recorded."""
        last: set[str] = set()

        def settings(config: Config) -> dict[str, Any]:
            last.clear()
            return stage.settings(Recorded(config, last))  # type: ignore[arg-type]

        def run(config: Config, inputs: Mapping[str, Path], out: Path, machine: Machine) -> None:
            named = last.union(*(self.named[folder.name] for folder in inputs.values()))
            reads: set[str] = set()
            stage.run(Recorded(config, reads), inputs, out, machine)  # type: ignore[arg-type]
            self.named[out.name] = named
            self.ran.add(stage.name)
            self.unnamed.setdefault(stage.name, set()).update(n for n in reads - named if not is_neutral(n))

        return replace(stage, settings=settings, run=run)
