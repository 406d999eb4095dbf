"""Every number of appendix A.1 against a computation by hand; the ledger against killed and concurrent runs; bad input."""
import io
import json
import multiprocessing
import random
import warnings

import anndata as ad
import igraph
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from scformer_nb import evaluation
from scformer_nb.evaluation import RESOLUTIONS, Ledger, evaluate, knn_graph, louvain, nearest, plot_history, plot_umap, results_table


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
    one, two = evaluation._silhouettes(Z, left_out, np.arange(len(Z)) % 2)
    assert np.allclose(one[:-2], silhouette(Z[:-2], codes)) and np.isnan(one[-2:]).all()
    assert np.allclose(two, silhouette(Z, np.arange(len(Z)) % 2))


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
    assert evaluate(Z, obs, batch_key="cell_type")["ASW_batch"] == pytest.approx(1 - abs(silhouette(Z, obs["cell_type"]).mean()))


def without(obs, n):
    return obs.assign(batch=obs["batch"].where(obs.index >= n))


def with_nan(Z):
    Z = Z.copy()
    Z[[2, 5], 0] = np.nan, np.inf
    return Z


BAD = [
    (lambda Z, obs: (Z[1:], obs, {}), ValueError, r"shape \(239, 6\) and obs has 240 rows"),
    (lambda Z, obs: (Z[:, 0], obs, {}), ValueError, r"shape \(240,\)"),
    (lambda Z, obs: (sp.csr_matrix(Z), obs, {}), ValueError, "give numbers, one row per cell"),
    (lambda Z, obs: (Z.astype(str), obs, {}), ValueError, "give numbers"),
    (lambda Z, obs: (with_nan(Z), obs, {}), ValueError, "2 of 240 cells have NaN or infinite values"),
    (lambda Z, obs: (Z, obs, {"label_key": "celltype"}), KeyError, "'celltype' is not in obs.*cell_type, batch, or pass label_key=None"),
    (lambda Z, obs: (Z, obs, {"batch_key": "donor"}), KeyError, "batch_key='donor' is not in obs"),
    (lambda Z, obs: (Z, obs[[]], {}), KeyError, "no columns"),
    (lambda Z, obs: (Z, without(obs, 3), {"batch_key": "batch"}), ValueError, "3 of 240 cells have no batch"),
    (lambda Z, obs: (Z[:10], obs[:10], {}), ValueError, "k=15 neighbours of 10 cells"),
    (lambda Z, obs: (Z, obs, {"k": 1}), ValueError, "k must be at least 2"),
]


@pytest.mark.parametrize(("case", "error", "match"), BAD)
def test_bad_input(case, error, match):
    Z, obs, options = case(*blobs())
    with pytest.raises(error, match=match):
        evaluate(Z, obs, **options)


# the ledger

RUN = {"dataset": "blobs", "method": "PCA", "option": "full", "seed": 0, "settings": {"n_hvg": 1200, "lr": [1e-3, .9]}}


def test_a_finished_line_is_not_computed_again(tmp_path):
    calls = []
    ledger = Ledger(tmp_path / "figures" / "clustering.jsonl")
    first = ledger.get_or_run(**RUN, fn=lambda: calls.append(1) or {"AvgBIO": np.float32(.5), "NMI": np.nan, "n": np.int64(3)})
    second = Ledger(str(ledger.path)).get_or_run(**RUN | {"settings": {"lr": (1e-3, .9), "n_hvg": np.int64(1200)}}, fn=lambda: 1 / 0)
    assert calls == [1] and first == second == json.loads(ledger.path.read_text())
    assert first["experiment"] == "clustering" and first["metrics"] == {"AvgBIO": .5, "NMI": None, "n": 3} and first["seconds"] >= 0
    assert set(first) == {"experiment", "dataset", "method", "option", "seed", "settings", "metrics", "seconds", "versions"}
    assert set(first["versions"]) == {"scformer_nb", "torch", "scanpy", "scib", "python"}


def test_other_settings_are_another_run(tmp_path):
    ledger = Ledger(tmp_path / "x.jsonl")
    for value, n_hvg in ((.1, 1200), (.2, 2000)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ledger.get_or_run(**RUN | {"settings": {"n_hvg": n_hvg}}, fn=lambda value=value: {"AvgBIO": value})
    assert "n_hvg: 1200 -> 2000" in str(caught[0].message) and caught[0].filename == __file__
    assert ledger.get_or_run(**RUN | {"settings": {"n_hvg": 1200}}, fn=lambda: 1 / 0)["metrics"] == {"AvgBIO": .1}
    assert len(ledger.table()) == len(ledger.summary()) == 2
    line = json.loads(ledger.path.read_text().splitlines()[0])
    with ledger.path.open("a") as file:                  # the newest of equal settings wins
        file.write(json.dumps(line | {"metrics": {"AvgBIO": .9}}) + "\n")
    assert ledger.get_or_run(**RUN | {"settings": {"n_hvg": 1200}}, fn=lambda: 1 / 0)["metrics"] == {"AvgBIO": .9}
    assert sorted(ledger.table()["AvgBIO"]) == [.2, .9]


def test_a_run_killed_at_any_byte_costs_one_line(tmp_path):
    ledger = Ledger(tmp_path / "x.jsonl")
    for seed in (0, 1):
        ledger.get_or_run(**RUN | {"seed": seed}, fn=lambda: {"AvgBIO": .5})
    whole = ledger.path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole) + 1):
        ledger.path.write_bytes(whole[:end])
        calls = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            line = ledger.get_or_run(**RUN | {"seed": 1}, fn=lambda calls=calls: calls.append(1) or {"AvgBIO": .5})
            assert len(calls) == (end < len(whole) - 1) and line["seed"] == 1
            assert ledger.table()["seed"].tolist() == [0, 1]


