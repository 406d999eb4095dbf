"""From counts to embeddings and back from disk on toy cells: bad input, what must not matter, saved models, the command's refusals."""
import hashlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import scanpy as sc
import scipy.sparse as sp
import torch
from scib.metrics import silhouette

from scformer_nb import data, model_files, scformer, writable
from scformer_nb.io import speaking_shell
from scformer_nb.scformer import ScFormer
from scformer_nb.training import DEFAULT, PAPER

SMALL = dict(dim=16, n_blocks=1, d_ff=16, max_masked=16)
RECIPE, DSBN = replace(DEFAULT, **SMALL), replace(PAPER, **SMALL)
CELLS = data.simulate(60, 60, 3, 2)
COUNTS = CELLS.X


def toy(X=COUNTS, names=None, layers=None, **obs):
    "The toy cells with something changed."
    var = pd.DataFrame(index=list(CELLS.var_names if names is None else names))
    return anndata.AnnData(X, obs=CELLS.obs.assign(**obs), var=var, layers=layers)


def with_value(value):
    X = COUNTS.toarray()
    X[3, 5] = value
    return X


def model(adata=CELLS, epochs=0, **how):
    made = ScFormer(adata, **{"batch_key": "batch", "recipe": RECIPE} | how)
    return made.fit(epochs, progress=False, accelerator="cpu") if epochs else made


def same(a, b):
    "Whether two models have exactly the same genes and weights."
    ours, theirs = ({k: v.cpu() for k, v in m.network.state_dict().items()} for m in (a, b))
    return a.vocab.genes == b.vocab.genes and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def our_warnings(caught):
    "Messages of the UserWarnings that do not come from libraries."
    return [str(w.message) for w in caught if w.category is UserWarning and "site-packages" not in w.filename]


@pytest.fixture(scope="module")
def trained():
    return model(epochs=2)


@pytest.fixture(scope="module")
def Z(trained):
    Z = trained.embed_cells(CELLS)
    assert Z.shape == (60, 16) and Z.dtype == np.float32 and np.allclose(np.linalg.norm(Z, axis=1), 1, atol=1e-5)
    return Z


# ---- counts in any form

@pytest.mark.parametrize("backed", [False, True], ids=["in memory", "backed"])
@pytest.mark.parametrize("form", [COUNTS.tocsc(), COUNTS.toarray(), COUNTS.astype(np.int64), COUNTS.astype(float), sp.csr_array(COUNTS),
                                  COUNTS.toarray().astype(np.uint16)],
                         ids=["CSC", "dense", "int64", "float64", "csr_array", "uint16"])
def test_every_form_of_counts_gives_the_same_model_and_embedding(trained, Z, form, backed, tmp_path, recwarn):
    given = toy(form)
    if backed:
        given.write_h5ad(tmp_path / "x.h5ad")
        given = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    made = model(given)
    assert same(made, model()) and (made.cells.bins != trained.cells.bins).nnz == 0 and (made.cells.counts != COUNTS).nnz == 0
    assert np.array_equal(trained.embed_cells(given), Z)
    assert our_warnings(recwarn) == []
    if backed:
        given.file.close()


@pytest.mark.parametrize("form", [COUNTS, COUNTS.toarray(), COUNTS.tocsc()], ids=["CSR", "dense", "CSC"])
def test_a_backed_file_is_read_in_parts(trained, Z, form, tmp_path, monkeypatch):
    sizes, check = [], scformer.check_adata
    monkeypatch.setattr(scformer, "PART", 16)
    monkeypatch.setattr(scformer, "check_adata", lambda adata, **how: sizes.append(adata.n_obs) or check(adata, **how))
    toy(form).write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    trained.annotate(backed)
    assert sizes == ([60] if sp.issparse(form) and form.format == "csc" else [16, 16, 16, 12])
    assert np.abs(backed.obsm["X_scformer"] - Z).max() < 1e-6
    backed.write_h5ad(tmp_path / "annotated.h5ad")
    assert np.array_equal(anndata.read_h5ad(tmp_path / "annotated.h5ad").obsm["X_scformer"], backed.obsm["X_scformer"])
    assert np.abs(trained.embed_cells(backed[10:50]) - Z[10:50]).max() < 1e-6
    backed.file.close()


