"""Reference mapping: what the confidence must and must not depend on, how often it errs where the truth is known, bad input."""
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest

from scformer_nb.mapping import Reference, build_reference, held_out_neighbours
from scformer_nb.recipe import DEFAULT, PAPER
from scformer_nb.scformer import ScFormer
from scformer_nb.simulate import simulate

SMALL = dict(dim=16, n_blocks=1, d_ff=16, max_masked=16, batch_size=16)


def clouds(n, types=4, shift=0.0, seed=0):
    "Points of well separated types in 10 dimensions."
    rng = np.random.default_rng(seed)
    label = rng.integers(0, types, n)
    return np.eye(10)[label] * 8 + rng.normal(0, 1, (n, 10)) + shift, np.array([f"type {i}" for i in label])


Z, LABELS = clouds(1000)


@pytest.fixture(scope="module")
def reference():
    return Reference(Z, LABELS)


def test_labels_are_right_and_few_cells_are_lost(reference):
    "alpha of the cells become unknown when the query is like the reference; five sd of that share are allowed for."
    query, truth = clouds(2000, seed=1)
    table = reference.transfer(query)
    assert (table["nearest"] == truth).mean() > 0.99
    assert abs((table["label"] == "unknown").mean() - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_alpha_is_what_is_lost(alpha):
    lost = (Reference(Z, LABELS, alpha=alpha).transfer(clouds(2000, seed=1)[0])["label"] == "unknown").mean()
    assert abs(lost - alpha) < 5 * np.sqrt(alpha * (1 - alpha) / 1000)


def test_a_type_that_the_reference_lacks_is_unknown():
    seen = LABELS != "type 3"
    query, truth = clouds(1000, seed=1)
    table = Reference(Z[seen], LABELS[seen]).transfer(query)
    unknown = table["label"] == "unknown"
    assert unknown[truth == "type 3"].mean() > 0.95 and unknown[truth != "type 3"].mean() < 0.1


def test_between_two_types_the_confidence_falls(reference):
    middle = np.eye(10)[:2].mean(0) * 8 + np.random.default_rng(2).normal(0, 0.1, (50, 10))
    assert reference.transfer(middle)["confidence"].max() < reference.transfer(clouds(200, seed=1)[0])["confidence"].median()


@pytest.mark.parametrize("seed", range(3))
def test_a_reference_of_several_batches_is_ready_for_another(seed):
    "Batches are held out whole, so a query that is shifted as they are loses few cells; held out one by one, the cells know no shift."
    rng = np.random.default_rng(seed)
    parts = [clouds(300, shift=rng.normal(0, 1, 10), seed=i) for i in range(4)]
    (cells, labels), batches = map(np.concatenate, zip(*parts[:3], strict=True)), np.repeat(["a", "b", "c"], 300)
    lost = [(Reference(cells, labels, b).transfer(parts[3][0])["label"] == "unknown").mean() for b in (batches, None)]
    assert lost[0] < 0.1 and lost[1] > 0.2
    rows = held_out_neighbours(cells, batches, 5)[1]
    assert (batches[rows] != batches[:, None]).all()


def test_each_cell_is_mapped_by_itself(reference):
    query = clouds(100, seed=1)[0]
    table, order = reference.transfer(query), np.random.default_rng(0).permutation(100)
    alone = pd.concat([reference.transfer(query[i:i + 1]) for i in order], ignore_index=True)
    assert (alone["label"] == table["label"].iloc[order].to_numpy()).all()
    assert np.allclose(alone["confidence"], table["confidence"].iloc[order])
    turned = Reference(Z[::-1], LABELS[::-1]).transfer(query)
    assert np.allclose(turned["confidence"], table["confidence"]) and (turned["label"] == table["label"]).all()


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_the_unit_of_the_embedding_does_not_matter(reference, unit):
    query = clouds(100, seed=1)[0]
    scaled = Reference(Z * unit, LABELS).transfer(query * unit)
    assert np.allclose(scaled["confidence"], reference.transfer(query)["confidence"])


def test_identical_cells_are_no_trouble():
    same = np.repeat(np.eye(10)[:2], 40, axis=0)
    table = Reference(same, np.repeat(["a", "b"], 40)).transfer(np.vstack([same, np.full((1, 10), 5.0)]))
    assert (table["confidence"][:80] == 1).all() and list(table["label"]) == ["a"] * 40 + ["b"] * 40 + ["unknown"]


def test_rare_labels_share_a_threshold():
    labels = LABELS.copy()
    labels[np.flatnonzero(LABELS == "type 0")[5:]] = "type 1"
    made = Reference(Z, labels)
    right = made.held_out["label"] == made.held_out["truth"].astype(str)
    assert made.thresholds[0] == np.quantile(made.held_out["confidence"][right], 0.05) != made.thresholds[2]


WRONG = {
    "NaN": (lambda: Reference(np.where(Z > 9, np.nan, Z), LABELS), "NaN or infinite"),
    "fewer labels": (lambda: Reference(Z, LABELS[:-1]), "and there are 999 cells: give numbers, one row per cell"),
    "missing labels": (lambda: Reference(Z, [None, *LABELS[1:]]), "1 of 1000 reference cells have no label; drop them"),
    "the word is ours": (lambda: Reference(Z, ["unknown", *LABELS[1:]]), "'unknown' is the name for cells without a label"),
    "k": (lambda: Reference(Z[:10], LABELS[:10]), "k=15 neighbours, but there are 9 cells other reference cells: choose a k from 1 to 9"),
    "k in batches": (lambda: Reference(Z, LABELS, ["a"] * 990 + ["b"] * 10), "10 cells outside the largest batch: choose a k from 1 to 10"),
    "alpha": (lambda: Reference(Z, LABELS, alpha=5), "alpha=5 must lie between 0 and 1"),
    "each cell its own": (lambda: Reference(Z, np.arange(1000).astype(str)), "no held-out cell gets its own label"),
    "another model's": (lambda: Reference(Z, LABELS).transfer(Z[:, :4]), "the query has 4 dimensions, the reference 10: embed both"),
    "NaN in the query": (lambda: Reference(Z, LABELS).transfer(Z * np.nan), "NaN or infinite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_a_clear_error(case):
    run, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        run()


# ---- with a model

CELLS = simulate(200, 60, 3, 2)


@pytest.fixture(scope="module")
def model():
    return ScFormer(CELLS, batch_key="batch", recipe=replace(DEFAULT, **SMALL)).fit(3, progress=False, accelerator="cpu")


def test_a_query_is_annotated_and_survives_the_disk(model, tmp_path):
    query = CELLS[::3].copy()
    query.obs = query.obs[[]]  # neither labels nor batches
    before = query.X.copy()
    table = build_reference(model, CELLS, "cell_type").transform(query)
    assert (query.X != before).nnz == 0 and (table.index == query.obs_names).all()
    assert (table["nearest"] == CELLS.obs["cell_type"].astype(str)[::3]).mean() > 0.5  # of three types, after three epochs
    query.write_h5ad(tmp_path / "x.h5ad")
    back = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert list(back.obs) == ["scformer_label", "scformer_confidence"] and np.array_equal(back.obsm["X_scformer"], model.embed_cells(query))
    assert (back.obs["scformer_label"] == table["label"]).all() and np.allclose(back.obs["scformer_confidence"], table["confidence"])


def test_the_models_batches_are_held_out(model):
    theirs = build_reference(model, CELLS, "cell_type")
    ours = Reference(model.embed_cells(CELLS), CELLS.obs["cell_type"].astype(str), CELLS.obs["batch"].to_numpy())
    assert theirs.held_out.equals(ours.held_out) and repr(theirs) == repr(ours)


def test_a_saved_model_maps_the_same(model, tmp_path):
    model.save(tmp_path / "model")
    tables = [build_reference(m, CELLS, "cell_type").transform(CELLS.copy()) for m in (model, ScFormer.load(tmp_path / "model"))]
    assert tables[0].equals(tables[1])


def test_a_query_batch_that_dsbn_does_not_know():
    made = ScFormer(CELLS, batch_key="batch", recipe=replace(PAPER, **SMALL))
    query = CELLS[:20].copy()
    query.obs["batch"] = "lab 7"
    atlas = build_reference(made, CELLS, "cell_type")
    with pytest.raises(ValueError, match="not seen in training: lab 7.*unseen_batch='mean'"):
        atlas.transform(query)
    assert "scformer_label" not in query.obs and "X_scformer" not in query.obsm
    assert len(atlas.transform(query, unseen_batch="mean")) == 20


@pytest.mark.parametrize("label_key,change,message", [
    ("cell_typ", {}, "label_key='cell_typ' is not a column of adata.obs; did you mean 'cell_type'"),
    ("cell_type", {"cell_type": [np.nan] * 2 + ["x"] * 198}, "label_key='cell_type' is missing for 2 of 200 cells"),
    ("cell_type", {"cell_type": "unknown"}, "'unknown' is the name")])
def test_labels_that_cannot_be_used(model, label_key, change, message):
    given = CELLS.copy()
    given.obs = given.obs.assign(**change)
    with pytest.raises(ValueError, match=message):
        build_reference(model, given, label_key)


def test_what_is_no_anndata(model):
    with pytest.raises(ValueError, match="AnnData is needed"):
        build_reference(model, CELLS.X, "cell_type")
    with pytest.raises(ValueError, match="AnnData is needed"):
        build_reference(model, CELLS, "cell_type").transform(CELLS.X)


def test_the_old_name_works_and_says_the_new_one():
    atlas = build_reference(ScFormer(CELLS, recipe=replace(DEFAULT, **SMALL)), CELLS, "cell_type")
    with pytest.warns(DeprecationWarning, match="Reference.map is now Reference.transform"):
        old = atlas.map(CELLS.copy())
    assert old.equals(atlas.transform(CELLS.copy()))


def test_counts_of_reference_and_query_may_lie_in_different_places():
    model = ScFormer(CELLS, recipe=replace(DEFAULT, **SMALL))
    logged = CELLS.copy()
    logged.layers["counts"] = logged.X.copy()
    logged.X = logged.X.log1p()
    plain = build_reference(model, CELLS, "cell_type").transform(CELLS.copy())
    atlas = build_reference(model, logged, "cell_type", layer="counts")
    assert plain.equals(atlas.transform(logged.copy(), layer="counts")) and plain.equals(atlas.transform(CELLS.copy()))
