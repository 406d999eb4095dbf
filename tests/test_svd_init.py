"""Initialisation by SVD: any number of cells and batches, what varies and what does not, and decompositions that fail."""
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence

from scformer_nb import svd_init
from scformer_nb.recipe import DEFAULT
from scformer_nb.scformer import ScFormer
from scformer_nb.simulate import simulate
from scformer_nb.svd_init import CentredBins, gene_loadings


def bins(n_cells, n_genes=150, seed=0):
    "Bins of cells of two types."
    rng = np.random.default_rng(seed)
    rate = np.where(rng.integers(2, size=(n_cells, 1)) == rng.integers(2, size=n_genes), 3, 1)
    return sp.csr_matrix(np.minimum(rng.poisson(rate), 9).astype(np.uint8))


@pytest.mark.parametrize("n_cells", [2, 3, 4, 5, 16, 64, 100, 128, 256, 512, 1024])
@pytest.mark.parametrize("donors", [1, 2, 7, None])
def test_any_number_of_cells_and_batches(n_cells, donors):
    "None: each cell is a batch of its own. A vector of ones, to start from, is what centring maps to zero."
    batch = np.arange(n_cells) % (donors or n_cells)
    found = gene_loadings(bins(n_cells), batch, 20)
    assert 1 <= found.shape[1] <= min(20, n_cells - 1) and np.isfinite(found).all() and np.isclose(found.std(), 1)
    exact = np.linalg.svd(CentredBins(bins(n_cells), batch).toarray(), compute_uv=False)[:found.shape[1]]
    size = np.linalg.norm(found, axis=0)
    assert np.allclose(size / size[0], exact / exact[0], atol=1e-6), "loadings are as long as the singular values"


@pytest.mark.parametrize("n_cells", [64, 128])
@pytest.mark.parametrize("donors", [2, 32, None])
def test_a_model_of_any_number_of_donors(n_cells, donors):
    adata = simulate(n_cells, 80, 3, 1)
    adata.obs["donor"] = [f"donor_{i % (donors or n_cells)}" for i in range(n_cells)]
    recipe = replace(DEFAULT, dim=16, n_blocks=1, d_ff=16, max_masked=16, batch_size=16)
    model = ScFormer(adata, batch_key="donor", recipe=recipe).fit(1, progress=False, accelerator="cpu")
    assert np.isfinite(model.embed_cells(adata)).all()


def test_the_same_cells_give_the_same_loadings():
    batch = np.zeros(300, int)
    assert np.array_equal(gene_loadings(bins(300), batch, 20), gene_loadings(bins(300), batch, 20))


@pytest.mark.parametrize("same", [sp.csr_matrix((3, 20), dtype=np.uint8), sp.csr_matrix(np.full((3, 20), 5, np.uint8)), bins(1)],
                         ids=["empty", "equal", "one cell"])
def test_nothing_that_varies_is_a_clear_error(same):
    with pytest.raises(ValueError, match=f"no gene differs between the {same.shape[0]} cells"):
        gene_loadings(same, np.zeros(same.shape[0], int), 5)


def test_differences_between_batches_alone_still_count():
    "Cells that are equal within each batch: genes are centred over all cells."
    two = sp.vstack([bins(1, seed=0)] * 3 + [bins(1, seed=1)] * 3, format="csr")
    assert gene_loadings(two, np.repeat([0, 1], 3), 5).shape == (150, 1)


FAILURES = [ArpackError(-9), ArpackNoConvergence("no", [], []), np.linalg.LinAlgError("no")]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_an_iteration_that_fails_is_done_densely(monkeypatch, error):
    batch = np.arange(300) % 3
    expected = gene_loadings(bins(300), batch, 10)

    def fails(*args, **options):
        raise error
    monkeypatch.setattr(svd_init, "svds", fails)
    assert np.allclose(gene_loadings(bins(300), batch, 10), expected, atol=1e-6)


def test_a_large_matrix_that_fails_is_a_clear_error(monkeypatch):
    large = sp.random(50_000, 700, 1e-3, format="csr", random_state=np.random.default_rng(0))

    def fails(*args, **options):
        raise ArpackError(-9)
    monkeypatch.setattr(svd_init, "svds", fails)
    with pytest.raises(ValueError, match="SVD of the 50000 x 700 bins failed .*; use svd_init=0"):
        gene_loadings(large, np.zeros(50_000, int), 10)