def test_an_unseen_batch_at_the_end_of_a_backed_file_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(scformer, "PART", 16)
    monkeypatch.setattr(scformer, "embed_tokens", lambda *args: pytest.fail("it embedded"))
    toy(batch=["batch_0"] * 59 + ["lab 7"]).write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="not seen in training: lab 7"):
        model(recipe=DSBN).embed_cells(anndata.read_h5ad(tmp_path / "x.h5ad", backed="r"))


def test_a_backed_file_costs_the_memory_of_its_parts(trained, tmp_path, monkeypatch):
    more = sp.random(6000, 2000, 0.2, "csr", np.float32, random_state=0, data_rvs=lambda n: np.full(n, 1.0))
    names = [*CELLS.var_names, *(f"extra_{i}" for i in range(1940))]
    anndata.AnnData(more, var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "x.h5ad")
    monkeypatch.setattr(scformer, "PART", 500)
    monkeypatch.setattr(scformer, "embed_tokens", lambda network, cells: np.ones((len(cells), 16), np.float32))
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    tracemalloc.start()
    trained.embed_cells(backed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < more.data.nbytes + more.indices.nbytes  # 19 MB; less than the counts, and they are a fifth of the dense matrix


def test_counts_in_a_layer(trained, Z):
    given = toy(COUNTS.log1p(), layers={"counts": COUNTS})
    made = model(given, epochs=2, layer="counts")
    assert same(made, trained) and np.array_equal(made.embed_cells(given), Z)
    with pytest.raises(ValueError, match="trained on layer 'counts', which these cells do not have .layers: none.*pass layer='X' for X"):
        made.embed_cells(CELLS)
    with speaking_shell(), pytest.raises(ValueError, match="say --layer X for X, or the name of a layer"):
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
    "Ensembl ids": ([f"ENSG{i:011d}" for i in range(60)], "only 0 of the model's 60 genes.*has Ensembl ids, the model gene symbols; map"),
    "Ensembl with versions": ([f"ENSMUSG{i:011d}.{i}" for i in range(60)], "Ensembl ids, the model gene symbols"),
    "other symbols": ([f"other_{i}" for i in range(60)], "only 0 of the model's 60 genes are in the data .at least half are needed.$"),
    "less than half": ([*CELLS.var_names[:29], *(f"other_{i}" for i in range(31))], "only 29 of the model's 60 genes"),
}


@pytest.mark.parametrize("case", OTHER_NAMES)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_that_the_model_cannot_use(trained, case):
    names, message = OTHER_NAMES[case]
    with pytest.raises(ValueError, match=message):
        trained.embed_cells(toy(names=names))


def test_symbols_against_a_model_of_ensembl_ids():
    with pytest.raises(ValueError, match="the data has gene symbols, the model Ensembl ids; map one to the other first"):
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


@pytest.mark.parametrize("recipe", [RECIPE, DSBN], ids=["default", "paper"])
def test_embeddings_depend_on_the_cell_alone(recipe, monkeypatch):
    "Not on the chunks they are computed in, nor on the order of cells and genes."
    made = model(epochs=1, recipe=recipe)
    expected, chunks = made.embed_cells(CELLS), scformer.length_chunks
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(60), rng.permutation(60)
    assert np.abs(made.embed_cells(CELLS[cells][:, genes].copy()) - expected[cells]).max() < 1e-6
    assert np.abs(made.embed_cells(CELLS[cells[:11]].copy()) - expected[cells[:11]]).max() < 1e-6
    for budget in (1, 100, 1000):  # from one cell at a time
        monkeypatch.setattr(scformer, "length_chunks", partial(chunks, budget=budget))
        assert np.abs(made.embed_cells(CELLS) - expected).max() < 1e-6


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


# ---- saved models

