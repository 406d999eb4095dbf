"""Saved perturbation models: every recipe comes back, and what no model has is refused."""
import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file
from toy import SMALL_SCREEN as SMALL

from scformer_nb.model_files import write_model
from scformer_nb.perturbation import PerturbationModel
from scformer_nb.perturbation_network import PERTURBATION_PAPER

RECIPES = {"default": SMALL, "genes": replace(SMALL, head="genes"), "raw": replace(SMALL, linear_init=False),
    "bins": replace(SMALL, values="bins"), "paper": replace(PERTURBATION_PAPER, dim=16, d_ff=16, n_blocks=1, batch_size=64)}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_is_saved_and_loaded(train, split, tmp_path, recipe):
    model = PerturbationModel(train, direction="up", recipe=recipe, targets=["X"]).fit(1, progress=False)
    model.save(tmp_path / "model")
    loaded = PerturbationModel.load(tmp_path / "model")
    asked = [*split.index[split.part == "test"], "X", "X+gene0"]
    assert np.allclose(loaded.predict(asked), model.predict(asked), atol=1e-6)
    assert loaded.recipe == recipe and loaded.history.equals(model.history) and repr(loaded) == repr(model)


def test_damaged_and_foreign_folders(screen_model, tmp_path):
    screen_model.save(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        screen_model.save(tmp_path)
    screen_model.save(tmp_path, overwrite=True)
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="cut off or damaged"):
        PerturbationModel.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no saved model"):
        PerturbationModel.load(tmp_path / "nothing")


@pytest.fixture(scope="module")
def saved(screen_model, tmp_path_factory):
    screen_model.save(folder := tmp_path_factory.mktemp("saved") / "model")
    return load_file(folder / "weights.safetensors"), json.loads((folder / "model.json").read_text())


FACTS = {"settings.n_genes": 10**9, "settings.n_bins": "many", "settings.seed": -1, "settings.direction": "sideways",
    "settings.gain": {"all": float("nan")}, "settings.scale": {"1/1": None}, "recipe.dim": 2**40, "recipe.n_blocks": 10**6,
    "recipe.n_heads": 0, "recipe.head": "mlp", "recipe.unknown": 1, "names": ["gene0", "NOGENE"], "genes": ["gene0"] * 41,
    "specials": ["<pad>"], "history": [1], "versions": None}


@pytest.mark.parametrize("name", FACTS)
def test_facts_that_no_model_has_are_refused(saved, tmp_path, name):
    weights, facts = saved[0], json.loads(json.dumps(saved[1]))
    where, _, field = name.rpartition(".")
    (facts[where] if where else facts)[field] = FACTS[name]
    write_model(tmp_path / "model", weights, facts)
    with pytest.raises(ValueError, match="is cut off or damaged|do not belong together"):
        PerturbationModel.load(tmp_path / "model")


def test_a_perturbation_has_one_row(saved, tmp_path):
    weights, facts = saved
    write_model(tmp_path / "model", weights, facts | {"names": facts["names"][:1] * len(facts["names"])})
    with pytest.raises(ValueError, match="names has values that no model has"):
        PerturbationModel.load(tmp_path / "model")


def beyond(x):
    return x + 10**6


WEIGHTS = {"effects.column": beyond, "effects.noise": lambda x: -x, "inputs.data": beyond,
    "inputs.indices": beyond, "inputs.indptr": lambda x: x.flip(0), "inputs.shape": lambda x: x[:1], "alike.shape": beyond,
    "alike.indices": lambda x: x.float(), "effects.change": lambda x: x[:, 1:], "effects.own": lambda x: x[0],
    "effects.level": lambda x: x * np.nan, "control": lambda x: x[1:], "centres": None, "network.encoder.effect.weight": None}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_no_model_has_are_refused(saved, tmp_path, name):
    changed = {k: v for k, v in saved[0].items() if k != name} | ({name: WEIGHTS[name](saved[0][name])} if WEIGHTS[name] else {})
    write_model(tmp_path / "model", changed, saved[1])
    with pytest.raises(ValueError, match="is cut off or damaged|do not belong together|NaN or infinite"):
        PerturbationModel.load(tmp_path / "model")
