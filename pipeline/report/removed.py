"""Sections of the page on what was removed, and on the importance that decided it."""

from collections.abc import Mapping

from pipeline.report.comparison import whole
from pipeline.report.drawing import Drawing, svg
from pipeline.report.facts import Report
from pipeline.report.layout import panels, paragraph, section

TEXT_WIDTH = 736  # pixels of the page's column


def removed_section(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """Return the section of the map, with what remains of every axis in words."""
    cut = report["cut"]
    sentences = []
    if cut["dropped_layers"]:
        dropped = ", ".join(map(str, cut["dropped_layers"]))
        sentences.append(f"{len(cut['dropped_layers'])} of {cut['layers']} layers were removed ({dropped}).")
    for part, layers in (("attention", cut["removed_attention"]), ("FFN", cut["removed_ffn"])):
        if layers:
            sentences.append(f"Layers that lost their {part} alone: {', '.join(map(str, layers))}.")
    if cut["donations"]:
        given = sum(donation["groups"] for donation in cut["donations"])
        sentences.append(
            f"{given} of their KV groups scored higher than groups of the layer below and replaced them, with keys, "
            "values, queries and outputs (CLAP)."
        )
    if cut["heads_kept"] < cut["heads"]:
        sentences.append(f"{whole(cut['heads_kept'])} of {whole(cut['heads'])} attention heads remain.")
    if cut["neurons_kept"] < cut["neurons"]:
        sentences.append(
            f"{whole(cut['neurons_kept'])} of {whole(cut['neurons'])} neurons remain; they hold "
            f"{cut['neuron_score_kept']:.0%} of the score in the remaining layers."
        )
    if cut.get("experts_kept", 0) < cut.get("experts", 0):
        sentences.append(
            f"{whole(cut['experts_kept'])} of {whole(cut['experts'])} experts remain; the router sent them "
            f"{cut['expert_tokens_kept']:.0%} of the calibration tokens of the remaining layers."
        )
    caption = (
        "One row per layer of the teacher, input at the top. Darker bins of neurons keep more of them; “score kept” is "
        "their share of the layer’s score. Hover over a part for its values."
    )
    text = paragraph(" ".join(sentences) or "All layers, heads and neurons remain.")
    experts = ""
    if "experts" in drawings:
        figure = f'<div class="scroll map">{svg(drawings["experts"])}</div><figcaption>{EXPERTS}</figcaption>'
        experts = f"<figure>{figure}</figure>"
    if _layers_alike(report):
        return section("Removed parts", text, experts)
    drawing = drawings["map"]
    wide = ' class="wide"' if drawing.width > TEXT_WIDTH else ""
    figure = f'<div class="scroll map">{svg(drawing)}</div><figcaption>{caption}</figcaption>'
    return section("Removed parts", text, f"<figure{wide}>{figure}</figure>", experts)


EXPERTS = (
    "One row per layer of the teacher that has experts. Darker experts were sent more calibration tokens; “tokens "
    "kept” is the share of the experts that remain. Hover over an expert for its values."
)


def _layers_alike(report: Report) -> bool:
    """Return whether no layer was removed and all layers of the student have the same widths."""
    shape = report["shape"]["student"]
    widths_differ = any(isinstance(shape[axis], list) for axis in ("heads", "groups", "neurons"))
    return not report["cut"]["dropped_layers"] and not widths_differ


def importance_section(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """Return the section of the importance of layers and hidden channels."""
    cut = report["cut"]
    text = (
        f"Importance was measured in one forward pass over {whole(cut['calibration_tokens'])} calibration tokens. A "
        "layer’s influence is one minus the mean cosine similarity of its input and output. A hidden channel’s "
        "importance is the sum of its absolute activations after the norms."
    )
    if cut["channels_kept"] < cut["channels"]:
        share = f"{cut['channel_score_kept']:.0%} of the score"
        text += f" {cut['channels_kept']} of {cut['channels']} channels remain, with {share}."
    if "rounds" in report:
        text += " Each round measures it again; the first round is shown."
    figure = panels([drawings["layers"], drawings["channels"]], "Both importance axes are logarithmic.")
    return section("Importance", paragraph(text), figure)
