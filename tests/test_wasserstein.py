"""Wasserstein affinity: what a user may get wrong, and what a distance must keep to."""
from itertools import permutations

import numpy as np
import pytest

from scformer_nb.wasserstein import affinity, between_scores, cells_by_type, gromov_transfer, transport


def clouds(n, dims=6, seed=0):
    rng = np.random.default_rng(seed)
    Z = rng.normal(0, 3, (len(n), dims)).repeat(n, 0) + rng.normal(0, 1, (sum(n), dims))
    return Z, np.repeat(list("abcdefgh")[:len(n)], n)


def test_affinity_is_a_metric_that_knows_no_order_of_cells():
    Z, labels = clouds((30, 25, 20, 10))
    A = affinity(Z, labels, progress=False).to_numpy()
    assert (A == A.T).all() and (np.diag(A) == 0).all()
    assert all(A[i, j] <= A[i, k] + A[k, j] + 1e-9 for i, j, k in permutations(range(4), 3))
    order = np.random.default_rng(0).permutation(len(Z))
    assert np.allclose(affinity(Z[order], labels[order], progress=False), A)
    assert np.allclose(affinity(5 * Z + 1, labels, progress=False), 5 * A)
    one, other = (affinity(X, labels, normalise="shape", progress=False) for X in (Z, 5 * Z + 1))
    assert np.allclose(one, other)


def test_a_sample_does_not_depend_on_the_other_types():
    Z, labels = clouds((80, 60, 40))
    three = affinity(Z, labels, max_cells=20, progress=False)
    two = affinity(Z[labels != "b"], labels[labels != "b"], max_cells=20, progress=False)
    assert three.loc["a", "c"] == two.loc["a", "c"]
    assert affinity(Z, labels, max_cells=20, seed=1, progress=False).loc["a", "c"] != three.loc["a", "c"]


def test_global_random_numbers_are_left_alone():
    Z, labels = clouds((30, 25))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    affinity(Z, labels, max_cells=10, progress=False)
    assert (np.random.get_state()[1] == before).all()


def test_degenerate_clusters_have_finite_distances():
    same, other = np.ones((6, 3)), np.ones((9, 3)) + 2
    assert transport(same, same)[0] == 0 and np.isclose(transport(same, other)[0], np.sqrt(12))
    Z, labels = np.concatenate([same, other]), np.repeat(["a", "b"], [6, 9])
    assert (affinity(Z, labels, normalise="shape", progress=False) == 0).all(None)


def test_the_bar_counts_pairs(capsys):
    Z, labels = clouds((10, 10, 10))
    affinity(Z, labels)
    assert "3/3" in capsys.readouterr().err
    affinity(Z, labels, progress=False)
    assert not capsys.readouterr().err


def test_bad_embeddings_and_labels():
    Z, labels = clouds((10, 10, 10))
    bad = Z.copy()
    bad[:2, 1] = np.inf
    with pytest.raises(ValueError, match="2 of 30 cells have NaN or infinite values"):
        affinity(bad, labels)
    with pytest.raises(ValueError, match="shape .30, 6. and there are 29 cells"):
        affinity(Z, labels[:29])
    with pytest.raises(ValueError, match="normalise='z': it is mass or shape"):
        affinity(Z, labels, normalise="z")


def test_small_classes_and_unequal_sizes_are_counted():
    Z, labels = clouds((200, 9, 4, 3))
    with pytest.warns(UserWarning) as caught:
        A = affinity(Z, labels, progress=False)
    text = " / ".join(str(w.message) for w in caught)
    assert "2 of 4 types have fewer than 5 cells and are left out: c, d" in text and list(A) == ["a", "b"]
    assert "the largest type has 22 times the cells of the smallest" in text
    with pytest.warns(UserWarning, match="1 of 3 types of mouse have fewer than 5 cells"):
        names = {"human": labels[:209], "mouse": labels[:213]}
        affinity({"human": Z[:209], "mouse": Z[:213]}, names, max_cells=50, progress=False)


def test_labels_are_text_whatever_they_look_like():
    Z, _ = clouds((10, 10, 10, 10))
    labels = np.repeat(np.array(["0", "1.0", "NA", "None"], dtype=object), 10)
    A = affinity(Z, labels, progress=False)
    assert list(A) == ["0", "1.0", "NA", "None"] and list(A.index) == list(A)
    numbers = np.repeat([0, 1, 2, 3], 10)
    assert list(affinity(Z, numbers, progress=False)) == ["0", "1", "2", "3"]
    with pytest.warns(UserWarning, match="10 of 40 cells have no label"):
        assert list(cells_by_type(Z, np.where(labels == "NA", None, labels))) == ["0", "1.0", "None"]


def test_species_that_lie_on_each_other_and_types_of_one_only():
    Z, labels = clouds((40, 30, 20, 30))
    both, names = {"a": Z[labels != "d"], "b": Z + 0.01}, {"a": labels[labels != "d"], "b": labels}
    scores, A = between_scores(both, names)
    assert scores["a to b"] == scores["b to a"] == scores["counterparts"] == 1
    assert scores["only in b, AUC"] > 0.99 and scores["only in b, W"] > 2 and "only in a, AUC" not in scores
    assert A.loc["a"]["b"].shape == (3, 4)
    away, _ = between_scores({"a": both["a"], "b": both["b"][:, ::-1]}, names)
    assert away["counterparts"] < 1


def test_gromov_wasserstein_needs_no_common_space():
    Z, labels = clouds((40, 30, 20), dims=6)
    wide = np.hstack([Z @ np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0], np.zeros((90, 2))])
    assert gromov_transfer({"a": Z, "b": wide}, {"a": labels, "b": labels}) == {"a to b": 1, "b to a": 1}
