"""The score card against scib-metrics, and on input that has no answer."""
import json
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scformer_nb import score_card as sc
from scformer_nb.metrics import evaluate, nearest

# How the table was made, in an environment of its own (`pip install scib-metrics==0.5.10`, jax in double precision):
# `cells()` below; exact neighbours `N` by brute force, the cell itself first, as `NeighborsResults(indices, distances)`.
# iLISI: ilisi_knn(N of k=90, batches); LISI: lisi_knn of the same, every 12th cell; BRAS: bras(Z, types, batches);
# PCR_batch: utils.principal_component_regression(Z, batches, categorical=True); ASW_cell: silhouette_label(Z, types);
# ASW_batch_scib: silhouette_batch(Z, types, batches); kBET of all cells: kbet(N of k=20, batches)[0]; for each type
# alone kbet(N of k=10)[0] and the mean of lisi_knn(N of k=59); GraphConn: graph_connectivity(N of k=15, types).
THEIRS = json.loads(Path(__file__).with_name("scib_metrics.json").read_text())
NEW = {"participation_ratio", "NMI_ARI", "NMI_ARI_sd", "kNN_accuracy", "kNN_across", "iLISI", "PCR_batch", "CiLISI", "kBET",
    "batch_mixing", "depth_R2", "BRAS", "confounding", "Overall_no_ASW"}


def cells(n=240):
    "Four types, three batches, 60 cells a type; RandomState draws the same on every machine."
    i = np.arange(n)
    types, batches = i % 4, (i // 4) % 3
    rng = np.random.RandomState(0)
    Z = rng.standard_normal((4, 6))[types] * 2 + rng.standard_normal((3, 6))[batches] * .5 + rng.standard_normal((n, 6))
    return Z, types, batches


Z, TYPES, BATCHES = cells()
OBS = pd.DataFrame({"cell_type": [f"t{t}" for t in TYPES], "batch": [f"b{b}" for b in BATCHES]})
SIZE = np.random.RandomState(1).poisson(2000, len(Z))


def card(embedding=Z, obs=OBS, **more):
    "A card and what it warned of."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sc.score_card(embedding, obs, **{"batch_key": "batch", "library_size": SIZE[:len(obs)]} | more)
    assert all(type(v) is float and np.isfinite(v) for v in found.values())
    return found, [str(w.message) for w in caught if w.category is UserWarning]


@cache
def plain():
    "The card of the cells as they are."
    return card()[0]


# ---- what others compute

def test_numbers_are_those_of_scib_metrics():
    found = plain()
    for name in ("iLISI", "BRAS", "PCR_batch", "ASW_cell", "ASW_batch_scib"):
        assert found[name] == pytest.approx(THEIRS[name], abs=1e-6), name
    assert found["kBET"] == pytest.approx(np.mean([THEIRS[f"kBET of type {t}"] for t in range(4)]), abs=1e-6)
    of_types = np.mean([THEIRS[f"LISI of type {t}"] for t in range(4)])
    assert found["CiLISI"] == pytest.approx((of_types - 1) / 2, abs=1e-6)


def test_lisi_and_kbet_are_theirs_cell_by_cell():
    near, d = nearest(Z, 90)
    assert sc.lisi(d[:, 1:], BATCHES[near[:, 1:]], 30)[::12] == pytest.approx(np.array(THEIRS["LISI"]), abs=1e-6)
    assert sc.kbet(nearest(Z, 20)[0], BATCHES) == pytest.approx(THEIRS["kBET of all cells"], abs=1e-6)


def test_the_papers_numbers_stay_as_they_are():
    found = plain()
    paper = evaluate(Z, OBS, batch_key="batch")
    assert {name: found[name] for name in paper} == paper and set(found) - set(paper) == NEW


def test_overall_without_silhouette_by_hand():
    found = plain()
    bio = (2 * found["NMI_ARI"] + found["kNN_accuracy"]) / 3
    batch = (found["CiLISI"] + found["GraphConn"] + found["kBET"]) / 3
    assert found["Overall_no_ASW"] == pytest.approx(.6 * bio + .4 * batch)
    alone, _ = card(batch_key=None)
    assert alone["Overall_no_ASW"] == pytest.approx(bio)


def test_units_and_turns_of_an_embedding_do_not_matter():
    turn = np.linalg.qr(np.random.RandomState(2).standard_normal((6, 6)))[0]
    for other in (Z @ turn, Z * 1e4, Z / 1e4):
        assert card(other)[0] == pytest.approx(plain(), abs=1e-3)


def test_depth_r2_by_the_definition():
    left = total = 0
    for t in range(4):
        own = np.flatnonzero(TYPES == t)
        y = np.log(SIZE[own])
        D = np.linalg.norm(Z[own, None] - Z[own], axis=2)
        for i in range(len(own)):
            others = [j for j in np.argsort(D[i]) if j != i][:15]
            left += (y[i] - y[others].mean())**2
            total += (y[i] - y.mean())**2
    assert plain()["depth_R2"] == pytest.approx(1 - left / total)


def test_depth_is_seen_and_does_not_come_from_types():
    by_type = np.exp(5 + TYPES)   # types differ in depth, cells of a type do not but for noise
    assert card(library_size=by_type * SIZE)[0]["depth_R2"] < .05
    depth = np.log(SIZE) - np.log(SIZE).mean()
    assert card(np.c_[Z, 300 * depth])[0]["depth_R2"] > .5


def test_controls_bound_the_card():
    bounds = sc.card_with_controls(Z, OBS, batch_key="batch", library_size=SIZE)
    assert (bounds.loc[["NMI_ARI", "kNN_accuracy"], "floor"] < bounds.loc[["NMI_ARI", "kNN_accuracy"], "embedding"]).all()
    mixing = ["iLISI", "CiLISI", "kBET", "batch_mixing", "BRAS"]
    assert (bounds.loc[mixing, "ceiling"] > bounds.loc[mixing, "embedding"]).all()
    assert bounds.loc["kNN_accuracy", "ceiling"] == bounds.loc["kNN_accuracy", "embedding"]


# ---- bad input

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value):
    bad = Z.copy()
    bad[3, 2] = value
    with pytest.raises(ValueError, match="1 of 240 cells have NaN or infinite values.*check the model"):
        card(bad)


