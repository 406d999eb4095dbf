"""Every number of appendix A.1 against a computation by hand; bad input."""
import json
import random
import warnings

import igraph
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from scformer_nb import metrics
from scformer_nb.io import speaking_shell
from scformer_nb.metrics import (
    MISSING_WORDS,
    RESOLUTIONS,
    best_clusters,
    evaluate,
    knn_graph,
    louvain,
    nearest,
    silhouettes,
    text_column,
)


def blobs(n=240, types=5, batches=3, dims=6, shift=.4, seed=0):
    "Gaussian clouds that overlap a little, with a shift per batch."
    rng = np.random.default_rng(seed)
    t, b = np.arange(n) % types, rng.integers(0, batches, n)
    Z = rng.normal(0, 1.5, (types, dims))[t] + rng.normal(0, shift, (batches, dims))[b] + rng.normal(0, 1, (n, dims))
    return Z.astype(np.float32), pd.DataFrame({"cell_type": [f"t{i}" for i in t], "batch": [f"b{i}" for i in b]})


def pairwise(Z):
    Z = np.asarray(Z, float)
    return np.sqrt(((Z[:, None] - Z[None]) ** 2).sum(-1))


def silhouette(Z, groups):
    "The definition, one cell at a time; 0 for a group of one cell."
    D, groups, out = pairwise(Z), np.asarray(groups), []
    for i, own in enumerate(groups):
        mean = {g: D[i, groups == g].sum() / ((groups == g).sum() - (g == own)) for g in set(groups) if g != own or (groups == g).sum() > 1}
        a = mean.pop(own, None)
        out.append(0 if a is None else (min(mean.values()) - a) / max(a, min(mean.values())))
    return np.array(out)


def nmi_ari(a, b):
    "Both from the contingency table."
    n = pd.crosstab(np.asarray(a), np.asarray(b)).to_numpy().astype(float)
    N, r, c = n.sum(), n.sum(1), n.sum(0)
    mutual = sum(n[i, j] / N * np.log(N * n[i, j] / (r[i] * c[j])) for i, j in zip(*n.nonzero(), strict=True))
    entropy = [-(x / N * np.log(x / N)).sum() for x in (r, c)]
    pairs = [(x * (x - 1) / 2).sum() for x in (n, r, c)]
    expected = pairs[1] * pairs[2] / (N * (N - 1) / 2)
    return 2 * mutual / sum(entropy), (pairs[0] - expected) / ((pairs[1] + pairs[2]) / 2 - expected)


def knn_edges(Z, k):
    "The symmetric graph of the k - 1 nearest other cells, from all distances."
    D = pairwise(Z)
    np.fill_diagonal(D, -1)
    near = np.argsort(D, 1, kind="stable")[:, :k]
    A = sp.csr_matrix((np.ones(near.size), (np.repeat(np.arange(len(Z)), k), near.ravel())), D.shape)
    return A + A.T


def graph_conn(Z, labels, k=15):
    A, shares = knn_edges(Z, k), []
    for c in set(labels):
        own = np.flatnonzero(labels == c)
        shares.append(np.bincount(connected_components(A[own][:, own], directed=False)[1]).max() / len(own))
    return np.mean(shares)


def modularity(A, c, gamma):
    A, total, c = A.toarray().astype(float), A.sum(), np.asarray(c)
    degree = A.sum(0)
    return sum(A[i, j] - gamma * degree[i] * degree[j] / total for i in range(len(c)) for j in np.flatnonzero(c == c[i])) / total


# the numbers of A.1

@pytest.mark.parametrize("seed", range(3))
def test_every_number_by_hand(seed):
    Z, obs = blobs(seed=seed, shift=.3 + .5 * seed)
    t, b = obs["cell_type"].to_numpy(), obs["batch"].to_numpy()
    got = evaluate(Z, obs, batch_key="batch", seed=seed)
    sweep = [nmi_ari(t, c) for c in louvain(knn_graph(Z, obs), seed=seed)]
    best = int(np.argmax([round(nmi, 12) for nmi, _ in sweep]))
    per_type = [np.mean(1 - abs(silhouette(Z[t == c], b[t == c]))) for c in set(t)]
    want = {"NMI": sweep[best][0], "ARI": sweep[best][1], "resolution": RESOLUTIONS[best], "ASW_cell": (silhouette(Z, t).mean() + 1) / 2}
    want["AvgBIO"] = (want["NMI"] + want["ARI"] + want["ASW_cell"]) / 3
    want |= {"ASW_batch": 1 - abs(silhouette(Z, b).mean()), "ASW_batch_scib": np.mean(per_type), "GraphConn": graph_conn(Z, t)}
    want["AvgBATCH"] = (want["ASW_batch"] + want["GraphConn"]) / 2
    want["Overall"] = .6 * want["AvgBIO"] + .4 * want["AvgBATCH"]
    assert list(got) == list(want) and all(type(v) is float for v in got.values())
    assert got == pytest.approx(want, abs=1e-5)


