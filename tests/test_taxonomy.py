"""Affinity, taxonomy and their page: what a user may get wrong, definitions against brute force, two species from a user's own files."""
import warnings
from itertools import combinations, permutations

import h5py
import nbformat
import notebooks  # tools/notebooks.py
import numpy as np
import pandas as pd
import pytest
from scipy.cluster.hierarchy import cut_tree
from scipy.spatial.distance import squareform
from test_pages import run

from scformer_nb.taxonomy import (
    MOUSE_BRAIN,
    Taxonomy,
    affinity_correlation,
    class_means,
    compare_trees,
    known,
    level_accuracy,
    read_tree,
    simulate_species,
    taxonomy,
    tree_distance,
)
from scformer_nb.wasserstein import affinity, sinkhorn, sliced, transport

PAGE = notebooks.ROOT / "nbs/24_exp_cross_species.ipynb"
TREE = {"Neurons": {"CNS": ["a", "b"], "PNS": ["c"]}, "Non-neurons": ["d", "e"]}


def clouds(n, dims=6, seed=0):
    rng = np.random.default_rng(seed)
    Z = rng.normal(0, 3, (len(n), dims)).repeat(n, 0) + rng.normal(0, 1, (sum(n), dims))
    return Z, np.repeat(list("abcdefgh")[:len(n)], n)


# --- affinity

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
    for method in ("exact", "sinkhorn", "sliced"):
        affinity(Z, labels, max_cells=10, method=method, progress=False)
    simulate_species(n_cells=200, n_genes=40)
    assert (np.random.get_state()[1] == before).all()


def test_degenerate_clusters_have_finite_distances():
    same, other = np.ones((6, 3)), np.ones((9, 3)) + 2
    for distance in (lambda a, b: transport(a, b)[0], sinkhorn, sliced):
        assert np.isclose(distance(same, same), 0) and np.isfinite(distance(same, other))
    assert np.isclose(transport(same, other)[0], np.sqrt(12))
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
    with pytest.raises(ValueError, match="2 of 30 cells have NaN or infinite values"):
        class_means(bad, labels)
    with pytest.raises(ValueError, match="shape .30, 6. and obs has 29 rows"):
        affinity(Z, labels[:29])
    with pytest.raises(ValueError, match="normalise is mass or shape"):
        affinity(Z, labels, normalise="z")
    with pytest.raises(ValueError, match="2 types make no tree"):
        taxonomy(class_means(Z[:20], labels[:20]))


def test_small_classes_and_unequal_sizes_are_counted():
    Z, labels = clouds((200, 9, 4, 3))
    with pytest.warns(UserWarning) as caught:
        A = affinity(Z, labels, progress=False)
    text = " / ".join(str(w.message) for w in caught)
    assert "2 of 4 types have fewer than 5 cells and are left out: c, d" in text and list(A) == ["a", "b"]
    assert "the largest type has 22 times the cells of the smallest" in text
    with pytest.warns(UserWarning, match="1 of 3 types of mouse have fewer than 5 cells"):
        affinity({"human": Z[:209], "mouse": Z[:213]}, {"human": labels[:209], "mouse": labels[:213]}, max_cells=50, progress=False)


# --- trees

def test_trees_that_are_none(tmp_path):
    (tmp_path / "gap.csv").write_text("type,level 1,level 2\na,x,y\nb,x,\n")
    with pytest.raises(ValueError, match="2 types, 2 levels and 1 empty cells"):
        read_tree(tmp_path / "gap.csv")
    with pytest.raises(ValueError, match="without a group"):
        read_tree({})
    for text, message in (("((a,b),c;", "1 brackets are not closed"), ("(a,b)),c);", "closes that was never opened")):
        (tmp_path / "bad.nwk").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_tree(tmp_path / "bad.nwk")
    with pytest.raises(ValueError, match="is no tree file"):
        read_tree(tmp_path / "tree.xlsx")


def test_newick_without_names_and_with_lengths(tmp_path):
    (tmp_path / "tree.nwk").write_text("((a:0.1,b:0.2):1,(c,(d,e)):2);\n")
    tree = read_tree(tmp_path / "tree.nwk")
    assert (tree_distance(tree).loc["a"] == [0, 1, 3, 3, 3]).all() and tree_distance(tree).loc["d", ["c", "e"]].tolist() == [2, 1]


def test_a_tree_that_lacks_a_type_or_knows_more():
    Z, labels = clouds((10,) * 5)
    tree, found = read_tree(TREE), taxonomy(class_means(Z, labels))
    with pytest.raises(ValueError, match="the tree lacks 1 of 5 types: e"):
        level_accuracy(found, tree.drop("e"))
    with pytest.warns(UserWarning, match="1 of 6 types of the tree are not in the data and are left out: f"):
        compare_trees(found, pd.concat([tree, tree.loc[["e"]].rename({"e": "f"})]))
    with pytest.raises(ValueError, match="four types at two distances"):
        affinity_correlation(affinity(Z, labels, progress=False), tree.assign(**{"level 1": "x", "level 2": "y"}))


