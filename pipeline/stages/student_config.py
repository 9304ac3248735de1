"""What is known of the student's config.json before any work."""

from typing import Any

from pipeline.config import Config
from pipeline.model.families import FAMILIES, WRAPPERS
from pipeline.runtime.described import read_config, read_mapping
from pipeline.runtime.model_source import model_folder


def is_image_text(config: Config) -> bool:
    """Return whether the model is an image-text model, where its config.json can be read."""
    folder = model_folder(config.model.path, config.model.allow_pickle)
    path = None if folder is None else folder / "config.json"
    return path is not None and path.is_file() and read_mapping(path).get("model_type") in WRAPPERS


def student_config(config: Config) -> dict[str, Any] | None:
    """Return the config.json of the model, with static scales in `pruned` if the run will put them for post-norms.

    None where it cannot be read before any work, as in a GGUF, or where its type has no table.
    """
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder is None or not (folder / "config.json").is_file():
        return None
    student = read_config(folder)
    family = FAMILIES.get(str(student.get("model_type")))
    if family is None:  # refused by the teacher stage
        return None
    absorbs = config.reinit.absorb is not False and "absorb_norms" in config.recipe.stages
    if absorbs and family.sandwich and family.folded is None:
        student["pruned"] = {"scales": list(family.post_norms)}
    return student
