"""The same seed gives the same bits, in this process and in another one; stored numbers come again from their line."""
import json
import os
import subprocess
import sys
import warnings
from hashlib import sha256

import matplotlib
import notebooks  # tools/notebooks.py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from matplotlib.image import imread
from toy import CELLS, SMALL_SCREEN, model

from scformer_nb.alignment import align
from scformer_nb.baselines import BASELINES
from scformer_nb.experiment import LEADING, Experiment, plot_margins
from scformer_nb.gene_anchors import GeneSpaces
from scformer_nb.ledger import Ledger, read_lines
from scformer_nb.perturbation import PerturbationModel
from scformer_nb.plots import save_figure
from scformer_nb.score_card import score_card
from scformer_nb.simulate import simulate_perturbations
from scformer_nb.taxonomy import recovery_scores, simulated

FIGURES = notebooks.ROOT / "figures"
DRAWN = np.random.RandomState(0).standard_normal((120, 6)) + 2 * (np.arange(120) % 4)[:, None] % 5
OBS = pd.DataFrame({"cell_type": [f"t{i % 4}" for i in range(120)], "batch": [f"b{i // 4 % 2}" for i in range(120)]})


def weights(network):
    return [value.cpu().numpy() for value in network.state_dict().values()]


def fit():
    return weights(model(epochs=2).network)


def embed():
    made = model(epochs=1)
    return [made.embed_cells(CELLS), made.embed_genes().to_numpy()]


def card():
    with warnings.catch_warnings(action="ignore"):
        return [np.array(list(score_card(DRAWN, OBS, "cell_type", "batch", np.arange(1, 121)).values()))]


def taxonomy():
    species, tree = simulated(0, small=True)
    cells = species["mouse"]
    counts = np.log1p(cells.X.toarray())
    return [np.array(list(recovery_scores(counts, cells.obs["leaf"].to_numpy(), tree).values()), float)]


def alignment():
    found = align(DRAWN, DRAWN[::-1] @ np.linalg.qr(np.random.RandomState(1).standard_normal((6, 6)))[0], restarts=1, max_steps=60)
    return [found.transform(DRAWN)]


def anchors():
    species, _ = simulated(0, small=True)
    logged = {name: AnnData(cells.X.log1p(), cells.obs, cells.var) for name, cells in species.items()}
    spaces = GeneSpaces(logged, {name: cells.X.toarray()[:, :20] for name, cells in logged.items()})
    pairs = pd.DataFrame({name: cells.var_names[:60] for name, cells in species.items()})
    found, score = spaces.align(spaces.matrix(pairs))
    return [*found.values(), np.array([score])]


def perturbation():
    screen = simulate_perturbations(n_genes=40, n_targets=8, n_doubles=10, n_cells=12, seed=3)
    made = PerturbationModel(screen, batch_key="batch", recipe=SMALL_SCREEN).fit(1, progress=False)
    return [*weights(made.network), made.predict(["gene1+gene2"]).to_numpy()]


WORK = dict(fit=fit, embed=embed, card=card, taxonomy=taxonomy, alignment=alignment, anchors=anchors, perturbation=perturbation)


def digest(arrays):
    return sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


@pytest.mark.slow
def test_the_same_bits_again_and_in_another_process():
    "Whatever was drawn before, and in whatever order Python's sets and dicts hold text there."
    code = ("import json, sys; sys.path[:0] = ['tests', 'tools']\nfrom unittest import mock\nimport torch; torch.set_num_threads(1)\n"
        "from scformer_nb.batch_correction import BatchShift; BatchShift.steps = 50\n"
        "import test_determinism as t\nprint(json.dumps({name: t.digest(of()) for name, of in t.WORK.items()}))")
    env = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-c", code]
    process = subprocess.Popen(words, cwd=notebooks.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    first = {name: digest(of()) for name, of in WORK.items()}
    np.random.seed(5), torch.rand(3)
    assert {name: digest(of()) for name, of in WORK.items()} == first
    torch.set_num_threads(before)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == first


# ---- stored numbers

STORED = [("integration", "pancreas_5tech", "PCA"), ("integration", "pancreas_5tech", "HVG"), ("clustering", "cortex", "PCA")]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SCFORMER_DATA_DIR"), reason="needs SCFORMER_DATA_DIR")
@pytest.mark.parametrize(("name", "dataset", "method"), STORED, ids=lambda x: x)
def test_a_stored_line_comes_again(name, dataset, method, tmp_path, monkeypatch):
    "The newest one of seed 0: the data is that of the line, and so are the numbers, on another machine to five digits."
    stored = [line for line in read_lines(FIGURES / f"{name}.jsonl")
              if (line["dataset"], line["method"], line["seed"]) == (dataset, method, 0)][-1]
    keys = {key: stored["settings"][key] or "" for key in ("label_key", "batch_key")}
    experiment = Experiment(name, dataset, str(tmp_path), **keys)
    monkeypatch.setattr(Experiment, "keep_umap", lambda *args: None)
    monkeypatch.setattr(Experiment, "train", lambda *args: pytest.fail("it trained"))
    assert json.loads(json.dumps(experiment.settings)) == stored["settings"]
    Z = BASELINES[method](experiment.hvg, experiment.batch_key, 0)
    found = score_card(Z, experiment.hvg.obs, experiment.label_key, experiment.batch_key, experiment.library_size)
    assert found.keys() == stored["metrics"].keys()
    assert found == pytest.approx(stored["metrics"], rel=1e-5, abs=1e-5)


# ---- stored figures

DRAWN_FROM = {  # what names a figure: the command that draws it again without a diff, or by training anew
    "architecture.png": "tools/architecture.py, by page 54",
    "quickstart.png": "by training anew: mkdir -p out && cd nbs && ../.venv/bin/papermill index.ipynb ../out/index.ipynb "
        "-p out ../out/index -p max_epochs 160 && cp ../out/index/quickstart.png ../figures",
    "_history.png": "a new run alone: curves of training are in no ledger",
    "gene_embeddings_": "a new run alone: vectors of genes are not kept",
    "clustering": "make experiments, from the ledger and kept coordinates", "integration": "as clustering", "ablation": "as clustering",
    "resolutions": "as clustering", "what_is_kept": "make experiments, from kept arrays", "cross_species": "as what_is_kept",
    "perturbation": "make experiments, from the ledger and kept predictions", "new_study": "make experiments, from the ledger",
    "anchors": "as new_study", "external_tokens": "as new_study",
}


def test_each_stored_figure_says_what_draws_it():
    "Those of an experiment are made by `make experiments`."
    made = (notebooks.ROOT / "Makefile").read_text()
    for figure in FIGURES.glob("*.png"):
        names = [part for part in DRAWN_FROM if part in figure.name]
        assert names, figure.name
        assert names[0].endswith(".png") or any(f"exp_{name.rstrip('_')}" in made for name in names), figure.name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("clustering", ["AvgBIO"]), ("integration", ["AvgBIO", "Overall"])])
def test_a_figure_of_a_ledger_is_drawn_again_without_a_diff(name, last, tmp_path):
    "All pixels, with the pinned matplotlib."
    with matplotlib.rc_context():  # scib, which another test imports, sets some
        matplotlib.rcdefaults()
        fig = plot_margins(Ledger(FIGURES / f"{name}.jsonl"), [*LEADING[:3], *last])
        pixels, stored = imread(save_figure(fig, tmp_path / name)), imread(FIGURES / f"{name}.png")
    assert pixels.shape == stored.shape and np.array_equal(pixels, stored)
