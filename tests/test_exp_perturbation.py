"""The perturbation page: on a user's own screen, in GEARS' layout, with methods that nobody knows or that fail."""
import zipfile

import notebooks  # tools/notebooks.py
import pandas as pd
import papermill as pm
import pytest
from own_data import shown

PAGE = notebooks.ROOT / "nbs/34_exp_perturbation.ipynb"
METHODS = ["no change", "additive", "linear", "linear init", "scFormer"]


def test_page_on_a_users_file(adata, tmp_path, run_page):
    "Other names for the columns, counts in a layer, `ctrl`, no batches, no gene sets."
    mine = adata.copy()
    mine.obs = pd.DataFrame({"guide": mine.obs["condition"].astype(str).replace("control", "ctrl")}, mine.obs_names)
    mine.layers["raw"], mine.X = mine.X.copy(), mine.X.log1p()
    del mine.uns["truth"]
    mine.write_h5ad(tmp_path / "mine.h5ad")
    own = dict(dataset=str(tmp_path / "mine.h5ad"), condition_key="guide", batch_key="", layer="raw", direction="down", gene_sets="")
    run_page(PAGE, tmp_path, **own, methods=METHODS, out=str(tmp_path / "out"))
    lines = pd.read_json(tmp_path / "out/perturbation.jsonl", lines=True)
    assert set(lines.method) == {"ceiling", "start", *METHODS} - {"linear init"} and set(lines.dataset) == {"mine"}
    assert list((tmp_path / "out").glob("perturbation_mine*.png"))
    with pytest.raises(pm.PapermillExecutionError, match="guides"):
        run_page(PAGE, tmp_path, **own | {"condition_key": "guides"}, methods=METHODS, out=str(tmp_path / "out2"))
    (tmp_path / "human.gmt").write_text("set\tof genes\tGENE0\tGENE1\tGENE2\n")
    with pytest.raises(pm.PapermillExecutionError, match="sets of another species"):
        run_page(PAGE, tmp_path, **own | {"gene_sets": str(tmp_path / "human.gmt")}, methods=METHODS, out=str(tmp_path / "out3"))
    assert not (tmp_path / "out3" / "perturbation.jsonl").exists(), "before the first model is trained"


def test_page_on_the_published_layout_of_gears(adata, tmp_path, monkeypatch, run_page):
    "A zip with log values, symbols in a column of var, and `A+ctrl`."
    layout = adata.copy()
    condition = layout.obs["condition"].astype(str)
    layout.obs["condition"] = condition.where(condition.str.contains(r"\+"), condition + "+ctrl").replace("control+ctrl", "ctrl")
    layout.obs["cell_type"] = "K562"
    layout.obs_names = layout.obs_names + "-1"
    layout.layers["counts"] = layout.X.copy()
    layout.var["gene_name"] = layout.var_names.to_numpy()
    layout.var_names = [f"ENSG{i}" for i in range(layout.n_vars)]
    del layout.uns["truth"]
    layout.write_h5ad(tmp_path / "perturb_processed.h5ad")
    with zipfile.ZipFile(tmp_path / "norman.zip", "w") as z:
        z.write(tmp_path / "perturb_processed.h5ad", "norman/perturb_processed.h5ad")
    monkeypatch.setenv("SCFORMER_DATA_DIR", str(tmp_path))
    run_page(PAGE, tmp_path, dataset="norman_gears", gene_sets="", methods=METHODS, out=str(tmp_path / "out"))
    assert set(pd.read_json(tmp_path / "out/perturbation.jsonl", lines=True).dataset) == {"norman_gears"}


def test_an_unknown_method_is_named_before_anything_runs(tmp_path, run_page):
    with pytest.raises(pm.PapermillExecutionError, match="unknown methods: 'linaer'.*did you mean 'linear'"):
        run_page(PAGE, tmp_path, methods=["linaer"], out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_second_run_computes_nothing_and_shows_the_same(tmp_path, run_page):
    "And a method that cannot run keeps its row, which says why."
    (tmp_path / "gears.py").write_text("raise ImportError('not here')")
    given = dict(methods=["additive", "GEARS", "scFormer"], out=str(tmp_path / "out"))
    first = run_page(PAGE, tmp_path, **given)
    before = (tmp_path / "out/perturbation.jsonl").read_bytes()
    again = run_page(PAGE, tmp_path, **given)
    assert (tmp_path / "out/perturbation.jsonl").read_bytes() == before
    assert shown(again, "def table") == shown(first, "def table")
    assert "pip install" in shown(first, "def table") and "ceiling" in shown(first, "def table")
