"""What earlier states of 0.1.0 have left: models and lines of a ledger in tests/old, which load, or say why not."""
import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from scformer_nb.ledger import Ledger, read_lines
from scformer_nb.scformer import ScFormer

OLD = Path(__file__).parent / "old"
CELLS = json.loads((OLD / "cells.json").read_text())


def cells():
    X = np.array(CELLS["counts"], np.float32)
    batch = pd.Categorical([("a", "b")[i % 2] for i in range(len(X))])
    obs = pd.DataFrame({"batch": batch}, index=[f"c{i}" for i in range(len(X))])
    return anndata.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(X.shape[1])]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mean_squares", "bottleneck"])
def test_models_of_before_embed_as_they_did(name, tmp_path):
    shutil.copytree(OLD / name, tmp_path / name)
    loaded = ScFormer.load(tmp_path / name)
    found = loaded.embed_cells(cells())
    assert np.allclose(found, CELLS["embeddings"][name], atol=1e-4)
    loaded.save(tmp_path / "again")  # in today's words
    assert np.array_equal(ScFormer.load(tmp_path / "again").embed_cells(cells()), found)


@pytest.mark.parametrize("name, why", [
    ("first", "model.json and weights.safetensors in .*first do not belong together"),  # it kept no digest yet
    ("second", r"model.json.settings.dataset is missing")])
def test_models_of_the_first_day_say_why_they_do_not_load(name, why):
    with pytest.raises(ValueError, match=why):
        ScFormer.load(OLD / name)


def test_lines_of_the_first_day_are_runs_of_today(tmp_path):
    shutil.copy(OLD / "integration.jsonl", tmp_path)
    ledger = Ledger(tmp_path / "integration.jsonl")
    lines = read_lines(ledger.path)
    assert [(line["method"], line["dataset"]) for line in lines[:2]] == [("PCA", "pancreas_5tech"), ("scFormer", "pancreas_5tech")]
    first = json.loads((OLD / "integration.jsonl").read_text().splitlines()[1])
    assert "d_ff" in lines[1]["settings"]["recipe"] and "hidden" in first["settings"]["recipe"]
    key = [first[name] for name in ("dataset", "method", "option", "seed", "settings")]
    assert ledger.get_or_run(*key, lambda: pytest.fail("computed again"))["metrics"] == first["metrics"]
