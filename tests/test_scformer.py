"""From counts to embeddings on toy cells: bad input, and what must not matter."""
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from scib.metrics import silhouette
from toy import CELLS, COUNTS, DSBN, RECIPE, model, our_warnings, same, toy, with_value

from scformer_nb import data, embedding, hvg, scformer
from scformer_nb.io import speaking_shell
from scformer_nb.scformer import ScFormer
from scformer_nb.simulate import simulate

# ---- counts in any form

@pytest.mark.parametrize("form", [COUNTS, COUNTS.toarray(), COUNTS.tocsc()], ids=["CSR", "dense", "CSC"])
@pytest.mark.filterwarnings("ignore:X is stored by columns")
def test_a_backed_file_is_read_in_parts(trained, Z, form, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PART", 16)
    toy(form).write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    trained.annotate(backed)
    assert np.abs(backed.obsm["X_scformer"] - Z).max() < 1e-6
    backed.write_h5ad(tmp_path / "annotated.h5ad")
    assert np.array_equal(anndata.read_h5ad(tmp_path / "annotated.h5ad").obsm["X_scformer"], backed.obsm["X_scformer"])
    assert np.abs(trained.embed_cells(backed[10:50]) - Z[10:50]).max() < 1e-6
    assert np.abs(trained.embed_cells(tmp_path / "x.h5ad") - Z).max() < 1e-6
    backed.file.close()


@pytest.mark.parametrize("form", [COUNTS, COUNTS.toarray()], ids=["CSR", "dense"])
def test_a_file_read_in_parts_gives_the_same_model(form, tmp_path, monkeypatch):
    toy(form, layers={"raw": form}).write_h5ad(tmp_path / "x.h5ad")
    given = [(CELLS, None), (tmp_path / "x.h5ad", None), (str(tmp_path / "x.h5ad"), "raw")]
    made = [model(source, layer=layer) for source, layer in given]
    monkeypatch.setattr(data, "PART", 16)
    monkeypatch.setattr(hvg, "LARGE", 30)
    made += [model(source, layer=layer) for source, layer in given]
    for other in made[1:]:
        assert same(made[0], other) and (made[0].cells.counts != other.cells.counts).nnz == 0
        assert (made[0].cells.bins != other.cells.bins).nnz == 0


def test_what_a_network_starts_from_is_a_sample(monkeypatch):
    sizes = []
    monkeypatch.setattr(scformer, "LARGE", 20)
    for name in ("svd_init", "bias_init"):
        monkeypatch.setattr(scformer, name, lambda part, cells, *rest: sizes.append(len(cells)))
    assert len(model().cells) == 60 and sizes == [20, 20]


def test_an_unseen_batch_at_the_end_of_a_backed_file_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PART", 16)
    monkeypatch.setattr(embedding, "embed_tokens", lambda *args: pytest.fail("it embedded"))
    toy(batch=["batch_0"] * 59 + ["lab 7"]).write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="not seen in training: lab 7"):
        model(recipe=DSBN).embed_cells(anndata.read_h5ad(tmp_path / "x.h5ad", backed="r"))


def test_counts_in_a_layer(trained, Z):
    given = toy(COUNTS.log1p(), layers={"counts": COUNTS})
    made = model(given, epochs=2, layer="counts")
    assert same(made, trained) and np.array_equal(made.embed_cells(given), Z)
    with pytest.raises(ValueError, match="trained on layer 'counts', which these cells do not have .layers: none.*pass layer='X' for X"):
        made.embed_cells(CELLS)
    with speaking_shell(), pytest.raises(ValueError, match="say --layer X for X, or a layer's name"):
        made.embed_cells(CELLS)
    assert np.array_equal(made.embed_cells(CELLS, layer="X"), Z)
    elsewhere = toy(COUNTS.log1p(), layers={"raw": COUNTS})
    for use in (made, trained):  # whatever layer it was trained on
        assert np.array_equal(use.embed_cells(elsewhere, layer="raw"), Z)
    with pytest.raises(ValueError, match="adata.layers has an 'X' too; rename"):
        made.embed_cells(toy(layers={"X": COUNTS}), layer="X")
    with pytest.raises(ValueError, match="layer='row' does not exist"):
        made.embed_cells(elsewhere, layer="row")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_that_are_not_whole_numbers_are_counted(trained, dtype):
    given = toy((COUNTS * 1.37).astype(dtype))
    for use in (model, trained.embed_cells):
        with pytest.warns(UserWarning, match="2,265 of 2,265 counts in X are not integers"):
            use(given)


