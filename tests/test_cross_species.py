"""Cross species: what a user may get wrong, what must not depend on chance, and any number of species."""
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from scformer_nb.cross_species import (
    SPECIES_SMALL,
    CrossSpecies,
    SpeciesRecipe,
    first_two,
    prepare_species,
    shared_components,
    shared_genes,
)
from scformer_nb.simulate import simulate

TINY = replace(SPECIES_SMALL, dim=16, n_encoder=1, n_decoder=1, d_ff=16, batch_size=64)


@pytest.fixture(scope="module")
def adatas():
    return {"human": simulate(120, 60, 3, 1, seed=1), "mouse": simulate(90, 40, 3, 1, seed=2),
            "fly": simulate(60, 30, 2, 1, seed=3)}


def test_any_number_of_species(adatas):
    model = CrossSpecies(adatas, TINY).fit(2, progress=False)
    assert list(model.history) == ["epoch", "human", "mouse", "fly", "total"] and len(model.history) == 2
    shapes = {name: z.shape for name, z in model.embed().items()}
    assert shapes == {"human": (120, 16), "mouse": (90, 16), "fly": (60, 16)}
    assert np.allclose(model.history.total, model.history[["human", "mouse", "fly"]].sum(axis=1))


@pytest.mark.parametrize(("make", "message"), [
    (lambda a: {"human": a["human"]}, "there is only human: add another"),
    (lambda a: {}, "there is only none"),
    (lambda a: a["human"], "must be a dict of name and AnnData"),
    (lambda a: [a["human"], a["mouse"]], "must be a dict of name and AnnData"),
    (lambda a: a | {"rat": a["mouse"][:19].copy()}, "'rat' has 19 cells"),
    (lambda a: a | {"rat": a["mouse"].X}, "'rat' is a csr_matrix, not an AnnData"),
    (lambda a: a | {"rat": AnnData(np.log1p(a["mouse"].X.toarray()))}, "'rat': X must hold raw counts"),
    (lambda a: a | {"rat": AnnData(np.full((30, 9), np.nan))}, "'rat': .* are NaN"),
], ids=["one", "none", "one adata", "list", "few cells", "matrix", "logged", "nan"])
def test_datasets_that_cannot_be_embedded(adatas, make, message):
    with pytest.raises(ValueError, match=message):
        CrossSpecies(make(adatas), TINY)


def test_recipes_and_epochs_that_make_no_sense(adatas):
    with pytest.raises(ValueError, match="recipe must be SPECIES_SMALL, SPECIES_PAPER or a"):
        CrossSpecies(adatas, "small")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        SpeciesRecipe(batch_size=0)
    with pytest.raises(ValueError, match="max_epochs=0"):
        CrossSpecies(adatas, TINY).fit(0)
    with pytest.raises(FloatingPointError, match="lower `lr`"):
        CrossSpecies(adatas, replace(TINY, lr=1e30)).fit(20, progress=False)


def test_the_layer_holds_the_counts(adatas):
    layered = {name: a.copy() for name, a in adatas.items()}
    for a in layered.values():
        a.layers["counts"], a.X = a.X, np.log1p(a.X.toarray())
    first, second = (CrossSpecies(a, TINY, layer=layer).embed() for a, layer in ((adatas, None), (layered, "counts")))
    assert all(np.array_equal(first[name], second[name]) for name in adatas)
    with pytest.raises(ValueError, match="'human': layer='raw' does not exist"):
        CrossSpecies(layered, TINY, layer="raw")