def test_both_scores_are_of_the_clustering_that_nmi_chooses():
    "Four clusters of two cells have the higher NMI, two of which one cell is in the wrong place the higher ARI."
    types, fine, coarse = np.repeat([0, 1], 4), np.repeat(range(4), 2), np.array([0, 0, 0, 1, 1, 1, 1, 1])
    nmi, ari = zip(*(nmi_ari(types, c) for c in (fine, coarse)), strict=True)
    assert nmi[0] > nmi[1] and ari[0] < ari[1]
    assert best_clusters(types, np.array([fine, coarse])) == pytest.approx({"NMI": nmi[0], "ARI": ari[0], "resolution": RESOLUTIONS[0]})


def test_graph_connectivity_of_a_torn_type():
    Z, obs = blobs(types=3)
    far = (obs["cell_type"] == "t0").to_numpy() & (np.arange(len(Z)) % 2 == 0)   # half of t0 elsewhere
    Z[far] += 100
    got = evaluate(Z, obs, batch_key="batch")["GraphConn"]
    assert got == pytest.approx(graph_conn(Z, obs["cell_type"].to_numpy())) and got == pytest.approx((.5 + 1 + 1) / 3, abs=.05)


def test_perfect_clusters_score_one():
    Z, obs = blobs(shift=0)
    Z = Z * 1e-3 + 100 * np.eye(6)[np.arange(len(Z)) % 5]
    got = evaluate(Z, obs, batch_key="batch")
    assert min(got["NMI"], got["ARI"], got["GraphConn"]) == pytest.approx(1) and got["ASW_cell"] > .999


def test_papers_table_7_has_this_overall():
    assert .6 * .882 + .4 * .900 == pytest.approx(.889, abs=5e-4)   # scFormer(full): AvgBIO, AvgBATCH, Overall
    assert .6 * .590 + .4 * .851 == pytest.approx(.694, abs=1e-3)   # without MGM and MVC


# Louvain

def test_louvain_optimises_modularity_at_its_resolution():
    Z, obs = blobs()
    adata = knn_graph(Z, obs)
    A = adata.obsp["connectivities"]
    coarse, middle, fine = louvain(adata, [.1, 1., 2.])
    assert coarse.max() < middle.max() < fine.max()
    for gamma, own, others in ((.1, coarse, (middle, fine)), (1., middle, (coarse, fine)), (2., fine, (coarse, middle))):
        assert all(modularity(A, own, gamma) > modularity(A, c, gamma) for c in others)
        half = sp.triu(A, 1).tocoo()
        graph = igraph.Graph(n=len(Z), edges=np.stack([half.row, half.col], 1))
        theirs = graph.modularity(own.tolist(), weights=half.data.tolist(), resolution=gamma)
        assert modularity(A, own, gamma) == pytest.approx(theirs, abs=1e-6)


def test_louvain_is_seeded_and_leaves_every_generator_alone():
    adata = knn_graph(*blobs())
    random.seed(1)
    np.random.seed(1)
    before, numpy_before = random.getstate(), np.random.get_state()[1].tolist()
    first, again = louvain(adata, [.5, 1.]), louvain(adata, [1.])
    assert (first[1] == again[0]).all()
    assert random.getstate() == before and np.random.get_state()[1].tolist() == numpy_before
    igraph.Graph.Erdos_Renyi(n=50, p=.2)                 # igraph draws from `random` again
    assert random.getstate() != before


def test_louvain_gives_the_generator_back_after_an_error():
    with pytest.raises((ValueError, TypeError)):
        louvain(knn_graph(*blobs()), ["high"])
    state = random.getstate()
    igraph.Graph.Erdos_Renyi(n=50, p=.2)
    assert random.getstate() != state


# neighbours and silhouettes

