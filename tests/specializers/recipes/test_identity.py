"""What a recipe and a variant are called by does not change with the code: same fields, same order, same bytes."""

import hashlib
import json
from pathlib import Path

import pytest

from metier.specializers import Variant, load_recipe
from metier.specializers.shelf.variant import content_id

EXAMPLES = Path(__file__).parents[3] / "examples"

# SHA-256 (first 16 digits) of each method's recipe as JSON, as the first release wrote it.
RECIPES = {
    "critic": "db608ddbc81d5859",
    "critic_w8a8": "27823ca25be77577",
    "gift_card_shallow": "57b483162860803c",
    "ledger_accountant_narrow": "9c393c7bf29250df",
    "ledger_accountant_short": "595264bb6ead82e3",
    "ledger_accountant_thinking": "a87cea3f15fe4bbe",
    "long_reader": "922f0ecc0f9f1a86",
    "msq": "53a0bf2700cc5c20",
    "npft_w4": "9d8f14c3e99edb53",
    "pat": "977bda9671b7f123",
    "trex": "b6c92f04c5aa235d",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_its_identity(name: str) -> None:
    text = load_recipe(EXAMPLES / "recipes" / f"{name}.yaml").model_dump_json()
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == RECIPES[name], text


@pytest.mark.parametrize("folder", sorted((EXAMPLES / "variants").iterdir()), ids=lambda folder: folder.name)
def test_a_variant_that_was_made_keeps_its_content_id(folder: Path) -> None:
    record = json.loads((folder / "variant.json").read_text(encoding="utf-8"))
    variant = Variant.model_validate(record)
    assert content_id(variant.model_dump(mode="json")) == variant.id == record["id"]