def test_level_accuracy_is_the_best_matching():
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = taxonomy(pd.DataFrame(rng.normal(size=(8, 3)), index=list("abcdefgh")))
        groups = pd.Series(rng.permutation([0, 0, 0, 1, 1, 2, 2, 2]).astype(str), index=list("abcdefgh"))
        branch = cut_tree(found.linkage, 3).ravel()
        best = max(np.mean([p[b] == g for b, g in zip(branch, groups[found.types], strict=True)]) for p in permutations("012"))
        assert level_accuracy(found, groups.to_frame("level 1"))["level 1"] == best


def test_triplets_and_clades_by_hand():
    tree = read_tree(TREE)
    D = tree_distance(tree).to_numpy()
    resolved = [t for t in combinations(range(5), 3) if len({D[t[0], t[1]], D[t[0], t[2]], D[t[1], t[2]]}) > 1]
    assert len(resolved) == 10
    wrong = Taxonomy(list("abcde"), known(tree.loc[list("abdce")]).linkage)  # c and d change places
    scores = compare_trees(wrong, tree)
    assert compare_trees(known(tree), tree)[["triplets", "clades"]].tolist() == [1, 1]
    assert scores["triplets"] == 0.3 and np.isclose(scores["clades"], 1 / 3) and scores["level 1"] == 0.6


def test_affinity_correlation_is_one_for_the_tree_itself_and_not_significant_for_noise():
    D = tree_distance(MOUSE_BRAIN)
    assert affinity_correlation(D, MOUSE_BRAIN).round(3).tolist() == [1, 1, 0.001]
    noise = squareform(np.random.default_rng(0).uniform(1, 2, 120))
    p = affinity_correlation(pd.DataFrame(noise, D.index, D.index), MOUSE_BRAIN)
    assert abs(p["r"]) < 0.4 and p["p"] > 0.01


def test_simulated_species_follow_their_tree():
    tree = read_tree(TREE)
    species = simulate_species(tree, {"fish": ["e"], "fly": [], "worm": ["a", "b"]}, n_cells=200, n_genes=60, orthologs=0.25)
    assert {s: "".join(sorted(set(x.obs.cell_type))) for s, x in species.items()} == {"fish": "abcd", "fly": "abcde", "worm": "cde"}
    assert all((x.var.ortholog != "").sum() == 15 and (x.X.data == np.rint(x.X.data)).all() for x in species.values())
    assert all(x.uns["truth"].equals(species["fly"].uns["truth"]) for x in species.values())


# --- the page

