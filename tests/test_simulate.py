"""Simulated cells: seeded, and their truth is found back."""
import numpy as np
import pandas as pd
import pytest

from scformer_nb.simulate import draw_counts, simulate


def test_simulator_is_seeded_and_finds_back_its_truth():
    a, again, other = simulate(3000, 200, 3, 2, seed=4), simulate(3000, 200, 3, 2, seed=4), simulate(3000, 200, 3, 2, seed=5)
    assert (a.X != again.X).nnz == 0 and (a.X != other.X).nnz > 0
    truth = a.uns["truth"]
    share = truth["rate"][a.obs["cell_type"].cat.codes] * truth["batch_factor"][a.obs["batch"].cat.codes]
    mean = truth["library_size"][:, None] * share / share.sum(1, keepdims=True)
    assert np.corrcoef(mean.mean(0), a.X.mean(0).A1)[0, 1] > 0.99
    for j in np.flatnonzero(a.var["marker_of"] != "none"):
        by_type = pd.Series(a.X[:, j].toarray().ravel()).groupby(a.obs["cell_type"].to_numpy()).mean()
        assert by_type.idxmax() == a.var["marker_of"].iloc[j]


def test_slabs_do_not_change_how_cells_are_drawn():
    "1,000 cells are drawn at a time, and memory does not grow with them."
    a = simulate(2500, 20, 2, 2)
    assert a.shape == (2500, 20) and abs(a.X[2000:].mean() / a.X[:1000].mean() - 1) < 0.1


@pytest.mark.parametrize("mean", [0.2, 5, 100])
def test_counts_have_the_variance_of_a_negative_binomial(mean):
    X = draw_counts(np.random.default_rng(0), np.ones((20_000, 1)), np.full(20_000, float(mean))).toarray()
    assert abs(X.mean() / mean - 1) < 0.05 and abs(X.var() / (mean + mean**2 / 2) - 1) < 0.1
