"""What a model folder says of its licence: the metadata of its README.md, and the licence files beside it.

Both are written by strangers. Values that are not of the expected form are left out; nothing is guessed.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.runtime.hashing import file_digest

CARD = "README.md"
LICENSE = re.compile(r"(licen[cs]e|copying|notice|use_policy)([._-][\w.-]*)?", re.IGNORECASE)
LARGEST = 1 << 20  # bytes of a licence file, and of a card that is read
MOST = 16  # licence files
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")  # as the hub names licences
NAME = re.compile(r"[A-Za-z0-9][\w .+-]{0,95}", re.ASCII)
LINK = re.compile(r"https://[\w.-]+(/[\w./%+~-]*)?", re.ASCII)
HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)


def license_files(folder: Path | None) -> list[Path]:
    """Return the licence and notice files of a model folder by name; none for a GGUF (None)."""
    if folder is None:
        return []
    names = (path for path in sorted(Path(folder).iterdir()) if LICENSE.fullmatch(path.name))
    return [path for path in names if path.is_file() and path.stat().st_size <= LARGEST][:MOST]


def license_digests(folder: Path | None) -> dict[str, str]:
    """Return name -> digest of the licence and notice files of a model folder."""
    return {path.name: file_digest(path) for path in license_files(folder)}


def source_facts(path: str, folder: Path | None) -> dict[str, Any]:
    """Return what a card may say of its source: base_model, license, license_name, license_link, license_files.

    Args:
        path: the setting that names the model; `base_model` is this where it is a hub id.
        folder: the model's folder; None for a GGUF.

    What the source does not say is absent. A folder with a licence file and no licence in its README.md has the licence
    `other`, the hub's word for one that is read in a file.
    """
    files = [each.name for each in license_files(folder)]
    facts: dict[str, Any] = {}
    if HUB_ID.fullmatch(path) and not Path(path).expanduser().exists():
        facts["base_model"] = path
    metadata = _metadata(folder / CARD) if folder is not None else {}
    named = metadata.get("license")
    identifiers = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    if identifiers and all(isinstance(each, str) and IDENTIFIER.fullmatch(each) for each in identifiers):
        facts["license"] = named if isinstance(named, str) else list(identifiers)
    facts |= dict(_license_details(metadata, files))
    texts = [name for name in files if re.match("licen[cs]e|copying", name, re.IGNORECASE)]
    if texts:
        facts.setdefault("license", "other")
        facts.setdefault("license_link", texts[0])
    return facts | ({"license_files": files} if files else {})


def _license_details(metadata: dict[str, Any], files: list[str]) -> Iterator[tuple[str, str]]:
    name, link = metadata.get("license_name"), metadata.get("license_link")
    if isinstance(name, str) and NAME.fullmatch(name):
        yield "license_name", name
    if isinstance(link, str) and len(link) <= 300 and (link in files or LINK.fullmatch(link)):
        yield "license_link", link


def _metadata(card: Path) -> dict[str, Any]:
    """Return the YAML mapping at the head of a README.md; empty where there is none that can be read."""
    if not card.is_file() or card.stat().st_size > LARGEST:
        return {}
    text = card.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    head = re.match(r"---\n(.*?)\n---(\n|$)", text, re.DOTALL)
    if head is None:
        return {}
    try:
        values = yaml.safe_load(head[1])
    except (yaml.YAMLError, RecursionError, ValueError):  # a damaged card says nothing; the weights decide the run
        return {}
    return values if isinstance(values, dict) else {}
