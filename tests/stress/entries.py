"""The entry points that read files, and the good files that cases are made of."""
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import anndata
import safetensors.numpy


@dataclass
class Entry:
    "A command line, or a function, of the input and of the place of the output."
    name: str
    act: Callable
    good: Callable  # of a folder: the good input
    suffix: str = ""  # of the output
    result: Callable = lambda out, printed: {}  # what must be equal and finite
    kinds: tuple = ()  # needs "counts", a fitted "model", the columns of "scores"
    broken: int = 0  # which of several inputs the message must name
    keeps: bool = False  # the output is a folder that is there before
    also: Callable | None = None  # of a folder: another input, which a message may name instead
    refuses: bool = False  # even the good input
    copies: bool = False  # what it does not need of the input goes into the output as it is

    def expected(self, folder, goods):
        "The result of the good input, computed once."
        if id(self) not in goods:
            import corpus
            out = Path(tempfile.mkdtemp(dir=folder), f"out{self.suffix}")
            code, said, printed = corpus.attempt(self.act, self.good(folder), out)
            assert code == 0, said
            goods[id(self)] = self.result(out, printed)
        return goods[id(self)]


def once(make):
    "What is made in a folder when it is first asked for."
    def get(folder):
        place = folder / f"good_{make.__name__}"
        if not place.exists():
            place.mkdir()
            with warnings.catch_warnings(action="ignore"):
                make(place)
        return place
    return get


@once
def cells_folder(place):
    from corpus_files import good_cells
    good_cells().write_h5ad(place / "cells.h5ad")
    other = good_cells()
    other.obs["cell_type"] = other.obs["cell_type"].astype(str)
    other.write_h5ad(place / "second.h5ad")


def cells(folder):
    return cells_folder(folder) / "cells.h5ad"


def second(folder):
    return cells_folder(folder) / "second.h5ad"


@once
def model_folder(place):
    from corpus_files import good_cells

    import scformer_nb as scf
    made = scf.ScFormer(good_cells(), "batch", recipe=scf.recipe.DEFAULT)
    made.fit(1, progress=False, accelerator="cpu").save(place / "model")


def model(folder):
    return model_folder(folder) / "model"


@once
def screen_folder(place):
    from corpus_files import good_cells
    from toy import SMALL_SCREEN

    import scformer_nb as scf
    scf.perturbation.PerturbationModel(good_cells(), recipe=SMALL_SCREEN).save(place / "screen")


def screen(folder):
    return screen_folder(folder) / "screen"


def base(out):
    "The folder of a group, in which all good files lie, from the place of an output."
    return Path(out).parents[1]


# ---- results

def weights(out, printed):
    found = safetensors.numpy.load_file(out / "weights.safetensors")
    return {name: w for name, w in found.items() if name != "effects.own"}  # in which NaN has a meaning


def embedding(out, printed):
    return {"embedding": anndata.read_h5ad(out).obsm["X_scformer"]}


def names(out, printed):
    adata = anndata.read_h5ad(out)
    X = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
    return {"genes": list(adata.var_names), "counts": None if X is None else X.tolist()}  # as they were, even if they are no counts


def scores(out, printed):
    return {"scores": printed}


# ---- of cell files

KEYS = ("--batch-key", "batch")
SCORES = ("--label-key", "cell_type", "--batch-key", "batch")
COUNTS = ("counts",)

FILE_ENTRIES = [
    Entry("fit", lambda p, out: ["fit", p, "-o", out, "--epochs", 1, *KEYS], cells, "", weights, COUNTS),
    Entry("fit two", lambda p, out: ["fit", p, second(base(out)), "-o", out, "--epochs", 1], cells, "", weights,
          ("counts", "two")),
    Entry("fit --from", lambda p, out: ["fit", p, "--from", model(base(out)), "-o", out, "--epochs", 1, *KEYS], cells, "", weights,
          ("counts", "model")),
    Entry("embed", lambda p, out: ["embed", model(base(out)), p, "-o", out], cells, ".h5ad", embedding, ("counts", "model"),
          copies=True),
    Entry("evaluate", lambda p, out: ["evaluate", p, *SCORES], cells, "", scores, ("scores",)),
    Entry("run", lambda p, out: ["run", "clustering", p, "-o", out], cells, "", lambda *_: {}, COUNTS),
    Entry("perturb", lambda p, out: ["perturb", "fit", p, "-o", out], cells, "", weights, COUNTS),
    Entry("species", lambda p, out: ["compare-species", p, second(base(out)), "--label-key", "cell_type", "-o", out], cells, "",
          lambda *_: {}, COUNTS),
    Entry("genes", lambda p, out: ["genes", p, "--to", "ensembl", "-o", out], cells, ".h5ad", names),
]


# ---- of model folders

def load(path, out):
    import scformer_nb as scf
    return lambda: scf.ScFormer.load(path)


MODEL_ENTRIES = [
    Entry("load", load, model),
    Entry("embed", lambda p, out: ["embed", p, cells(base(out)), "-o", out], model, ".h5ad", embedding, also=cells),
    Entry("fit --from", lambda p, out: ["fit", cells(base(out)), "--from", p, "-o", out, "--epochs", 1, *KEYS], model, "", weights,
          also=cells),
    Entry("embed --labels", lambda p, out: ["embed", p, cells(base(out)), "--labels", "-o", out], model, ".h5ad", refuses=True),
    Entry("perturb predict", lambda p, out: ["perturb", "predict", p, "gene_1", "-o", out], model, ".csv", refuses=True),
]
