"""SAUCIE on tiny data: seeded, without a trace, with and without batches."""
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.neighbors import NearestNeighbors

from scformer_nb import saucie as module
from scformer_nb.hvg import preprocess
from scformer_nb.saucie import batch_loss, remove_batches, saucie, unit_variance
from scformer_nb.simulate import simulate

CELLS = preprocess(simulate(60, 80, 3, 2, seed=1, boost=20), batch_key="batch")  # some 30 cells in each batch


def test_an_embedding_and_nothing_else(capfd):
    adata, before = CELLS.copy(), (torch.get_rng_state().tolist(), str(np.random.get_state()))
    Z = saucie(adata, "batch", steps=20)
    assert (torch.get_rng_state().tolist(), str(np.random.get_state())) == before and capfd.readouterr() == ("", "")
    assert Z.shape == (60, 2) and Z.dtype == np.float32 and np.isfinite(Z).all()
    assert (adata.X != CELLS.X).nnz == 0 and adata.obs.equals(CELLS.obs) and not adata.obsm
    assert np.array_equal(Z, saucie(adata, "batch", steps=20)) and not np.array_equal(Z, saucie(adata, "batch", seed=1, steps=20))
    near, types = NearestNeighbors(n_neighbors=5).fit(Z).kneighbors(return_distance=False), adata.obs["cell_type"].to_numpy()
    assert (types[near] == types[:, None]).mean() > .4                                # rows in another order: a third


def test_without_batches_and_with_empty_cells():
    adata = CELLS.copy()
    silent = sp.diags((np.arange(60) > 1).astype(np.float32))                         # two cells express nothing
    adata.X = sp.csr_matrix(silent @ adata.X)
    assert np.isfinite(saucie(adata, steps=20)).all()
    adata.obs["batch"] = ["alone"] + ["others"] * 59
    assert np.isfinite(saucie(adata, "batch", steps=20)).all()


def test_mistakes_of_the_caller_are_errors():
    adata = CELLS.copy()
    with pytest.raises(KeyError, match="batch_key='donor' is not in obs: name one of cell_type, batch"):
        saucie(adata, "donor")
    del adata.layers["counts"]
    with pytest.raises(KeyError, match="no layer 'counts'"):
        saucie(adata)


def test_the_batch_loss_is_blind_to_level_and_spread_of_the_other_batch():
    x = torch.rand(20, 5, generator=torch.Generator().manual_seed(0))
    embedding = torch.zeros(20, 2)
    perfect = batch_loss(lambda x: (embedding, None, x), x)
    moved = batch_loss(lambda x: (embedding, None, torch.cat([x[:10], 3 * x[10:] + 7])), x)
    assert perfect == pytest.approx(0, abs=1e-6) and moved == pytest.approx(0, abs=1e-4)
    assert batch_loss(lambda x: (embedding, None, 3 * x), x) > .1                      # the reference has to stay


def test_batches_are_moved_onto_the_largest():
    X, batches = unit_variance(CELLS.X), np.array(["small"] * 20 + ["large"] * 40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Y = remove_batches(X, batches, 5, np.random.default_rng(0))
    assert Y.shape == X.shape and (Y.std(0) > 0).all()


def test_the_largest_batch_is_the_reference_of_each_other(monkeypatch):
    seen, batches = [], np.array(["b"] * 15 + ["c"] * 25 + ["a"] * 20)
    monkeypatch.setattr(module, "fit_autoencoder", lambda model, loss, X, groups, *rest: seen.append([batches[g[0]] for g in groups]))
    remove_batches(unit_variance(CELLS.X), batches, 5, np.random.default_rng(0))
    assert seen == [["c", "a"], ["c", "b"]]
