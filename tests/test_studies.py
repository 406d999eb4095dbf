"""Several studies in one model: names, genes, batches, and that what was not measured is nothing."""
import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.neighbors import KNeighborsClassifier
from toy import CELLS, COUNTS, DSBN, RECIPE, model, our_warnings, same, toy

from scformer_nb import data
from scformer_nb.heads import HEADS
from scformer_nb.io import speaking_shell
from scformer_nb.model_files import write_model
from scformer_nb.scformer import ScFormer, build_network, model_facts
from scformer_nb.simulate import simulate
from scformer_nb.studies import choose_genes, join_studies
from scformer_nb.svd_init import bias_init, svd_init
from scformer_nb.tokens import CellTokens, make_batch

GENES = CELLS.var_names
A, B, C = CELLS[:25, :50].copy(), CELLS[25:40, 10:].copy(), CELLS[40:, 5:55].copy()
THREE = {"a": A, "b": B, "c": C}


def studies(**changed):
    return {**THREE, **changed}


def renamed(adata, names):
    out = adata.copy()
    out.var_names = names
    return out


# ---- bad input, said with the name of the study

LOGGED = anndata.AnnData(B.X.log1p(), obs=B.obs, var=B.var)
BARE, NAMELESS = anndata.AnnData(B.X, var=B.var), toy(COUNTS, batch=np.nan)[40:, 5:55].copy()
IDS = renamed(B, [f"ENSG{i:011d}" for i in range(B.n_vars)])
BAD = {
    "no study": ({}, {}, "there is no study"),
    "no cells": ({"a": A, "b": 3}, {}, "study 'b' is of type int; an AnnData or the path"),
    "two of one name": ([A, A], {}, "two studies are called 'simulated'"),
    "two of one name as text": ({1: A, "1": B}, {}, "two studies are called '1'"),
    "no counts": (studies(b=LOGGED), {}, "study 'b': X must hold raw counts"),
    "no such layer": (THREE, dict(layer="counts"), "study 'a': layer='counts' does not exist"),
    "no batch column": (studies(b=BARE), dict(batch_key="batch"), "study 'b': batch_key='batch' is not a column"),
    "batches missing": (studies(c=NAMELESS), dict(batch_key="batch"), "study 'c': batch_key='batch' is missing"),
    "one cell": (studies(c=C[:1].copy()), {}, "study 'c': 1 cells x 50 genes"),
    "Ensembl and symbols": (studies(b=IDS), {}, "study 'b' has Ensembl ids, 'a' gene symbols.*translate"),
    "two species": (studies(b=renamed(B, B.var_names.str.upper())), {}, "in case between the studies .*two species, compare them by"),
    "genome prefix": (studies(b=renamed(B, "GRCh38_" + B.var_names)), {}, "differ in genome prefix between"),
    "no genes": (studies(b=B[:, :0].copy()), {}, "study 'b' has no genes"),
    "nothing in common": (studies(b=renamed(B, "other_" + B.var_names)), {}, "study 'b' has no gene in common"),
    "genes twice": (studies(b=renamed(B, ["gene_1"] * B.n_vars)), {}, "study 'b': 49 of 50 gene names are not unique"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_with_the_study(case):
    given, how, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ScFormer(given, recipe=RECIPE, **how)


def test_the_command_that_compares_species_is_named_in_a_shell():
    with speaking_shell(), pytest.raises(ValueError, match="scformer compare-species FIRST SECOND"):
        join_studies({"human": A, "mouse": renamed(A, A.var_names.str.upper())})


def test_warnings_name_the_study():
    half = B.copy()
    half.X.data[::7] += 0.5
    with pytest.warns(UserWarning) as heard:
        join_studies(studies(b=half, c=renamed(C, [name.replace("_", ".") if i < 3 else name for i, name in enumerate(C.var_names)])))
    said = our_warnings(heard)
    assert len(said) == len(set(said))
    assert any(text.startswith("study 'b': ") and "are not integers" in text for text in said)


def test_a_study_without_a_chosen_gene_is_refused():
    counts = sp.csr_matrix(np.ones((20, 2), np.float32) + np.eye(20, 2, dtype=np.float32))
    rare = anndata.AnnData(counts, var=pd.DataFrame(index=["gene_0", "only_here"]))
    with pytest.raises(ValueError, match="study 'd': it measured none of the 2 genes that were chosen; raise n_hvg"):
        join_studies(studies(d=rare), n_hvg=2)


# ---- genes and batches

def test_genes_of_most_studies_come_first_then_by_mean_rank():
    ranks = {"a": pd.Series({"x": 0.0, "y": 1.0, "z": 2.0}), "b": pd.Series({"z": 0.0, "w": 1.0}), "c": pd.Series({"y": 0.0, "w": 1.0})}
    assert [choose_genes(ranks, n) for n in (1, 2, 3)] == [{"y"}, {"y", "z"}, {"y", "z", "w"}]
    assert choose_genes(ranks, 9) == set("xyzw")


def test_files_are_studies_like_others(tmp_path):
    files = [tmp_path / f"{name}.h5ad" for name in THREE]
    for file, study in zip(files, THREE.values(), strict=True):
        study.write_h5ad(file)
    read, given = join_studies(files, n_hvg=40), join_studies(THREE, n_hvg=40)
    assert (read.X != given.X).nnz == 0 and (read.varm["measured"] == given.varm["measured"]).all() and read.uns == given.uns
    with pytest.raises(FileNotFoundError, match="nowhere.h5ad"):
        join_studies([files[0], tmp_path / "nowhere.h5ad"])


@pytest.mark.filterwarnings("ignore:.* is stored by columns")
def test_files_may_differ_in_how_they_store_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PART", 10)
    stored = {"a": A.X.astype(np.float64), "b": B.X.tocsc().astype(np.int32), "c": C.X.toarray()}
    for name, study in THREE.items():
        anndata.AnnData(stored[name], obs=study.obs, var=study.var).write_h5ad(tmp_path / f"{name}.h5ad")
    files = {name: tmp_path / f"{name}.h5ad" for name in THREE}
    joined, expected = (join_studies(given, n_hvg=40) for given in (files, THREE))
    assert joined.var_names.equals(expected.var_names) and (joined.X != expected.X).nnz == 0


def test_counts_are_those_of_the_studies_and_nothing_is_changed():
    before = {name: (s.X.copy(), s.obs.copy()) for name, s in THREE.items()}
    joined = join_studies(THREE, n_hvg=40)
    assert joined.n_obs == 60 and joined.n_vars == 40 and list(joined.obs["study"].cat.categories) == ["a", "b", "c"]
    for code, (name, study) in enumerate(THREE.items()):
        here = joined.var_names.isin(study.var_names)
        assert (joined.varm["measured"][:, code] == here).all()
        counts = joined.X[(joined.obs["study"] == name).to_numpy()]
        assert (counts[:, here] != study[:, joined.var_names[here]].X).nnz == 0 and counts[:, ~here].nnz == 0
        assert (study.X != before[name][0]).nnz == 0 and study.obs.equals(before[name][1])
    assert joined.uns["studies"]["b"] == {"n_cells": 15, "n_genes": int(joined.var_names.isin(B.var_names).sum())}


def test_batches_are_pairs_where_studies_use_one_name():
    joined = join_studies(THREE, batch_key="batch")
    assert list(joined.obs["batch"].cat.categories) == [f"{s}: batch_{b}" for s in "abc" for b in (0, 1)]
    assert joined.varm["measured"].shape == (joined.n_vars, 6)
    own = {name: s.copy() for name, s in THREE.items()}
    for name, s in own.items():
        s.obs["batch"] = s.obs["batch"].astype(str) + name
    assert list(join_studies(own, batch_key="batch").obs["batch"].cat.categories) == [f"batch_{b}{s}" for b in (0, 1) for s in "abc"]


def test_one_study_in_a_list_is_that_study():
    listed = ScFormer([CELLS], recipe=RECIPE)
    assert listed.settings["batches"] == [] and listed.cells.measured is None and same(listed, model(batch_key=None))


# ---- what was not measured is nothing

EVERY = replace(RECIPE, latent=8, **{name: 1.0 for name in HEADS})
ALL = replace(EVERY, genes="all", max_genes=None, max_masked=None)


def with_columns(cells, value):
    "The same cells; genes that were not measured hold a value, which must not matter."
    unknown = ~cells.measured[cells.batch]
    full = [sp.csr_matrix(np.where(unknown, value, M.toarray()).astype(M.dtype)) for M in (cells.bins, cells.counts)]
    return CellTokens(*full, cells.vocab, cells.batch, genes=cells.genes, measured=cells.measured)


@pytest.mark.parametrize("recipe", [EVERY, ALL, DSBN], ids=["expressed", "all genes", "paper"])
def test_losses_and_start_are_the_same_whatever_an_unmeasured_column_holds(recipe):
    made = model(THREE, batch_key=None, recipe=recipe)
    assert not made.cells.measured.all()
    before = [w.clone() for w in made.network.state_dict().values()]
    for value in (0, 1, 37):
        cells = with_columns(made.cells, value)
        b, expected = (make_batch(c, np.arange(60), 0.4, rng=np.random.default_rng(0)) for c in (cells, made.cells))
        made.network.eval()
        losses, others = made.network(b), made.network(expected)
        assert losses.keys() == others.keys() and all(torch.equal(losses[k], others[k]) for k in losses)
        outside = {k: torch.where(b.measured, getattr(b, k), 9.0) for k in ("bins", "counts")}
        again = made.network(replace(b, **outside))
        assert all(torch.equal(again[k], v) for k, v in losses.items()), "heads do not look there"
        network = build_network(recipe, made.vocab, made.settings)
        if recipe.svd_init:
            svd_init(network.encoder, cells, recipe.svd_init)
        bias_init(network.heads, cells)
        assert all(torch.equal(x, y) for x, y in zip(network.state_dict().values(), before, strict=True))


@pytest.mark.parametrize("recipe", [EVERY, ALL], ids=["expressed", "all genes"])
def test_no_gradient_reaches_what_was_not_measured(recipe):
    made = model(THREE, batch_key=None, recipe=recipe)
    rows = np.flatnonzero(made.cells.batch == 1)
    unknown = torch.from_numpy(~made.cells.measured[1])
    made.network(make_batch(made.cells, rows, 0.4))["loss"].backward()
    for head in ("mvc", "zero", "count", "nb"):
        bias = made.network.heads.get_submodule(head).bias.grad
        assert (bias[unknown].abs() < 1e-9).all() and (bias[~unknown].abs() > 0).any()
    table = made.network.encoder.gene.weight.grad
    assert made.cells.lengths[rows].max() <= (~unknown).sum() and table is not None


def test_measured_everywhere_is_bit_for_bit_as_without():
    plain, full = (model(recipe=EVERY) for _ in range(2))
    everything = np.ones((2, len(full.vocab.genes)), bool)
    full.cells = CellTokens(full.cells.bins, full.cells.counts, full.vocab, full.cells.batch, measured=everything)
    network = build_network(EVERY, full.vocab, full.settings)
    svd_init(network.encoder, full.cells, EVERY.svd_init)
    bias_init(network.heads, full.cells)
    full.network = network
    assert same(plain, full)
    for made in (plain, full):
        made.fit(2, progress=False, accelerator="cpu")
    assert same(plain, full) and plain.history["valid_loss"].equals(full.history["valid_loss"])


# ---- embed, save, load

@pytest.fixture(scope="module")
def fitted():
    few = CELLS[40:, :12].copy()
    return model(studies(c=few), batch_key=None, epochs=1), few


def test_every_study_of_training_can_be_embedded(fitted, tmp_path):
    made, few = fitted
    assert len(made.vocab.genes) > 24 and made.settings["studies"]["c"] == {"n_cells": 20, "n_genes": 12}
    for study in (A, B, few):
        assert made.embed_cells(study).shape == (study.n_obs, RECIPE.latent)
    with pytest.raises(ValueError, match=r"only 11 of the model's \d+ genes .*at least \d+% are needed"):
        made.embed_cells(few[:, :11].copy())


def test_a_model_of_studies_comes_back(fitted, tmp_path):
    made, few = fitted
    made.save(tmp_path / "model")
    loaded = ScFormer.load(tmp_path / "model")
    assert same(made, loaded) and loaded.settings == made.settings and np.array_equal(loaded.embed_cells(few), made.embed_cells(few))
    facts = json.loads((tmp_path / "model/model.json").read_text())
    del facts["settings"]["studies"]
    write_model(tmp_path / "old", made.network.state_dict(), facts)
    assert same(ScFormer.load(tmp_path / "old"), made), "a model from before there were studies"


@pytest.mark.parametrize("wrong", [3, {"a": 3}, {"a": {"n_cells": 1}}, {"a": {"n_cells": "x", "n_genes": 1}}], ids=str)
def test_hostile_studies_are_refused(fitted, wrong, tmp_path):
    facts = model_facts(fitted[0]) | {"settings": fitted[0].settings | {"studies": wrong}}
    write_model(tmp_path / "model", fitted[0].network.state_dict(), facts)
    with pytest.raises(ValueError, match=r"cut off or damaged \(studies"):
        ScFormer.load(tmp_path / "model")


def test_a_run_of_studies_goes_on_where_it_stopped(tmp_path):
    whole = model(THREE, batch_key=None, epochs=2)
    model(THREE, batch_key=None).fit(1, run_dir=tmp_path / "run", progress=False, accelerator="cpu")
    goes_on = model(THREE, batch_key=None).fit(2, run_dir=tmp_path / "run", resume=True, progress=False, accelerator="cpu")
    assert same(whole, goes_on)
    fewer = model(studies(c=C[:, :40].copy()), batch_key=None)
    with pytest.raises(ValueError, match="cells, genes, n_bins or batches"):
        fewer.fit(3, run_dir=tmp_path / "run", resume=True, progress=False, accelerator="cpu")


def test_a_model_that_normalises_by_batch_asks_for_the_study():
    made = model(THREE, batch_key=None, recipe=DSBN)
    with pytest.raises(ValueError, match=r"needs obs\['study'\], which these cells do not have.*a, b, c"):
        made.embed_cells(A)
    named = A.copy()
    named.obs["study"] = "a"
    assert made.embed_cells(named).shape == (25, DSBN.dim)


# ---- is it worth it?

def test_the_union_of_genes_tells_types_apart_where_the_intersection_cannot():
    cells = simulate(360, 120, 4, 3, seed=0, depth=2)
    rng = np.random.default_rng(0)
    parts = {f"s{k}": cells[(cells.obs["batch"] == f"batch_{k}").to_numpy(), np.sort(rng.permutation(120)[:60])].copy() for k in range(3)}
    shared = sorted(set.intersection(*(set(s.var_names) for s in parts.values())))
    labels = np.concatenate([s.obs["cell_type"].astype(str) for s in parts.values()])
    accuracy = {}
    for name, given in {"union": parts, "intersection": {k: s[:, shared].copy() for k, s in parts.items()}}.items():
        made = ScFormer(given, recipe=replace(RECIPE, batch_size=64)).fit(30, progress=False, accelerator="cpu")
        Z = np.concatenate([made.embed_cells(s) for s in given.values()])
        accuracy[name] = KNeighborsClassifier(15).fit(Z[::2], labels[::2]).score(Z[1::2], labels[1::2])
    assert len(shared) < 30 and accuracy["union"] > accuracy["intersection"] + 0.05, accuracy
