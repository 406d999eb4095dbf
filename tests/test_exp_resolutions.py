"""The page on resolutions: a user's own file, twice, with and without batches."""

import notebooks  # tools/notebooks.py
import numpy as np
import pytest
from own_data import own_parameters, shown
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from scformer_nb.baselines import pca
from scformer_nb.experiment import Experiment
from scformer_nb.ledger import Ledger
from scformer_nb.metrics import knn_graph, louvain

PAGE = notebooks.ROOT / "nbs/24b_exp_resolutions.ipynb"


def cut_anew(parameters, folder, step):
    "(NMI + ARI) / 2 and the number of clusters of a PCA, one run of Louvain after the other."
    mine = Experiment("anew", out=folder, n_cells=300, **{k: v for k, v in parameters.items() if k != "out"})
    types = mine.hvg.obs["my_label"]
    known = types.notna().to_numpy()
    graph = knn_graph(pca(mine.hvg)[known], mine.hvg.obs[known])
    runs = [louvain(graph, [step], seed)[0] for seed in range(5)]
    names = types[known].astype(str)
    both = [normalized_mutual_info_score(names, run) + adjusted_rand_score(names, run) for run in runs]
    return np.mean(both) / 2, np.mean([len(set(run)) for run in runs])


@pytest.mark.parametrize("changed", [{"batch_key": ""}, {}], ids=["one batch", "batches"])
def test_a_users_own_file_twice(tmp_path, changed, run_page):
    parameters = own_parameters(PAGE, tmp_path, **changed)
    run_page(PAGE, tmp_path, **parameters)
    ledger = tmp_path / "results/resolutions.jsonl"
    before, table = ledger.read_bytes(), Ledger(ledger).table().set_index("method")
    assert set(table.index) == {"PCA", "scFormer"}
    for step in (.05, 1.):
        found = table.loc["PCA", [f"score at {step}", f"clusters at {step}"]].astype(float)
        assert np.allclose(found, cut_anew(parameters, tmp_path / "anew", step))
    table = table[table["option"] == "default"]  # cut at all resolutions; the others have a card
    assert (table["clusters at 2.0"] > table["clusters at 0.01"]).all()
    assert (ledger.parent / "resolutions_mine_curves.png").exists()
    notebook = run_page(PAGE, tmp_path, **parameters)
    assert ledger.read_bytes() == before and "matched" in shown(notebook, "table.round")
