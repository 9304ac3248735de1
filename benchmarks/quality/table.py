"""Write the side-by-side table and its plots from what the runs left behind; nothing is run.

    python benchmarks/quality/table.py [--runs runs] [--saved benchmarks/results/quality.json] [--docs FILE]

The figures of all runs found are added to the saved ones; from these the part of the document between its markers is
written again, and the plots beside it. Without runs it writes the same table from the saved figures alone.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import described, existing
from drawing import draw, draw_bars
from results import Figures, collect, over_dense, perplexity
from rows import GROUPS, ROWS, UNCUT

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- quality: begin, written by benchmarks/quality/table.py -->", "<!-- quality: end -->"
LINES, BARS = "quality-recipes.png", "quality-ablations.png"
NONE, GONE = "·", "∞"


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--saved", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    parser.add_argument("--docs", type=document, default=ROOT / "benchmarks" / "results" / "quality.md")
    options = parser.parse_args()
    found = [each for each in collect(options.runs, options.saved) if each["row"] in ROWS]
    if not found:
        raise SystemExit(f"error: --runs: {options.runs / 'quality'} has no finished row; run.py makes them")
    options.saved.parent.mkdir(parents=True, exist_ok=True)
    options.saved.write_text(json.dumps(found, indent=1) + "\n")
    pictures = []
    groups = {name: [each for each in found if ROWS[each["row"]].group == name] for name in GROUPS}
    ablations = groups.pop("ablations")
    others = [each for group in groups.values() for each in group]
    if len({each["removed"] for each in others}) > 1:  # one share is no line
        draw(others, options.docs.with_name(LINES))
        pictures.append(f"![recipes: perplexity over the dense model's, by share removed]({LINES})")
    if ablations:
        draw_bars([*groups["recipes"], *ablations], options.docs.with_name(BARS))
        pictures.append(f"![one thing changed: perplexity over the dense model's, by row]({BARS})")
    options.docs.write_text(between(options.docs.read_text(), "\n\n".join([*pictures, *tables(found)])))
    print(f"{options.docs}: {len(found)} rows, {len(pictures)} plots; {options.saved}")


def document(text: str) -> Path:
    """Return the path of a document that has a part for the table."""
    path = existing(text)
    try:
        between(path.read_text(), "")
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"{text}: {fault}") from fault
    return path


def between(written: str, text: str) -> str:
    """Return a document with the part between its markers replaced; ValueError if it has none."""
    before, begin, rest = written.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no part between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def tables(found: Sequence[Figures]) -> list[str]:
    """Return the parts of the document: for each share removed a heading and a table."""
    parts = []
    for removed in sorted({each["removed"] for each in found}):
        parts.append(f"### {removed:g} % removed")
        parts.append(table([each for each in found if each["removed"] == removed]))
    return parts


def table(found: Sequence[Figures]) -> str:
    """Return one table: the dense model, then the rows by group; in every column of perplexities the least is bold."""
    texts = list(dict.fromkeys(text for each in found for text in each["texts"]))
    head = ["", "parameters", "without embeddings", "KV bytes a token", "prefill tokens/s", "decode tokens/s"]
    for text in texts:
        head += [f"{text}: before", "after", "next word"]
    head += ["seconds to cut", "training tokens", "computed on"]
    by_row = {name: [each for each in found if each["row"] == name] for name in ROWS}
    lines = {name: _line(each, texts) for name, each in by_row.items() if each}
    for place in [6 + 3 * number + state for number in range(len(texts)) for state in (0, 1)]:
        _embolden([line for name, line in lines.items() if ROWS[name].peer != UNCUT], place)
    written = [_written(head), "|---" + "|---:" * (len(head) - 1) + "|", _written(_dense(found, texts))]
    for group, title in GROUPS.items():
        of_group = [name for name in lines if ROWS[name].group == group]
        if of_group:
            written.append(_written([f"*{title}*", *[""] * (len(head) - 1)]))
        written += [_written([ROWS[name].label, *lines[name][1:]]) for name in of_group]
    return "\n".join(written)


def _written(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _dense(found: Sequence[Figures], texts: Sequence[str]) -> list[str]:
    cells = ["Dense", *_sizes(found, "teacher")]
    for text in texts:
        dense = [each["texts"][text]["dense"] for each in found if text in each["texts"]]
        cells += [_number([perplexity(dense[0])], ".2f"), "", _share([dense[0]["next_word"]])]
    return [*cells, "", "", ""]


def _line(seeds: Sequence[Figures], texts: Sequence[str]) -> list[str]:
    """Return the cells of one row: means over its seeds, ± half of their range."""
    cells = ["", *_sizes(seeds, "student")]
    for text in texts:
        states = [each["texts"].get(text, {}) for each in seeds]
        words = {}
        for when in ("before", "after"):
            there = [each for each in states if when in each]
            own = _number([perplexity(each[when]) for each in there], ".2f")
            ratio = _number([over_dense(each, when) for each in there], ".2f")
            cells.append(f"{own} ({ratio}×)" if there else NONE)
            words[when] = _share([each[when]["next_word"] for each in there])
        cells.append(f"{words['before']} → {words['after']}")
    learnt = sorted({each["recovery_tokens"] for each in seeds if "recovery_tokens" in each})
    seconds = _number([each["cut_seconds"] for each in seeds], ".0f")
    places = sorted({each["device"].get("name", each["device"]["kind"]) for each in seeds})
    return [*cells, seconds, " to ".join(f"{tokens / 1000:g}k" for tokens in learnt) or NONE, ", ".join(places)]


def _sizes(seeds: Sequence[Figures], who: str) -> list[str]:
    models = [each["models"][who] for each in seeds]
    inner = [each["non_embedding_parameters"] for each in models]
    whole = [each["models"]["teacher"]["non_embedding_parameters"] for each in seeds]
    left_out = sum(1.0 - here / there for here, there in zip(inner, whole)) / len(seeds)
    return [
        f"{_number([each['parameters'] / 1e6 for each in models], '.1f')} M",
        f"{_number([each / 1e6 for each in inner], '.1f')} M" + (f" (−{left_out:.1%})" if who == "student" else ""),
        _number([each["kv_bytes_per_token"] for each in models], ".0f"),
        *(_speed(seeds, who, way) for way in ("prefill", "decode")),
    ]


def _speed(seeds: Sequence[Figures], who: str, way: str) -> str:
    """Return tokens a second and, of a student, over those of the dense model that it took turns with."""
    timed = [{name: facts["speed"] for name, facts in each["models"].items()} for each in seeds]
    timed = [each for each in timed if all(each.values())]
    if not timed:
        return NONE
    ratio = _number([each["student"][way] / each["teacher"][way] for each in timed], ".2f")
    return _number([each[who][way] for each in timed], ".0f") + (f" ({ratio}×)" if who == "student" else "")


def _share(values: Sequence[float | None]) -> str:
    known = [100.0 * value for value in values if value is not None]
    return f"{_number(known, '.1f')} %" if known else NONE


def _number(values: Sequence[float], form: str) -> str:
    if not values:
        return NONE
    if not all(map(math.isfinite, values)):
        return GONE
    form = ".1e" if max(values) >= 1e5 and form == ".2f" else form  # a model that is gone
    spread = format((max(values) - min(values)) / 2.0, form)
    return format(sum(values) / len(values), form) + (f" ± {spread}" if float(spread) else "")


def _embolden(lines: Sequence[list[str]], place: int) -> None:
    """Set the least value of a column of perplexities in bold."""
    known = [cells for cells in lines if cells[place] != NONE]
    if len(known) > 1:
        least = min(known, key=lambda cells: float(cells[place].split()[0].replace(GONE, "inf")))
        least[place] = f"**{least[place]}**"


if __name__ == "__main__":
    main()
