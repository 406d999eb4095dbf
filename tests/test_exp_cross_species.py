"""The experiment page on two species: from a user's own files, and in the layouts of the paper's atlases."""
import h5py
import notebooks  # tools/notebooks.py
import numpy as np
import pandas as pd
import pytest

from scformer_nb.ledger import canonical, plain, read_lines
from scformer_nb.saucie import method_settings
from scformer_nb.simulate import simulate_species
from scformer_nb.taxonomy import MOUSE_BRAIN, MOUSE_BRAIN_CELLS, PERIPHERY
from scformer_nb.trees import read_tree

PAGE = notebooks.ROOT / "nbs/46_exp_cross_species.ipynb"
TREE = {"Neurons": {"0": ["0", "1.0"], "NA": ["NA"]}, "Non-neurons": ["None", "e"]}
FIGURES = ["between", "figure3_species", "figure3_types", "figure4", "figure5"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Two species as a user has them: counts in a layer, types that look like numbers, one in the second only."
    folder = tmp_path_factory.mktemp("species")
    species = simulate_species(read_tree(TREE), {"fish": ["e"], "fly": []}, n_cells=150, n_genes=60, seed=1)
    for s, adata in species.items():
        adata.obs["annotation"] = adata.obs.pop("cell_type").astype(str)
        adata.layers["raw"] = adata.X.copy()
        adata.X = np.log1p(adata.X)
        adata.write_h5ad(folder / f"{s}.h5ad")
    read_tree(TREE).to_csv(folder / "tree.csv")
    return dict(first=str(folder / "fish.h5ad"), second=str(folder / "fly.h5ad"), label_key="annotation", layer="raw",
                tree=str(folder / "tree.csv"))


def shown(notebook):
    "All tables of a page as HTML."
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return " ".join(out.get("data", {}).get("text/html", "") for out in outputs)


def test_the_stored_runs_are_those_of_todays_settings():
    "Else a full run would compute for hours what the ledger has."
    own = method_settings(epochs=40, epochs_scformer=5, steps=1000)
    for line in read_lines(notebooks.ROOT / "figures/cross_species.jsonl"):
        asked = canonical(plain(own[line["method"]]))
        assert {name: line["settings"].get(name) for name in asked} == asked, line["method"]


def test_a_method_that_is_none_stops_the_page_before_it_trains(files, tmp_path, run_page):
    with pytest.raises(Exception, match="methods: pca is none of"):
        run_page(PAGE, tmp_path, **files, methods=["pca"], out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_page_on_a_users_two_files(files, tmp_path, run_page):
    methods, out = ["PCA", "CrossSpecies", "CrossSpecies, aligned", "Gromov-Wasserstein"], tmp_path / "out"
    notebook = run_page(PAGE, tmp_path, **files, methods=methods, out=str(out))
    lines = pd.read_json(out / "cross_species.jsonl", lines=True)
    assert set(lines.dataset) == {"fish_fly"} and set(lines.method) == set(methods)
    scores = lines.set_index(["method", "option"]).metrics["CrossSpecies", "own genes"]
    assert {"fly level 1", "fly triplets", "fish to fly", "counterparts", "only in fly, AUC"} <= set(scores)
    parts = (" r ", "cophenetic", ", W")
    assert all(0 <= v <= 1 for k, v in scores.items() if v is not None and not any(m in k for m in parts))
    assert sorted(f.name for f in out.glob("*.png")) == [f"cross_species_fish_fly_{what}.png" for what in FIGURES]
    assert ">NaN<" not in shown(notebook) and ">nan<" not in shown(notebook)
    stored = np.load(out / "cross_species_fish_fly.npz")
    assert list(stored["CrossSpecies, own genes, leaves"]) == ["0", "1.0", "NA", "None", "e"]
    assert {tuple(t) for t in stored["CrossSpecies, own genes, types"]} > {("fish", "NA"), ("fly", "None"), ("fly", "1.0")}


def test_without_a_tree_and_with_one_method(files, tmp_path, run_page):
    out = tmp_path / "out"
    run_page(PAGE, tmp_path, **files | {"tree": ""}, methods=["CrossSpecies"], out=str(out))
    scores = pd.read_json(out / "cross_species.jsonl", lines=True).metrics[0]
    assert "fish to fly" in scores and not any("level" in k for k in scores)
    assert len(list(out.glob("*.png"))) == len(FIGURES)


def test_page_on_the_papers_atlases(tmp_path, monkeypatch, run_page):
    "Small files in the published layouts: Allen's two csv tables, mousebrain.org's loom of genes x cells."
    rng, absent = np.random.default_rng(0), {"human": PERIPHERY, "mouse": []}
    atlas = simulate_species(MOUSE_BRAIN, absent, MOUSE_BRAIN_CELLS, n_cells=320, n_genes=60, seed=2)
    human, mouse = atlas.values()
    names = {"Telencephalon interneurons": ("GABAergic", "VIP"), "Telencephalon projecting neurons": ("Glutamatergic", "IT"),
        "Astroependymal cells": ("Non-neuronal", "Astrocyte"), "Oligodendrocytes": ("Non-neuronal", "Oligodendrocyte"),
        "Vascular cells": ("Non-neuronal", "VLMC"), "Immune cells": ("Non-neuronal", "Microglia")}
    types = human.obs["cell_type"].astype(str)
    human = human[types.isin(list(names)).to_numpy()]
    meta = pd.DataFrame([names[t] for t in human.obs["cell_type"]], human.obs_names, ["class_label", "subclass_label"])
    meta = meta.assign(cluster_label="c", external_donor_name_label="H1").rename_axis("sample_name")
    meta.iloc[rng.permutation(len(meta))].to_csv(tmp_path / "allen_human_cortex_metadata.csv")
    counts = pd.DataFrame(human.X.toarray().astype(int), human.obs_names.rename("sample_name"), human.var_names)
    counts.to_csv(tmp_path / "allen_human_cortex_matrix.csv")
    with h5py.File(tmp_path / "l5_all.loom", "w") as f:
        f["matrix"] = mouse.X.toarray().T
        f["row_attrs/Gene"] = mouse.var_names.to_numpy().astype("S")
        columns = dict.fromkeys(["CellID", "SampleID", "ClusterName", *(f"TaxonomyRank{i}" for i in (1, 2, 4))], mouse.obs_names)
        for key, values in (columns | {"TaxonomyRank3": mouse.obs["cell_type"]}).items():
            f[f"col_attrs/{key}"] = values.to_numpy().astype("S")
    monkeypatch.setenv("SCFORMER_DATA_DIR", str(tmp_path))
    methods, out = ["PCA", "CrossSpecies", "CrossSpecies, aligned"], tmp_path / "out"
    run_page(PAGE, tmp_path, dataset="atlases", methods=methods, out=str(out))
    lines = pd.read_json(out / "cross_species.jsonl", lines=True)
    assert set(lines.dataset) == {"atlases"} and set(lines.method) == set(methods)
    scores = lines.set_index(["method", "option"]).metrics["CrossSpecies", "own genes"]
    assert {"mouse level 1", "human level 1", "human to mouse", "counterparts", "only in mouse, AUC"} <= set(scores)
