"""Counts, corrected counts and logarithms: what the page 01_counts cannot hold."""
import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scformer_nb import counts, data
from scformer_nb.datasets import load
from scformer_nb.simulate import simulate

DEEP = simulate(300, 300, 2, 2, depth=2, seed=5)


def to_total(X, total=1e4):
    return sp.csr_matrix(sp.diags(total / X.sum(1).A1) @ X)


def fractional(kind):
    rng, X = np.random.default_rng(0), DEEP.X.copy()
    if kind == "EM, small":
        X.data = np.minimum(X.data, 15)
        some = rng.random(X.nnz) < 0.3
        X.data[some] += rng.random(some.sum()).round(2)
    elif kind == "one per cent":
        X.data = np.minimum(X.data, 18)
        X.data[rng.random(X.nnz) < 0.01] += 0.37
    elif kind == "ambient, small":  # every value a little below a whole number
        X.data = np.minimum(X.data, 15) - rng.uniform(0.001, 0.15, X.nnz)
    elif kind == "UMI collisions":
        X.data = -4096 * np.log(1 - np.minimum(X.data, 4000) / 4096)
    elif kind == "one value":
        X.data[10] = 2.5
    return X.astype(np.float32)


@pytest.mark.parametrize("kind", ["EM, small", "one per cent", "ambient, small", "UMI collisions", "one value"])
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_counts_with_fractions_pass_with_a_warning(kind, batch_key):
    a = AnnData(fractional(kind), obs=DEEP.obs, var=DEEP.var)
    with pytest.warns(UserWarning, match="counts in X are not integers; taken as they are"):
        assert (data.check_adata(a, batch_key=batch_key).X != a.X).nnz == 0


def logged(kind):
    X = to_total(DEEP.X)
    if kind == "log2":
        X.data = np.log2(1 + X.data)
    elif kind == "log10":
        X.data = np.log10(1 + X.data)
    elif kind == "log2 of counts":  # three quarters of its values are whole
        X = DEEP.X.copy()
        X.data = np.log2(1 + X.data)
    elif kind == "log of TPM":  # divided by gene length first
        X = to_total(DEEP.X @ sp.diags(1 / np.random.default_rng(0).lognormal(7, 0.7, DEEP.n_vars)), 1e6).log1p()
    elif kind == "log1p":
        X = X.log1p()
    return X.tocsr().astype(np.float32)


LOGS = ["log1p", "log2", "log10", "log2 of counts", "log of TPM"]


@pytest.mark.parametrize("kind", LOGS)
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_logarithms_are_refused(kind, batch_key):
    with pytest.raises(ValueError, match="as in logged data"):
        data.check_adata(AnnData(logged(kind), obs=DEEP.obs, var=DEEP.var), batch_key=batch_key)


@pytest.mark.parametrize("kind", [*LOGS, "1e4"])
@pytest.mark.parametrize("batch_key", [None, "study"])
def test_a_logged_study_among_counts_is_named(kind, batch_key):
    first = np.arange(300) < 225
    X = sp.vstack([DEEP.X[first], logged(kind)[~first]]).tocsr()
    a = AnnData(X, obs=DEEP.obs.assign(study=np.where(first, "kept", "treated"), plate=np.arange(300) % 3), var=DEEP.var)
    word = "normalised" if kind == "1e4" else "logged"
    with pytest.raises(ValueError, match=rf"of 300 random cells \((study|batch) 'treated'\) hold values as in {word} data: pass layer="):
        data.check_adata(a, batch_key=batch_key)


def test_logged_cells_that_no_column_names_are_counted():
    odd = np.arange(300) % 10 == 0
    X = sp.csr_matrix(np.where(odd[:, None], logged("log1p").toarray(), DEEP.X.toarray()))
    with pytest.raises(ValueError, match="30 of 300 random cells hold values as in logged data"):
        data.check_adata(AnnData(X, obs=DEEP.obs, var=DEEP.var))


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_sampled_cells_are_random_and_hold_something(form, tmp_path):
    X = DEEP.X.toarray()
    X[:150] = 0
    AnnData(form(X), obs=DEEP.obs, layers={"log": form(np.log1p(X))}).write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    whole = load(tmp_path / "x.h5ad")
    for layer in (None, "log"):
        some = counts.sample_cells(backed, 40, seed=1, layer=layer)
        assert some.shape == (40, 300) and not some.isbacked and (np.asarray(some.X.sum(1)).ravel() > 0).all()
        assert some.obs_names.equals(counts.sample_cells(whole, 40, seed=1, layer=layer).obs_names)
    assert not some.obs_names.equals(counts.sample_cells(backed, 40, seed=2).obs_names)
    assert counts.sample_cells(backed, 999).n_obs == 150
    backed.file.close()