@pytest.mark.parametrize("case", ["plain", "identical", "tiny", "huge", "lattice", "k2"])
def test_weights_are_umaps_in_any_unit(case):
    from umap.umap_ import fuzzy_simplicial_set
    Z, obs = blobs(300)
    if case == "identical":
        Z = np.repeat(Z[:15], 20, axis=0)
    if case == "lattice":
        Z = np.stack(np.meshgrid(*[range(7)] * 3), -1).reshape(-1, 3)[:300].astype(float)
    k = 2 if case == "k2" else 15
    A = knn_graph(Z * {"tiny": 1e-5, "huge": 1e5}.get(case, 1), obs, k).obsp["connectivities"]
    indices, distances = nearest(Z, k)
    small = (distances / max(distances.max(), 1) / 10).astype(np.float32)   # umap-learn 0.5.9 errs where the bandwidth exceeds 1
    want = fuzzy_simplicial_set(sp.coo_matrix((300, 1)), k, None, None, knn_indices=indices, knn_dists=small)[0]
    assert abs(A - want).max() < 1e-4 and abs(A - A.T).max() == 0 and 0 < A.data.min() and A.max() <= 1
    assert A.nnz == want.nnz


def test_graph_is_what_scanpy_reads():
    adata = knn_graph(*blobs(100))
    sc.tl.umap(adata, random_state=0)
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2)
    assert adata.obsm["X_umap"].shape == (100, 2) and adata.obs["leiden"].nunique() > 1


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 60), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([1., 1e-6, 1e6]), st.booleans(), st.data())
def test_nearest_is_exact(n, dims, seed, scale, ties, data):
    rng = np.random.default_rng(seed)
    Z = (rng.integers(0, 3, (n, dims)) if ties else rng.normal(0, 1, (n, dims))) * scale + 10 * scale
    k = data.draw(st.integers(2, n - 1))
    indices, distances = nearest(Z, k)
    D = pairwise(Z)
    assert (indices[:, 0] == np.arange(n)).all() and (distances[:, 0] == 0).all()
    assert all(len(set(row)) == k for row in indices)
    assert np.allclose(distances, np.take_along_axis(D, indices, 1), rtol=1e-9, atol=1e-9 * scale)
    np.fill_diagonal(D, -1)
    assert np.allclose(distances[:, 1:], np.sort(D, 1)[:, 1:k], rtol=1e-6, atol=1e-6 * scale)


def test_nearest_over_several_blocks():
    Z = np.random.default_rng(0).normal(size=(3500, 3)).astype(np.float32)
    assert 2**23 // len(Z) < len(Z)                      # more than one block
    indices, distances = nearest(Z, 5)
    for i in (0, 1234, 2396, 2397, 3499):
        d = np.sqrt(((Z.astype(float) - Z[i]) ** 2).sum(1))
        assert indices[i].tolist() == np.argsort(d)[:5].tolist() and np.allclose(distances[i], np.sort(d)[:5])


def test_identical_cells_are_at_distance_zero():
    Z = np.repeat(np.random.default_rng(0).normal(1e4, 1, (10, 4)), 3, axis=0)
    indices, distances = nearest(Z, 4)
    assert (distances[:, :3] == 0).all() and (distances[:, 3] > 0).all()
    assert (indices[:, :3] // 3 == (np.arange(30) // 3)[:, None]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 4))
def test_silhouettes_by_the_definition(seed, groups, dims):
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.repeat(np.arange(groups), 2), rng.integers(0, groups, 20)])
    left_out = np.r_[codes, [-1, -1]]
    Z = rng.normal(0, 1, (len(left_out), dims)) + 50
    one, two = silhouettes(Z, left_out, np.arange(len(Z)) % 2)
    assert np.allclose(one[:-2], silhouette(Z[:-2], codes)) and np.isnan(one[-2:]).all()
    assert np.allclose(two, silhouette(Z, np.arange(len(Z)) % 2))


def test_many_cells_have_nearly_the_same_scores_and_the_sample_is_said(monkeypatch):
    Z, obs = blobs(900)
    exact, near = evaluate(Z, obs, batch_key="batch"), nearest(Z)[0]
    monkeypatch.setattr(metrics, "MOST_CELLS", 600)
    with pytest.warns(UserWarning, match="900 cells are many: silhouettes are those of 600") as caught:
        sampled = evaluate(Z, obs, batch_key="batch")
    assert caught[0].filename == __file__ and sampled.keys() == exact.keys()
    assert max(abs(sampled[name] - exact[name]) for name in ("AvgBIO", "AvgBATCH", "ASW_cell")) < .03
    found, distances = nearest(Z)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(found, near, strict=True)]) > .99
    assert (found[:, 0] == range(900)).all() and (np.diff(distances) >= 0).all()


