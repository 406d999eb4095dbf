"""Sixty toy cells, small recipes, and what the tests of models share."""
import os
from dataclasses import replace

import anndata
import pandas as pd
import torch

from scformer_nb.perturbation_network import PerturbationRecipe
from scformer_nb.recipe import DEFAULT, PAPER
from scformer_nb.scformer import ScFormer
from scformer_nb.simulate import simulate

SMALL = dict(dim=16, n_blocks=1, d_ff=16, max_masked=16, batch_size=16)
RECIPE, DSBN = replace(DEFAULT, **SMALL), replace(PAPER, **SMALL)
SMALL_SCREEN = PerturbationRecipe(dim=16, d_ff=16, n_blocks=1, max_genes=16, batch_size=16)
CELLS = simulate(60, 60, 3, 2)
COUNTS = CELLS.X


def toy(X=COUNTS, names=None, layers=None, **obs):
    "The toy cells with something changed."
    var = pd.DataFrame(index=list(CELLS.var_names if names is None else names))
    return anndata.AnnData(X, obs=CELLS.obs.assign(**obs), var=var, layers=layers)


def cells(**how):
    "Sixty cells of forty genes with attributes set, to values or to what functions make of the cells."
    a = simulate(60, 40, 2, 2)
    for k, v in how.items():
        setattr(a, k, v(a) if callable(v) else v)
    return a


def with_value(value):
    X = COUNTS.toarray()
    X[3, 5] = value
    return X


def model(adata=CELLS, epochs=0, **how):
    made = ScFormer(adata, **{"batch_key": "batch", "recipe": RECIPE} | how)
    return made.fit(epochs, progress=False, accelerator="cpu") if epochs else made


def same(a, b):
    "Whether two models have exactly the same genes and weights."
    ours, theirs = ({k: v.cpu() for k, v in m.network.state_dict().items()} for m in (a, b))
    return a.vocab.genes == b.vocab.genes and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def our_warnings(caught):
    "Messages of the UserWarnings that do not come from libraries."
    return [str(w.message) for w in caught if w.category is UserWarning and "site-packages" not in w.filename]


class Trap:
    "A pickle that touches a file when it is read."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch '{self.path}'",)
