"""What must not change a result: the order, names, form and scale of what is given, labels, and who computes it."""
from dataclasses import replace
from itertools import combinations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from toy import CELLS, COUNTS, DSBN, RECIPE, model, same, toy

from scformer_nb import embedding
from scformer_nb.metrics import evaluate
from scformer_nb.pretrained import from_pretrained
from scformer_nb.score_card import score_card
from scformer_nb.screen_scores import score
from scformer_nb.screens import profile
from scformer_nb.simulate import simulate
from scformer_nb.taxonomy import recovery_scores
from scformer_nb.tokens import make_batch
from scformer_nb.trees import read_tree
from scformer_nb.wasserstein import affinity, between_scores

RNG = np.random.default_rng(0)
ORDER, GENES = RNG.permutation(60), RNG.permutation(60)
RECIPES = pytest.mark.parametrize("recipe", [RECIPE, DSBN], ids=["default", "paper"])


def renamed(column, name):
    "A column of the toy cells in other words."
    return toy(**{column: [name(str(value)) for value in CELLS.obs[column]]})


def unsorted(X):
    "The same sparse matrix, each row written backwards."
    rows = [slice(a, b) for a, b in zip(X.indptr, X.indptr[1:], strict=False)]
    order = np.concatenate([np.arange(r.start, r.stop)[::-1] for r in rows])
    return sp.csr_matrix((X.data[order], X.indices[order], X.indptr), X.shape)


def with_zeros(X):
    "The same sparse matrix with all its zeros stored."
    n, m = X.shape
    return sp.csr_matrix((X.toarray().ravel(), np.tile(np.arange(m), n), np.arange(n + 1) * m), X.shape)


class Unreadable:
    "A label that nothing can be learned from."
    def refuse(self, *args):
        raise AssertionError("a label was read")
    __eq__ = __hash__ = __str__ = __repr__ = __lt__ = refuse


def unreadable():
    labels = np.empty(60, object)
    labels[:] = [Unreadable() for _ in range(60)]
    return labels


FORMS = {  # of the same counts
    "int32": COUNTS.astype(np.int32), "int64": COUNTS.astype(np.int64), "uint16": COUNTS.astype(np.uint16), "float64": COUNTS.astype(float),
    "dense": COUNTS.toarray(), "dense int64": COUNTS.toarray().astype(np.int64), "dense float64": COUNTS.toarray().astype(float),
    "dense by columns": np.asfortranarray(COUNTS.toarray()), "CSC": COUNTS.tocsc(), "CSC float64": COUNTS.tocsc().astype(float),
    "csr_array": sp.csr_array(COUNTS), "unsorted": unsorted(COUNTS), "zeros stored": with_zeros(COUNTS),
}
LABELS = {  # of the same cells
    "permuted": lambda: toy(cell_type=CELLS.obs["cell_type"].to_numpy()[ORDER]), "all alike": lambda: toy(cell_type="x"),
    "missing": lambda: toy(cell_type=np.nan),
    "none": lambda: anndata.AnnData(COUNTS, CELLS.obs[["batch"]], pd.DataFrame(index=CELLS.var_names)),
    "renamed": lambda: renamed("cell_type", lambda name: f"zz {name[::-1]}"), "unreadable": lambda: toy(cell_type=unreadable()),
}
NAMES = {  # the order of batches, which is that of their names, stays
    "batches": lambda: renamed("batch", lambda name: f"a lane, {name[-1]}"),
    "genes": lambda: toy(names=[f"ENSG{i:011d}" for i in range(60)]),
    "cells": lambda: anndata.AnnData(COUNTS, CELLS.obs.set_axis([f"c{i}" for i in ORDER]), pd.DataFrame(index=CELLS.var_names)),
}
AS_FILES = {"CSR": COUNTS, "dense": COUNTS.toarray(), "CSC": COUNTS.tocsc(), "int64": COUNTS.astype(np.int64)}


# ---- what changes no bit

@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_counts(trained, Z, form, recwarn):
    given = toy(FORMS[form])
    made = model(given)
    assert same(made, model()) and (made.cells.bins != trained.cells.bins).nnz == 0 and (made.cells.counts != COUNTS).nnz == 0
    assert np.array_equal(trained.embed_cells(given), Z)


@pytest.mark.parametrize("form", AS_FILES)
def test_a_file(trained, Z, form, tmp_path):
    toy(AS_FILES[form]).write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    for given in (backed, tmp_path / "x.h5ad"):
        assert same(model(given), model()) and np.array_equal(trained.embed_cells(given), Z)
    backed.file.close()


