"""Trees: what is none, three file formats, text that looks like numbers, measures by hand."""
import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from scformer_nb.trees import (
    Taxonomy,
    class_means,
    compare_trees,
    read_tree,
    reference_tree,
    taxonomy,
    tree_distance,
)

TREE = {"Neurons": {"CNS": ["a", "b"], "PNS": ["c"]}, "Non-neurons": ["d", "e"]}


def test_trees_that_are_none(tmp_path):
    (tmp_path / "gap.csv").write_text("type,level 1,level 2\na,x,y\nb,x,\n")
    with pytest.raises(ValueError, match="1 of 2 types of the tree have an empty cell"):
        read_tree(tmp_path / "gap.csv")
    with pytest.raises(ValueError, match="it has no types"):
        read_tree({})
    for text, message in (("((a,b),c;", "a bracket is not closed"), ("(a,b)),c);", "closes that was never opened")):
        (tmp_path / "bad.nwk").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_tree(tmp_path / "bad.nwk")
    with pytest.raises(ValueError, match="is no tree file"):
        read_tree(tmp_path / "tree.xlsx")


def test_names_stay_text_on_the_way_through_a_file(tmp_path):
    "Types and groups that look like numbers or like missing values."
    nested = {"0": {"1.0": ["00", "1.0"], "NA": ["NA"]}, "None": ["None", "nan"]}
    tree = read_tree(nested)
    tree.to_csv(tmp_path / "tree.csv")
    (tmp_path / "tree.json").write_text(json.dumps(nested))
    (tmp_path / "tree.nwk").write_text("(((00,1.0)1.0,(NA)NA)0,(None,'nan')None);")
    for kind in ("csv", "json", "nwk"):
        assert read_tree(tmp_path / f"tree.{kind}").equals(tree)
    assert list(tree.index) == ["00", "1.0", "NA", "None", "nan"] and list(tree["level 1"]) == [*"000", "None", "None"]
    numbers = pd.DataFrame({"level 1": ["x", "x", "y"]}, index=[0, 1, 2])
    assert list(read_tree(numbers).index) == ["0", "1", "2"]


def test_newick_without_names_and_with_lengths(tmp_path):
    (tmp_path / "tree.nwk").write_text("((a:0.1,b:0.2):1,(c,(d,e)):2);\n")
    tree = read_tree(tmp_path / "tree.nwk")
    assert (tree_distance(tree).loc["a"] == [0, 1, 3, 3, 3]).all() and tree_distance(tree).loc["d", ["c", "e"]].tolist() == [2, 1]


def test_newick_names_in_quotes_may_hold_brackets(tmp_path):
    (tmp_path / "tree.nwk").write_text("(('T (CD4)','T, CD8')'T cells',\n (B):1)root;")
    tree = read_tree(tmp_path / "tree.nwk")
    assert tree["level 1"].to_dict() == {"T (CD4)": "T cells", "T, CD8": "T cells", "B": "branch 2"}


def test_too_few_types_and_cells_that_are_none():
    Z = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(ValueError, match="2 types make no tree"):
        taxonomy(class_means(Z, np.repeat(["a", "b"], 10)))
    Z[:2, 1] = np.nan
    with pytest.raises(ValueError, match="2 of 20 cells have NaN"):
        class_means(Z, np.repeat(["a", "b"], 10))


def test_triplets_and_clades_by_hand():
    tree = read_tree(TREE)
    D = tree_distance(tree).to_numpy()
    resolved = [t for t in combinations(range(5), 3) if len({D[t[0], t[1]], D[t[0], t[2]], D[t[1], t[2]]}) > 1]
    assert len(resolved) == 10
    wrong = Taxonomy(list("abcde"), reference_tree(tree.loc[list("abdce")]).linkage)  # c and d change places
    scores = compare_trees(wrong, tree)
    assert compare_trees(reference_tree(tree), tree)[["triplets", "clades"]].tolist() == [1, 1]
    assert scores["triplets"] == 0.3 and np.isclose(scores["clades"], 1 / 3)


def test_a_triplet_that_the_tree_leaves_open_is_not_asked_for():
    tree, finer = read_tree({"x": ["a", "b", "c"], "y": ["d"]}), read_tree({"x": {"1": ["a"], "2": ["b", "c"]}, "y": ["d"]})
    assert compare_trees(reference_tree(finer), tree)["triplets"] == 1
