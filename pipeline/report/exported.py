"""The section of the page on the exported checkpoint and how to load it."""

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
LLAMA = "llama-cli -m {path}"
SERVE = "vllm serve {folder} --trust-remote-code"


def export_section(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """Return the section on the export, empty where there is none."""
    if "export" not in report:
        return ""
    export = report["export"]
    form, name = export["form"], export["class"].partition(",")[0]
    words = {
        "stock": f"The student is a stock {name} (export.form=stock): transformers loads it without trust_remote_code.",
        "own": f"No stock class represents layers of different widths, so the student is exported as {name} "
        "(export.form=own): the folder contains the modelling file, which transformers loads with "
        "trust_remote_code=True.",
        "padded": f"The student is exported as a stock {name} (export.form=padded): all layers are padded with zeros "
        "to the widest, which changes no output. transformers loads it without trust_remote_code.",
        "decilm": f"The student is exported as {name} (export.form=decilm), with a width per layer, for engines that "
        "support this class, such as vLLM. The folder’s configuration code needs trust_remote_code.",
    }[form]
    read = "an independent reader of its class" if form == "decilm" else "a new process without this project"
    same = f"differ by at most {export['difference']:.1e} of the largest" if export["difference"] else "are equal"
    proof = (
        f" Reloaded in {read}, its logits and those of the student {same}. The weights take {size(export['bytes'])}."
    )
    folded = " The static scales that replaced its post-norms were folded into the weights." if export["folded"] else ""
    parts = [paragraph(words + folded + proof), f"<pre>{escape(loading(form, export['folder']))}</pre>"]
    if export["padded"]:
        parts.append(_padding(export["padded"]))
    if "gguf" in report:
        parts += _gguf(report["gguf"], export["folder"])
    return section("Export", *parts)


def loading(form: str, folder: str) -> str:
    """Return the code, or for `decilm` the command, that loads a folder of this form."""
    if form == "decilm":
        return SERVE.format(folder=shlex.quote(folder))
    return LOAD.format(folder=json.dumps(folder, ensure_ascii=False), code=CODE if form == "own" else "")


def llama(gguf: Mapping[str, Any], folder: str) -> str:
    """Return the command of llama.cpp that answers with the GGUF file of a student."""
    return LLAMA.format(path=shlex.quote(f"{folder}/{gguf['file']}"))


def adapted(gguf: Mapping[str, Any]) -> str:
    """Return what a GGUF file is, in sentences."""
    parts = [f"{gguf['file']} ({gguf['type']}, {size(gguf['bytes'])}) is the student for llama.cpp."]
    if gguf["windows"]:
        parts.append("It states which layers have a sliding window; older versions of llama.cpp ignore that.")
    if gguf["query_factor"] != 1.0:
        parts.append(f"Its queries are scaled by {gguf['query_factor']:.4g}, for the scale of attention of llama.cpp.")
    return " ".join(parts)


def _gguf(gguf: Mapping[str, Any], folder: str) -> list[str]:
    return [paragraph(adapted(gguf)), f"<pre>{escape(llama(gguf, folder))}</pre>"]


def _padding(padded: Mapping[str, Any]) -> str:
    columns = ("pruned", "exported", "padding adds")
    body = [
        line(label, (show(before), show(after), change(before, after)), columns)
        for label, show, (before, after) in (
            ("parameters", count, padded["parameters"]),
            ("cached values per token", whole, padded["kv_values_per_token"]),
        )
    ]
    caption = f"Padded layers: {len(padded['layers'])}. They are listed in export.json."
    return table(columns, body, caption)