# ---- bad input is refused by training and by embedding alike

NOT_COUNTS = {
    "logged": (COUNTS.log1p(), "as in logged data: .*layer="),
    "scaled": (COUNTS.toarray() - 1, "are negative, as in scaled data: .*layer="),
    "one negative": (with_value(-1), "1 of .* are negative.*layer="),
    "NaN": (with_value(np.nan), "1 of .* are NaN: .*layer="),
    "infinite": (with_value(np.inf), "1 of .* are infinite: .*layer="),
    "zeros only": (COUNTS * 0, "zeros only: .*layer="),
}


@pytest.mark.parametrize("case", NOT_COUNTS)
def test_what_are_no_counts(trained, case):
    X, message = NOT_COUNTS[case]
    for use in (model, trained.embed_cells):
        with pytest.raises(ValueError, match=message):
            use(toy(X))
        with pytest.raises(ValueError, match="pass layer='raw', it looks like counts"):
            use(toy(X, layers={"raw": COUNTS}))


OTHER_NAMES = {
    "genes twice": (["A"] * 60, "59 of 60 gene names are not unique; call adata.var_names_make_unique"),
    "Ensembl ids": ([f"ENSG{i:011d}" for i in range(60)], "has Ensembl ids, the model gene symbols; translate"),
    "Ensembl with versions": ([f"ENSMUSG{i:011d}.{i}" for i in range(60)], "Ensembl ids, the model gene symbols"),
    "other symbols": ([f"other_{i}" for i in range(60)], "only 0 of the model.s 60 genes .*half are needed. .the data has names like"),
    "less than half": ([*CELLS.var_names[:29], *(f"other_{i}" for i in range(31))], "only 29 of the model's 60 genes"),
}


@pytest.mark.parametrize("case", OTHER_NAMES)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_that_the_model_cannot_use(trained, case):
    names, message = OTHER_NAMES[case]
    with pytest.raises(ValueError, match=message):
        trained.embed_cells(toy(names=names))


def test_symbols_against_a_model_of_ensembl_ids():
    with pytest.raises(ValueError, match="the data has gene symbols, the model Ensembl ids; translate them first, gene_names.rename_genes"):
        model(toy(names=OTHER_NAMES["Ensembl ids"][0])).embed_cells(CELLS)