# what is left out, and what is refused

def test_missing_labels_are_counted_and_left_out():
    Z, obs = blobs()
    holes = obs.assign(cell_type=obs["cell_type"].where(np.arange(len(obs)) % 7 > 0))
    known = holes["cell_type"].notna().to_numpy()
    with pytest.warns(UserWarning, match=f"{(~known).sum()} of 240 cells have no label") as caught:
        got = evaluate(Z, holes, batch_key="batch")
    assert got == evaluate(Z[known], obs[known], batch_key="batch") and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="no label"):
        assert got == evaluate(Z, holes.astype("category"), batch_key="batch")


def test_no_labels_leave_what_needs_none():
    Z, obs = blobs()
    want = {"ASW_batch": pytest.approx(1 - abs(silhouette(Z, obs["batch"]).mean()))}
    assert evaluate(Z, obs, label_key=None, batch_key="batch") == want
    with pytest.warns(UserWarning, match="label_key has 0 groups"):
        assert evaluate(Z, obs.assign(cell_type=np.nan), batch_key="batch") == want
    assert evaluate(Z, obs, label_key=None) == {}


def test_classes_of_one_cell():
    Z, obs = blobs()
    rare = obs.copy()
    rare.loc[[3, 50], "cell_type"] = ["only one", "another"]
    with pytest.warns(UserWarning, match="2 label groups of one cell"):
        got = evaluate(Z, rare, batch_key="batch")
    kept = ~rare.index.isin([3, 50])
    t = rare["cell_type"].to_numpy()
    sweep = [nmi_ari(t, c)[0] for c in louvain(knn_graph(Z, rare))]
    A = knn_edges(Z, 15)
    shares = [np.bincount(connected_components(A[own][:, own], directed=False)[1]).max() / len(own)
              for c in set(t[kept]) for own in [np.flatnonzero(t == c)]]
    assert got["NMI"] == pytest.approx(max(sweep)) and got["GraphConn"] == pytest.approx(np.mean(shares))
    assert got["ASW_cell"] == pytest.approx((silhouette(Z[kept], t[kept]).mean() + 1) / 2)
    assert got["ASW_batch"] == pytest.approx(1 - abs(silhouette(Z, rare["batch"]).mean()))


def test_too_few_groups():
    Z, obs = blobs()
    with pytest.warns(UserWarning, match="label_key has 1 groups"):
        assert list(evaluate(Z, obs.assign(cell_type="T"), batch_key="batch")) == ["ASW_batch"]
    with pytest.warns(UserWarning, match="batch_key has 1 groups"):
        assert list(evaluate(Z, obs.assign(batch="b"), batch_key="batch")) == ["NMI", "ARI", "resolution", "ASW_cell", "AvgBIO"]
    lone = obs["batch"].where(obs.index > 0, "lone")
    with pytest.warns(UserWarning, match="1 batch groups of one cell"):
        got = evaluate(Z, obs.assign(batch=lone), batch_key="batch")
    assert got["ASW_batch"] == pytest.approx(1 - abs(silhouette(Z[1:], lone[1:]).mean()))


def test_any_form_of_the_same_groups_and_no_change_to_the_input():
    Z, obs = blobs()
    want, before = evaluate(Z, obs, batch_key="batch"), obs.copy()
    number = obs.apply(lambda column: column.str[1:].astype(int))
    for form in (number, number.astype(float), obs.astype("category"), obs.set_axis(["same"] * len(obs)),
                 obs.assign(cell_type=pd.Categorical(obs["cell_type"], categories=[*"xyz", *sorted(set(obs["cell_type"]))]))):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert evaluate(Z, form, batch_key="batch") == want
    frozen = Z.copy()
    frozen.flags.writeable = False
    assert evaluate(frozen, obs, batch_key="batch") == want and obs.equals(before)
    assert evaluate(Z.astype(float), obs, batch_key="batch") == want


def without(obs, n):
    return obs.assign(batch=obs["batch"].where(obs.index >= n))


def with_nan(Z):
    Z = Z.copy()
    Z[[2, 5], 0] = np.nan, np.inf
    return Z