@pytest.mark.parametrize("labels", LABELS)
def test_labels(trained, Z, labels):
    "Neither training nor embedding reads one."
    given = LABELS[labels]()
    assert same(model(given, epochs=2), trained) and np.array_equal(trained.embed_cells(given), Z)


def test_labels_of_what_begins_with_another_model(trained, tmp_path):
    trained.save(tmp_path / "model")
    tuned = [from_pretrained(tmp_path / "model", given, batch_key="batch").fit(1, progress=False, accelerator="cpu")
             for given in (CELLS, LABELS["permuted"](), LABELS["unreadable"]())]
    assert same(tuned[0], tuned[1]) and same(tuned[0], tuned[2])


@pytest.mark.parametrize("kind", NAMES)
@RECIPES
def test_names(recipe, kind):
    "As long as they sort as before: batches are numbered in the order of their names."
    before, after = (model(given, epochs=1, recipe=recipe) for given in (CELLS, NAMES[kind]()))
    assert all(torch.equal(a, b) for a, b in zip(before.network.state_dict().values(), after.network.state_dict().values(), strict=True))
    assert np.array_equal(before.embed_cells(CELLS), after.embed_cells(NAMES[kind]()))


@pytest.mark.parametrize("factor", [2, 7])
def test_the_scale_of_counts(trained, Z, factor):
    "Bins know the order of counts within a cell alone; only heads that count molecules see the scale."
    more = toy(COUNTS * factor)
    assert np.array_equal(trained.embed_cells(more), Z)
    assert same(model(more, epochs=1, recipe=DSBN), model(epochs=1, recipe=DSBN))


# ---- what changes the last digits at most

@RECIPES
def test_the_order_of_cells_and_genes_when_they_are_embedded(recipe):
    made = model(epochs=1, recipe=recipe)
    expected = made.embed_cells(CELLS)
    assert np.abs(made.embed_cells(CELLS[ORDER][:, GENES].copy()) - expected[ORDER]).max() < 1e-6
    assert np.abs(made.embed_cells(CELLS[ORDER[:11]].copy()) - expected[ORDER[:11]]).max() < 1e-6


@pytest.mark.parametrize("tokens", [1, 100, 1000])
@RECIPES
def test_the_size_of_mini_batches_when_cells_are_embedded(recipe, tokens, monkeypatch):
    "From one cell at a time on."
    made = model(epochs=1, recipe=recipe)
    expected = made.embed_cells(CELLS)
    monkeypatch.setattr(embedding, "TOKENS", tokens)
    assert np.abs(made.embed_cells(CELLS) - expected).max() < 1e-6


@pytest.mark.parametrize("more", [1, 7, 60])
@RECIPES
def test_padding(recipe, more):
    network, cells = (made := model(epochs=1, recipe=recipe)).network.eval(), made.cells
    short, long = (make_batch(cells, np.arange(9)) for _ in range(2))
    for name in ("genes", "values", "masked", "external"):
        tokens = getattr(short, name)
        setattr(long, name, torch.cat([tokens, tokens.new_zeros(9, more, *tokens.shape[2:])], 1))
    long.n_visible += more
    assert long.genes.shape[1] == short.genes.shape[1] + more
    with torch.inference_mode():
        assert (network.encoder(long, cell_only=True)[1] - network.encoder(short, cell_only=True)[1]).abs().max() < 1e-6


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_threads(trained, Z, two_threads):
    "Embedding in the last digits; training by what two epochs make of them."
    assert torch.get_num_threads() == 2 and np.abs(trained.embed_cells(CELLS) - Z).max() < 1e-6
    assert np.abs(model(epochs=2).embed_cells(CELLS) - Z).max() < 1e-3


# ---- what is another draw: it moves an embedding as another seed does, and not more

def moved(Z, other):
    "Distance after the best rotation, as a share of the spread: 0 for the same, near 1 for nothing in common."
    A, B = (np.asarray(X, float) - X.mean(0) for X in (Z, other))
    alike = np.linalg.svd(A.T @ B, compute_uv=False).sum() / np.linalg.norm(A) / np.linalg.norm(B)
    return float(np.sqrt(max(0, 1 - alike**2)))


def back(order, Z):
    "Rows of permuted cells in their old order."
    return Z[np.argsort(order)]


TYPES = simulate(150, 60, 3, 2)
MANY = np.random.default_rng(1).permutation(150)
OWN = TYPES.obs["cell_type"].to_numpy(str)