@pytest.mark.parametrize("junk", [b"[1, 2]", b"3", b"null", b'{"experiment": "x"}', b"\xff\xfe", b"{" * 10])
def test_lines_of_something_else_are_counted_and_skipped(tmp_path, junk):
    ledger = Ledger(tmp_path / "x.jsonl")
    ledger.get_or_run(**RUN, fn=lambda: {"AvgBIO": .5})
    ledger.path.write_bytes(junk + b"\n\n" + ledger.path.read_bytes())
    with pytest.warns(UserWarning, match="1 lines are cut off"):
        assert len(ledger.table()) == 1


def append_many(path, who):
    ledger = Ledger(path)
    for seed in range(50):
        ledger.get_or_run("blobs", who, "x" * 3000, seed, {}, lambda seed=seed: {"AvgBIO": seed})


def test_two_processes_append(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=append_many, args=(tmp_path / "x.jsonl", who)) for who in ("PCA", "HVG")]
    [w.start() for w in workers]
    [w.join(120) for w in workers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = Ledger(tmp_path / "x.jsonl").table()
    assert len(table) == 100 and table.groupby("method")["AvgBIO"].sum().tolist() == [1225, 1225]


def test_a_failed_run_writes_nothing_and_a_bad_place_is_found_first(tmp_path):
    ledger = Ledger(tmp_path / "x.jsonl")
    with pytest.raises(ZeroDivisionError):
        ledger.get_or_run(**RUN, fn=lambda: 1 / 0)
    with pytest.raises(TypeError, match="cannot be written to a ledger"):
        ledger.get_or_run(**RUN | {"settings": {"model": object()}}, fn=lambda: {})
    assert ledger.table().empty and list(ledger.table()) == ["experiment", "dataset", "method", "option", "seed", "settings", "seconds"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Ledger(tmp_path / "file" / "x.jsonl").get_or_run(**RUN, fn=lambda: pytest.fail("computed before the folder was tried"))


def test_summary_is_mean_and_sd_over_seeds(tmp_path):
    ledger = Ledger(tmp_path / "x.jsonl")
    for method, values in {"PCA": [.1, .2, .6], "HVG": [.5]}.items():
        for seed, value in enumerate(values):
            ledger.get_or_run("blobs", method, "full", seed, {}, lambda value=value: {"AvgBIO": value})
    summary = ledger.summary().set_index("method")
    assert summary.loc["PCA", "AvgBIO"] == pytest.approx(.3)
    assert summary.loc["PCA", "AvgBIO_sd"] == pytest.approx(np.std([.1, .2, .6], ddof=1))
    assert summary["n_seeds"].to_dict() == {"PCA": 3, "HVG": 1} and np.isnan(summary.loc["HVG", "AvgBIO_sd"])
    assert Ledger(tmp_path / "none.jsonl").summary().empty and not (tmp_path / "none.jsonl").exists()


# tables and figures

def png(fig):
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=40)
    return buffer.getvalue()


def test_results_table():
    table = results_table({"HVG": {"AvgBIO": .5, "NMI": .4, "resolution": 1.}, "PCA": {"AvgBIO": .7, "NMI": .3}, "none": {"NMI": .9}})
    assert table.index.tolist() == ["PCA", "HVG", "none"] and table.columns.tolist() == ["AvgBIO", "NMI"]
    assert table["AvgBIO"].tolist() == ["0.700 *", "0.500", ""] and table.loc["none", "NMI"] == "0.900"
    assert results_table({"a": {"AvgBIO": .9, "Overall": .1}, "b": {"AvgBIO": .1, "Overall": .9}}).index.tolist() == ["b", "a"]


def test_plot_umap(tmp_path):
    Z, obs = blobs(120)
    obs["many"] = [f"g{i % 30}" for i in range(120)]
    obs["holes"] = obs["batch"].where(obs.index > 9)
    adata = ad.AnnData(obs=obs.set_axis(map(str, obs.index)), obsm={"X_scformer": Z})
    fig = plot_umap(adata, color=["cell_type", "many", "holes"])
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in fig.axes]
    assert legends[0] == [f"t{i}" for i in range(5)] and len(legends[1]) == 30 and legends[2] == ["b0", "b1", "b2", "none"]
    assert legends[1][0] == "1  g0" and list(adata.obsm) == ["X_scformer"] and not adata.uns
    first = png(fig)
    assert first == png(plot_umap(adata, color=["cell_type", "many", "holes"])) and len(plot_umap(adata, color="batch").axes) == 1
    boxes = [ax.get_legend().get_window_extent() for ax in fig.axes]
    assert not any(box.overlaps(ax.get_window_extent()) for box in boxes for ax in fig.axes)
    for wrong in ({"basis": "X_pca"}, {"color": ["celltype"]}):
        with pytest.raises(KeyError, match="name one of"):
            plot_umap(adata, **wrong)


def test_plot_history():
    history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3., 2., 1.], "valid_loss": [3., np.nan, 4.]})
    history = history.assign(train_mgm=1., valid_ecs=np.nan, lr=1)
    fig = plot_history(history)
    assert [ax.get_title() for ax in fig.axes] == ["loss", "mgm", "ecs"] and png(fig)
    assert fig.axes[0].lines[-1].get_xdata() == [1, 1]    # the best validation epoch
    assert len(plot_history(pd.DataFrame({"epoch": [1]} | {f"train_{i}": [1.] for i in "abcd"})).axes) == 6
    for wrong in (history[["epoch", "lr"]], history.drop(columns="epoch")):
        with pytest.raises(ValueError, match="at least one train_"):
            plot_history(wrong)