WRONG = {
    "no AnnData": (lambda: model(COUNTS), "AnnData is needed, not csr_matrix"),
    "genes twice": (lambda: model(toy(names=["A"] * 60)), "59 of 60 gene names are not unique"),
    "no such layer": (lambda: model(layer="counts"), "layer='counts' does not exist"),
    "no such batch_key": (lambda: model(batch_key="bach"), "batch_key='bach' is not a column of adata.obs; did you mean 'batch'"),
    "NaN batch_key": (lambda: model(toy(batch=[np.nan] * 2 + ["x"] * 58)), "batch_key='batch' is missing for 2 of 60 cells"),
    "one cell": (lambda: model(CELLS[:1].copy(), batch_key=None), "1 cells x 60 genes"),
    "one gene": (lambda: model(CELLS[:, :1].copy()), "60 cells x 1 genes"),
    "one HVG": (lambda: model(n_hvg=1), "n_hvg=1: at least 2"),
    "one bin": (lambda: model(n_bins=1), "n_bins is 1, but"),
    "no epochs": (lambda: model().fit(0), "max_epochs=0 must be at least 1"),
    "no cells": (lambda: model().embed_cells(CELLS[:0].copy()), "the data is empty: 0 cells x 60 genes"),
    "one gene of many": (lambda: model().embed_cells(CELLS[:, :1].copy()), "only 1 of the model's 60 genes"),
    "unseen_batch": (lambda: model().embed_cells(CELLS, unseen_batch="skip"), "'error' or 'mean', not 'skip'"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_wrong_use_is_a_clear_error(case):
    run, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        run()


# ---- few cells, few genes, odd batches: they work

@pytest.mark.parametrize("recipe", [RECIPE, DSBN], ids=["default", "paper"])
def test_a_constant_batch_key_is_no_batch(recipe):
    constant = toy(batch="x")
    with pytest.warns(UserWarning, match="batch_key='batch' is 'x' in every cell: treated as no batch"):
        made = model(constant, epochs=1, recipe=recipe)
    without = model(constant, epochs=1, recipe=recipe, batch_key=None)
    assert same(made, without) and repr(made) == repr(without)
    for new in (constant, CELLS):  # batches that differ from training's only one
        assert np.array_equal(made.embed_cells(new), without.embed_cells(new))


@pytest.mark.parametrize("recipe", [RECIPE, DSBN], ids=["default", "paper"])
def test_a_batch_of_one_cell_trains(recipe):
    lonely = toy(batch=["y"] + ["x"] * 59)
    with pytest.warns(UserWarning, match="1 of 2 batches in 'batch' have one cell only"):
        made = model(lonely, epochs=2, recipe=recipe)
    assert np.isfinite(made.history.valid_loss).all() and np.isfinite(made.embed_cells(lonely)).all()


def test_batches_matter_to_new_cells_only_with_dsbn(trained, Z):
    unknown = toy(batch=[np.nan] + ["lab 7"] * 59)
    assert np.array_equal(trained.embed_cells(unknown), Z)
    paper = model(recipe=DSBN)
    with pytest.raises(ValueError, match="batches not seen in training: lab 7.*unseen_batch='mean'"):
        paper.embed_cells(toy(batch=["lab 7"] * 59 + ["batch_0"]))
    with speaking_shell(), pytest.raises(ValueError, match="the model knows batch_0, batch_1.*say --unseen-batch mean"):
        paper.embed_cells(toy(batch="lab 7"))
    with pytest.raises(ValueError, match="needs obs.'batch'."):
        paper.embed_cells(anndata.AnnData(COUNTS, var=CELLS.var))


@pytest.mark.parametrize("recipe", [RECIPE, DSBN], ids=["default", "paper"])
def test_cells_without_any_expressed_gene(recipe):
    empty = toy(sp.diags([0.0] * 3 + [1.0] * 57).tocsr() @ COUNTS)
    with pytest.warns(UserWarning, match="3 of 60 cells express none of the 60 genes"):
        made = model(empty, epochs=1, recipe=recipe)
    with pytest.warns(UserWarning, match="3 of 60 cells express none"):
        embedded = made.embed_cells(empty)
    assert np.isfinite(embedded).all() and np.isfinite(made.history.valid_loss).all()
    with pytest.warns(UserWarning, match="2 of 2 cells express none"):
        made.embed_cells(anndata.concat([empty[:2], toy(COUNTS, names=[f"other_{i}" for i in range(60)])[:2]], axis=1, merge="first"))


def test_one_cell_can_be_embedded(trained, Z):
    assert np.abs(trained.embed_cells(CELLS[7]) - Z[7]).max() < 1e-6


@pytest.mark.parametrize("cells,genes", [(3, 60), (9, 60), (60, 3)])
@pytest.mark.filterwarnings("ignore:.* cells express none")
def test_few_cells_or_genes_train(cells, genes):
    few = CELLS[:cells, :genes].copy()
    made = model(few, epochs=2, batch_key=None)
    assert np.isfinite(made.embed_cells(few)).all() and np.isfinite(made.history.valid_loss).all()


@pytest.mark.parametrize("recipe", [RECIPE, DSBN], ids=["default", "paper"])
@pytest.mark.filterwarnings("ignore:.* have one cell only", "ignore:.* cells express none")
def test_twelve_cells_one_of_them_a_batch_train(recipe):
    few = CELLS[:12].copy()
    few.obs["batch"] = ["y"] + ["x"] * 11
    made = model(few, epochs=2, recipe=recipe)
    assert np.isfinite(made.embed_cells(few)).all() and np.isfinite(made.history.valid_loss).all()


def test_batches_of_one_type_train():
    alike = simulate(60, 60, 1, 2)
    made = model(alike, epochs=2)
    assert made.network.batch_shift is not None and np.isfinite(made.embed_cells(alike)).all()


# ---- batch correction

def test_the_correction_is_learned_once_there_are_batches_and_saved(trained, Z, tmp_path):
    assert trained.network.batch_shift.shift[2].weight.any() and model(batch_key=None).network.batch_shift is None
    assert model(recipe=replace(RECIPE, correct=False)).network.batch_shift is None
    trained.save(tmp_path / "model")
    loaded = ScFormer.load(tmp_path / "model")
    assert loaded.network.batch_shift.shift[2].weight.any() and np.array_equal(loaded.embed_cells(CELLS), Z)


def test_an_embedding_of_any_length_or_of_length_one(Z):
    "The bottleneck's numbers are as they are; `h_c` itself is scaled, as in models of before."
    assert Z.shape == (60, RECIPE.latent) and np.ptp(np.linalg.norm(Z, axis=1)) > .01
    before = model(epochs=1, recipe=replace(RECIPE, latent=0, kl=0.)).embed_cells(CELLS)
    assert before.shape == (60, RECIPE.dim) and np.allclose(np.linalg.norm(before, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("n_hvg", [60, 61, 1200])
def test_fewer_genes_than_n_hvg_keeps_all(trained, n_hvg):
    assert same(model(n_hvg=n_hvg, epochs=2), trained)


def test_the_input_is_left_alone(trained):
    before, given = CELLS.copy(), CELLS.copy()
    model(given, epochs=1, n_hvg=20).embed_cells(given)
    assert (given.X != before.X).nnz == 0 and given.obs.equals(before.obs) and given.var.equals(before.var)
    assert not given.layers and not given.obsm and given.uns.keys() == before.uns.keys()


# ---- the seed decides, and nothing else

def test_the_seed_decides(trained):
    assert same(model(epochs=2), trained) and same(model(seed=1), model(seed=np.int64(1)))
    assert not same(model(seed=1), model(seed=2)) and not same(model(epochs=2, seed=1), trained)


def test_the_seed_decides_dropout_too():
    recipe = replace(RECIPE, dropout=0.2)
    first = model(epochs=2, recipe=recipe)
    torch.rand(3)  # what others draw makes no difference
    assert same(model(epochs=2, recipe=recipe), first)


@pytest.mark.parametrize("what", ["construct", "select genes", "fit", "embed"])
def test_the_global_random_state_is_left_alone(trained, monkeypatch, what):
    if what != "fit":  # training may seed a GPU's generators, if it puts them back
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the generators of all GPUs were seeded"))
    states = torch.get_rng_state(), np.random.get_state()[1:3]
    {"construct": model, "select genes": partial(model, n_hvg=20), "embed": partial(trained.embed_cells, CELLS),
     "fit": partial(model, epochs=1)}[what]()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state()[1:3], states[1], strict=True))


def test_new_cells_with_extra_and_missing_genes(trained, Z, recwarn):
    extra = toy(COUNTS[:, ::-1], names=[f"extra_{i}" for i in range(60)])
    more = anndata.concat([CELLS, extra], axis=1, merge="first")
    assert np.array_equal(trained.embed_cells(more), Z) and our_warnings(recwarn) == []
    with pytest.warns(UserWarning, match="10 of the model's 60 genes are not in the data and count as not expressed"):
        fewer = trained.embed_cells(more[:, 10:].copy())
    silent = toy(COUNTS.multiply(np.arange(60) >= 10).tocsr())
    assert np.abs(fewer - trained.embed_cells(silent)).max() < 1e-6
    with pytest.warns(UserWarning, match="30 of the model's 60"):  # half is enough
        assert np.isfinite(trained.embed_cells(CELLS[:, :30].copy())).all()


# ---- annotate

@pytest.mark.parametrize("kind", ["trained", "untrained", "loaded", "without batches"])
def test_annotations_survive_the_disk(trained, kind, tmp_path):
    trained.save(tmp_path / "model")
    made = {"trained": lambda: trained, "untrained": model, "loaded": lambda: ScFormer.load(tmp_path / "model"),
            "without batches": partial(model, batch_key=None)}[kind]()
    given = anndata.concat([CELLS, toy(names=[f"extra_{i}" for i in range(60)])], axis=1, merge="first")
    made.annotate(given)
    given.write_h5ad(tmp_path / "x.h5ad")
    back = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert np.array_equal(back.obsm["X_scformer"], made.embed_cells(CELLS))
    assert np.array_equal(back.varm["scformer"][:60], made.embed_genes().to_numpy()) and np.isnan(back.varm["scformer"][60:]).all()
    kept = back.uns["scformer"]
    assert json.loads(kept["settings"])["n_bins"] == 51 and json.loads(kept["recipe"])["dim"] == 16
    assert all(isinstance(v, str) for v in kept["versions"].values()) and "torch" in kept["versions"]
    assert len(kept["history"]) == len(made.history) and list(kept["history"].columns) == list(made.history.columns)
    made.annotate(back)  # once more onto what was read
    back.write_h5ad(tmp_path / "again.h5ad")


def test_annotate_replaces_what_is_its_own_and_nothing_else(trained, monkeypatch):
    given = toy()
    given.obsm["X_scformer"] = np.zeros((60, 3))  # an embedding of an older model
    trained.annotate(given)
    trained.annotate(given)
    monkeypatch.setattr(embedding, "embed_tokens", lambda *args: pytest.fail("it embedded"))
    for place, value in (("uns", "mine"), ("obsm", pd.DataFrame({"a": range(60)}, given.obs_names))):
        other = toy()
        getattr(other, place)["scformer" if place == "uns" else "X_scformer"] = value
        with pytest.raises(ValueError, match=f"adata.{place}.* is there already and is nothing that ScFormer writes"):
            trained.annotate(other)


def test_scanpy_and_scib_read_on(trained):
    given = CELLS.copy()
    trained.annotate(given)
    sc.pp.neighbors(given, use_rep="X_scformer", n_neighbors=10, method="gauss")  # the default compiles umap-learn for ten seconds
    assert given.uns["neighbors"]["params"]["use_rep"] == "X_scformer" and given.obsp["connectivities"].shape == (60, 60)
    assert 0 < silhouette(given, "cell_type", "X_scformer") < 1


def test_nothing_warns_on_the_plain_way(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="lightning|torch")
        made = model(epochs=1)
        given = CELLS.copy()
        made.annotate(given)
        made.save(tmp_path / "model")
        ScFormer.load(tmp_path / "model")


def test_a_trained_model_is_not_trained_over():
    trained = model(epochs=1)
    weights = {k: v.clone() for k, v in trained.network.state_dict().items()}
    with pytest.raises(ValueError, match="trained for 1 epoch; make a new ScFormer"):
        trained.fit(1, progress=False)
    assert all(torch.equal(v, weights[k]) for k, v in trained.network.state_dict().items()) and len(trained.history) == 1


# ---- what was called before makes no difference

@pytest.mark.parametrize("recipe", [replace(RECIPE, dropout=0.5), replace(DSBN, dropout=0.5)], ids=["dropout", "dropout and DSBN"])
def test_embeddings_do_not_depend_on_what_was_called_before(recipe):
    made = model(recipe=recipe, epochs=1)
    first, genes = made.embed_cells(CELLS), made.embed_genes()
    weights = {k: v.clone() for k, v in made.network.state_dict().items()}
    made.network.train()
    assert np.array_equal(made.embed_cells(CELLS), first) and np.array_equal(made.embed_cells(CELLS), first)
    made.network.train()
    assert made.embed_genes().equals(genes)
    assert all(torch.equal(v, weights[k]) for k, v in made.network.state_dict().items())


@pytest.mark.parametrize("recipe", [replace(RECIPE, dropout=0.5), replace(DSBN, dropout=0.5)], ids=["dropout", "dropout and DSBN"])
def test_training_does_not_depend_on_what_was_called_before(recipe, tmp_path):
    whole = model(recipe=recipe, epochs=2)
    looked_at = model(recipe=recipe)
    looked_at.embed_cells(CELLS)
    assert same(looked_at.fit(2, progress=False, accelerator="cpu"), whole)
    continued = model(recipe=recipe).fit(1, tmp_path / "run", progress=False, accelerator="cpu")
    continued.embed_cells(CELLS)
    assert same(continued.fit(2, tmp_path / "run", resume=True, progress=False, accelerator="cpu"), whole)
    continued.save(tmp_path / "run")  # beside the checkpoint
    assert same(ScFormer.load(tmp_path / "run"), whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_fit_that_fails_leaves_the_model_as_it_was(error, monkeypatch):
    def stop(task, *args, **how):
        with torch.no_grad():
            next(task.network.parameters()).add_(1)
        raise error
    made = model()
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(scformer, "train", stop)
        made.fit(1)
    assert same(made, model()) and same(made.fit(1, progress=False, accelerator="cpu"), model(epochs=1))


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        model(seed=-1)


# ---- batches that are numbers

def test_one_of_anything_is_no_plural(trained):
    assert repr(model(batch_key=None)).endswith("60 genes, 16 dimensions, 1 batch, not trained")
    assert repr(trained).endswith("2 batches, trained for 2 epochs")


# ---- the package

def test_the_old_module_says_the_new_name():
    code = ("import warnings, sys; warnings.simplefilter('error'); import scformer_nb.api, scformer_nb\n"
            "assert 'torch' not in sys.modules\nwarnings.simplefilter('always')\n"
            "with warnings.catch_warnings(record=True) as seen:\n    from scformer_nb.api import ScFormer\n"
            "assert ScFormer is scformer_nb.ScFormer and scformer_nb.scformer.ScFormer is ScFormer\n"
            "assert any(w.category is DeprecationWarning and 'scformer_nb.scformer' in str(w.message) and w.filename == '<string>'\n"
            "           for w in seen), [str(w) for w in seen]\n"
            "try: scformer_nb.api.nothing\nexcept AttributeError as e: assert 'scformer' in str(e)\nelse: raise SystemExit(1)\n"
            "assert scformer_nb.load is scformer_nb.data.load\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
