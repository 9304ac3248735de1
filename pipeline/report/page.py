"""report.html: one self-contained page that tells what was cut, what it cost and how it was made."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pipeline.report.comparison import MINUS, count, percent, rate, size, unsteady, whole
from pipeline.report.drawing import COLOURS, Drawing, svg
from pipeline.report.exported import export_section
from pipeline.report.facts import Report, perplexity_of, start_of, times
from pipeline.report.figures import duration
from pipeline.report.layout import beside, panels, paragraph, section
from pipeline.report.local_distill import blocks_section
from pipeline.report.rounds import rounds_section
from pipeline.report.tables import comparison_table, plain_table, quality_table, search_table, task_table

TEMPLATE = Path(__file__).with_name("page.html")
TEXT_WIDTH = 736  # pixels of the page's column
CORRECTION = ("correction",)
SETTLING = ("settling", "settling_change", "settling_entropy")
RECOVERY = ("loss", "kl", "rate")


def page(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """Give the page of a report with its figures; a figure or a number that is absent has no place on it."""
    parts = (_comparison, _quality, _samples, _search, _cut, _importance, _correction, _settling, rounds_section)
    parts += (blocks_section, _recovery, export_section, _costs, _making)
    student = count(report["parameters"]["student"])
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{report['model']}, pruned to {student} parameters"),
        kicker=escape(f"Pruning report · {report['recipe']} · run {report['run']} · {report['created'][:10]}"),
        heading=escape(f"{report['model']}, from {count(report['parameters']['teacher'])} to {student} parameters"),
        lede=escape(_lede(report)),
        headline=_headline(report),
        sections="\n".join(part(report, drawings) for part in parts),
        footer=escape(f"Written {report['created']} by Pangu Light, revision {report['versions']['revision']}."),
        colours="\n".join(map(_rule, COLOURS)),
    )


def _rule(role: str) -> str:
    return f".f-{role} {{ fill: var(--{role}) }} .s-{role} {{ stroke: var(--{role}) }}"


def _lede(report: Report) -> str:
    smaller, inner = (_change(report, key) for key in ("parameters", "non_embedding_parameters"))
    amount = f"{abs(smaller):.0%} {'fewer' if smaller < 0 else 'more'}" if smaller else "as many"
    told = [f"The student has {amount} parameters {'than' if smaller else 'as'} its teacher"]
    told[0] += f" ({percent(inner)} outside the embeddings)." if inner else "."
    name, values = next(iter(perplexity_of(report).items()))
    cut = f", and {start_of(report)} it was {times(values['start'])}" if "start" in values else ""
    told.append(
        f"Its perplexity on held-out text ({name}) is {times(values['student'])}; "
        f"the teacher’s is {times(values['teacher'])}{cut}."
    )
    if report["speed"]:
        decode, prefill = (_ratio(report, kind) for kind in ("decode", "prefill"))
        told.append(f"It decodes {decode:.2f} times as fast and reads a prompt {prefill:.2f} times as fast.")
    return " ".join(told)


def _change(report: Report, key: str) -> float:
    return report[key]["student"] / report[key]["teacher"] - 1


def _ratio(report: Report, kind: str) -> float:
    return report["speed"]["student"][kind] / report["speed"]["teacher"][kind]


def _headline(report: Report) -> str:
    def signed(key: str) -> str:
        return f"{_change(report, key):+.0%}".replace("-", MINUS) if _change(report, key) else "same"

    def pair(values: Mapping, show) -> str:
        return f"{show(values['teacher'])} → {show(values['student'])}"

    name, values = next(iter(perplexity_of(report).items()))
    before = f", {times(values['start'], '.1f')} {start_of(report)}" if "start" in values else ""
    entries = [
        ("Parameters", signed("parameters"), pair(report["parameters"], count)),
        (f"Perplexity, {name}", times(values["student"], ".1f"), f"teacher {times(values['teacher'], '.1f')}{before}"),
    ]
    if report["speed"]:
        decode = {who: report["speed"][who]["decode"] for who in ("teacher", "student")}
        entries.append(("Decoding", f"×{_ratio(report, 'decode'):.2f}", f"{pair(decode, rate)} tokens/s"))
    cache = report["kv_bytes_per_token"]
    entries.append(("KV cache", signed("kv_bytes_per_token"), f"{pair(cache, size)} a token"))
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><dd>{escape(c)}</dd></div>" for a, b, c in entries)
    return f'<dl class="headline">{"".join(cells)}</dl>'


def _comparison(report: Report, drawings: Mapping[str, Drawing]) -> str:
    notes = ["Head and neuron counts are those of a layer; sizes are in decimal units."]
    if report["speed"]:
        s = report["speed"]
        turns = "once each" if s["repeats"] == 1 else f"{s['repeats']} times each, medians"
        notes.append(
            f"Speed: batch {s['batch']}, a prompt of {s['prefill']} tokens, {s['decode']} decoded; teacher and student "
            f"in turn, {turns}, on {_machine(report)}."
        )
        rough = unsteady(report)
        notes += [f"{rough[0].upper()}{rough[1:]}."] if rough else []
    return section("The student beside its teacher", comparison_table(report, " ".join(notes)))


def _machine(report: Report) -> str:
    device = report["device"]
    number = device.get("threads")
    threads = f", {number} {'thread' if number == 1 else 'threads'}" if number else ""
    ranks = f", {device['ranks']} processes" if device["ranks"] > 1 else ""
    return f"{device['name']} ({device['kind']}, {device['dtype']}{threads}{ranks})"


def _quality(report: Report, drawings: Mapping[str, Drawing]) -> str:
    told = f"{_won_back(report)} Each row is one held-out text; the axis is logarithmic.".strip()
    caption = (
        "Packed sequences that do not overlap. Every token but the first of a sequence is predicted from those before "
        "it in that sequence; perplexity is exp of the mean loss, and ± the standard error over sequences. A last word "
        "is right when the greedy continuation gives the whole of it."
    )
    tasks = ""
    if report["tasks"].get("teacher"):
        harness = "Measured by the LM Evaluation Harness; metrics as it names them, ± standard error."
        tasks = f"<h3>Benchmark tasks</h3>{task_table(report, harness)}"
    figure = beside(drawings["perplexity"], told)
    return section("What it costs in quality", figure, quality_table(report, caption), tasks)


def _won_back(report: Report) -> str:
    """Say which share of the loss added by the cut the recovery took away again, where it did.

    Not where the teacher was corrected: a part of what the cut added is then missing between start and given teacher.
    Not in rounds either: between start and teacher lies what all cuts added, less what all recoveries but one took.
    """
    if "correction" in report or "rounds" in report:
        return ""
    shares = [
        f"{math.log(values['start'] / values['student']) / math.log(values['start'] / values['teacher']):.0%} on {name}"
        for name, values in perplexity_of(report).items()
        if math.inf > values.get("start", 0.0) > max(values["student"], values["teacher"])
    ]
    return f"Of the loss that the cut added, recovery took back {', '.join(shares)}." if shares else ""


def _samples(report: Report, drawings: Mapping[str, Drawing]) -> str:
    if not report["samples"]:
        return ""
    columns = (("teacher", "Teacher", ""), ("student", "Student", "student"), ("reference", "The text itself", ""))
    articles = []
    for sample in report["samples"]:
        told = "".join(
            f'<section><h4 class="{kind}">{label}</h4><p>{escape(sample[key].strip())}</p></section>'
            for key, label, kind in columns
        )
        prompt = escape(sample["prompt"].strip())
        articles.append(f'<article class="sample"><blockquote>{prompt} …</blockquote><div>{told}</div></article>')
    intro = paragraph("Greedy continuations of held-out text, not selected.")
    return section("In their own words", intro, f'<div class="samples wide">{"".join(articles)}</div>')


def _search(report: Report, drawings: Mapping[str, Drawing]) -> str:
    if "search" not in report:
        return ""
    search = report["search"]
    told = (
        f"Shapes within the budget were sifted by their predicted speed on {search['chip']}; these were really cut "
        f"and measured, before any recovery. Picked: {search['rule']}."
    )
    serving = search["serving"]
    caption = (
        f"All but the loss is predicted, for {serving['batch_size']} sequences at a time, prompts of "
        f"{serving['prompt']} tokens, contexts of {serving['context']}, {serving['precision']}. "
        "Parameters kept are those outside the "
        "embeddings. The loss is in nats a token, on calibration text that was not scored."
    )
    return section("How the shape was found", beside(drawings["shapes"], told), search_table(search, caption))


def _cut(report: Report, drawings: Mapping[str, Drawing]) -> str:
    cut = report["cut"]
    told = []
    if cut["dropped_layers"]:
        dropped = ", ".join(map(str, cut["dropped_layers"]))
        told.append(f"{len(cut['dropped_layers'])} of {cut['layers']} layers were dropped ({dropped}).")
    if cut["donations"]:
        given = sum(donation["groups"] for donation in cut["donations"])
        told.append(
            f"Part of their attention lives on: {given} of their KV groups scored higher than groups of the layer that "
            "hosts them and took their places, with keys, values, queries and outputs (CLAP)."
        )
    if cut["heads_kept"] < cut["heads"]:
        told.append(f"{whole(cut['heads_kept'])} of {whole(cut['heads'])} attention heads stay.")
    if cut["neurons_kept"] < cut["neurons"]:
        told.append(
            f"{whole(cut['neurons_kept'])} of {whole(cut['neurons'])} neurons stay; in the layers that remain they "
            f"carry {cut['neuron_score_kept']:.0%} of the score."
        )
    caption = (
        "One row a layer of the teacher, input at the top. The denser a bin of neurons, the more of them stay; “score "
        "kept” is their share of the layer’s score. Point at a part for its numbers."
    )
    drawing = drawings["map"]
    wide = ' class="wide"' if drawing.width > TEXT_WIDTH else ""
    figure = f'<div class="scroll map">{svg(drawing)}</div><figcaption>{caption}</figcaption>'
    text = paragraph(" ".join(told) or "Every layer, head and neuron stays.")
    return section("What was removed, and where", text, f"<figure{wide}>{figure}</figure>")


def _importance(report: Report, drawings: Mapping[str, Drawing]) -> str:
    cut = report["cut"]
    told = (
        f"Importance was measured in one forward pass over {whole(cut['calibration_tokens'])} calibration tokens. A "
        "layer’s influence is one minus the mean cosine between what enters and what leaves it. A hidden channel’s "
        "importance is its activation behind the norms, summed over them."
    )
    if cut["channels_kept"] < cut["channels"]:
        share = f"{cut['channel_score_kept']:.0%} of the score"
        told += f" {cut['channels_kept']} of {cut['channels']} channels stay, with {share}."
    if "rounds" in report:
        told += " It was measured anew in every round; shown is the first."
    figure = panels([drawings["layers"], drawings["channels"]], "Both scales of importance are logarithmic.")
    return section("What mattered", paragraph(told), figure)


def _training(title: str, told: str, names: Sequence[str], drawings: Mapping[str, Drawing]) -> str:
    """Give the section of a training, with those of its curves that are there; nothing where none is."""
    shown = [drawings[name] for name in names if name in drawings]
    return section(title, paragraph(told), panels(shown)) if shown else ""


def _correction(report: Report, drawings: Mapping[str, Drawing]) -> str:
    told = (
        "Before it taught, the teacher learnt the next tokens of the text that the student recovers from (teacher "
        "correction). The stages after that read the corrected teacher; quality, sizes and speed are compared with the "
        "one that was given."
    )
    return _training("Correcting the teacher", told, CORRECTION, drawings)


def _settling(report: Report, drawings: Mapping[str, Drawing]) -> str:
    told = (
        "Before they were deleted, the layers that go were emptied: the whole model was trained on text so that they "
        "write little, and the others took over what they did. The loss is the next-token loss and, weighted, what "
        "these layers add to the stream: the sum over them of its norm, a mean over tokens (TRSP)."
    )
    return _training("Emptying the layers that go", told, SETTLING, drawings)


def _recovery(report: Report, drawings: Mapping[str, Drawing]) -> str:
    told = "After the cut the student was trained on the predictions of its teacher."
    if "rounds" in report:
        taught = "corrected" if "correction" in report else "original"
        told = f"After every cut the student was trained on the predictions of the {taught} teacher; dashed, the cuts."
    told += _selected((report["recovery"] or {}).get("selection"))
    return _training("Recovery", told, RECOVERY, drawings)


def _selected(selection: Mapping[str, Any] | None) -> str:
    """Say which state is exported, where it is not the last, and whether recovery lowered the held-out KL."""
    if not selection:
        return ""
    values = f"{selection['first']:.4f} before recovery, {selection['last']:.4f} after it"
    sentence = f" Warning: recovery did not lower the held-out KL ({values})." if selection["rose"] else ""
    if selection["exported_step"] != selection["last_step"]:
        sentence += (
            f" Exported is the state of step {selection['exported_step']} with the lowest held-out KL,"
            f" {selection['exported']:.4f}."
        )
    return sentence


def _costs(report: Report, drawings: Mapping[str, Drawing]) -> str:
    if "stages" not in drawings:
        return ""
    total = duration(sum(stage["seconds"] for stage in report["stages"].values()))
    devices = sorted({name for stage in report["stages"].values() for name in stage["devices"]})
    place = _machine(report) if len(devices) < 2 else " and ".join(devices)
    memory = "resident memory" if report["device"]["kind"] == "cpu" else "device memory"
    if len(devices) > 1:
        memory = "device memory, on a CPU the resident memory,"
    told = f"All stages together took {total} on {place}. Peak memory is the {memory} of the first process."
    return section("Time and memory", beside(drawings["stages"], told))


def _making(report: Report, drawings: Mapping[str, Drawing]) -> str:
    folded = (
        ("Every setting", report["settings"]),
        ("Code and libraries", report["versions"]),
        ("Artifacts this report was made from", report["artifacts"]),
    )
    details = "".join(f"<details><summary>{title}</summary>{plain_table(values)}</details>" for title, values in folded)
    return section("How it was made", f"<pre>{escape(report['command'])}</pre>", details)
