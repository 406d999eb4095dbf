"""The integration page on a user's own file, on the published layout of the paper's data, and on batches that cannot be integrated."""
import anndata as ad
import notebooks  # tools/notebooks.py
import papermill as pm
import pytest
import scipy.sparse as sp
from own_data import own_parameters, shown

from scformer_nb.simulate import simulate

PAGE = notebooks.ROOT / "nbs/21_exp_integration.ipynb"
FEW = ["PCA", "scFormer"]


def test_a_users_own_file(tmp_path, run_page):
    notebook = run_page(PAGE, tmp_path, **own_parameters(PAGE, tmp_path, methods=FEW))
    assert "5 of 160 cells have no label" in shown(notebook) and "Overall" in shown(notebook, "results_table(runs, missing=failed)")
    drawn = {file.name for file in (tmp_path / "results").glob("integration_mine_*.png")}
    assert drawn == {f"integration_mine_{part}.png" for part in ("types", "batches", "history")}


def test_types_that_lie_in_one_batch_each(tmp_path, run_page):
    parameters = own_parameters(PAGE, tmp_path, methods=FEW)
    cells = ad.read_h5ad(parameters["dataset"])
    cells.obs["plate"] = "plate of " + cells.obs["my_label"].astype(object).fillna("type_0").astype(str)
    cells.write_h5ad(parameters["dataset"])
    notebook = run_page(PAGE, tmp_path, **parameters)
    table = shown(notebook, "results_table(runs, missing=failed)")
    assert "mixing cannot be told from types" in shown(notebook) and "AvgBIO" in table and "Overall" not in table


def test_one_batch_says_so(tmp_path, run_page):
    with pytest.raises(pm.PapermillExecutionError, match="integration needs two or more: name another batch_key, or run"):
        run_page(PAGE, tmp_path, **own_parameters(PAGE, tmp_path, batch_key="one"))


def test_the_papers_own_data_by_name(tmp_path, monkeypatch, run_page):
    "A small file in the published layout of the paper's Pancreas: counts in a layer, its own names for types and batches."
    adata = simulate(n_cells=160, n_genes=150, n_types=3, n_batches=2, seed=2)
    layout = ad.AnnData(sp.csr_matrix(adata.X), obs=adata.obs.rename(columns={"cell_type": "celltype", "batch": "tech"}), var=adata.var[[]])
    layout.layers["counts"] = layout.X.copy()
    layout.write_h5ad(tmp_path / "human_pancreas_norm_complexBatch.h5ad")
    monkeypatch.setenv("SCFORMER_DATA_DIR", str(tmp_path))
    notebook = run_page(PAGE, tmp_path, dataset="pancreas_9batch", methods=FEW, out=str(tmp_path / "results"))
    assert "in the paper" in shown(notebook, "if experiment.dataset in paper")