def test_one_dimension():
    found, _ = card(Z[:, :1])
    assert found["participation_ratio"] == 1 and set(found) >= NEW


def test_constant_rows():
    with pytest.raises(ValueError, match="all 240 cells have the same embedding"):
        card(np.ones((240, 5)))
    half = np.where(np.arange(240)[:, None] < 120, 0, Z)
    found, said = card(half)
    assert set(found) >= NEW and any("120 of 240 cells share their embedding" in text for text in said)
    assert set(card(np.c_[Z, np.zeros(240)])[0]) >= NEW   # a constant dimension


@pytest.mark.parametrize("n", [4, 9, 14, 40])
def test_fewer_cells_than_neighbours(n):
    found, said = card(Z[:n], OBS[:n].assign(cell_type=["a", "b"] * (n // 2) + ["a"] * (n % 2)))
    assert {"kNN_accuracy", "NMI_ARI", "participation_ratio"} <= set(found)
    assert any("too few for k=15" in text for text in said) == (n <= 15) and ("depth_R2" in found) == (n >= 60)


def test_one_label():
    found, said = card(obs=OBS.assign(cell_type="a"))
    assert not {"NMI_ARI", "kNN_accuracy", "Overall_no_ASW"} & set(found)
    assert {"CiLISI", "kBET", "BRAS", "depth_R2", "participation_ratio"} <= set(found)
    assert any("label_key has 1 groups of two cells or more" in text for text in said)


def test_labels_all_different():
    found, said = card(obs=OBS.assign(cell_type=[f"cell {i}" for i in range(240)]))
    assert not NEW - {"participation_ratio", "PCR_batch", "confounding"} & set(found) and "participation_ratio" in found
    assert any("240 label groups of one cell" in text for text in said)


def test_batches_of_one_cell():
    found, said = card(obs=OBS.assign(batch=[f"cell {i}" if i < 3 else "rest" for i in range(240)]))
    assert set(found) >= NEW - {"kNN_across"} and any("3 batch groups of one cell" in text for text in said)
    found, _ = card(obs=OBS.assign(batch=[f"cell {i}" for i in range(240)]))
    assert {"NMI_ARI", "kNN_accuracy", "depth_R2"} <= set(found) and "BRAS" not in found


def test_one_batch_is_none():
    found, _ = card(obs=OBS.assign(batch="a"))
    assert set(found) >= {"NMI_ARI", "Overall_no_ASW"} and not {"iLISI", "BRAS", "kBET", "PCR_batch", "confounding"} & set(found)


def test_each_type_in_a_batch_of_its_own():
    found, said = card(obs=OBS.assign(batch=OBS["cell_type"]))
    assert found["confounding"] == pytest.approx(1) and not {"CiLISI", "kBET", "BRAS", "kNN_across"} & set(found)
    assert found["Overall_no_ASW"] == pytest.approx((2 * found["NMI_ARI"] + found["kNN_accuracy"]) / 3)
    assert any("no label is found in two batches" in text for text in said)
    assert "the cell type tells 100% of the batch" in " ".join(sc.advice(found))


def test_without_labels_or_library_sizes():
    found, _ = card(label_key=None)
    assert set(found) == {"ASW_batch", "participation_ratio", "PCR_batch"}
    assert "depth_R2" not in card(library_size=None)[0]


def test_cells_without_a_label_are_left_out():
    holes = OBS.assign(cell_type=OBS["cell_type"].where(OBS.index >= 60))
    found, said = card(obs=holes)
    assert any("60 of 240 cells have no label" in text for text in said)
    assert found == pytest.approx(card(Z[60:], OBS[60:].reset_index(drop=True), library_size=SIZE[60:])[0])


@pytest.mark.parametrize("size", [SIZE[1:], SIZE * 0, np.where(SIZE > 0, np.nan, 0), ["many"] * 240])
def test_library_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="library_size has .* give the counts of each cell"):
        card(library_size=size)


def test_unknown_columns():
    with pytest.raises(KeyError, match="label_key='type' is not in obs: name one of cell_type, batch"):
        card(label_key="type")


def test_many_cells_are_sampled_and_the_size_is_said(monkeypatch):
    n = 100_000
    rng = np.random.RandomState(0)
    kinds = rng.choice(4, n, p=[.6, .3, .09, .01])
    many = pd.DataFrame({"cell_type": kinds.astype(str), "batch": rng.choice(2, n).astype(str)})
    wide = rng.standard_normal((4, 3))[kinds] * 3 + rng.standard_normal((n, 3))
    rows = sc.sample_cells(many, ["cell_type", "batch"], sc.MOST_CELLS)
    share = many["cell_type"].iloc[rows].value_counts(normalize=True) - many["cell_type"].value_counts(normalize=True)
    assert len(rows) == len(set(rows)) == 20_000 and share.abs().max() < 1e-3
    monkeypatch.setattr(sc, "MOST_CELLS", 600)   # the same with less to compute
    found, said = card(wide, many, library_size=np.full(n, 1000) + rng.poisson(500, n))
    assert any("100,000 cells are many: the scores are of 600 of them" in text for text in said)
    assert set(found) >= NEW and found["kNN_accuracy"] > .9
    again, _ = card(wide, many, library_size=np.full(n, 1000) + rng.poisson(500, n), seed=1)
    assert again["kNN_accuracy"] != found["kNN_accuracy"]   # another draw
    wide[5] = np.nan
    with pytest.raises(ValueError, match="1 of 100000 cells"):
        card(wide, many, library_size=None)


# ---- in words

def test_advice_is_given_where_it_is_due():
    assert sc.advice({"depth_R2": .3, "participation_ratio": 3, "confounding": .5}) == []
    depth, few, told = sc.advice({"depth_R2": .46, "participation_ratio": 1.2, "confounding": .9})
    assert "depth R2 is 0.46" in depth and "a higher weight of kl" in depth
    assert "participation ratio is 1.2" in few and "90% of the batch" in told and "batch_key" in told
    assert sc.advice({"depth_R2": -.05}) == [] and sc.advice({"NMI": .5}) == []
