"""The clustering page on a user's own file, without labels, and with a method that nobody knows."""
import notebooks  # tools/notebooks.py
import papermill as pm
import pytest
from own_data import own_parameters, shown

PAGE = notebooks.ROOT / "nbs/20_exp_clustering.ipynb"
FEW = ["PCA", "scFormer"]


def test_a_users_own_file(tmp_path, run_page):
    notebook = run_page(PAGE, tmp_path, **own_parameters(PAGE, tmp_path, methods=FEW))
    assert "5 of 160 cells have no label" in shown(notebook)
    table = shown(notebook, "results_table(runs, missing=failed)")
    assert "PCA" in table and "scFormer" in table and "AvgBIO" in table and "*" in table
    drawn = {file.name for file in (tmp_path / "results").iterdir()}
    assert drawn == {"clustering.jsonl", "clustering.png", "clustering_mine_umap.png", "clustering_mine_history.png", "umap"}


def test_without_labels_the_page_shows_what_needs_none(tmp_path, run_page):
    notebook = run_page(PAGE, tmp_path, **own_parameters(PAGE, tmp_path, methods=FEW, label_key=""))
    assert "nothing to score" in shown(notebook, "results_table(runs, missing=failed)")
    assert (tmp_path / "results/clustering_mine_umap.png").exists() and not (tmp_path / "results/clustering.png").exists()


def test_an_unknown_method_is_refused_by_name(tmp_path, run_page):
    with pytest.raises(pm.PapermillExecutionError, match="methods are .*; not 'No, such'"):
        run_page(PAGE, tmp_path, **own_parameters(PAGE, tmp_path, methods=["PCA", "No, such"]))
    assert not (tmp_path / "results").exists()
