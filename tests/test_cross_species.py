"""Cross species: what a user may get wrong, what must not depend on chance, and any number of species."""
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from scformer_nb.alignment import PAPER, Alignment, align, match_centres, procrustes, refine
from scformer_nb.cross_species import SMALL, CrossSpecies, Preset, prepare
from scformer_nb.data import simulate

TINY = replace(SMALL, dim=16, n_encoder=1, n_decoder=1, hidden=16, batch_size=64)


@pytest.fixture(scope="module")
def adatas():
    return {"human": simulate(120, 60, 3, 1, seed=1), "mouse": simulate(90, 40, 3, 1, seed=2), "fly": simulate(60, 30, 2, 1, seed=3)}


def cloud(n=200, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 3, (4, d))[rng.integers(0, 4, n)] + rng.normal(size=(n, d))).astype(np.float32)


def test_any_number_of_species(adatas):
    model = CrossSpecies(adatas, TINY).fit(2, progress=False)
    assert list(model.history) == ["epoch", "human", "mouse", "fly", "total"] and len(model.history) == 2
    assert {name: z.shape for name, z in model.embed().items()} == {"human": (120, 16), "mouse": (90, 16), "fly": (60, 16)}
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


def test_presets_and_epochs_that_make_no_sense(adatas):
    with pytest.raises(ValueError, match="preset must be SMALL, PAPER"):
        CrossSpecies(adatas, "small")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        Preset(batch_size=0)
    with pytest.raises(ValueError, match="max_epochs=0"):
        CrossSpecies(adatas, TINY).fit(0)
    with pytest.raises(FloatingPointError, match="lower lr"):
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
    assert torch.equal(torch.random.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])
    for name, a in adatas.items():
        assert np.allclose(runs[0][name], runs[1][name], atol=1e-6) and not np.allclose(runs[0][name], runs[2][name], atol=1e-2)
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
        padded = prepare(AnnData(X))
    whole = prepare(adatas["mouse"])
    assert padded.scores.shape[0] == 95 and padded.seen.sum() == 90
    assert np.allclose(padded.scores[:90], whole.scores, atol=1e-3) and np.isclose(padded.explained, whole.explained)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40)])
@pytest.mark.parametrize("n", [3, 1200])
def test_reconstruction_loses_the_discarded_variance(shape, n):
    p = prepare(simulate(*shape, 3, 1, seed=4), n_components=n)
    values, back = prepare(simulate(*shape, 3, 1, seed=4)).reconstruct(), p.reconstruct()
    lost = ((back - values)**2).sum() / ((values - values.mean(0))**2).sum()
    assert np.isclose(lost, 1 - p.explained, atol=1e-5) and np.allclose(p.axes @ p.axes.T, np.eye(len(p.axes)), atol=1e-8)


@pytest.mark.parametrize(("source", "target", "message"), [
    (np.where(np.arange(200)[:, None] < 3, np.nan, cloud()), cloud(), "3 of 200 cells of source have NaN"),
    (cloud(), np.where(np.arange(200)[:, None] == 7, np.inf, cloud()), "1 of 200 cells of target have NaN or infinite"),
    (cloud(d=6), cloud(d=7), "source has 6 dimensions and target 7"),
    (cloud(29), cloud(), "source has 29 cells; a cloud of fewer than 30"),
    (cloud()[:, 0], cloud(), "source must be numbers of shape"),
    (cloud().astype(str), cloud(), "source must be numbers of shape"),
    (np.ones((50, 6)), cloud(), "all 50 cells of source are the same"),
], ids=["nan", "inf", "dims", "few", "vector", "text", "constant"])
def test_embeddings_that_cannot_be_aligned(source, target, message):
    with pytest.raises(ValueError, match=message):
        align(source, target)


def test_wrong_options():
    with pytest.raises(ValueError, match="start must be 'match', 'identity' or 'random', not 'axes'"):
        align(cloud(), cloud(), start="axes")
    with pytest.raises(ValueError, match="restarts=0 must be at least 1"):
        align(cloud(), cloud(), restarts=0)


def test_alignment_is_seeded_and_maps_new_cells():
    source, target = cloud(300), cloud(300) @ np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0].astype(np.float32) + 2
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, second = (align(source, target, seed=3, max_steps=25, restarts=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state) and isinstance(first, Alignment)
    assert np.array_equal(first.W, second.W) and first.history.equals(second.history)
    assert np.allclose(first.map(source)[:5], first.map(source[:5]), atol=1e-5)
    assert np.abs(first.map(source) - target).max() < 0.2


def test_the_plain_game_keeps_neither_rotation_nor_start():
    found = align(cloud(), cloud(seed=1), max_steps=50, **PAPER | dict(lr=1e-2))
    assert np.abs(found.W @ found.W.T - np.eye(6)).max() > 0.01 and set(found.history.restart) == {0}


def test_identical_points_and_no_support_are_survived():
    "Repeated cells, and constellations with nothing in common."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k-means: fewer distinct points than clusters
        twice = np.repeat(cloud(20), 5, axis=0)
        assert np.isfinite(align(twice, twice, max_steps=25).W).all()
    far = np.eye(4) * 100, np.ones((4, 3))
    assert len(match_centres((np.eye(4), np.ones((4, 3))), far, 0.01)[0]) <= 4


def test_refinement_ends_at_the_planted_map():
    X = torch.from_numpy(cloud(400))
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    near = torch.linalg.qr(Q + 0.05 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    near = near[0] * near[1].diagonal().sign()
    W, shift, share = refine(X, X @ Q + 1, near, torch.ones(6))
    assert torch.allclose(W, Q, atol=1e-3) and share == 1
    assert torch.allclose(procrustes(X, X @ Q + 1)[0], Q, atol=1e-4)
