"""Baselines where a package, R or a batch is missing, on tiny data, and without a trace in the process that calls them."""
import importlib.util
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from functools import cache, partial

import lightning
import matplotlib
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.neighbors import NearestNeighbors

from scformer_nb import baselines
from scformer_nb.baselines import BASELINES, DETERMINISTIC, SEES_LABELS, MissingBaseline, quietly, scvi_genes, split_for_scvi
from scformer_nb.hvg import preprocess
from scformer_nb.simulate import simulate

CELLS = preprocess(simulate(60, 80, 3, 2, seed=1, boost=20), batch_key="batch")  # some 30 cells in each batch
INSTALL = "pip install -c constraints.txt '.[baselines]'"


def has_seurat():
    code = "quit(status = !requireNamespace('Seurat', quietly = TRUE))"
    return bool(shutil.which("Rscript")) and subprocess.run(["Rscript", "-e", code], capture_output=True).returncode == 0


METHODS = BASELINES | SEES_LABELS
PACKAGES = {"Harmony": "harmonypy", "scVI": "scvi", "scANVI (sees labels)": "scvi", "CONCORD": "concord"}
MISSING = {name for name, package in PACKAGES.items() if not importlib.util.find_spec(package)}
MISSING |= set() if has_seurat() else {"Seurat"}
SHORT = {"scVI": partial(baselines.scvi, max_epochs=10), "scANVI (sees labels)": partial(baselines.scanvi, max_epochs=10)}
each = pytest.mark.parametrize("name", METHODS)


def embed(name, adata=CELLS, batch_key="batch", seed=0):
    "A short run, skipped where something is missing."
    if name in MISSING:
        pytest.skip(f"{name} is not installed")
    return SHORT.get(name, METHODS[name])(adata, batch_key, seed)


@cache
def plain(name):
    "The embedding of the cells as they are."
    return embed(name)


def trace():
    "What a well-behaved function leaves as it found it, in this process and in X."
    logs = [logging.root, *(logging.getLogger(n) for n in (lightning.__name__, "lightning.pytorch", "py.warnings"))]
    return (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads(), dict(os.environ),
            [list(log.handlers) for log in logs], logging.root.manager.disable, list(warnings.filters), signal.getsignal(signal.SIGINT),
            dict(matplotlib.rcParams), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, os.getcwd(), os.listdir())


