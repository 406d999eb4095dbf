"""Transformer embeddings of cells and genes for single-cell RNA-seq; the notebooks in nbs/ are the source."""
import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors; nothing heavy is imported until it is used
    from . import (
        alignment, baselines, batch_correction, binning, cli, counts, cross_species, data, datasets, effects,
        embedding, experiment, external_tokens, gene_anchors, gene_names, gene_space, h5ad, heads, hub, hvg, io,
        ledger, mapping, metrics, model, model_files, perturbation, perturbation_files, perturbation_models,
        perturbation_network, plots, pretrained, readers, recipe, report, runner, runs, saucie, scformer, score_card,
        screen_scores, screens, shipped, simulate, studies, svd_init, taxonomy, tokens, training, trees, wasserstein,
        writable,
    )
    from .datasets import load
    from .scformer import ScFormer

__version__ = "0.1.0"
__all__ = [
    "ScFormer", "alignment", "baselines", "batch_correction", "binning", "cli", "counts", "cross_species", "data",
    "datasets", "effects", "embedding", "experiment", "external_tokens", "gene_anchors", "gene_names", "gene_space",
    "h5ad", "heads", "hub", "hvg", "io", "ledger", "load", "mapping", "metrics", "model", "model_files",
    "perturbation", "perturbation_files", "perturbation_models", "perturbation_network", "plots", "pretrained",
    "readers", "recipe", "report", "runner", "runs", "saucie", "scformer", "score_card", "screen_scores", "screens",
    "shipped", "simulate", "studies", "svd_init", "taxonomy", "tokens", "training", "trees", "wasserstein", "writable",
]

_SHORT = {"ScFormer": "scformer", "load": "datasets"}  # names of modules that can be had from the package itself
_MOVED = {
    "api": ("scformer", "hub", "model_files"), "evaluation": ("metrics", "plots", "ledger"),
}  # old module -> where its names are now


class _Moved(ModuleType):
    "An old module: it looks each name up in the new ones and says where it found it."

    def __getattr__(self, name):
        old = self.__name__.rpartition(".")[2]
        for new in () if name.startswith("__") else _MOVED[old]:
            module = import_module(f"{__name__}.{new}")
            if hasattr(module, name):
                text = f"scformer_nb.{old} is no more; {name} is in scformer_nb.{new} now"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; it is now {', '.join(_MOVED[old])}")


for _old in _MOVED:  # so that `import scformer_nb.api` finds it, before anything heavy is imported
    sys.modules[f"{__name__}.{_old}"] = _Moved(f"{__name__}.{_old}")


def __getattr__(name):
    "`scf.data`, `scf.ScFormer` and the rest are imported at first use (PEP 562): importing the package costs nothing."
    if name in _SHORT:
        return getattr(import_module(f"{__name__}.{_SHORT[name]}"), name)
    if name in __all__ or name in _MOVED:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
