"""The reference of all settings, read from conf/ and its comments: --help and docs/settings.md.

python -m pipeline.cli.reference > docs/settings.md     write the document
python -m pipeline.cli.reference docs/settings.md       check it, and that every setting has a comment
"""

import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cli.registered import registered
from pipeline.config import SETTINGS
from pipeline.config.names import unknown_key
from pipeline.config.schema import expected

HERE = Path(__file__).resolve().parents[1]
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"
EXTRA = {"device/chip": "910B1"}  # groups outside the defaults of conf/config.yaml, and the choice that documents them
LINE = re.compile(r"( *)(\w+):(?: +(\S.*?))?(?: +# ?(.*))?")
WIDTH, COLUMN = 118, 34

USAGE = """\
Make a Hugging Face language model smaller: score, prune, re-initialise, recover by distillation, export and report.

  python -m pipeline run=NAME                                   prune the default model by 25 %
  python -m pipeline run=NAME model.path=FOLDER budget.parameters=0.6
  python -m pipeline run=NAME model.path=FOLDER recipe=best experiment=8b
  python -m pipeline run=NAME --multirun shape.hidden=448,512   a sweep; stages in common run once
  python -m pipeline --from runs/NAME/run.json run=AGAIN        repeat a run, with other settings where given
  torchrun --nproc-per-node N -m pipeline run=NAME ...          several devices
  python -m pipeline doctor [device=npu]                        check what this machine can run
  python -m pipeline compare RUN [RUN ...]                      a table and a page that compare finished runs
  python -m pipeline clean                                      show artifacts that no run refers to, and free them
  python -m pipeline calibrate-chip [calibrate.name=NAME]       fit a chip model to this machine

Options
  -h, --help [GROUP]    this text, or one group of settings, e.g. --help distill
  -m, --multirun        run every combination of settings that are given several values, separated by commas
  -cd, --config-dir DIR folder of your own groups, e.g. DIR/recipe/mine.yaml for recipe=mine
  --from FILE           start from the configuration that a run.json records
  --cfg job             print the composed configuration
"""


@dataclass
class Entry:
    """One setting: dotted key, default as written in conf/, and comment."""

    key: str
    default: str
    comment: str

    @property
    def accepts(self) -> str:
        """What the setting accepts, in words; empty for any text."""
        names = registered(self.key)
        if names:
            return f"{', '.join(names[:-1])} or {names[-1]}"
        words = expected(SETTINGS[self.key]) if self.key in SETTINGS else ""  # device.chip is a group
        return "" if words == "text" else words


@dataclass
class Group:
    """Settings that are documented together: a section of conf/config.yaml, or a group of files with its choices."""

    name: str
    comment: str = ""
    choices: dict[str, str] = field(default_factory=dict)  # choice -> the comment at the top of its file
    entries: list[Entry] = field(default_factory=list)


