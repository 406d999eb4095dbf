"""Scores of perturbation models."""
import numpy as np
import pandas as pd
import pytest

from scformer_nb.screen_scores import de_genes, de_weights, discrimination, energy_distance, perturbed_mean, score, score_halves
from scformer_nb.screens import profile


def test_scores_know_a_perturbation_by_any_of_its_names(data):
    truth = profile(data)
    double = next(c for c in truth.mean.index if "+" in c)
    a, b = double.split("+")
    asked = truth.mean.loc[[double]].set_axis([f"{b}+{a}"])
    assert np.isclose(score(asked, truth).loc[f"{b}+{a}", "corr"], 1)
    with pytest.raises(ValueError, match="there is no profile of 'gene0\\+nogene'"):
        score(asked.set_axis(["gene0+nogene"]), truth)


def test_the_mean_of_training_is_the_floor_of_what_is_specific(data, split):
    "Whatever its correlation with change against control."
    truth = profile(data)
    test, mean = list(split.index[split.part == "test"]), perturbed_mean(truth, split)
    floor = score(pd.DataFrame([mean] * len(test), test), truth, reference=mean)
    assert np.allclose(floor[["corr_specific", "r2_specific"]], 0) and floor.corr_delta.mean() > 0.2
    perfect = score(truth.mean.loc[test], truth, reference=mean)
    better = ["corr_specific", "r2_specific", "discrimination", "centroid", "de_overlap"]
    assert (perfect[better].mean() > floor[better].mean()).all() and (perfect[["mae", "wmse"]] < floor[["mae", "wmse"]]).all().all()


def test_de_weights_and_genes_follow_the_cells(data):
    "A gene that only one perturbation changes has its weight; one that no perturbation changes is not among the changed genes."
    marked = data.copy()
    X, names = marked.X.toarray(), marked.obs.condition.to_numpy()
    rng = np.random.default_rng(0)
    X[:, :2] = rng.normal(5, 1, (len(X), 2))
    X[names == "gene3", 0] += 5
    marked.X = type(data.X)(X)
    truth = profile(marked)
    assert de_weights(truth).loc["gene3"].idxmax() == marked.var_names[0]
    changed = de_genes(truth)
    assert changed.loc["gene3", marked.var_names[0]] and changed[marked.var_names[1]].mean() < 0.2


def test_energy_distance_sees_more_than_the_mean():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 150, 4))
    wide = 3 * other
    assert abs(energy_distance(one, other)) < 0.1 < energy_distance(one, wide - wide.mean(0) + one.mean(0))


def test_halves_are_scored_as_a_prediction_is(data, split):
    test = list(split.index[split.part == "test"])
    halves = score_halves(data, test, reference=perturbed_mean(profile(data), split))
    assert list(halves.index) == test and halves.e_distance.abs().mean() < 1
    assert halves.discrimination.mean() > 0.9


def test_a_perturbation_is_not_told_by_its_own_genes():
    "A prediction that knows A's own change only, and else looks like B's, ranks A second of two."
    truth = pd.DataFrame({"A": [9, 0.], "B": [0, 9.], "C": [1, 2.]}, index=["A", "B"])
    guess = pd.DataFrame({"A": [9.], "B": [4.5], "C": [2.]}, index=["A"])
    assert discrimination(guess, truth)["A"] == .5 and discrimination(guess.assign(B=4), truth)["A"] == 1
