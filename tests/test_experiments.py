"""The experiment pages on other data than their own: a user's file, the published layout of the paper's data, bad input."""
import anndata as ad
import nbformat
import notebooks  # tools/notebooks.py
import numpy as np
import papermill as pm
import pytest
import scanpy as sc
import scipy.sparse as sp
from test_pages import defaults, run

from scformer_nb.simulate import simulate
from scformer_nb.ledger import Ledger

PAGES = {page.stem.split("_", 2)[2]: page for page in notebooks.pages() if page.stem[:2] in ("10", "11", "12", "13")}


def own_file(folder):
    "Cells as a user has them: log values in X, counts in a layer, other names; a type with one cell, cells without a type."
    adata = simulate(n_cells=160, n_genes=150, n_types=3, n_batches=2, seed=1)
    adata.layers["raw"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    adata.obs = adata.obs.rename(columns={"cell_type": "my_label", "batch": "plate"})
    label = adata.obs["my_label"].astype(object)
    label.iloc[:5], label.iloc[5] = np.nan, "rare"
    adata.obs["my_label"], adata.obs["one"] = label.astype("category"), "the same"
    adata.uns.clear()
    adata.write_h5ad(folder / "mine.h5ad")
    return str(folder / "mine.h5ad")


def own_keys(page, folder, **changed):
    "Parameters of a page for `own_file`, those that the page has."
    wanted = dict(dataset=own_file(folder), label_key="my_label", batch_key="plate", layer="raw", out=str(folder / "results"), **changed)
    return {name: value for name, value in wanted.items() if name in defaults(page)}


def text_of(notebook):
    "All that a page shows, as text."
    return nbformat.writes(notebook)


@pytest.mark.parametrize("name", PAGES)
def test_a_users_own_file(name, tmp_path):
    notebook = run(PAGES[name], tmp_path, **own_keys(PAGES[name], tmp_path))
    assert not notebook.metadata.papermill.exception
    assert list((tmp_path / "results").glob("*.jsonl")) and list((tmp_path / "results").glob("*mine*.png"))
    if name in ("clustering", "integration"):
        assert "5 of 160 cells have no label" in text_of(notebook)


def test_without_labels_the_page_shows_what_needs_none(tmp_path):
    notebook = run(PAGES["clustering"], tmp_path, **own_keys(PAGES["clustering"], tmp_path) | {"label_key": ""})
    assert "nothing to score" in text_of(notebook) and (tmp_path / "results/clustering_mine_umap.png").exists()


def test_integration_of_one_batch_says_so(tmp_path):
    with pytest.raises(pm.PapermillExecutionError, match="integration needs two or more: name another batch_key, or run 20_exp_clustering"):
        run(PAGES["integration"], tmp_path, **own_keys(PAGES["integration"], tmp_path) | {"batch_key": "one"})


def test_a_second_run_computes_nothing_again(tmp_path):
    parameters = own_keys(PAGES["ablation"], tmp_path)
    run(PAGES["ablation"], tmp_path, **parameters)
    ledger = tmp_path / "results/ablation.jsonl"
    before = ledger.read_bytes()
    run(PAGES["ablation"], tmp_path, **parameters)
    assert ledger.read_bytes() == before


def test_corrected_labels_are_scored_anew(tmp_path):
    parameters = own_keys(PAGES["ablation"], tmp_path)
    run(PAGES["ablation"], tmp_path, **parameters)
    cells = ad.read_h5ad(parameters["dataset"])
    cells.obs["my_label"] = cells.obs["my_label"].to_numpy()[::-1]
    cells.write_h5ad(parameters["dataset"])
    run(PAGES["ablation"], tmp_path, **parameters)
    first, second = np.split(Ledger(tmp_path / "results/ablation.jsonl").table()["NMI"].to_numpy(), 2)
    assert (first != second).all()


def test_the_papers_own_data_by_name(tmp_path, monkeypatch):
    "A small file in the published layout of the paper's Pancreas: counts in a layer, its own names for types and batches."
    adata = simulate(n_cells=160, n_genes=150, n_types=3, n_batches=2, seed=2)
    layout = ad.AnnData(sp.csr_matrix(adata.X), obs=adata.obs.rename(columns={"cell_type": "celltype", "batch": "tech"}), var=adata.var[[]])
    layout.layers["counts"] = layout.X.copy()
    layout.write_h5ad(tmp_path / "human_pancreas_norm_complexBatch.h5ad")
    monkeypatch.setenv("SCFORMER_DATA_DIR", str(tmp_path))
    notebook = run(PAGES["integration"], tmp_path, dataset="pancreas_9batch", out=str(tmp_path / "results"))
    assert not notebook.metadata.papermill.exception and "in the paper" in text_of(notebook)
