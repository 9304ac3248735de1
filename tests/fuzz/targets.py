"""All targets by name; each is made in an empty folder."""

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import Target, models, own, texts

TARGETS: dict[str, Callable[[Path], Target]] = {
    "settings": own.settings,
    "checked settings": own.checked_settings,
    "blueprint": own.blueprint,
    "manifest": own.manifest,
    "config.json": models.config,
    "config.json of layers": models.config_of_layers,
    "config.json of a student": models.config_of_a_student,
    "safetensors header": models.safetensors_header,
    "index": models.index,
    "GGUF header": models.gguf_header,
    "tokenizer": models.tokenizer,
    "lines": texts.lines,
    "records": texts.records,
    "prose": texts.prose,
    "parquet": texts.parquet,
    "chats": texts.chats,
    "template": texts.template,
}