class Trap:
    "A pickle that touches a file when it is read."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def saved(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back(trained, Z, saved):
    loaded = ScFormer.load(saved)
    assert same(loaded, trained) and np.array_equal(loaded.embed_cells(CELLS), Z) and loaded.embed_genes().equals(trained.embed_genes())
    assert loaded.history.equals(trained.history) and repr(loaded) == repr(trained)
    loaded.save(saved.parent / "copy")
    assert (saved.parent / "copy/model.json").read_text() == (saved / "model.json").read_text()


def test_both_files_can_be_read_by_others(saved):
    probe = saved / "probe"
    probe.touch()
    assert {(saved / name).stat().st_mode for name in ("model.json", "weights.safetensors")} == {probe.stat().st_mode}


NUMPY = {
    "seed": dict(seed=np.int64(3)),
    "n_bins": dict(n_bins=np.int32(11)),
    "n_hvg": dict(n_hvg=np.int64(20)),
    "recipe": dict(recipe=replace(RECIPE, d_ff=np.int64(16), ecs=np.float32(1))),
}


@pytest.mark.parametrize("case", NUMPY)
def test_numpy_numbers_can_be_saved(case, tmp_path):
    made = model(**NUMPY[case])
    made.save(tmp_path / "model")
    assert same(ScFormer.load(tmp_path / "model"), made)


def test_a_model_is_not_overwritten_by_chance(trained, saved):
    before = (saved / "model.json").read_bytes()
    other = model(seed=1)
    with pytest.raises(FileExistsError, match="model holds a model; choose another folder or say overwrite=True"):
        other.save(saved)
    assert (saved / "model.json").read_bytes() == before and same(ScFormer.load(saved), trained)
    other.save(saved, overwrite=True)
    assert same(ScFormer.load(saved), other) and sorted(p.name for p in saved.iterdir()) == ["model.json", "weights.safetensors"]


@pytest.fixture(params=["read-only", "in read-only", "a file", "in a file"])
def unwritable(request):
    "A path that cannot become a folder of results, not even for root."
    folder = Path(tempfile.mkdtemp())
    path = folder / "here"
    path.write_text("mine") if "file" in request.param else path.mkdir(0o555)
    folder.chmod(0o755)
    if root := os.geteuid() == 0:  # who may write anywhere
        os.seteuid(65534)
    yield path / "inside" if "in" in request.param.split() else path
    if root:
        os.seteuid(0)
    assert path.read_text() == "mine" if path.is_file() else not any(path.iterdir())
    shutil.rmtree(folder)


def test_saving_where_nothing_can_be_written(trained, unwritable):
    with pytest.raises(OSError, match=f"cannot write {unwritable}"):
        trained.save(unwritable)


def test_a_full_disk_leaves_the_old_model(trained, saved):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {saved}"):
            model(seed=1).save(saved, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(ScFormer.load(saved), trained)


def test_a_save_that_is_cut_off_is_never_half_of_two_models(trained, saved, monkeypatch):
    def stop(source, target):
        moves.append(target)
        if len(moves) == at:
            raise KeyboardInterrupt
        return move(source, target)
    move = os.replace
    for at in (1, 2):
        moves = []
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", stop)
            model(seed=1).save(saved, overwrite=True)
        if at == 1:
            assert same(ScFormer.load(saved), trained)
    with pytest.raises(ValueError, match="belong together"):
        ScFormer.load(saved)


@pytest.mark.parametrize("missing", ["model.json", "weights.safetensors", "the folder"])
def test_a_model_with_a_part_missing(saved, missing):
    shutil.rmtree(saved) if missing == "the folder" else (saved / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{saved} holds no saved model: .* is missing"):
        ScFormer.load(saved)


def test_a_model_of_another_format(saved):
    facts = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_text(json.dumps(facts | {"format": 2, "versions": {"scformer_nb": "9.9"}}))
    (saved / "weights.safetensors").write_bytes(b"of another kind")
    with pytest.raises(ValueError, match="has format 2, this version reads 1; install scformer_nb 9.9"):
        ScFormer.load(saved)


GARBAGE = {
    "not JSON": lambda facts: "{]",
    "empty": lambda facts: "",
    "a list": lambda facts: "[1]",
    "a number": lambda facts: "3",
    "null": lambda facts: "null",
    "cut off": lambda facts: json.dumps(facts)[:500],
    "not text": lambda facts: b"\xff\xfe\x00garbage",
    "the format alone": lambda facts: {"format": 1},
    "odd versions": lambda facts: facts | {"format": 2, "versions": []},
    "genes are a number": lambda facts: facts | {"genes": 3},
    "a gene less": lambda facts: facts | {"genes": facts["genes"][1:]},
    "genes in another order": lambda facts: facts | {"genes": facts["genes"][::-1]},
    "other specials": lambda facts: facts | {"specials": ["x"]},
    "no recipe": lambda facts: facts | {"recipe": None},
    "an unknown option": lambda facts: facts | {"recipe": facts["recipe"] | {"new": 1}},
    "heads that do not fit": lambda facts: facts | {"recipe": facts["recipe"] | {"n_heads": 3}},
    "another size": lambda facts: facts | {"recipe": facts["recipe"] | {"dim": 8}},
    "a size of text": lambda facts: facts | {"recipe": facts["recipe"] | {"dim": "16"}},
    "no layer": lambda facts: facts | {"settings": {k: v for k, v in facts["settings"].items() if k != "layer"}},
    "settings are a list": lambda facts: facts | {"settings": []},
    "seed is text": lambda facts: facts | {"settings": facts["settings"] | {"seed": "x"}},
    "no history": lambda facts: {k: v for k, v in facts.items() if k != "history"},
    "history is text": lambda facts: facts | {"history": "abc"},
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_model_json(saved, case):
    wrong = GARBAGE[case](json.loads((saved / "model.json").read_text()))
    wrong = wrong if isinstance(wrong, (str, bytes)) else json.dumps(wrong)
    (saved / "model.json").write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
    with pytest.raises(ValueError, match=f"{saved}"):
        ScFormer.load(saved)


OTHERS = {
    "another seed": lambda: model(seed=1),
    "other genes, as many": lambda: model(toy(names=[f"other_{i}" for i in range(60)])),
    "another size": lambda: model(recipe=replace(RECIPE, d_ff=32)),
    "other batches": lambda: model(batch_key=None),
}


@pytest.mark.parametrize("case", OTHERS)
def test_weights_of_another_model(saved, tmp_path, case):
    OTHERS[case]().save(tmp_path / "other")
    shutil.copy(tmp_path / "other/weights.safetensors", saved)
    with pytest.raises(ValueError, match=f"{saved} do not belong together"):
        ScFormer.load(saved)


WEIGHTS = {
    "pickle": lambda trap: pickle.dumps(trap),
    "torch": lambda trap: torch_bytes({"weight": trap}),
    "empty": lambda trap: b"",
    "text": lambda trap: b"garbage" * 100,
    "no tensors": lambda trap: safetensors.torch.save({}),
}


def torch_bytes(what):
    with tempfile.TemporaryFile() as file:
        torch.save(what, file)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_never_executed(saved, tmp_path, case):
    (saved / "weights.safetensors").write_bytes(WEIGHTS[case](Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match=f"{saved}"):
        ScFormer.load(saved)
    assert not (tmp_path / "sprung").exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_weights_that_are_cut_off(saved, share):
    whole = (saved / "weights.safetensors").read_bytes()
    (saved / "weights.safetensors").write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(ValueError, match="is cut off or damaged .*; copy or save it again"):
        ScFormer.load(saved)


@pytest.mark.parametrize("change,message", [
    (lambda weights: {k: v.index_fill(0, torch.tensor(0), np.nan) if k == "encoder.gene.weight" else v for k, v in weights.items()},
     "1 of .* tensors in .* have NaN or infinite values .encoder.gene.weight.; copy or train it again"),
    (lambda weights: {k: v for k, v in weights.items() if k != "encoder.gene.weight"}, "do not belong together")],
    ids=["NaN", "a tensor is missing"])
def test_weights_that_are_spoilt(trained, saved, change, message):
    model_files.write_model(saved, change(trained.network.state_dict()), scformer.model_facts(trained), overwrite=True)
    with pytest.raises(ValueError, match=message):
        ScFormer.load(saved)


# ---- the hub

@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A stand-in for huggingface_hub: a folder, and the calls it got."
    calls = []

    class HfApi:
        def create_repo(self, repo_id, **how):
            calls.append(("create_repo", repo_id, how))

        def upload_folder(self, **how):
            calls.append(("upload_folder", sorted(os.listdir(how["folder_path"])), how))
            shutil.copytree(how["folder_path"], tmp_path / how["repo_id"])
            return f"commit of {how['repo_id']}"

    def snapshot_download(repo_id, **how):
        calls.append(("snapshot_download", repo_id, how))
        return str(tmp_path / repo_id)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download))
    return calls


def test_a_model_comes_back_from_the_hub(trained, hub):
    assert trained.push_to_hub("lab/toy") == "commit of lab/toy"
    assert same(ScFormer.from_hub("lab/toy", revision="abc"), trained)
    made, sent, got = hub
    assert made == ("create_repo", "lab/toy", {"private": True, "exist_ok": True})
    assert sent[1] == ["README.md", "model.json", "weights.safetensors"] and not Path(sent[2]["folder_path"]).exists()
    assert got[2] == {"revision": "abc", "allow_patterns": ["model.json", "weights.safetensors"]}  # nothing else is downloaded


def test_an_untrained_model_is_not_shared(hub):
    with pytest.raises(ValueError, match="not trained; fit it before you share it"):
        model().push_to_hub("lab/toy")
    assert hub == []


def test_the_hub_is_called_as_it_wants_to_be():
    real = pytest.importorskip("huggingface_hub")
    used = {real.HfApi.create_repo: "repo_id private exist_ok", real.HfApi.upload_folder: "repo_id folder_path commit_message",
            real.snapshot_download: "repo_id revision allow_patterns"}
    for function, names in used.items():
        assert set(names.split()) <= set(inspect.signature(function).parameters)


def test_a_card_says_what_it_knows_and_no_more(trained):
    plain = trained.model_card("lab/toy")
    assert "license" not in plain and "Not stated" in plain and "Metrics" not in plain
    assert "simulated: 60 cells, 60 genes" in plain and "2 sequencing batches" in plain and "2 epochs" in plain
    assert "batch_0" not in plain  # a batch may be named after a donor
    odd = toy()
    odd.uns["dataset"] = "two\nlines | and a bar"
    card = model(odd, batch_key=None).model_card("lab/toy", {"NMI | x": 1}, licence="other: mine")
    assert "two lines | and a bar: 60 cells" in card and "no sequencing batches" in card and "Not trained." in card
    assert 'license: "other: mine"\n---\n' in card and "| NMI / x | 1 |" in card


def test_a_trained_model_is_not_trained_over():
    trained = model(epochs=1)
    weights = {k: v.clone() for k, v in trained.network.state_dict().items()}
    with pytest.raises(ValueError, match="trained for 1 epochs; make a new ScFormer"):
        trained.fit(1, progress=False)
    assert all(torch.equal(v, weights[k]) for k, v in trained.network.state_dict().items()) and len(trained.history) == 1


# ---- hostile model folders

def save_as(folder, network=None, text=None, **changes):
    "A model folder with something changed, its digest as it should be; `a__b` is the entry b of a."
    facts = json.loads((folder / "model.json").read_text())
    for path, value in changes.items():
        place, name = (facts[path.split("__")[0]] if "__" in path else facts), path.split("__")[-1]
        place[name] = value
    text = json.dumps(facts).encode() if text is None else text
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    data = safetensors.torch.save((network or (lambda w: w))(weights), {"model.json": hashlib.sha256(text).hexdigest()})
    (folder / "model.json").write_bytes(text)
    (folder / "weights.safetensors").write_bytes(data)


def gene_table(change):
    return lambda weights: weights | {"encoder.gene.weight": change(weights["encoder.gene.weight"]).contiguous()}


HOSTILE = {
    "a width of a terabyte": (dict(recipe__dim=10**9), "dim is 1000000000, which does not fit"),
    "a width of another size": (dict(recipe__dim=32), "do not belong together: .* is .*, not "),
    "a width beyond 64 bits": (dict(recipe__dim=10**20), "dim is 1000.*, which does not fit"),
    "a million blocks": (dict(recipe__n_blocks=10**6), "n_blocks is 1000000, which does not fit"),
    "bins without end": (dict(settings__n_bins=5 * 10**6), "n_bins is 5000000, not from 2 to 65536"),
    "one bin": (dict(settings__n_bins=1), "n_bins is 1, not from 2"),
    "a negative seed": (dict(settings__seed=-3), "seed is -3, not from 0"),
    "heads as a float": (dict(recipe__n_heads=4.0), "recipe.n_heads is 4.0, not a whole number"),
    "true as a number": (dict(format=True), "format is True, not a whole number"),
    "a pool of code": (dict(recipe__pool="__import__('os')"), "__import__"),
    "an unknown option": (dict(recipe__evil=1), "evil"),
    "a layer as a list": (dict(settings__layer=[1]), "layer is .1., not text or null"),
    "three batches": (dict(settings__batches=["a", "b", "c"]), "do not belong together: heads.batch.weight is .2, 16., not .3, 16."),
    "genes as a text": (dict(genes="x" * 60), "genes is 'x*\\.\\.\\.x*', not a list"),
    "genes twice": (dict(genes=["gene"] * 60), "59 gene names are duplicates"),
    "half a character": (dict(genes=["\ud800", *(f"gene_{i}" for i in range(59))]), "genes.0. is .*, not text"),
    "a nested history": (dict(history=[{"epoch": [1]}]), "history.0..epoch is .1., not a number or null"),
    "versions as a list": (dict(versions=[1]), "versions is .1., not an object"),
    "JSON without end": (dict(text=b"[" * 200_000), "nested without end"),
    "a number of 6,000 digits": (dict(text=b'{"format": ' + b"9" * 6000 + b"}"), "cut off or damaged"),
    "whole numbers as weights": (dict(network=gene_table(lambda w: w.int())), "gene.weight is of type I32, not F32"),
    "complex weights": (dict(network=gene_table(lambda w: w.to(torch.complex64))), "gene.weight is of type C64"),
    "weights of 8 bits": (dict(network=gene_table(lambda w: w.to(torch.float8_e4m3fn))), "gene.weight is of type F8_E4M3"),
    "a tensor more": (dict(network=lambda w: w | {"evil": torch.zeros(3)}), "evil is in one of them only"),
    "weights beyond 32 bits": (dict(network=gene_table(lambda w: w.double() * 0 + 1e300)), "NaN or infinite values"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_model_folder_is_refused_before_anything_is_built(saved, case, monkeypatch):
    changes, message = HOSTILE[case]
    save_as(saved, **changes)
    built, build = [], scformer.build_network
    monkeypatch.setattr(scformer, "build_network", lambda *how: built.append(build(*how)) or built[-1])
    with pytest.raises(ValueError, match=message) as error:
        ScFormer.load(saved)
    assert str(saved) in str(error.value)
    assert all(weight.is_meta for network in built for weight in network.parameters())


@pytest.mark.parametrize("dtype,error", [(torch.float64, 0), (torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_weights_of_other_precision_are_converted(saved, Z, dtype, error):
    save_as(saved, network=lambda weights: {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items()})
    loaded = ScFormer.load(saved)
    assert {w.dtype for w in loaded.network.parameters()} == {torch.float32}
    assert np.abs(loaded.embed_cells(CELLS) - Z).max() <= error


def test_an_embedding_that_is_not_finite_is_never_returned(saved):
    save_as(saved, network=gene_table(lambda w: w * 0 + 3e38))
    loaded = ScFormer.load(saved)  # all of its weights are finite
    with pytest.raises(ValueError, match="60 of 60 cells get NaN instead of an embedding"):
        loaded.embed_cells(CELLS)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to nothing"])
def test_what_is_no_file_is_not_opened(saved, name, kind):
    (saved / name).unlink()
    {"pipe": lambda: os.mkfifo(saved / name), "folder": (saved / name).mkdir, "device": lambda: (saved / name).symlink_to("/dev/zero"),
     "link to nothing": lambda: (saved / name).symlink_to("nowhere")}[kind]()
    with pytest.raises((ValueError, FileNotFoundError), match=f"{saved}.*({name}|is missing)"):
        ScFormer.load(saved)


def test_a_model_of_perturbations_is_not_one_of_cells(saved):
    save_as(saved, kind="perturbation")
    with pytest.raises(ValueError, match=f"{saved} holds another kind of model; load it with PerturbationModel.load"):
        ScFormer.load(saved)


def test_a_planted_link_is_not_followed(trained, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("weights.new", "json.new", ".new.model.json", "model.json", "weights.safetensors"):
        (folder / name).symlink_to(victim)
    trained.save(folder, overwrite=True)
    assert victim.read_text() == "mine" and same(ScFormer.load(folder), trained)


def test_a_failed_save_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="no space is left"):
        trained.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


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

def test_numbers_as_batches_are_explained():
    lanes = toy(batch=np.repeat([1, 2], 30))
    made = model(lanes, recipe=DSBN)
    assert np.isfinite(made.embed_cells(lanes)).all()
    with pytest.raises(ValueError, match="not seen in training: 1.0, 2.0; the model knows 1, 2.*1.0 is the number 1 of training"):
        made.embed_cells(toy(batch=np.repeat([1.0, 2.0], 30)))
    with pytest.raises(ValueError, match="donor_0, .*, donor_15 and 52 more; the model"):
        made.embed_cells(toy(batch=[f"donor_{i}" for i in range(60)]))


# ---- what can be written is known before

TABLES = {
    "a reserved name": (dict(_index=[1] * 60), "adata.obs.'_index'. cannot be written .*reserved"),
    "mixed types": (dict(note=[1, "x"] * 30), r"obs.'note'. = adata.obs.'note'..astype\(str\)"),
    "dates": (dict(day=pd.to_datetime(["2020-01-01"] * 60)), "obs.'day'. cannot be written"),
    "truth with gaps": (dict(good=pd.Series([True, None] * 30, dtype=object).to_numpy()), r"obs.'good'..astype\(str\)"),
    "lists": (dict(tags=pd.Series([["a"]] * 60).to_numpy()), "obs.'tags'. cannot be written"),
}


@pytest.mark.parametrize("case", TABLES)
def test_what_cannot_be_written_is_named(case):
    columns, message = TABLES[case]
    with pytest.raises(ValueError, match=message):
        writable.check_writable(toy(**columns))
    given = toy()
    given.raw = toy()
    for name, values in columns.items():
        given.raw.var[name] = values
    with pytest.raises(ValueError, match="adata.raw.var."):  # Seurat's converters leave columns there
        writable.check_writable(given)


@pytest.mark.parametrize("place,value", [("uns", {1, 2}), ("uns", {3: 4}), ("obsm", pd.DataFrame({"_index": range(60)}, CELLS.obs_names))])
def test_other_parts_that_cannot_be_written_are_named(place, value):
    given = toy()
    getattr(given, place)["odd"] = value
    with pytest.raises(ValueError, match=f"adata.{place}.'odd'. cannot be written"):
        writable.check_writable(given)


def test_what_can_be_written_passes_and_is_written(tmp_path):
    given = toy(text=["a", None] * 30, numbers=pd.array([1, None] * 30, dtype="Int64"), flag=True,
                kind=pd.Categorical(["x", None] * 30), real=np.nan)
    given.uns["settings"] = {"a": [1, "x"], "none": None}
    given.obsm["table"] = pd.DataFrame({"a": range(60)}, given.obs_names)
    before = given.copy()
    writable.check_writable(given)
    assert given.obs.equals(before.obs) and given.uns.keys() == before.uns.keys()
    given.write_h5ad(tmp_path / "x.h5ad")


def test_annotate_replaces_what_is_its_own_and_nothing_else(trained, monkeypatch):
    given = toy()
    given.obsm["X_scformer"] = np.zeros((60, 3))  # an embedding of an older model
    trained.annotate(given)
    trained.annotate(given)
    monkeypatch.setattr(scformer, "embed_tokens", lambda *args: pytest.fail("it embedded"))
    for place, value in (("uns", "mine"), ("obsm", pd.DataFrame({"a": range(60)}, given.obs_names))):
        other = toy()
        getattr(other, place)["scformer" if place == "uns" else "X_scformer"] = value
        with pytest.raises(ValueError, match=f"adata.{place}.* is there already and is nothing that ScFormer writes"):
            trained.annotate(other)


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