def test_nothing_is_changed_and_everything_follows_from_the_seed(adatas):
    before = {name: a.copy() for name, a in adatas.items()}
    torch.manual_seed(5)
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    runs = [CrossSpecies(adatas, TINY, seed=seed).fit(2, progress=False).embed() for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    for name, a in adatas.items():
        assert np.allclose(runs[0][name], runs[1][name], atol=1e-6)
        assert not np.allclose(runs[0][name], runs[2][name], atol=1e-2)
        assert (a.X != before[name].X).nnz == 0 and a.obs.equals(before[name].obs)


def test_rows_keep_their_order(adatas):
    "Cells of a shuffled file get the vectors they had, up to the company of other cells."
    order = np.random.default_rng(0).permutation(120)
    shuffled = adatas | {"human": adatas["human"][order].copy()}
    first, second = (CrossSpecies(a, replace(TINY, batch_size=1024)).embed()["human"] for a in (adatas, shuffled))
    assert np.allclose(first[order], second, atol=1e-3)


def test_cells_without_counts_keep_their_row_and_change_nothing(adatas):
    X = sp.vstack([adatas["mouse"].X, sp.csr_matrix((5, 40), dtype=np.float32)], format="csr")
    with pytest.warns(UserWarning, match="5 of 95 cells express none"):
        padded = prepare_species(AnnData(X))
    whole = prepare_species(adatas["mouse"])
    assert padded.scores.shape[0] == 95 and padded.seen.sum() == 90
    assert np.allclose(padded.scores[:90], whole.scores, atol=1e-3) and np.isclose(padded.explained, whole.explained)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40)])
@pytest.mark.parametrize("n", [3, 1200])
def test_reconstruction_loses_the_discarded_variance(shape, n):
    p = prepare_species(simulate(*shape, 3, 1, seed=4), n_components=n)
    values, back = prepare_species(simulate(*shape, 3, 1, seed=4)).reconstruct(), p.reconstruct()
    lost = ((back - values)**2).sum() / ((values - values.mean(0))**2).sum()
    assert np.isclose(lost, 1 - p.explained, atol=1e-5)
    assert np.allclose(p.axes @ p.axes.T, np.eye(len(p.axes)), atol=1e-8)


def test_genes_are_shared_by_name_or_by_ortholog(adatas):
    "Names that stand twice, and genes without an ortholog, are left out; too few shared genes make no comparison."
    pair = {s: adatas[s].copy() for s in ("human", "mouse")}
    pair["human"].var["ortholog"] = ["twice", "twice", *(f"o{i}" for i in range(2, 58)), None, ""]
    pair["mouse"].var_names = [f"o{i}" for i in range(40)]
    together = shared_genes(pair, least=30)
    assert sorted(together.var_names) == sorted(f"o{i}" for i in range(2, 40)) and together.n_obs == 210
    assert np.array_equal(together[:120, "o7"].X.toarray(), pair["human"][:, 7].X.toarray())
    assert shared_genes(pair) is None
    parts = shared_components(together, 5)
    assert {s: Z.shape for s, Z in parts.items()} == {"human": (120, 5), "mouse": (90, 5)}
    assert np.isfinite(first_two(parts)).all() and first_two(parts).shape == (210, 2)


def test_a_run_in_a_folder_goes_on_where_it_ended(adatas, tmp_path):
    "In a new process, for the same data and recipe only."
    whole = CrossSpecies(adatas, TINY).fit(4, progress=False)
    CrossSpecies(adatas, TINY).fit(2, progress=False, run_dir=tmp_path / "run")
    resumed = CrossSpecies(adatas, TINY).fit(4, progress=False, run_dir=tmp_path / "run", resume=True)
    assert whole.history.equals(resumed.history)
    assert all(np.array_equal(z, resumed.embed()[s]) for s, z in whole.embed().items())
    other = adatas | {"fly": simulate(60, 30, 2, 1, seed=4)}
    for model, message in ((CrossSpecies(other, TINY), "cells or genes"), (CrossSpecies(adatas, TINY, seed=1), "seed")):
        with pytest.raises(ValueError, match=f"another recipe or data set .*{message}"):
            model.fit(5, progress=False, run_dir=tmp_path / "run", resume=True)
    with pytest.raises(FileExistsError, match="resume=True"):
        CrossSpecies(adatas, TINY).fit(5, progress=False, run_dir=tmp_path / "run")
