"""The page on resolutions: a user's own file, twice, with and without batches."""

import notebooks  # tools/notebooks.py
import pytest
from own_data import own_parameters, shown
from test_pages import run

from scformer_nb.ledger import Ledger

PAGE = notebooks.ROOT / "nbs/24b_exp_resolutions.ipynb"


@pytest.mark.parametrize("changed", [{"batch_key": ""}, {}], ids=["one batch", "batches"])
def test_a_users_own_file_twice(tmp_path, changed):
    parameters = own_parameters(PAGE, tmp_path, **changed)
    run(PAGE, tmp_path, **parameters)
    ledger = tmp_path / "results/resolutions.jsonl"
    before, table = ledger.read_bytes(), Ledger(ledger).table().set_index("method")
    assert set(table.index) == {"PCA", "scFormer"}
    scores = table.filter(like="score at")
    assert (table["wide"].between(scores.min(axis=1), scores.max(axis=1) + .2)).all() and (table["matched"] <= 1).all()
    assert (table["clusters at 2.0"] > table["clusters at 0.01"]).all()
    assert (ledger.parent / "resolutions_mine_curves.png").exists()
    notebook = run(PAGE, tmp_path, **parameters)
    assert ledger.read_bytes() == before and "matched" in shown(notebook, "table.round")