BAD = [
    (lambda Z, obs: (Z[1:], obs, {}), ValueError, r"shape \(239, 6\) and there are 240 cells"),
    (lambda Z, obs: (Z[:, 0], obs, {}), ValueError, r"shape \(240,\)"),
    (lambda Z, obs: (Z[:, :0], obs, {}), ValueError, "one row per cell, one column or more"),
    (lambda Z, obs: (sp.csr_matrix(Z)[:, :0], obs, {}), ValueError, "one column or more"),
    (lambda Z, obs: (Z.astype(str), obs, {}), ValueError, "give numbers"),
    (lambda Z, obs: (Z > 0, obs, {}), ValueError, "the embedding is bool"),
    (lambda Z, obs: (pd.DataFrame(Z).assign(name="x"), obs, {}), ValueError, "the embedding is object"),
    (lambda Z, obs: (with_nan(Z), obs, {}), ValueError, "2 of 240 cells have NaN or infinite values"),
    (lambda Z, obs: (Z + np.inf, obs, {}), ValueError, "240 of 240 cells have NaN or infinite values"),
    (lambda Z, obs: (sp.csr_matrix(with_nan(Z)), obs, {}), ValueError, "2 of 240 cells have NaN or infinite"),
    (lambda Z, obs: (Z.astype(float) * 1e200, obs, {}), ValueError, "would overflow"),
    (lambda Z, obs: (Z * 0 + 3, obs, {}), ValueError, "all 240 cells have the same embedding"),
    (lambda Z, obs: (Z[:0], obs[:0], {}), ValueError, "all 0 cells have the same embedding"),
    (lambda Z, obs: (Z, obs, {"label_key": "celltype"}), KeyError, "'celltype' is not in obs.*cell_type, batch, or pass label_key=None"),
    (lambda Z, obs: (Z, obs, {"batch_key": "donor"}), KeyError, "batch_key='donor' is not in obs"),
    (lambda Z, obs: (Z, obs[[]], {}), KeyError, "no columns"),
    (lambda Z, obs: (Z, without(obs, 3), {"batch_key": "batch"}), ValueError, "3 of 240 cells have no batch"),
    (lambda Z, obs: (Z, obs, {"k": 1}), ValueError, "k must be at least 2"),
]


@pytest.mark.parametrize(("case", "error", "match"), BAD)
def test_bad_input(case, error, match):
    Z, obs, options = case(*blobs())
    with pytest.raises(error, match=match):
        evaluate(Z, obs, **options)


def strict(scores):
    "The scores after a trip through JSON that knows no NaN."
    return json.loads(json.dumps(scores, allow_nan=False))


FORMS = {
    "sparse": sp.csr_matrix, "DataFrame": pd.DataFrame, "float64": np.float64, "longdouble": np.longdouble,
    "Fortran": np.asfortranarray}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_the_same_embedding(form):
    Z, obs = blobs()
    assert evaluate(FORMS[form](Z), obs, batch_key="batch") == evaluate(Z, obs, batch_key="batch")


def test_half_precision_whole_numbers_and_one_dimension():
    Z, obs = blobs()
    full = evaluate(Z, obs, batch_key="batch")
    half = evaluate(Z.astype(np.float16), obs, batch_key="batch")
    assert half["ASW_cell"] == pytest.approx(full["ASW_cell"], abs=1e-3)
    assert half["Overall"] == pytest.approx(full["Overall"], abs=.1)
    assert evaluate((Z * 1000).astype(int), obs)["ASW_cell"] == pytest.approx(full["ASW_cell"], abs=1e-3)
    line = evaluate(Z[:, :1], obs, batch_key="batch")
    assert line["ASW_cell"] == pytest.approx((silhouette(Z[:, :1], obs["cell_type"]).mean() + 1) / 2)


@pytest.mark.parametrize("unit", [1e-60, 1e60])
def test_the_unit_of_the_embedding_does_not_matter(unit):
    Z, obs = blobs()
    want = evaluate(Z, obs, batch_key="batch")
    assert evaluate(Z.astype(float) * unit, obs, batch_key="batch") == pytest.approx(want)


def test_batch_equals_type():
    Z, obs = blobs()
    with pytest.warns(UserWarning, match="no label is found in two batches.*left out") as caught:
        got = evaluate(Z, obs.assign(batch=obs["cell_type"]), batch_key="batch")
    types = evaluate(Z, obs)
    assert caught[0].filename == __file__ and list(got) == [*types, "GraphConn"] and strict(got) == got
    assert {name: got[name] for name in types} == types


