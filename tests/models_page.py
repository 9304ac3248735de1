"""Write docs/models.md: `python -m tests.models_page`."""

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.model.models_page import models_page

PAGE = Path(__file__).parents[1] / "docs/models.md"


def text() -> str:
    """Return the page for the installed transformers."""
    return models_page(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
