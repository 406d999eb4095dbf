"""The page on a new study: a user's own file beside a model of his own, twice; and what is refused."""

import notebooks  # tools/notebooks.py
import papermill as pm
import pytest
from own_data import own_parameters, shown

from scformer_nb.ledger import Ledger
from scformer_nb.scformer import ScFormer
from scformer_nb.simulate import simulate

PAGE = notebooks.ROOT / "nbs/25_exp_new_study.ipynb"


@pytest.fixture
def folder(tmp_path):
    "A model of other cells with the same genes."
    ScFormer(simulate(n_cells=120, n_genes=150, n_types=3, n_batches=1, seed=2)).fit(1, progress=False).save(tmp_path / "old")
    return str(tmp_path / "old")


def test_a_users_own_file_twice_beside_a_model_of_his_own(tmp_path, folder, run_page):
    parameters = own_parameters(PAGE, tmp_path, model=folder)
    notebook = run_page(PAGE, tmp_path, **parameters)
    ledger = tmp_path / "results/new_study.jsonl"
    before = ledger.read_bytes()
    table = Ledger(ledger).table()
    assert set(table["method"]) == {"PCA", "Harmony", "zero-shot", "fine-tuned", "from scratch"}
    assert (table["cpu_seconds"] > 0).all() and set(table["option"]) == {"100 cells"} and "label_accuracy" not in table
    assert "fine-tuned" in shown(notebook, "table_of(finished") and (tmp_path / "results/new_study_mine_accuracy.png").exists()
    run_page(PAGE, tmp_path, **parameters)
    assert ledger.read_bytes() == before


@pytest.mark.parametrize("changed, message", [({"model": "human_blod"}, "did you mean 'human_blood'"),
    ({"label_key": "type"}, "label_key='type'"), ({"model": "human_pancreas"}, "only 0 of the model's")], ids=["model", "labels", "genes"])
def test_what_it_cannot_do_without(tmp_path, changed, message, run_page):
    with pytest.raises(pm.PapermillExecutionError, match=message):
        run_page(PAGE, tmp_path, **own_parameters(PAGE, tmp_path, **changed))
