"""python -m pipeline compare: runs, or all runs below a folder, beside each other in compare.html, .json and .csv."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pipeline.report.compare import as_csv, as_text, as_values, points_of
from pipeline.report.compare_page import compare_page
from pipeline.runtime.records import write_atomically
from pipeline.runtime.run_folder import is_as_delivered

USAGE = "python -m pipeline compare RUN [RUN ...] [--output FOLDER]"
REPORT, PAGE = "report.json", "report.html"
Number = Annotated[float, Field(ge=0.0)]
Size = Annotated[float, Field(gt=0.0)]


class Sizes(TypedDict):
    """A size of both models."""

    teacher: Size
    student: Size


class Cache(TypedDict):
    """Bytes of keys and values per token, of both models."""

    teacher: Size
    student: Number


class Quality(TypedDict):
    """A perplexity, null where it is infinite."""

    perplexity: Size | None


class Text(TypedDict):
    """The quality of both models on a text."""

    teacher: Quality
    student: Quality


class Rates(TypedDict):
    """Tokens per second."""

    prefill: Size
    decode: Size


class Speed(TypedDict):
    """The speeds of both models."""

    teacher: Rates
    student: Rates


class Curve(TypedDict):
    """A figure at the first and the last step, and at some between."""

    first: float | None
    last: float | None
    points: NotRequired[list[tuple[float, float | None]]]


class Recovery(TypedDict):
    """What a recovery read, and its curves by name."""

    tokens: float
    curves: dict[str, Curve]


class Named(TypedDict):
    """A device."""

    name: str


class Compared(TypedDict):
    """What a comparison reads of a report.json."""

    model: str
    settings: dict[str, Any]
    parameters: Sizes
    kv_bytes_per_token: Cache
    perplexity: Annotated[dict[str, Text], Field(min_length=1)]
    speed: Speed | None
    recovery: Recovery | None
    device: Named


COMPARED = TypeAdapter(Compared)


def compare(words: Sequence[str]) -> int:
    """Compare the runs that the words of the command name, print the table, and return the exit status."""
    folders, output, rest = [], None, list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            print(f"{USAGE}\n\nRUN: a run folder, or a folder with runs below it, such as that of a sweep.")
            return 0
        if word == "--output" and rest:
            output = Path(rest.pop(0))
        elif word.startswith("--output="):
            output = Path(word.partition("=")[2])
        elif word.startswith("-"):
            raise ValueError(f"compare: {word} is not an option; usage: {USAGE}")
        else:
            folders.append(Path(word))
    if not folders:
        raise ValueError(f"compare: no run is named; usage: {USAGE}")
    print(write_comparison(folders, output))
    return 0


def write_comparison(folders: Sequence[Path], output: Path | None = None) -> str:
    """Write compare.html, compare.json and compare.csv; return the table and where the page is, as text.

    They are written into `output`; without it into the one folder given, or the folder that all runs given are in.
    Raise ValueError where a folder holds no report.
    """
    runs = list(dict.fromkeys(run for folder in folders for run in runs_below(folder)))
    if output is None:
        parents = [os.path.abspath(folder if len(folders) == 1 else folder.parent) for folder in folders]
        output = Path(os.path.commonpath(parents))
    points = points_of(_named({run: read_report(run) for run in runs}))
    names = dict(zip(_names(runs), runs, strict=True))
    links = {name: os.path.relpath(run / PAGE, output) for name, run in names.items() if (run / PAGE).is_file()}
    output.mkdir(parents=True, exist_ok=True)
    title = f"{len(points)} runs compared" if len(points) > 1 else f"Run {points[0].name}"
    write_atomically(output / "compare.html", compare_page(points, links, title))
    text = json.dumps(as_values(points), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(output / "compare.json", f"{text}\n")
    write_atomically(output / "compare.csv", as_csv(points))
    return f"{as_text(points)}\ncomparison: {output / 'compare.html'}"


def runs_below(folder: Path) -> list[Path]:
    """Return a run folder itself, or the run folders with a report below a folder, by name."""
    if (folder / REPORT).is_file():
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"compare: {folder} is not a folder; name a run folder, such as runs/NAME")
    found = []
    for place, inner, files in os.walk(folder):
        if REPORT in files:
            found.append(Path(place))
            inner.clear()
    if not found:
        raise ValueError(
            f"compare: {folder} holds no {REPORT}, nor does a folder below it; finish the run with its report stage"
        )
    return sorted(found)


def read_report(run: Path) -> dict[str, Any]:
    """Return the report.json of a run.

    Raise ValueError where it cannot be read, lacks what is compared, or is not the one that the run.json beside it
    names.
    """
    path, again = run / REPORT, "run the command of this run again"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        COMPARED.validate_python(report)
        intact = is_as_delivered(run, REPORT)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"compare: {path}: {field}: {first['msg']}; {again}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"compare: {path} is damaged ({error}); {again}") from None
    if not intact:
        raise ValueError(f"compare: {path} was changed after its run; {again}")
    return report


def _named(reports: Mapping[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return dict(zip(_names(list(reports)), reports.values(), strict=True))


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the runs' paths below the folder that holds them all."""
    paths = [os.path.abspath(run) for run in runs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]