def cells_of(**parameters):
    "The page's names after its data section, with these parameters."
    names = {}
    for cell in nbformat.read(PAGE, 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
            if "known_tree = data(" in cell.source:
                return names


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Two species as a user has them: other labels, counts in a layer, five types, one in the second only, one of three cells."
    folder = tmp_path_factory.mktemp("species")
    species = simulate_species(read_tree(TREE), {"fish": ["e"], "fly": []}, n_cells=150, n_genes=60, seed=1)
    for s, adata in species.items():
        adata.obs = adata.obs.rename(columns={"cell_type": "annotation"})
        adata.obs["annotation"] = adata.obs["annotation"].astype(str)
        adata.layers["raw"] = adata.X.copy()
        adata.X = np.log1p(adata.X)
        adata.write_h5ad(folder / f"{s}.h5ad")
    fly = species["fly"].copy()
    fly.obs["annotation"] = "fly " + fly.obs["annotation"].astype(str)
    fly.write_h5ad(folder / "strange.h5ad")
    read_tree(TREE).to_csv(folder / "tree.csv")
    return folder


def test_bad_parameters_of_the_page(files):
    first, own = str(files / "fish.h5ad"), dict(label_key="annotation", layer="raw")
    for given, message in (
        (dict(first=first), "give both first and second, or neither"),
        (dict(dataset="brain"), "dataset='brain' is none of simulated, cortex"),
        (dict(first=first, second=first, **own), "both files are called fish"),
        (dict(first=first, second=str(files / "strange.h5ad"), **own), "no cell type in common"),
        (dict(first=first, second=str(files / "fly.h5ad"), label_key="type"), "label_key='type' is not a column"),
        (dict(first=first, second=str(files / "fly.h5ad"), label_key="annotation"), "X must hold raw counts"),
    ):
        with pytest.raises(ValueError, match=message):
            cells_of(**given)


def test_the_tree_of_the_page(files):
    own = dict(first=str(files / "fish.h5ad"), second=str(files / "fly.h5ad"), label_key="annotation", layer="raw")
    (files / "short.json").write_text('{"Neurons": ["a", "b", "c"], "Non-neurons": ["d"]}')
    with pytest.raises(ValueError, match="the tree lacks 1 of 5 types: e"):
        cells_of(**own, tree=str(files / "short.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = cells_of(**own, tree=str(files / "tree.csv"))
    assert list(names["species"]) == ["fish", "fly"] and names["shared"] == list("abcd") and names["known_tree"].shape == (5, 2)


def test_page_on_a_users_two_files(files, tmp_path):
    own = dict(first=str(files / "fish.h5ad"), second=str(files / "fly.h5ad"), label_key="annotation", layer="raw")
    methods, out = ["PCA", "CrossSpecies", "CrossSpecies, aligned", "Gromov-Wasserstein"], tmp_path / "out"
    notebook = run(PAGE, tmp_path, **own, tree=str(files / "tree.csv"), methods=methods, out=str(out))
    assert not notebook.metadata.papermill.exception
    lines = pd.read_json(out / "cross_species.jsonl", lines=True)
    assert set(lines.dataset) == {"fish_fly"} and set(lines.method) == set(methods)
    scores = lines.set_index(["method", "option"]).metrics["CrossSpecies", "own genes"]
    assert {"fly level 1", "fly triplets", "fish to fly", "counterparts", "only in fly, AUC"} <= set(scores)
    shares = [v for k, v in scores.items() if v is not None and not any(m in k for m in (" r ", "cophenetic", ", W"))]
    assert all(0 <= v <= 1 for v in shares)
    drawn = {f.name for f in (out / "cross_species").iterdir()}
    assert {"fish_fly_figure3_types.png", "fish_fly_figure4.png", "fish_fly_figure5.png"} <= drawn


def test_page_on_the_papers_atlases(tmp_path, monkeypatch):
    "Small files in the published layouts: Allen's two csv tables, mousebrain.org's loom of genes x cells."
    rng, atlas = np.random.default_rng(0), simulate_species(n_cells=320, n_genes=60, seed=2)
    human, mouse = atlas.values()
    names = {"Telencephalon interneurons": ("GABAergic", "VIP"), "Telencephalon projecting neurons": ("Glutamatergic", "IT"),
        "Astroependymal cells": ("Non-neuronal", "Astrocyte"), "Oligodendrocytes": ("Non-neuronal", "Oligodendrocyte"),
        "Vascular cells": ("Non-neuronal", "VLMC"), "Immune cells": ("Non-neuronal", "Microglia")}
    types = human.obs["cell_type"].astype(str)
    human = human[types.isin(list(names)).to_numpy()]
    meta = pd.DataFrame([names[t] for t in human.obs["cell_type"]], human.obs_names, ["class_label", "subclass_label"])
    meta = meta.assign(cluster_label="c", external_donor_name_label="H1").rename_axis("sample_name")
    meta.iloc[rng.permutation(len(meta))].to_csv(tmp_path / "allen_human_cortex_metadata.csv")
    counts = pd.DataFrame(human.X.toarray().astype(int), human.obs_names.rename("sample_name"), human.var_names)
    counts.to_csv(tmp_path / "allen_human_cortex_matrix.csv")
    with h5py.File(tmp_path / "l5_all.loom", "w") as f:
        f["matrix"] = mouse.X.toarray().T
        f["row_attrs/Gene"] = mouse.var_names.to_numpy().astype("S")
        columns = dict.fromkeys(["CellID", "SampleID", "ClusterName", *(f"TaxonomyRank{i}" for i in (1, 2, 4))], mouse.obs_names)
        for key, values in (columns | {"TaxonomyRank3": mouse.obs["cell_type"]}).items():
            f[f"col_attrs/{key}"] = values.to_numpy().astype("S")
    monkeypatch.setenv("SCFORMER_DATA_DIR", str(tmp_path))
    methods, out = ["PCA", "CrossSpecies", "CrossSpecies, aligned"], tmp_path / "out"
    notebook = run(PAGE, tmp_path, dataset="atlases", methods=methods, out=str(out))
    assert not notebook.metadata.papermill.exception
    lines = pd.read_json(out / "cross_species.jsonl", lines=True)
    assert set(lines.dataset) == {"atlases"} and set(lines.method) == set(methods)
    scores = lines.set_index(["method", "option"]).metrics["CrossSpecies", "own genes"]
    assert {"mouse level 1", "human level 1", "human to mouse", "counterparts", "only in mouse, AUC"} <= set(scores)
