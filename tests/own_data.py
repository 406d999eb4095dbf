"""Cells as a user has them, for the tests of the experiment pages."""
import nbformat
import scanpy as sc
from test_pages import defaults

from scformer_nb.simulate import simulate


def own_file(folder):
    "Log values in X, counts in a layer, other names for the columns; a type with one cell, cells without a type."
    adata = simulate(n_cells=160, n_genes=150, n_types=3, n_batches=2, seed=1)
    adata.layers["raw"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    adata.obs = adata.obs.rename(columns={"cell_type": "my_label", "batch": "plate"})
    label = adata.obs["my_label"].astype(object)
    label.iloc[:5], label.iloc[5] = float("nan"), "rare"
    adata.obs["my_label"], adata.obs["one"] = label.astype("category"), "the same"
    adata.uns.clear()
    adata.write_h5ad(folder / "mine.h5ad")
    return str(folder / "mine.h5ad")


def own_parameters(page, folder, **changed):
    "Parameters of a page for `own_file`, those that the page has."
    wanted = dict(dataset=own_file(folder), label_key="my_label", batch_key="plate", layer="raw", out=str(folder / "results"))
    return {name: value for name, value in (wanted | changed).items() if name in defaults(page)}


def shown(notebook, cell=None):
    "What a page shows as text and HTML: all of it, or the outputs of the first cell that contains `cell`."
    cells = [c for c in notebook.cells if c.cell_type == "code" and (cell is None or cell in c.source)]
    outputs = [out for c in (cells if cell is None else cells[:1]) for out in c.outputs]
    found = []
    for out in outputs:
        data = out.get("data", {})
        found += [out.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    assert nbformat.validate(notebook) is None
    return "\n".join(found)
