"""report.html: one self-contained page that shows what was removed, what it cost and how it was made."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pipeline.report.answers import MEANING
from pipeline.report.budget import budget_of
from pipeline.report.comparison import MINUS, count, percent, rate, size, unsteady
from pipeline.report.drawing import COLOURS, Drawing
from pipeline.report.exported import export_section
from pipeline.report.facts import Report, perplexity_of, start_of, times
from pipeline.report.figures import duration
from pipeline.report.layout import beside, panels, paragraph, section
from pipeline.report.local_distill import blocks_section
from pipeline.report.removed import importance_section, removed_section
from pipeline.report.rounds import rounds_section
from pipeline.report.tables import comparison_table, plain_table, quality_table, search_table, task_table

TEMPLATE = Path(__file__).with_name("page.html")
CORRECTION = ("correction",)
REGULARIZATION = ("settling", "settling_change", "settling_entropy")
RECOVERY = ("loss", "kl", "rate")
ON_POLICY = ("onpolicy", "onpolicy_kl")


def page(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """Return the HTML page of a report with its figures; what was not measured has no section."""
    parts = [_comparison, _quality, _samples, _search, removed_section, importance_section, _correction]
    parts += [_regularization, rounds_section, blocks_section, _recovery, _on_policy, export_section, _costs, _making]
    student = count(report["parameters"]["student"])
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{report['model']}, pruned to {student} parameters"),
        kicker=escape(f"Pruning report · {report['recipe']} · run {report['run']} · {report['created'][:10]}"),
        heading=escape(f"{report['model']}, from {count(report['parameters']['teacher'])} to {student} parameters"),
        lede=escape(_lede(report)),
        headline=_headline(report),
        sections="\n".join(part(report, drawings) for part in parts),
        footer=escape(f"Written {report['created']} by Pangu Light, revision {report['versions']['revision']}."),
        colours=colour_rules(),
    )


def colour_rules() -> str:
    """Return the style rules that paint the marks of drawings."""
    return "\n".join(map(_rule, COLOURS))


def _rule(role: str) -> str:
    return f".f-{role} {{ fill: var(--{role}) }} .s-{role} {{ stroke: var(--{role}) }}"


def _lede(report: Report) -> str:
    smaller, inner = (_change(report, key) for key in ("parameters", "non_embedding_parameters"))
    amount = f"{abs(smaller):.0%} {'fewer' if smaller < 0 else 'more'}" if smaller else "as many"
    sentences = [f"The student has {amount} parameters {'than' if smaller else 'as'} its teacher"]
    sentences[0] += f" ({percent(inner)} outside the embeddings)." if inner else "."
    name, values = next(iter(perplexity_of(report).items()))
    cut = f"; {start_of(report)} it was {times(values['start'])}" if "start" in values else ""
    sentences.append(
        f"Its perplexity on held-out text ({name}) is {times(values['student'])}, "
        f"that of the teacher {times(values['teacher'])}{cut}."
    )
    if report["speed"]:
        decode, prefill = (_ratio(report, kind) for kind in ("decode", "prefill"))
        sentences.append(f"Decoding runs at {decode:.2f} times the teacher’s speed, prefill at {prefill:.2f} times.")
    return " ".join(sentences)


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
        *filter(None, [budget_of(report)]),
        ("Parameters", signed("parameters"), _sizes(report)),
        (f"Perplexity, {name}", times(values["student"], ".1f"), f"teacher {times(values['teacher'], '.1f')}{before}"),
    ]
    entries += _answers(report)
    if report["speed"]:
        decode = {who: report["speed"][who]["decode"] for who in ("teacher", "student")}
        entries.append(("Decoding", f"×{_ratio(report, 'decode'):.2f}", f"{pair(decode, rate)} tokens/s"))
    cache = report["kv_bytes_per_token"]
    entries.append(("KV cache", signed("kv_bytes_per_token"), f"{pair(cache, size)} per token"))
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><dd>{escape(c)}</dd></div>" for a, b, c in entries)
    return f'<dl class="headline">{"".join(cells)}</dl>'


def _answers(report: Report) -> list[tuple[str, str, str]]:
    """Return the headline of the assistant's answers in the first text that has any."""
    found = ((name, text["assistant"]) for name, text in report["perplexity"].items() if "assistant" in text)
    name, answers = next(found, ("", None))
    if answers is None:
        return []
    before = f", KL {answers['start']['kl']:.2f} before recovery" if "start" in answers else ""
    shown = f"{answers['agreement']:.0%} equal first choices{before}"
    return [(f"KL of answers, {name}", f"{answers['kl']:.2f}", shown)]


