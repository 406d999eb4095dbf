"""Alignment: what cannot be aligned, what must not depend on chance, and maps that are known."""
import warnings

import numpy as np
import pytest
import torch

from scformer_nb.alignment import (
    ALIGN_PAPER,
    align,
    align_by_pairs,
    csls,
    label_transfer,
    match_centres,
    procrustes,
    refine,
    shared_recall,
)


def cloud(n=200, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 3, (4, d))[rng.integers(0, 4, n)] + rng.normal(size=(n, d))).astype(np.float32)


@pytest.mark.parametrize(("source", "target", "message"), [
    (np.where(np.arange(200)[:, None] < 3, np.nan, cloud()), cloud(), "source: 3 of 200 cells have NaN"),
    (cloud(), np.where(np.arange(200)[:, None] == 7, np.inf, cloud()), "target: 1 of 200 cells have NaN or infinite"),
    (cloud(d=6), cloud(d=7), "source has 6 dimensions and target 7"),
    (cloud(29), cloud(), "source has 29 cells at 29 places; fewer than 30"),
    (cloud()[:, 0], cloud(), "source: the embedding is .* of shape"),
    (cloud().astype(str), cloud(), "source: the embedding is .* of shape"),
    (np.ones((50, 6)), cloud(), "source has 50 cells at 1 places; .* all the same"),
], ids=["nan", "inf", "dims", "few", "vector", "text", "constant"])
def test_embeddings_that_cannot_be_aligned(source, target, message):
    with pytest.raises(ValueError, match=message):
        align(source, target)


def test_wrong_options():
    with pytest.raises(ValueError, match="init must be 'match', 'identity' or 'random', not 'axes'"):
        align(cloud(), cloud(), init="axes")
    with pytest.raises(ValueError, match="restarts=0 must be at least 1"):
        align(cloud(), cloud(), restarts=0)


def test_alignment_is_seeded_and_maps_new_cells():
    Q = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0].astype(np.float32)
    source, target = cloud(300), cloud(300) @ Q + 2
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, second = (align(source, target, seed=3, max_steps=25, restarts=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(first.W, second.W) and first.history.equals(second.history)
    assert np.allclose(first.transform(source)[:5], first.transform(source[:5]), atol=1e-5)
    assert np.abs(first.transform(source) - target).max() < 0.2


def test_the_old_name_of_transform_says_the_new_one():
    found = align(cloud(100), cloud(100), max_steps=0, init="identity")
    with pytest.warns(DeprecationWarning, match="Alignment.transform"):
        assert np.array_equal(found.map(cloud(9)), found.transform(cloud(9)))


def test_the_plain_game_keeps_neither_rotation_nor_initial_map():
    found = align(cloud(), cloud(seed=1), max_steps=50, **ALIGN_PAPER | dict(lr=1e-2))
    assert np.abs(found.W @ found.W.T - np.eye(6)).max() > 0.01 and set(found.history.restart) == {0}


def test_identical_points_and_no_support_are_survived():
    "Repeated cells, and constellations with nothing in common."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k-means: fewer distinct points than clusters
        twice = np.repeat(cloud(20), 5, axis=0)
        assert np.isfinite(align(twice, twice, max_steps=25).W).all()
    shapes = np.ones((4, 3))
    one, other = np.eye(4), np.diag([1, 10, 100, 1000.0])
    assert len(match_centres((one, shapes), (one, shapes), 0.01)[0]) == 4
    assert len(match_centres((one, shapes), (other, shapes), 0.01)[0]) <= 1


def test_refinement_ends_at_the_planted_map():
    X = torch.from_numpy(cloud(400))
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    near = torch.linalg.qr(Q + 0.05 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    near = near[0] * near[1].diagonal().sign()
    W, shift, share = refine(X, X @ Q + 1, near, torch.ones(6))
    assert torch.allclose(W, Q, atol=1e-3) and share == 1
    assert torch.allclose(procrustes(X, X @ Q + 1)[0], Q, atol=1e-4)


def test_hubs_of_both_sides_lose_their_lead():
    S = np.random.default_rng(0).normal(size=(12, 30))
    assert np.allclose(csls(S).T, csls(S.T)) and np.allclose(csls(np.ones((4, 5))), 0)


def test_label_transfer_is_a_mean_over_types_that_both_have():
    Z = {"a": np.repeat([[0.0], [5.0]], 10, axis=0), "b": np.array([[0.0]] * 30 + [[5.0]] * 2 + [[9.0]] * 5)}
    types = {"a": np.repeat(["x", "y"], 10), "b": np.array(["x"] * 30 + ["x"] * 0 + ["y", "x"] + ["only b"] * 5)}
    found = label_transfer(Z, types)
    assert found["a to b"] == (30 / 31 + 1) / 2 and set(found) == {"a to b", "b to a"}
    assert shared_recall(np.array(["x", "x", "z"]), np.array(["x", "z", "z"]), np.array(["x"])) == 0.5


def test_pairs_by_shared_genes_give_the_rotation():
    Q = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    Z, order = cloud(150), np.random.default_rng(2).permutation(150)
    found = align_by_pairs({"a": Z, "b": (Z @ Q + 3)[order]}, {"a": Z, "b": Z[order]}, k=1)
    assert np.allclose(found["a"][order], found["b"], atol=1e-3)
