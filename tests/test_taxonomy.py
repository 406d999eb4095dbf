"""Taxonomy: definitions against brute force, simulated species, data with a known tree."""
import warnings
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy.cluster.hierarchy import cut_tree
from scipy.spatial.distance import squareform

from scformer_nb.simulate import simulate_species
from scformer_nb.taxonomy import MOUSE_BRAIN, affinity_correlation, level_accuracy, read_species, recovery_scores, thin
from scformer_nb.trees import class_means, compare_trees, read_tree, taxonomy, tree_distance
from scformer_nb.wasserstein import affinity

TREE = {"Neurons": {"CNS": ["a", "b"], "PNS": ["c"]}, "Non-neurons": ["d", "e"]}


def clouds(n, dims=6, seed=0):
    rng = np.random.default_rng(seed)
    Z = rng.normal(0, 3, (len(n), dims)).repeat(n, 0) + rng.normal(0, 1, (sum(n), dims))
    return Z, np.repeat(list("abcdefgh")[:len(n)], n)


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
        shares = [np.mean([p[b] == g for b, g in zip(branch, groups[found.types], strict=True)])
                  for p in permutations("012")]
        assert level_accuracy(found, groups.to_frame("level 1"))["level 1"] == max(shares)


def test_affinity_correlation_is_one_for_the_tree_itself_and_not_significant_for_noise():
    D = tree_distance(MOUSE_BRAIN)
    assert affinity_correlation(D, MOUSE_BRAIN).round(3).tolist() == [1, 1, 0.001]
    noise = squareform(np.random.default_rng(0).uniform(1, 2, 120))
    p = affinity_correlation(pd.DataFrame(noise, D.index, D.index), MOUSE_BRAIN)
    assert abs(p["r"]) < 0.4 and p["p"] > 0.01


def test_shuffles_are_of_types_not_of_distances():
    "Of the 120 orders of five types four leave this tree as it is."
    tree = read_tree(TREE)
    assert abs(affinity_correlation(tree_distance(tree), tree)["p"] - 4 / 120) < .015


def test_simulated_species_follow_their_tree():
    tree, before = read_tree(TREE), np.random.get_state()[1].copy()
    species = simulate_species(tree, {"fish": ["e"], "fly": [], "worm": ["a", "b"]}, n_cells=200, n_genes=60, orthologs=0.25)
    found = {s: "".join(sorted(set(x.obs.cell_type))) for s, x in species.items()}
    assert found == {"fish": "abcd", "fly": "abcde", "worm": "cde"}
    assert all((x.var.ortholog != "").sum() == 15 and (x.X.data == np.rint(x.X.data)).all() for x in species.values())
    assert all(x.uns["truth"].equals(species["fly"].uns["truth"]) for x in species.values())
    assert (np.random.get_state()[1] == before).all()


def test_scores_of_a_species_whose_clusters_are_the_tree():
    tree, rng = read_tree(TREE), np.random.default_rng(0)
    Z = np.repeat(9.0 * pd.get_dummies(tree).to_numpy(), 12, axis=0)
    labels = np.repeat(np.array([*tree.index], dtype=object), 12)
    Z = np.hstack([Z, np.repeat(np.eye(5), 12, axis=0)]) + rng.normal(0, 0.01, (60, 5 + Z.shape[1]))
    scores = recovery_scores(Z, labels, tree)
    assert scores["level 1"] == scores["level 2"] == scores["triplets"] == scores["clades"] == 1
    assert scores["level 1 chance"] < 1 and scores["r mass"] > 0.95
    labels[labels == "a"] = None
    assert "level 1" in recovery_scores(Z, labels, tree)
    assert recovery_scores(Z, np.where(labels == "b", None, labels), tree) == {}


def save(folder, adata, name):
    folder.mkdir(exist_ok=True)
    adata.write_h5ad(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def species():
    "Types that look like numbers or like missing values; the last is in the fly only."
    names = dict(zip("abcde", ["0", "1.0", "NA", "None", "nan"], strict=True))
    tree = read_tree(TREE)
    found = simulate_species(tree, {"fish": ["e"], "fly": []}, n_cells=150, n_genes=60, seed=1)
    for adata in found.values():
        adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).map(names)
        del adata.uns["truth"]
    return found, tree.rename(names)


def test_labels_of_files_stay_text(species, tmp_path):
    adatas, tree = species
    tree.to_csv(tmp_path / "tree.csv")
    paths = [save(tmp_path, x, f"{s}.h5ad") for s, x in adatas.items()]
    files = dict(first=paths[0], second=paths[1], label_key="cell_type", tree=str(tmp_path / "tree.csv"))
    with pytest.warns(UserWarning, match="cells of fly have cell_type='nan' or none: most likely missing"):
        found, known = read_species("", files=files)
    assert set(found["fly"].obs["type"]) == {"0", "1.0", "NA", "None", "nan"} == set(known.index)
    assert not any(x.obs["leaf"].isna().any() for x in found.values())


def test_files_of_one_name_are_told_apart_by_their_folders(species, tmp_path):
    adatas, _ = species
    human = save(tmp_path / "human", adatas["fish"], "cells.h5ad")
    mouse = save(tmp_path / "mouse", adatas["fish"], "cells.h5ad")
    found, tree = read_species("", files=dict(first=human, second=mouse, label_key="cell_type"))
    assert list(found) == ["human", "mouse"] and tree is None
    for first, second, message in (
        (human, human, "have one name, and it names the species: rename one, or its folder"),
        (human, "", "give both first and second"),
    ):
        with pytest.raises(ValueError, match=message):
            read_species("", files=dict(first=first, second=second, label_key="cell_type"))


def test_labels_that_cannot_be_compared(species, tmp_path):
    adatas, _ = species
    fish = save(tmp_path, adatas["fish"], "fish.h5ad")
    other = adatas["fly"].copy()
    other.obs["cell_type"] = "fly " + other.obs["cell_type"].astype(str)
    other.obs["gaps"] = other.obs["cell_type"].where(np.arange(150) > 7)
    other = save(tmp_path, other, "other.h5ad")
    for label_key, message in (
        ("cell_type", "no cell type in common"),
        ("gaps", "'gaps' is missing for 8 of 150 cells"),
        ("type", "label_key='type' is not a column"),
    ):
        with pytest.raises(ValueError, match=message):
            read_species("", files=dict(first=other, second=fish, label_key=label_key))
    with pytest.raises(ValueError, match="dataset='brain' is none of simulated, cortex"):
        read_species("brain")


def test_thinning_keeps_rare_types(species):
    fly = species[0]["fly"].copy()
    fly.obs["type"] = ["rare"] * 3 + ["often"] * 147
    assert thin(fly, 40).obs["type"].value_counts().to_dict() == {"often": 40, "rare": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(read_species("simulated", small=True)[1]) == ["level 1", "level 2", "level 3"]