def _sizes(report: Report) -> str:
    """Return both sizes and the student's as a share of the teacher's."""
    values = report["parameters"]
    share = values["student"] / values["teacher"]
    return f"{count(values['teacher'])} → {count(values['student'])}, {share:.1%} of the teacher"


def _comparison(report: Report, drawings: Mapping[str, Drawing]) -> str:
    notes = ["Head and neuron counts are per layer; sizes are in decimal units."]
    if report["speed"]:
        s = report["speed"]
        turns = "one run each" if s["repeats"] == 1 else f"{s['repeats']} runs each, medians"
        notes.append(
            f"Speed: batch size {s['batch']}, prompt of {s['prefill']} tokens, {s['decode']} generated tokens; teacher "
            f"and student in turn, {turns}, on {_machine(report)}."
        )
        rough = unsteady(report)
        notes += [f"{rough[0].upper()}{rough[1:]}."] if rough else []
    notes += [MEANING] if _answers(report) else []
    return section("Student and teacher", comparison_table(report, " ".join(notes)))


def _machine(report: Report) -> str:
    device = report["device"]
    number = device.get("threads")
    threads = f", {number} {'thread' if number == 1 else 'threads'}" if number else ""
    ranks = f", {device['ranks']} processes" if device["ranks"] > 1 else ""
    return f"{device['name']} ({device['kind']}, {device['dtype']}{threads}{ranks})"


def _quality(report: Report, drawings: Mapping[str, Drawing]) -> str:
    text = f"{_recovered_share(report)} One row per held-out text; logarithmic axis.".strip()
    caption = (
        "Packed sequences without overlap. Every token except the first of a sequence is predicted from the tokens "
        "before it; perplexity is exp of the mean loss, ± the standard error over sequences. A last word is correct "
        "if the greedy continuation reproduces all of it."
    )
    tasks = ""
    if report["tasks"].get("teacher"):
        harness = "Measured by the LM Evaluation Harness; metrics as it names them, ± standard error."
        tasks = f"<h3>Benchmark tasks</h3>{task_table(report, harness)}"
    figure = beside(drawings["perplexity"], text)
    return section("Quality", figure, quality_table(report, caption), tasks)


def _recovered_share(report: Report) -> str:
    """Return a sentence with the share of the loss increase of pruning that recovery removed, empty where unknown.

    It is unknown with a corrected teacher, which differs from the reference, and in rounds, where only the last of
    several cuts has a state before it.
    """
    if "correction" in report or "rounds" in report:
        return ""
    shares = [
        f"{math.log(values['start'] / values['student']) / math.log(values['start'] / values['teacher']):.0%} on {name}"
        for name, values in perplexity_of(report).items()
        if math.inf > values.get("start", 0.0) > max(values["student"], values["teacher"])
    ]
    return f"Recovery removed this share of the loss increase of pruning: {', '.join(shares)}." if shares else ""


def _samples(report: Report, drawings: Mapping[str, Drawing]) -> str:
    if not report["samples"]:
        return ""
    columns = (("teacher", "Teacher", ""), ("student", "Student", "student"), ("reference", "Original text", ""))
    articles = []
    for sample in report["samples"]:
        columns_html = "".join(
            f'<section><h4 class="{kind}">{label}</h4><p>{escape(sample[key].strip())}</p></section>'
            for key, label, kind in columns
        )
        prompt = escape(sample["prompt"].strip())
        quote = f"<blockquote>{prompt} …</blockquote>"
        articles.append(f'<article class="sample">{quote}<div>{columns_html}</div></article>')
    intro = paragraph("Greedy continuations of held-out text, of chats the answer to a turn; samples are not selected.")
    return section("Samples", intro, f'<div class="samples wide">{"".join(articles)}</div>')


