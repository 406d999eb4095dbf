"""Markers, gene sets, neighbours and chance against what is known by construction."""
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scformer_nb.gene_space import Question, find_markers, gene_questions, plot_genes, term_members, unit_vectors


def marked_cells():
    "Three types with five genes each that they alone express, and ten genes of noise; a lone cell, an unlabelled one."
    rng = np.random.default_rng(0)
    types = np.repeat(list("ABC"), 20)
    X = rng.normal(0, .1, (62, 25))
    for i, t in enumerate("ABC"):
        X[:60][types == t, 5 * i:5 * i + 5] += 3
    labels = pd.Series([*types, "lone", np.nan], dtype=object, index=[f"c{i}" for i in range(62)])
    adata = AnnData(X, obs=pd.DataFrame(index=labels.index), var=pd.DataFrame(index=[f"g{i}" for i in range(25)]))
    return adata, labels


def test_markers_are_the_genes_that_a_type_alone_expresses():
    adata, labels = marked_cells()
    markers = find_markers(adata, labels, n=5)
    for i, t in enumerate("ABC"):
        assert set(markers.index[markers == t]) == {f"g{j}" for j in range(5 * i, 5 * i + 5)}
    assert find_markers(adata, labels.where(labels == "A"), n=5).empty
    assert find_markers(adata, pd.Series(np.nan, labels.index, dtype=object), n=5).empty


def test_types_called_by_numbers_keep_their_names():
    adata, labels = marked_cells()
    markers = find_markers(adata, labels.map({"A": "0", "B": "NA", "C": "None"}), n=5)
    assert set(markers) == {"0", "NA", "None"}


def test_term_members():
    sets = {"two": ["A", "b", "b"], "one": ["a"], "none": ["Z"], "all": ["a", "b", "c"]}
    assert term_members(["a", "B", "c"], sets, least=2, most=2).tolist() == [[1, 1, 0]]
    assert term_members(["a"], {}, 1, 2).shape == (0, 1) and term_members(["a"], {}, 1, 2).dtype == np.float32


def test_shares_and_chance_by_hand():
    E = np.repeat(np.eye(4), 3, axis=0) + np.random.default_rng(0).normal(0, 1e-3, (12, 4))   # four groups of three
    group = np.arange(12) // 3
    every = np.ones(12, bool)
    perfect = Question(every, every, group[:, None] == group, k=2)
    assert perfect.share(E) == 1 and not perfect.right.diagonal().any()
    assert Question(every, every, group[:, None] != group, k=2).share(E) == 0
    first = group < 1
    assert Question(first, group < 2, group[:, None] == group, k=2).neighbours(E).shape == (6, 2)
    chance = perfect.chance(E)
    assert chance["exact"] == pytest.approx(2 / 11) and abs(chance["mean"] - 2 / 11) < 5 * chance["sd"] / 200**.5


def test_questions_without_enough_genes_are_left_out():
    genes, markers = pd.Index([f"g{i}" for i in range(8)]), pd.Series(list("AABB"), index=["g0", "g1", "g2", "g3"])
    terms = np.zeros((1, 8), np.float32)
    assert list(gene_questions(genes, markers, terms, k=2)) == ["markers"] and gene_questions(genes, markers, terms, k=3) == {}
    terms[0, :5] = 1
    assert list(gene_questions(genes, markers[:0], terms, k=2)) == ["GO terms"]


def test_unit_vectors_and_the_picture():
    E = pd.DataFrame(np.random.default_rng(0).normal(5, 1, (30, 4)), index=[f"g{i}" for i in range(30)])
    assert np.allclose(np.linalg.norm(unit_vectors(E), axis=1), 1)
    assert np.allclose(unit_vectors(E), unit_vectors(3 * E + 7)) and not unit_vectors(np.ones((3, 2))).any()
    markers = pd.Series(["0", "NA"], index=["g3", "g4"])
    fig = plot_genes({"one": E, "two": E}, markers)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["0", "NA"]
    assert not plot_genes({"one": E}, markers[:0]).legends
