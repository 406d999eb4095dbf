"""Scores of perturbation models."""
import numpy as np
import pytest

from scformer_nb.screen_scores import score
from scformer_nb.screens import profile


def test_scores_know_a_perturbation_by_any_of_its_names(data):
    truth = profile(data)
    double = next(c for c in truth.mean.index if "+" in c)
    a, b = double.split("+")
    asked = truth.mean.loc[[double]].set_axis([f"{b}+{a}"])
    assert np.isclose(score(asked, truth).loc[f"{b}+{a}", "corr"], 1)
    with pytest.raises(ValueError, match="there is no profile of 'gene0\\+nogene'"):
        score(asked.set_axis(["gene0+nogene"]), truth)