@each
def test_an_embedding_and_nothing_else(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    adata, before = CELLS.copy(), trace()
    Z = embed(name, adata)
    assert [b for a, b in zip(before, trace(), strict=True) if a != b] == [] and capfd.readouterr() == ("", "")
    assert Z.shape[0] == adata.n_obs and Z.dtype == np.float32 and np.isfinite(Z).all()
    assert (adata.X != CELLS.X).nnz == 0 and (adata.layers["counts"] != CELLS.layers["counts"]).nnz == 0
    assert adata.obs.equals(CELLS.obs) and adata.var.equals(CELLS.var) and not adata.obsm and list(adata.uns) == list(CELLS.uns)
    assert np.array_equal(Z, plain(name))
    assert np.array_equal(Z, embed(name, adata, seed=1)) == (name in DETERMINISTIC)
    near, types = NearestNeighbors(n_neighbors=5).fit(Z).kneighbors(return_distance=False), adata.obs["cell_type"].to_numpy()
    assert (types[near] == types[:, None]).mean() > (.4 if name in SHORT else .6)    # rows in another order: a third


@each
def test_no_batches(name):
    adata = CELLS.copy()
    del adata.obs["batch"]
    silent = sp.diags((np.arange(60) > 1).astype(np.float32))                    # two cells express nothing
    adata.X, adata.layers["counts"] = sp.csr_matrix(silent @ adata.X), sp.csr_matrix(silent @ adata.layers["counts"])
    if name == "Harmony":
        with pytest.raises(ValueError, match="there is only one"):
            embed(name, adata, None)
    else:
        assert np.isfinite(embed(name, adata, None)).all()


def test_a_batch_of_one_cell():
    adata = CELLS.copy()
    adata.obs["batch"] = ["alone"] + ["others"] * 59
    with pytest.raises(ValueError, match="batch 'alone' has 1 cells and Seurat's anchors need 6"):
        BASELINES["Seurat"](adata, "batch")
    for name in PACKAGES:
        if name not in MISSING:
            assert np.isfinite(embed(name, adata)).all()


@each
def test_mistakes_of_the_caller_are_errors(name):
    adata = CELLS.copy()
    with pytest.raises(KeyError, match="batch_key='donor' is not in obs: name one of cell_type, batch"):
        METHODS[name](adata, "donor")
    adata.obs.loc[adata.obs_names[:3], "batch"] = np.nan
    with pytest.raises(ValueError, match="3 of 60 cells have no batch"):
        METHODS[name](adata, "batch")
    del adata.layers["counts"]
    with pytest.raises(KeyError, match="no layer 'counts'"):
        METHODS[name](adata)


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_missing_package(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingBaseline) as caught:
        METHODS[name](CELLS, "batch")
    assert INSTALL in str(caught.value) and "\n" not in str(caught.value) and isinstance(caught.value, ImportError)


def fake_r(folder, monkeypatch, script):
    "A PATH with nothing but an Rscript of ours."
    program = folder / "Rscript"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_a_missing_r(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingBaseline, match="^Seurat needs R, and there is no Rscript on the PATH") as caught:
        BASELINES["Seurat"](CELLS, "batch")
    for command in ("apt-get install --no-install-recommends r-cran-seurat", "install.packages('Seurat')"):
        assert command in str(caught.value)


def test_an_r_without_seurat(tmp_path, monkeypatch):
    fake_r(tmp_path, monkeypatch, "exit 77")
    with pytest.raises(MissingBaseline, match="needs the R package of that name.*apt-get install"):
        BASELINES["Seurat"](CELLS)


def test_an_r_that_fails(tmp_path, monkeypatch):
    fake_r(tmp_path, monkeypatch, "for i in 1 2 3 4 5 6; do echo line $i >&2; done; exit 1")
    with pytest.raises(RuntimeError, match="^Seurat failed: line 3 / line 4 / line 5 / line 6$"):
        BASELINES["Seurat"](CELLS)


@pytest.mark.skipif("scVI" in MISSING, reason="scVI is not installed")
def test_scvi():
    genes = scvi_genes(CELLS, "batch", max_epochs=1)
    assert list(genes.index) == list(CELLS.var_names) and genes.shape == (CELLS.n_vars, 128) and np.isfinite(genes.to_numpy()).all()
    with quietly():
        split = split_for_scvi(143)                                     # 129 training cells would leave a mini-batch of one
    assert [len(part) for part in split] == [128, 15, 0] and set(np.concatenate(split)) == set(range(143))


@each
def test_labels_are_seen_by_those_alone_that_say_so(name):
    adata = CELLS.copy()
    adata.obs["cell_type"] = np.random.default_rng(0).permutation(adata.obs["cell_type"])
    assert np.array_equal(plain(name), embed(name, adata)) == (name in BASELINES)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"label_key": "type"}, KeyError, "label_key='type' is not in obs: name one of cell_type, batch"),
    ({"label_key": "holes"}, ValueError, "1 of 60 cells have no holes: fill it in"),
    ({"label_key": "one"}, ValueError, "all cells are 'beta' in one: give another label_key")])
def test_labels_that_scanvi_cannot_learn(change, error, message):
    adata = CELLS.copy()
    adata.obs["holes"], adata.obs["one"] = adata.obs["cell_type"].where(np.arange(60) > 0), "beta"
    with pytest.raises(error, match=message):
        baselines.scanvi(adata, "batch", **change)


@pytest.mark.skipif("scANVI (sees labels)" in MISSING, reason="scVI is not installed")
def test_scanvi_reads_the_column_that_is_named():
    adata = CELLS.copy()
    adata.obs["type"] = adata.obs["cell_type"].to_numpy()
    found = [baselines.scanvi(adata, "batch", label_key=key, max_epochs=2) for key in ("cell_type", "type", "batch")]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


@pytest.mark.skipif("CONCORD" in MISSING, reason="CONCORD is not installed")
def test_concord():
    Z = plain("CONCORD")
    assert Z.shape == (60, 100) and np.allclose(np.linalg.norm(Z, axis=1), 1, atol=1e-5)
    adata = CELLS.copy()
    adata.obs["batch"] = np.arange(60) // 3
    with pytest.raises(ValueError, match="the largest has 3: merge batches"):
        embed("CONCORD", adata)


def test_ctrl_c_in_lightning_is_a_keyboard_interrupt():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), quietly():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise SystemExit(1)
    assert signal.getsignal(signal.SIGINT) == before and logging.root.manager.disable == 0
