"""The ablation page: a second run computes nothing, a corrected label is scored anew, one batch is refused."""
import anndata as ad
import notebooks  # tools/notebooks.py
import numpy as np
import papermill as pm
import pytest
from own_data import own_parameters, shown

from scformer_nb.ledger import Ledger

PAGE = notebooks.ROOT / "nbs/23_exp_ablation.ipynb"


def test_a_users_own_file_twice_and_with_corrected_labels(tmp_path, run_page):
    parameters = own_parameters(PAGE, tmp_path)
    notebook = run_page(PAGE, tmp_path, **parameters)
    ledger = tmp_path / "results/ablation.jsonl"
    before = ledger.read_bytes()
    assert "open" in shown(notebook, "judge_claims(") and "w/o MGM, MVC" in shown(notebook, '"paper", option')
    assert {f.name for f in ledger.parent.glob("*.png")} == {"ablation_mine.png", "ablation_mine_umap.png"}
    run_page(PAGE, tmp_path, **parameters)
    assert ledger.read_bytes() == before
    cells = ad.read_h5ad(parameters["dataset"])
    cells.obs["my_label"] = cells.obs["my_label"].to_numpy()[::-1]
    cells.write_h5ad(parameters["dataset"])
    run_page(PAGE, tmp_path, **parameters)
    first, second = np.split(Ledger(ledger).table()["NMI"].to_numpy(), 2)
    assert (first != second).all()


def test_without_labels_batches_are_scored(tmp_path, run_page):
    notebook = run_page(PAGE, tmp_path, **own_parameters(PAGE, tmp_path, label_key=""))
    assert "ASW_batch" in shown(notebook, '"paper", option') and "AvgBIO" not in shown(notebook, '"paper", option')


def test_one_batch_says_so(tmp_path, run_page):
    with pytest.raises(pm.PapermillExecutionError, match="correction, DAR and DSBN need two or more"):
        run_page(PAGE, tmp_path, **own_parameters(PAGE, tmp_path, batch_key="one"))