def _search(report: Report, drawings: Mapping[str, Drawing]) -> str:
    if "search" not in report:
        return ""
    search = report["search"]
    text = (
        f"Shapes within the budget were ranked by their predicted speed on {search['chip']}; these were cut and "
        f"measured before recovery. Selected: {search['rule']}."
    )
    serving = search["serving"]
    caption = (
        f"All values except the loss are predicted for a batch size of {serving['batch_size']}, prompts of "
        f"{serving['prompt']} tokens, contexts of {serving['context']}, {serving['precision']}. Parameters kept "
        "exclude embeddings. Loss: nats per token on calibration text that was not used for scoring."
    )
    return section("Shape search", beside(drawings["shapes"], text), search_table(search, caption))


def _training(title: str, text: str, names: Sequence[str], drawings: Mapping[str, Drawing]) -> str:
    """Return the section of a training with its curves, or nothing where there are none."""
    shown = [drawings[name] for name in names if name in drawings]
    return section(title, paragraph(text), panels(shown)) if shown else ""


def _correction(report: Report, drawings: Mapping[str, Drawing]) -> str:
    text = (
        "The teacher was first trained on next-token prediction on recovery text (teacher correction). Later stages "
        "use the corrected teacher; quality, sizes and speed are compared with the original model."
    )
    return _training("Teacher correction", text, CORRECTION, drawings)


def _regularization(report: Report, drawings: Mapping[str, Drawing]) -> str:
    text = (
        "Before their removal the selected layers were regularised: the whole model was trained so that they "
        "contribute little. The loss is the next-token loss plus, weighted, the norm of what these layers add to "
        "the residual stream, summed over layers and averaged over tokens (TRSP)."
    )
    return _training("Regularisation of removed layers", text, REGULARIZATION, drawings)


def _recovery(report: Report, drawings: Mapping[str, Drawing]) -> str:
    text = "After pruning, the student was trained on the predictions of the teacher (distillation)."
    if "rounds" in report:
        kind = "corrected" if "correction" in report else "original"
        text = (
            f"After each round of pruning the student was trained on the predictions of the {kind} teacher; "
            "dashed lines mark the rounds."
        )
    text += _selected((report["recovery"] or {}).get("selection"), "recovery")
    return _training("Recovery", text, RECOVERY, drawings)


def _on_policy(report: Report, drawings: Mapping[str, Drawing]) -> str:
    text = (
        "After recovery the student wrote answers to prompts of the recovery text and was trained on the divergence of "
        "its predictions from the teacher’s on them; tokens of answers are counted."
    )
    text += _selected(report.get("onpolicy", {}).get("selection"), "on-policy distillation")
    return _training("On-policy distillation", text, ON_POLICY, drawings)


def _selected(selection: Mapping[str, Any] | None, training: str) -> str:
    """Return which state is exported, if not the last, and a warning if a training did not lower the held-out KL."""
    if not selection:
        return ""
    values = f"{selection['first']:.4f} before {training}, {selection['last']:.4f} after it"
    sentence = f" Warning: {training} did not lower the held-out KL ({values})." if selection["rose"] else ""
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
    text = f"All stages took {total} on {place}. Peak memory is the {memory} of the first process."
    return section("Time and memory", beside(drawings["stages"], text))


def _making(report: Report, drawings: Mapping[str, Drawing]) -> str:
    folded = (
        ("Settings", report["settings"]),
        ("Code and libraries", report["versions"]),
        ("Artifacts", report["artifacts"]),
    )
    details = "".join(f"<details><summary>{title}</summary>{plain_table(values)}</details>" for title, values in folded)
    return section("Reproduction", f"<pre>{escape(report['command'])}</pre>", details)
