"""The section of the page that says what was written for others, and how it is loaded."""

import json
import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from pipeline.report.comparison import change, count, size, whole
from pipeline.report.drawing import Drawing
from pipeline.report.facts import Report
from pipeline.report.layout import paragraph, section
from pipeline.report.tables import line, table

LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({folder}{code})
tokenizer = AutoTokenizer.from_pretrained({folder})"""
CODE = ", trust_remote_code=True"
SERVE = "vllm serve {folder} --trust-remote-code"


def export_section(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """Give the section on the export, where it says what it is."""
    if "export" not in report:
        return ""
    told = report["export"]
    form, name = told["form"], told["class"].partition(",")[0]
    words = {
        "stock": f"The student is an ordinary {name} (export.form=stock): transformers loads it as it is, without "
        "trust_remote_code.",
        "own": f"No class of transformers computes the student as it is, so it leaves as {name} (export.form=own): the "
        "folder carries the modelling file, and loads with nothing but transformers and trust_remote_code=True.",
        "padded": f"The student leaves as an ordinary {name} (export.form=padded): its layers are as wide as the "
        "widest, filled up with zeros that change nothing. transformers loads it without trust_remote_code.",
        "decilm": f"The student leaves as {name} (export.form=decilm), a width for each layer, for engines that have "
        "this class, as vLLM has; transformers has none. The folder’s configuration code needs trust_remote_code.",
    }[form]
    read = "a reader of its class’s rules" if form == "decilm" else "a fresh process without this project"
    same = f"differ by at most {told['difference']:.1e} of the largest" if told["difference"] else "are the same"
    proof = f" Read back in {read}, its logits and the student’s {same}. The weights take {size(told['bytes'])}."
    folded = " The static scales in the place of its post-norms were folded into its weights." if told["folded"] else ""
    load = SERVE if form == "decilm" else LOAD
    place = shlex.quote(told["folder"]) if form == "decilm" else json.dumps(told["folder"], ensure_ascii=False)
    shown = load.format(folder=place, code=CODE if form == "own" else "")
    parts = [paragraph(words + folded + proof), f"<pre>{escape(shown)}</pre>"]
    if told["padded"]:
        parts.append(_padding(told["padded"]))
    return section("What leaves, and how to load it", *parts)


def _padding(padded: Mapping[str, Any]) -> str:
    columns = ("as cut", "as exported", "zeros add")
    body = [
        line(label, (show(before), show(after), change(before, after)), columns)
        for label, show, (before, after) in (
            ("parameters", count, padded["parameters"]),
            ("cached values per token", whole, padded["kv_values_per_token"]),
        )
    ]
    told = f"Padded layers: {len(padded['layers'])}. The folder’s export.json lists them."
    return table(columns, body, told)
