"""Simple models of perturbations: what they must not see, and the adapter of GEARS."""
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from scformer_nb.perturbation_models import MODELS, gears, mean_change, mlp_baseline, predict_with
from scformer_nb.screens import profile, training_cells

OPTIONS = dict(gene_sets={"a": ["gene0", "gene1", "gene2"], "b": ["gene2", "gene3"]}, seed=1, max_epochs=1)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "GEARS"])
def test_training_does_not_see_test_cells(data, split, train, name):
    "The same predictions when all test cells are replaced by nonsense."
    changed = data.copy()
    hidden = ~changed.obs.condition.isin(["control", *split.index[split.part == "train"]]).to_numpy()
    X = changed.X.toarray()
    X[hidden] = 7
    changed.X = type(data.X)(X)
    test = list(split.index[split.part == "test"])
    again = predict_with(name, training_cells(changed, split), test, **OPTIONS)
    assert hidden.any() and again.equals(predict_with(name, train, test, **OPTIONS))
    assert again.shape == (len(test), data.n_vars) and np.isfinite(again).all().all()


def test_the_mean_is_over_perturbations_and_without_control(train):
    "Control has five times the cells of a perturbation: a mean over cells would be near it."
    known, found = profile(train), mean_change(train, ["gene0", "gene1+gene2"])
    assert np.allclose(found, known.mean.mean()) and abs(known.mean.mean() - known.control).max() > .1


def test_the_mlp_leaves_the_seed_alone(train, split):
    test = list(split.index[split.part == "test"])
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = mlp_baseline(train, test, max_epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before) and (np.random.get_state()[1] == numpys).all()
    torch.manual_seed(6)
    assert first.equals(mlp_baseline(train, test, max_epochs=1))
    assert not first.equals(mlp_baseline(train, test, seed=1, max_epochs=1))


class FakePertData:
    "What the adapter gives to GEARS."
    def __init__(self, folder, gene_set_path, default_pert_graph):
        self.sets_of = pickle.loads(Path(folder, "gene2go_all.pkl").read_bytes())  # noqa: S301 of the adapter
        self.genes = pickle.loads(Path(gene_set_path).read_bytes())  # noqa: S301 of the adapter
        assert not default_pert_graph

    def new_data_process(self, name, adata):
        self.adata = adata

    def get_dataloader(self, batch_size, test_batch_size):
        train, valid = (set(self.set2conditions[k]) for k in ("train", "val"))
        assert "ctrl" in train and valid and not train & valid and train | valid == set(self.adata.obs["condition"])


class FakeGEARS:
    "A model that says how many genes it was asked for."
    def __init__(self, data, device):
        assert isinstance(data.adata.X, np.ndarray)
        self.data = data

    def model_initialize(self, G_go, G_go_weight):
        assert G_go.shape == (2, len(G_go_weight)) and int(G_go.max()) < len(self.data.genes)

    def train(self, epochs):
        self.epochs = epochs
        torch.rand(1)

    def predict(self, asked):
        assert {g for genes in asked for g in genes} <= set(self.data.genes) and not isinstance(self.adata.X, np.ndarray)
        return {"_".join(genes): np.full(self.data.adata.n_vars, len(genes) + self.epochs) for genes in asked}


def test_the_adapter_gives_gears_what_it_wants(train, split, monkeypatch):
    "With a stand-in for the package, which is heavy: what goes in, what comes out, and the seed."
    fake = types.SimpleNamespace(PertData=FakePertData, GEARS=FakeGEARS)
    monkeypatch.setitem(sys.modules, "gears", fake)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    test = [*split.index[split.part == "test"], "UNMEASURED"]
    predicted = gears(train, test, OPTIONS["gene_sets"], max_epochs=3)
    assert (predicted.loc["UNMEASURED"] == 4).all() and list(predicted.index) == test
    assert (predicted[predicted.index.str.contains("+", regex=False)] == 5).all().all()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_gears_itself(train, split):
    pytest.importorskip("gears", reason="needs cell-gears: pip install -c constraints.txt '.[gears]'")
    test = [*split.index[split.part == "test"], "UNMEASURED"]
    predicted = gears(train, test, OPTIONS["gene_sets"], max_epochs=1)
    assert predicted.shape == (len(test), train.n_vars) and np.isfinite(predicted).all().all()