def learn(adata=TYPES, seed=0):
    "A model trained for as long as it takes to tell the types apart."
    return model(adata, epochs=30, seed=seed, recipe=replace(RECIPE, lr=6e-3, warmup_steps=10))


@pytest.fixture(scope="module")
def learned():
    return learn()


@pytest.fixture(scope="module")
def seeds(learned):
    "How far the embeddings of two other seeds are from that of the first."
    first = learned.embed_cells(TYPES)
    return np.mean([moved(first, learn(seed=seed).embed_cells(TYPES)) for seed in (1, 2)])


def changed(X=TYPES.X, **obs):
    return anndata.AnnData(X, TYPES.obs.assign(**obs), TYPES.var[[]])


def other_lanes():
    "Batches whose names sort the other way round."
    return changed(batch=TYPES.obs["batch"].astype(str).replace({"batch_0": "lane 2", "batch_1": "lane 1"}))


DRAWS = {  # what is given, and the old order of cells
    "cells permuted": lambda: (TYPES[MANY].copy(), np.argsort(MANY)),
    "genes permuted": lambda: (TYPES[:, GENES].copy(), slice(None)),
    "counts doubled": lambda: (changed(TYPES.X * 2), slice(None)),
}


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWS)
def test_another_order_is_another_draw(learned, seeds, draw):
    "As the docstring of ScFormer says; which heads count molecules makes of their scale another one too."
    given, order = DRAWS[draw]()
    found = moved(learned.embed_cells(TYPES), learn(given).embed_cells(given)[order])
    assert .01 < found < 1.25 * seeds


@pytest.mark.slow
def test_the_order_of_batches(learned):
    "Their weights begin at what the counts say, not at random."
    assert moved(learned.embed_cells(TYPES), learn(other_lanes()).embed_cells(TYPES)) < 1e-3


# ---- depth

def thinned(share):
    "A share of the molecules of each cell, drawn at random."
    X = TYPES.X.copy()
    X.data = np.random.default_rng(0).binomial(X.data.astype(int), share).astype(np.float32)
    return changed(X)


def centres(Z):
    "(types, dims) in the order of their names."
    return pd.DataFrame(Z).groupby(OWN).mean()


@pytest.mark.slow
@pytest.mark.parametrize("share", [.8, .5])
def test_fewer_molecules_move_a_cell_less_than_its_type_is_from_others(learned, share):
    Z, less = learned.embed_cells(TYPES), learned.embed_cells(thinned(share))
    between = min(np.linalg.norm(a - b) for a, b in combinations(centres(Z).to_numpy(), 2))
    assert 0 < np.linalg.norm(less - Z, axis=1).mean() < between / 4


@pytest.mark.slow
def test_a_model_of_fewer_molecules_tells_the_same_types_apart(learned):
    for Z in (learned.embed_cells(TYPES), learn(thinned(.5)).embed_cells(thinned(.5))):
        C = centres(Z)
        nearest = C.index[np.linalg.norm(Z[:, None] - C.to_numpy(), axis=2).argmin(1)]
        assert (nearest == OWN).mean() > .9


# ---- scores of an embedding know no order, and no name

N = 240
KIND, LANE, WHO = np.arange(N) % 6, np.arange(N) // 6 % 3, np.random.default_rng(2).permutation(N)
DRAW = np.random.RandomState(0).standard_normal
CLOUDS = DRAW((6, 5))[KIND] * 2.5 + DRAW((3, 5))[LANE] * .5 + DRAW((N, 5))
OBS = pd.DataFrame({"cell_type": [f"t{k}" for k in KIND], "batch": [f"b{b}" for b in LANE]})
SIZE = np.random.RandomState(1).poisson(2000, N)
TREE = {"a": {"b": ["t0", "t1"], "c": ["t2"]}, "d": {"e": ["t3", "t4"], "f": ["t5"]}}
OTHER = {f"t{k}": f"type {'zyxwvu'[k]}" for k in range(6)}  # they sort the other way round
BY_LOUVAIN = {"NMI", "ARI", "AvgBIO", "Overall", "NMI_ARI", "NMI_ARI_sd", "isolated_F1", "Overall_no_ASW"}
BY_VOTE = {"kNN_accuracy", "kNN_across", "Overall_no_ASW"}  # of equally frequent types the first by name is taken


def cards(Z, obs, size, tree):
    return score_card(Z, obs, "cell_type", "batch", size)


def papers(Z, obs, size, tree):
    return evaluate(Z, obs, "cell_type", "batch")


