from pathlib import Path

from nemo_rao.hugging_face.families import FAMILIES

from .families_page import page
from .models import MODELS


def test_the_page_in_docs_is_the_one_that_is_written_from_the_tests() -> None:
    assert (Path(__file__).parents[2] / "docs" / "families.md").read_text() == page()


def test_every_family_that_is_converted_is_compared_with_transformers() -> None:
    assert {family.model_type for family in FAMILIES} == {given["model_type"] for given in MODELS.values()}