def test_two_types_nested_in_each_batch():
    Z, obs = blobs(types=4)
    nested = obs.assign(batch=obs["cell_type"].map({"t0": "a", "t1": "a", "t2": "b", "t3": "b"}))
    with pytest.warns(UserWarning, match="no label is found in two batches"):
        assert not {"ASW_batch", "ASW_batch_scib", "AvgBATCH", "Overall"} & set(evaluate(Z, nested, batch_key="batch"))
    nested.loc[0, "batch"] = "b"                                     # one cell of t0 in the other batch is enough
    assert {"ASW_batch", "Overall"} <= set(evaluate(Z, nested, batch_key="batch"))


def test_a_metric_without_a_value_is_absent():
    "Every type that is in two batches has as many batches as cells: scib has no per-type silhouette."
    Z, obs = blobs(n=80, types=40, batches=2)
    pairs = obs.assign(batch=["a", "b"] * 40, cell_type=[f"t{i // 2}" for i in range(80)])
    got = evaluate(Z, pairs, batch_key="batch")
    assert "ASW_batch_scib" not in got and "Overall" in got and strict(got) == got


@pytest.mark.parametrize("word", ["nan", "NA", "", " None ", "<NA>", "N/A", "NULL"])
def test_text_that_may_mean_missing_is_counted_and_stays_a_type(word):
    Z, obs = blobs()
    renamed = obs.assign(cell_type=obs["cell_type"].replace("t1", word))
    with pytest.warns(UserWarning, match=rf"48 of 240 cells have the text {word!r} in obs\['cell_type'\].*replace it by NaN") as caught:
        assert evaluate(Z, renamed, batch_key="batch") == pytest.approx(evaluate(Z, obs, batch_key="batch"))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"\d+ of 240 cells have the text 'nan' in obs..batch"):
        evaluate(Z, obs.assign(batch=obs["batch"].replace("b0", "nan")), batch_key="batch")


def test_types_called_by_numbers_are_types():
    Z, obs = blobs(types=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for names in (list("01234"), [0, 1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0, 4.0], [True, False, "2", 3, "four"]):
            renamed = obs["cell_type"].map({f"t{i}": name for i, name in enumerate(names)}).astype(object)
            assert evaluate(Z, obs.assign(cell_type=renamed)) == pytest.approx(evaluate(Z, obs))
    assert not MISSING_WORDS & set(map(str, range(16)))


def test_fewer_cells_than_neighbours():
    Z, obs = blobs(10, types=2)
    with pytest.warns(UserWarning, match="10 cells are too few for k=15 neighbours: k=9 is taken") as caught:
        got = evaluate(Z, obs)
    assert caught[0].filename == __file__ and got == evaluate(Z, obs, k=9)
    four = pd.DataFrame({"cell_type": list("aabb")})
    with pytest.warns(UserWarning, match="k=3 is taken"):
        assert strict(evaluate(Z[:4], four))["NMI"] <= 1


def test_many_cells_with_one_embedding_are_said():
    Z, obs = blobs()
    Z[:100] = 0
    with pytest.warns(UserWarning, match="100 of 240 cells share their embedding"):
        assert strict(evaluate(Z, obs, batch_key="batch"))
    Z, obs = blobs()
    Z[:3] = 0                                                        # fewer than k: nothing to say
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(Z, obs)


def test_ways_out_in_the_shell():
    obs = pd.DataFrame({"batch": ["a", "b"]})
    with speaking_shell(), pytest.raises(KeyError, match="label_key='type' is not in obs.*or leave --label-key out"):
        text_column(obs, "type", "label_key")


def test_long_steps_say_how_far_they_are(monkeypatch, capfd):
    "A line at the beginning and one at the end, where nobody looks at a terminal."
    Z = np.random.default_rng(0).normal(size=(60, 4))
    metrics.louvain(metrics.knn_graph(Z, pd.DataFrame(index=range(60))))
    assert capfd.readouterr().err == "", "what is over at once says nothing"
    monkeypatch.setattr(metrics, "LONG", 50)
    metrics.louvain(metrics.knn_graph(Z, pd.DataFrame(index=range(60))))
    said = capfd.readouterr().err
    for part in ("neighbours: 60 of 60 cells, ", "Louvain: 20 of 20 resolutions, ", " to go"):
        assert part in said, said
    assert len(said.splitlines()) < 12