def distances(Z, obs, size, tree):
    A = affinity(Z, obs["cell_type"], progress=False)
    names = sorted(A, key=dict(zip(obs["cell_type"], KIND[size.index], strict=True)).get)
    return {f"{i} {j}": x for (i, j), x in np.ndenumerate(A.loc[names, names])}


def recovery(Z, obs, size, tree):
    found = recovery_scores(Z, obs["cell_type"].to_numpy(), tree)
    return {name: x for name, x in found.items() if "chance" not in name}  # of shuffles of the types


def two_species(Z, obs, size, tree):
    a, labels = LANE[size.index] > 0, obs["cell_type"].to_numpy()
    return between_scores({"a": Z[a], "b": Z[~a]}, {"a": labels[a], "b": labels[~a]})[0]


SCORES = dict(card=cards, paper=papers, wasserstein=distances, taxonomy=recovery, between=two_species)


@pytest.fixture(scope="module")
def scores():
    "Of the cells as they are, by name."
    return {name: of(CLOUDS, OBS, pd.Series(SIZE), read_tree(TREE)) for name, of in SCORES.items()}


def assert_alike(found, expected, **loose):
    "Scores are the same, those that are named within a tolerance; the resolution is that of the best clusters."
    assert found.keys() == expected.keys() and len(found) >= 3
    for name in found.keys() - {"resolution"}:
        assert found[name] == pytest.approx(expected[name], abs=loose.get(name, 1e-9)), name


@pytest.mark.slow
@pytest.mark.parametrize("of", SCORES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scores_of_permuted_cells(scores, of):
    "Louvain takes the cells in their order and may end elsewhere; nothing else moves."
    found = SCORES[of](CLOUDS[WHO], OBS.iloc[WHO].reset_index(drop=True), pd.Series(SIZE, dtype=float).iloc[WHO], read_tree(TREE))
    assert_alike(found, scores[of], **dict.fromkeys(BY_LOUVAIN, .05))


@pytest.mark.slow
@pytest.mark.parametrize("of", SCORES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scores_of_renamed_types_and_batches(scores, of):
    named = pd.DataFrame({"cell_type": OBS["cell_type"].map(OTHER), "batch": OBS["batch"].map({"b0": "z", "b1": "y", "b2": "x"})})
    tree = read_tree(TREE).rename(index=OTHER)
    assert_alike(SCORES[of](CLOUDS, named, pd.Series(SIZE), tree), scores[of], **dict.fromkeys(BY_VOTE, .02))


@pytest.mark.slow
def test_wrong_labels_change_every_score_that_reads_them(scores):
    "So that the tests above can fail."
    wrong = OBS.assign(cell_type=OBS["cell_type"].to_numpy()[WHO])
    found = score_card(CLOUDS, wrong, "cell_type", "batch", SIZE)
    blind = {"ASW_batch", "PCR_batch", "participation_ratio", "iLISI", "resolution"}
    assert not [name for name in found.keys() - blind if found[name] == pytest.approx(scores["card"][name], abs=1e-6)]
    assert all(found[name] == scores["card"][name] for name in blind - {"resolution"})


# ---- scores of a perturbation model

SCREENS = {
    "cells permuted": lambda data: (data[np.random.default_rng(3).permutation(data.n_obs)].copy(), str),
    "genes permuted": lambda data: (data[:, np.random.default_rng(3).permutation(data.n_vars)].copy(), str),
    "batches renamed": lambda data: (anndata.AnnData(data.X, data.obs.assign(batch="z"), data.var), str),
    "genes renamed": lambda data: (with_names(data, lambda gene: "X" + gene[::-1]), lambda gene: "X" + gene[::-1]),
}


def combined(name, spell):
    "A perturbation in other names; the parts of a double are sorted."
    return name if name == "control" else "+".join(sorted(map(spell, name.split("+"))))


def with_names(data, spell):
    condition = [combined(c, spell) for c in data.obs["condition"].astype(str)]
    return anndata.AnnData(data.X, data.obs.assign(condition=pd.Categorical(condition)), pd.DataFrame(index=map(spell, data.var_names)))


@pytest.mark.parametrize("case", SCREENS)
def test_scores_of_a_screen(data, case):
    "Those of a prediction that is half right."
    given, spell = SCREENS[case](data)
    tables = []
    for screen, names in ((data, str), (given, spell)):
        truth = profile(screen)
        guess = (truth.mean + truth.mean.mean()) / 2
        table = score(guess, truth, guess)
        old = {combined(c, names): c for c in profile(data).mean.index}
        tables.append(table.rename(index=old).sort_index())
    pd.testing.assert_frame_equal(*tables, atol=1e-6, rtol=1e-6)
