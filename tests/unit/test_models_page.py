"""docs/models.md is what the tables say, for every causal language model of the installed transformers."""

import pytest

from pipeline.model.families import FAMILIES, REFUSED
from pipeline.model.models_page import models_page
from tests.models_page import PAGE, text


def test_the_page_is_generated_from_the_tables():
    assert PAGE.read_text(encoding="utf-8") == text()


def test_a_type_has_a_table_or_a_reason_and_not_both():
    assert not FAMILIES.keys() & REFUSED.keys()
    with pytest.raises(ValueError, match="no reason for unheard_of"):
        models_page(["llama", "unheard_of"])
