"""The model card of the student, README.md of its folder: metadata for a hub, what was removed, figures, loading."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.report.answers import MEANING, answer_lines
from pipeline.report.comparison import Row, count, rows, size, unsteady, whole
from pipeline.report.exported import adapted, llama, loading
from pipeline.report.facts import Report, infinite, start_of, times

FOLDER = "path/to/this/folder"
CHAT = """
chat = [{"role": "user", "content": "Why is the sky blue?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=128)[0], skip_special_tokens=True))"""
LONGEST = 120  # characters of a text from the source
HIDDEN = "..."  # in place of a path in the command
METADATA = ("base_model", "license", "license_name", "license_link")
SECRET = re.compile(r"hf_\w{8,}|(?i:token|secret|password|api_?key)\b")


def card(report: Report, source: Mapping[str, Any]) -> str:
    """Return the README.md of the exported student, from report.json and what its source says of itself.

    `source`: base_model, license, license_name, license_link, license_files, each where known. Figures that the run did
    not measure are absent. The card names no path of the machine.
    """
    model, student = plain(report["model"]), count(report["parameters"]["student"])
    parts = [
        _metadata(report, source),
        f"# {model}, pruned to {student} parameters",
        _origin(report, source, model),
        "## What was removed",
        _table(("", "teacher", "student", "change"), _shape_rows(report)),
        *_removed(report),
        "## Quality",
        *_quality(report),
        *_speed(report),
        "## How to load it",
        *_loading(report),
        "## How it was made",
        f"```\n{command_without_paths(report['command'], source.get('base_model'))}\n```",
        _versions(report),
        *_license(source),
    ]
    text = "\n\n".join(filter(None, parts)) + "\n"
    return text.translate(dict.fromkeys(map(ord, "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"), " "))


def plain(text: str) -> str:
    """Return a text of the source as Markdown that shows it: one line of limited length, its marks escaped."""
    line = _line(text)
    short = line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~$])", r"\\\1", short)


