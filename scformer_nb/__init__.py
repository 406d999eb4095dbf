"""Transformer embeddings of cells and genes for single-cell RNA-seq; the notebooks in nbs/ are the source."""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors; nothing heavy is imported until it is used
    from . import (
        alignment, api, baselines, binning, cli, cross_species, data, evaluation, heads, mapping, model, perturbation, report,
        runner, taxonomy, tokens, training, wasserstein,
    )
    from .api import ScFormer

__version__ = "0.1.0"
__all__ = [
    "ScFormer", "alignment", "api", "baselines", "binning", "cli", "cross_species", "data", "evaluation", "heads", "mapping",
    "model", "perturbation", "report", "runner", "taxonomy", "tokens", "training", "wasserstein",
]


def __getattr__(name):
    "`scf.data`, `scf.ScFormer` and the rest are imported at first use (PEP 562), so that `import scformer_nb` costs nothing."
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ScFormer":
        return import_module(f"{__name__}.api").ScFormer
    return import_module(f"{__name__}.{name}")


def __dir__():
    return sorted({*globals(), *__all__})
