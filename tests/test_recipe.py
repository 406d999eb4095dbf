"""Recipes of this version and of older ones: what the page 06c_recipe cannot hold."""
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from scformer_nb import training
from scformer_nb.heads import HEADS
from scformer_nb.recipe import DEFAULT, PAPER, Recipe

OLD_DEFAULT = Recipe(max_genes=150, mask_ratio=.4, n_blocks=4, latent=0, correct=False, mgm=1., mvc=1., zero=5., count=5., dar=.3,
    kl=0., nb=0., batch_size=16, lr=1e-3, lr_decay=.9, half_life=None, warmup_steps=100, epochs=30, steps=0)
LEDGERS = sorted(path for path in Path(__file__).parents[1].glob("figures/*.jsonl") if path.stem not in ("reliability", "atlas"))


def test_every_recipe_in_the_ledgers_is_understood():
    lines = [json.loads(line)["settings"].get("recipe", {}) for path in LEDGERS for line in path.read_text().splitlines()]
    recipes = [recipe for recipe in lines if "mask_ratio" in recipe]
    read = [Recipe.from_dict(recipe) for recipe in recipes]
    assert len(read) > 300 and {DEFAULT, OLD_DEFAULT} & set(read)
    assert all(new.d_ff == old.get("hidden", new.d_ff) for new, old in zip(read, recipes, strict=True))
    assert all(new.svd_init == old.get("warm_start", new.svd_init) for new, old in zip(read, recipes, strict=True))


def test_a_recipe_is_read_back_as_it_was():
    for recipe in (DEFAULT, PAPER, replace(DEFAULT, dsbn="affine", ecs=.1)):
        assert Recipe.from_dict(asdict(recipe)) == recipe
    assert {f.name for f in fields(Recipe)} >= HEADS.keys(), "each head has its weight in the recipe"


@pytest.mark.parametrize("saved, message", [(dict(dimm=3), "dimm; did you mean 'dim'"), (dict(value="table"), "value='table' is not in"),
                                            (dict(mask_ratio=3), "mask_ratio=3 must be below 1")], ids=str)
def test_recipes_that_this_version_does_not_know(saved, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(saved)


@pytest.mark.parametrize("n_cells, epochs", [(1, 800), (128, 800), (129, 400), (900, 100), (10_000, 11), (10**6, 5)])
def test_small_data_are_seen_more_often(n_cells, epochs):
    "800 steps of 128 cells, or five epochs where those are more."
    assert DEFAULT.max_epochs(n_cells) == epochs and PAPER.max_epochs(n_cells) == 30


def test_the_old_home_leads_to_the_new():
    with pytest.warns(DeprecationWarning, match="scformer_nb.training.PAPER is now scformer_nb.recipe.PAPER"):
        assert training.PAPER is PAPER
