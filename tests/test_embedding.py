"""Cells to vectors, part after part and batch by batch: what the page 07c_embedding cannot hold."""
import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from toy import CELLS, DSBN, model, toy

from scformer_nb import data, embedding


def test_a_backed_file_costs_the_memory_of_its_parts(trained, tmp_path, monkeypatch):
    more = sp.random(6000, 2000, 0.2, "csr", np.float32, random_state=0, data_rvs=lambda n: np.full(n, 1.0))
    names = [*CELLS.var_names, *(f"extra_{i}" for i in range(1940))]
    anndata.AnnData(more, var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "x.h5ad")
    monkeypatch.setattr(data, "PART", 500)
    monkeypatch.setattr(embedding, "embed_tokens", lambda network, cells: np.ones((len(cells), 16), np.float32))
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    tracemalloc.start()
    trained.embed_cells(backed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < more.data.nbytes + more.indices.nbytes  # 19 MB; less than the counts, and they are a fifth of the dense matrix


@pytest.mark.parametrize("trained_as", [int, float, str])
def test_a_number_is_the_same_batch_however_it_is_written(trained_as):
    lanes = toy(batch=np.repeat([1, 2], 30).astype(trained_as))
    made = model(lanes, recipe=DSBN)
    expected = made.embed_cells(lanes)
    for other in (int, float, str):
        assert np.array_equal(made.embed_cells(toy(batch=np.repeat([1, 2], 30).astype(other))), expected)


def test_batches_of_a_model_of_version_0_1_0_are_found():
    "It wrote 1.0 for a number with a point."
    lanes = toy(batch=np.repeat([1.0, 2.0], 30))
    made = model(lanes, recipe=DSBN)
    expected = made.embed_cells(lanes)
    made.settings["batches"] = ["1.0", "2.0"]
    assert np.array_equal(made.embed_cells(lanes), expected)


def test_unseen_batches_are_listed_up_to_eight():
    with pytest.raises(ValueError, match="donor_0, .*, donor_15 and 52 more; the model knows batch_0, batch_1. To"):
        model(recipe=DSBN).embed_cells(toy(batch=[f"donor_{i}" for i in range(60)]))