def reference(conf: Path = CONF) -> list[Group]:
    """Return all settings by group: first those without a section, then groups of files, then sections in order."""
    sections = _read(conf / "config.yaml", "")
    top = [entry for group in sections for entry in group.entries if group.name == ""]
    chosen = re.findall(r"^  - (\w+): (\w+)$", (conf / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    files = []
    for name, choice in [*chosen, *EXTRA.items()]:
        path = conf / name / f"{choice}.yaml"
        group = Group(name, _heading(path), {each.stem: _heading(each) for each in sorted(path.parent.glob("*.yaml"))})
        prefix = "" if "@package _global_" in path.read_text(encoding="utf-8") else f"{name.replace('/', '.')}."
        for section in _read(path, prefix):
            group.entries += section.entries
        files.append(group)
    return [Group("run", "Runs.", entries=top), *files, *(group for group in sections if group.name)]


def undocumented(conf: Path = CONF) -> list[str]:
    """Return settings that have no comment, and those of the configuration that the reference lacks."""
    entries = [entry for group in reference(conf) for entry in group.entries]
    return sorted({entry.key for entry in entries if not entry.comment} | set(SETTINGS) - {e.key for e in entries})


def help_text(name: str) -> str:
    """Return the help of all settings, or of a group or a single setting. Raise ValueError for an unknown one."""
    groups = reference()
    name = name.partition("=")[0]
    if not name:
        short = [group for group in groups if group.name not in EXTRA]
        return "\n".join([USAGE, *(_plain(group) for group in short)])
    found = [group for group in groups if name in (group.name, group.name.replace("/", "."))]
    found = found or [_matching(group, name) for group in groups if _matching(group, name).entries]
    if not found:
        known = [*SETTINGS, *(group.name for group in groups)]
        raise ValueError(unknown_key(name, known))
    return "\n".join(map(_plain, found))


def markdown() -> str:
    """Return docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Every setting with its default, meaning and accepted values. This page is generated from the comments in"
        " `conf/`, which `python -m pipeline --help` also prints.",
        "",
    ]
    for group in reference():
        lines += [f"## {group.name}", "", group.comment, ""]
        if len(group.choices) > 1:
            default = dict(re.findall(r"^  - (\w+): (\w+)$", (CONF / "config.yaml").read_text(encoding="utf-8"), re.M))
            lines += [f"Choose with `{group.name}=NAME`:", ""]
            for choice, comment in group.choices.items():
                mark = " (default)" if default.get(group.name) == choice else ""
                lines += [f"- `{choice}`{mark}: {_cell(comment)}"]
            lines += [""]
        if group.entries:
            lines += ["| setting | default | meaning | accepts |", "|---|---|---|---|"]
            for entry in group.entries:
                cells = (f"`{entry.key}`", f"`{entry.default}`", entry.comment, entry.accepts)
                lines += [f"| {' | '.join(map(_cell, cells))} |"]
            lines += [""]
    return "\n".join(lines)


def _matching(group: Group, name: str) -> Group:
    """Return a group with only the setting `name`, or the settings below it."""
    entries = [entry for entry in group.entries if entry.key == name or entry.key.startswith(f"{name}.")]
    return Group(group.name, group.comment, entries=entries)


def _plain(group: Group) -> str:
    lines = [group.name, *textwrap.wrap(group.comment, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    if len(group.choices) > 1:
        chosen = f"  {group.name}=NAME: {', '.join(group.choices)}"
        lines += textwrap.wrap(chosen, WIDTH, subsequent_indent="    ")
    for entry in group.entries:
        text = f"{entry.comment} [{entry.accepts}]" if entry.accepts else entry.comment
        start = f"  {entry.key}={entry.default}"
        body = textwrap.wrap(text, WIDTH - COLUMN)
        if len(start) < COLUMN:
            lines.append(f"{start:<{COLUMN}}{body[0]}")
            body = body[1:]
        else:
            lines.append(start)
        lines += [" " * COLUMN + each for each in body]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _heading(path: Path) -> str:
    """Return the comment at the top of a file, as one line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line[1:].strip())
    return " ".join(lines)


def _read(path: Path, prefix: str) -> list[Group]:
    """Return the settings of a file by section; the comments directly above a section document it."""
    groups: list[Group] = []
    parents: list[tuple[int, str]] = []
    for indent, name, value, comment in _lines(path):
        parents = [parent for parent in parents if parent[0] < indent]
        if name == "defaults" and not indent:
            continue
        key = prefix + ".".join([*(each for _, each in parents), name])
        section = parents[0][1] if parents else ""
        if value is None:
            parents.append((indent, name))
            if len(parents) == 1:
                groups.append(Group(name, comment))
            continue
        if not section and (not groups or groups[0].name):
            groups.insert(0, Group(""))
        group = next(each for each in groups if each.name == section)
        group.entries.append(Entry(key, value, comment))
    return groups


def _lines(path: Path) -> Iterator[tuple[int, str, str | None, str]]:
    """Yield each key of a file: indentation, name, value (None for a section) and comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    above: list[str] = []
    number = 0
    while number < len(lines):
        line, number = lines[number], number + 1
        if line.strip().startswith("#"):
            above.append(line.strip()[1:].strip())
            continue
        match = LINE.fullmatch(line)
        if match is None:  # blank lines and the list of defaults
            above = []
            continue
        indent, name, value, comment = len(match[1]), match[2], match[3], match[4]
        if value is None and number < len(lines) and lines[number].strip().startswith("["):
            parts: list[str] = []
            while not (parts and parts[-1].endswith("]")):
                parts.append(lines[number].strip())
                number += 1
            value = " ".join(parts)
        yield indent, name, value, " ".join([*above, *([comment.strip()] if comment else [])])
        above = []


if __name__ == "__main__":
    if len(sys.argv) > 1:
        missing = undocumented()
        if missing:
            sys.exit(f"settings without a comment in conf/: {', '.join(missing)}")
        if Path(sys.argv[1]).read_text(encoding="utf-8") != markdown():
            sys.exit(f"{sys.argv[1]} differs from conf/; run: python -m pipeline.cli.reference > {sys.argv[1]}")
    else:
        sys.stdout.buffer.write(markdown().encode())