def _line(text: str) -> str:
    """Return a text on one line, without characters that are not printable."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def command_without_paths(command: str, base_model: str | None) -> str:
    """Return a command with `...` for every path and whatever looks like a secret; the hub id of the model stays."""
    return shlex.join(_shown(word, base_model) for word in shlex.split(command))


def _shown(word: str, base_model: str | None) -> str:
    key, equals, value = word.rpartition("=") if word.startswith("-") else word.partition("=")
    if not equals:
        key, value = "", word
    if SECRET.search(word):
        return f"{key}{equals}{HIDDEN}" if equals else HIDDEN
    if value == base_model:
        return word
    is_path = re.search(r"[/\\~`]", value) or re.search(r"\.(jsonl?|txt|md|parquet|gguf|gz)\b", value)
    value = HIDDEN if is_path else _line(value)
    return f"{key}{equals}{value}"


def _metadata(report: Report, source: Mapping[str, Any]) -> str:
    values = {name: source[name] for name in METADATA if name in source}
    tags = ["pruned", *(["distillation"] if report["recovery"] else []), "pangu-light"]
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "\n".join(["---", *lines, "---"])


def _origin(report: Report, source: Mapping[str, Any], model: str) -> str:
    base = source.get("base_model")
    name = f"[{plain(base)}](https://huggingface.co/{base})" if base else f"`{report['model'][:LONGEST]}`"
    name = name if base or re.fullmatch(r"[\w. -]+", report["model"], re.ASCII) else model
    kept = report["parameters"]["student"] / report["parameters"]["teacher"]
    inner = report["non_embedding_parameters"]["student"] / report["non_embedding_parameters"]["teacher"]
    recipe = report["recipe"]
    paper = recipe == "pangu_light"
    method = "as in Pangu Light (arXiv 2505.20155)" if paper else f"by the recipe `{recipe}` of pangu-light"
    return (
        f"This model is {name} after structured pruning {method}. It has {kept:.1%} of its "
        f"parameters ({inner:.1%} outside the embeddings)."
    )


def _shape_rows(report: Report) -> list[Row]:
    measured = ("perplexity,", "bits per byte,", "prefill,", "decode,")
    answers = {row.label for row in _answer_rows(report)}
    return [row for row in rows(report) if not row.label.startswith(measured) and row.label not in answers]


def _answer_rows(report: Report) -> list[Row]:
    texts = ((name, text["assistant"]) for name, text in report["perplexity"].items() if "assistant" in text)
    return [Row(*line) for name, answers in texts for line in answer_lines(name, answers)]


def _removed(report: Report) -> Iterator[str]:
    cut = report["cut"]
    if cut["dropped_layers"]:
        yield f"Removed layers of the teacher, counted from 0: {', '.join(map(str, cut['dropped_layers']))}."
    for part, layers in (("attention", cut["removed_attention"]), ("FFN", cut["removed_ffn"])):
        if layers:
            yield f"Layers of the teacher that lost their {part} alone: {', '.join(map(str, layers))}."
    if cut["donations"]:
        groups = sum(each["groups"] for each in cut["donations"])
        yield f"KV groups of removed layers that replaced weaker ones of remaining layers (CLAP): {groups}."
    before, after = (report["shape"][who].get("vocabulary") for who in ("teacher", "student"))
    if before != after:
        yield (
            f"The tokenizer has {after} of the teacher's {before} tokens. It encodes any text; what the removed tokens "
            "stood for takes several. Perplexity below is per token of the teacher's tokenizer."
        )


def _quality(report: Report) -> Iterator[str]:
    texts = report["perplexity"]
    columns = ["teacher", *(["start"] if any("start" in text for text in texts.values()) else []), "student"]
    names = ["held-out text", *(start_of(report) if each == "start" else each for each in columns), "tokens"]
    body = [
        [plain(name), *(times(infinite(text[who]["perplexity"])) if who in text else "" for who in columns)]
        + [whole(text["tokens"])]
        for name, text in texts.items()
    ]
    yield _lines(names, body)
    yield (
        "Perplexity, measured on packed sequences of held-out text. It compares this model with its teacher; it does "
        "not measure instruction following, safety or knowledge, which pruning can change."
    )
    if answers := _answer_rows(report):
        yield _table(("", "teacher", "student", "change"), answers)
        yield MEANING
    if not report["recovery"]:
        yield "The model was not trained after pruning."
    elif (report["recovery"].get("selection") or {}).get("rose"):
        yield "Training after pruning did not lower the divergence from the teacher on held-out text."
    if "onpolicy" in report:
        yield "After recovery it was trained on its own answers, towards its teacher's distribution on them."
    teacher, student = (report["tasks"].get(who) or {} for who in ("teacher", "student"))
    if teacher:
        yield _lines(
            ("benchmark task", "metric", "teacher", "student"),
            [
                [plain(task), plain(metric), *(_with_error(tasks[task], metric) for tasks in (teacher, student))]
                for task, metrics in teacher.items()
                for metric in metrics
                if metric != "questions" and not metric.endswith("_stderr")
            ],
        )
        yield "Measured by the LM Evaluation Harness, ± standard error."
    else:
        yield "No benchmark tasks were run."


def _with_error(metrics: Mapping[str, float], metric: str) -> str:
    error = metrics.get(f"{metric}_stderr")
    return f"{metrics[metric]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _speed(report: Report) -> Iterator[str]:
    speed, device = report["speed"], report["device"]
    if not speed:
        return
    yield "## Speed"
    yield _table(("", "teacher", "student", "change"), [row for row in rows(report) if "tokens/s" in row.label])
    yield (
        f"Measured with transformers on {plain(device['name'])} ({device['kind']}, {device['dtype']}): batch size "
        f"{speed['batch']}, prompt of {speed['prefill']} tokens, {speed['decode']} generated tokens. Other devices and "
        "engines give other ratios."
    )
    note = unsteady(report)
    if note:
        yield f"{note[0].upper()}{note[1:]}."


def _loading(report: Report) -> Iterator[str]:
    export = report.get("export")
    if export is None:
        return
    language = "bash" if export["form"] == "decilm" else "python"
    code = loading(export["form"], FOLDER) + (CHAT if language == "python" and _answer_rows(report) else "")
    yield f"```{language}\n{code}\n```"
    if export["form"] in ("own", "decilm"):
        yield "The folder contains code of Pangu Light, which `trust_remote_code` permits to run; read it first."
    yield f"Weights: {size(export['bytes'])}."
    if "gguf" in report:
        yield f"{adapted(report['gguf'])}\n\n```bash\n{llama(report['gguf'], FOLDER)}\n```"


def _versions(report: Report) -> str:
    versions = report["versions"]
    shown = [name for name in ("pangu-light", "torch", "transformers") if name in versions]
    parts = [f"revision {plain(versions['revision'])}", *(f"{name} {plain(versions[name])}" for name in shown)]
    return f"Recipe `{report['recipe']}`; {', '.join(parts)}. Paths in the command are left out."


def _license(source: Mapping[str, Any]) -> Iterator[str]:
    files = source.get("license_files", ())
    if files:
        yield "## License"
        yield f"Files of the original model, unchanged: {', '.join(plain(name) for name in files)}."
    elif "license" not in source:
        yield "## License"
        yield "The source names no license. The terms of the original model apply."


def _table(columns: Sequence[str], body: Sequence[Row]) -> str:
    return _lines(columns, [(row.label, row.teacher, row.student, row.change) for row in body])


def _lines(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; its first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *body))
