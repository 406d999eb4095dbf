"""Every page with parameters runs headless from an empty folder, as papermill users run it."""
import ast
import os
from pathlib import Path

import notebooks  # tools/notebooks.py
import papermill as pm
import pytest

PAGES = [page for page in notebooks.pages() if "_exp_" in page.stem or page.stem == "index"]
SHIPPED = {"pbmc68k_reduced", "simulated"}  # inside scanpy, or drawn: no download


def defaults(page):
    "The parameters of a page with their default values."
    return {name: ast.literal_eval(found["default"]) for name, found in pm.inspect_notebook(str(page)).items()}


def run(page, folder, **parameters):
    "Execute a page in `folder`; papermill itself only warns of a parameter that the page does not have."
    unknown = parameters.keys() - defaults(page).keys()
    if unknown:
        raise KeyError(f"{page.name} has no parameter {sorted(unknown)}; it has {sorted(defaults(page))}")
    return pm.execute_notebook(page, folder / page.name, parameters, cwd=folder, kernel_name="python3", progress_bar=False)


def missing_data(page):
    "The default datasets that need a download, when there is no data folder."
    values = [value for name, value in defaults(page).items() if name.startswith("dataset")]
    names = {name for value in values for name in (value if isinstance(value, (list, tuple)) else [value])}
    return set() if Path(os.environ.get("SCFORMER_DATA_DIR") or "nowhere").is_dir() else names - SHIPPED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_headless(page, tmp_path, run_page):
    if missing := missing_data(page):
        pytest.skip(f"needs SCFORMER_DATA_DIR for {', '.join(sorted(missing))}")
    folders = {name: str(tmp_path / "results") for name in ("out", "output") if name in defaults(page)}
    notebook = run_page(page, tmp_path, **folders)
    assert folders and not notebook.metadata.papermill.exception
    assert any((tmp_path / "results").iterdir())


def test_an_unknown_parameter_is_refused(tmp_path, run_page):
    with pytest.raises(KeyError, match="no parameter .'epochs'.; it has .'dataset', 'max_epochs', 'out'."):
        run_page(notebooks.ROOT / "nbs/index.ipynb", tmp_path, epochs=3)
    assert not any(tmp_path.iterdir())
