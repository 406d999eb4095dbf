"""The page on gene embeddings with a user's own file: other keys, labels that are missing, a baseline that is not installed."""
import json
import os

import notebooks  # tools/notebooks.py
import numpy as np
import pytest
import scipy.sparse as sp

from scformer_nb.simulate import simulate

PAGE = notebooks.ROOT / "nbs/22_exp_gene_embeddings.ipynb"


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    "Counts in a layer, X log-normalised, columns of other names, three cells without a label and a type of one cell; no scvi-tools."
    adata = simulate(n_cells=160, n_genes=120, seed=0)
    adata.obs = adata.obs.rename(columns={"cell_type": "my_label", "batch": "plate"})
    adata.obs["my_label"] = adata.obs["my_label"].cat.add_categories("rare")
    adata.obs.loc[adata.obs_names[:3], "my_label"] = np.nan
    adata.obs.loc[adata.obs_names[3], "my_label"] = "rare"
    adata.layers["raw"], adata.X, adata.uns = adata.X, sp.csr_matrix(adata.X.log1p()), {}
    adata.write_h5ad(tmp_path / "own.h5ad")
    (tmp_path / "stub/scvi").mkdir(parents=True)
    (tmp_path / "stub/scvi/__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"), prepend=os.pathsep)
    return tmp_path / "own.h5ad"


def said(nb):
    "All that the page shows, as text."
    outputs = [out for cell in nb.cells for out in cell.get("outputs", [])]
    return "\n".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs)


@pytest.mark.parametrize("label_key, batch_key", [("my_label", "plate"), ("", "")], ids=["labels", "no labels"])
def test_own_file(own_file, tmp_path, label_key, batch_key, run_page):
    parameters = dict(dataset=str(own_file), layer="raw", out="results", label_key=label_key, batch_key=batch_key)
    nb = run_page(PAGE, tmp_path, **parameters)
    text, folder = said(nb), tmp_path / "results"
    lines = [json.loads(line) for line in (folder / "gene_embeddings.jsonl").read_text().splitlines()]
    assert {file.name for file in folder.iterdir()} > {"gene_embeddings_own_umap.png", "gene_embeddings_own_nearest.csv"}
    assert "0 genes with one of" in text
    if not label_key:
        assert "questions: none" in text
        assert "Neither labels nor GO terms" in text and [line["option"] for line in lines] == ["figure"]
        return
    assert "4 types; left out: 3 cells without a label and 1 types of a single cell" in text
    assert "scVI needs scvi-tools" in text and "pip install" in text
    scores = {line["method"]: line["metrics"] for line in lines if line["option"] == "markers"}
    assert "scVI" not in scores and scores["scFormer"]["same type, all genes"] > .3
