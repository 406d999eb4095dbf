"""The page on what the embedding keeps: a user's own file twice, with an ablation beside it, and what it cannot do without."""

import notebooks  # tools/notebooks.py
import papermill as pm
import pytest
from own_data import own_parameters, shown

from scformer_nb.ledger import Ledger

PAGE = notebooks.ROOT / "nbs/24_exp_what_is_kept.ipynb"


def test_a_users_own_file_twice_and_beside_an_ablation(tmp_path, run_page):
    parameters = own_parameters(PAGE, tmp_path)
    notebook = run_page(PAGE, tmp_path, **parameters)
    ledger = tmp_path / "results/what_is_kept.jsonl"
    before = ledger.read_bytes()
    assert set(Ledger(ledger).table()["method"]) == {"PCA", "earlier recipe", "today's recipe", "scFormer"}
    assert "depth_R2" in shown(notebook, "ledger.results_table(runs") and "no ablation in the output folder" in shown(notebook)
    drawn = {f"what_is_kept_mine_{part}.png" for part in ("depth", "spectrum", "batches", "learning")}
    assert {f.name for f in ledger.parent.glob("*.png")} == drawn
    scores = {"depth_R2": .1, "participation_ratio": 7, "CiLISI": .8, "kNN_accuracy": .9}
    for option, ratio in (("full", 7), ("no KL", 2)):
        found = scores | {"participation_ratio": ratio}
        Ledger(ledger.parent / "ablation.jsonl").get_or_run("mine", "default", option, 0, {}, found.copy)
    (ledger.parent / "what_is_kept_mine_depth.png").unlink()
    notebook = run_page(PAGE, tmp_path, **parameters)
    assert ledger.read_bytes() == before and (ledger.parent / "what_is_kept_mine_depth.png").exists()
    said = [out.get("data", {}).get("text/markdown", "") for cell in notebook.cells for out in cell.get("outputs", [])]
    assert "participation_ratio moves most with 'no KL', by -5.00" in "".join(said)
    assert (ledger.parent / "what_is_kept_mine_options.png").exists()


@pytest.mark.parametrize("changed, message", [({"batch_key": "one"}, "what is kept of batches needs two or more"),
    ({"label_key": ""}, "label_key=None is not a column")], ids=["one batch", "no labels"])
def test_what_it_cannot_do_without(tmp_path, changed, message, run_page):
    with pytest.raises(pm.PapermillExecutionError, match=message):
        run_page(PAGE, tmp_path, **own_parameters(PAGE, tmp_path, **changed))
