"""The linear model of effects: against the known network of a simulated screen."""
import numpy as np

from scformer_nb.effects import fit_effects
from scformer_nb.screen_scores import pearson
from scformer_nb.screens import prepare_screen, profile
from scformer_nb.simulate import simulate_perturbations


def halves():
    "60 cells of each perturbation to learn from, 180 others as the truth"
    data = prepare_screen(simulate_perturbations(n_genes=60, n_targets=8, n_doubles=10, n_cells=240, seed=0), batch_key="batch")
    control = (data.obs.condition == "control").to_numpy()
    first = (data.obs.groupby("condition", observed=True).cumcount() < 60).to_numpy()
    return data[first | control].copy(), profile(data[~first | control].copy())


def test_effects_find_the_truth_where_signal_is_strong():
    train, truth = halves()
    singles = [c for c in truth.mean.index if "+" not in c]
    expected = fit_effects(train, train.var_names).expected(singles)
    corr = [pearson(row, truth.change.loc[c]) for c, row in zip(singles, expected, strict=True)]
    assert np.mean(corr) > 0.95 and min(corr) > 0.85


def test_gene_sets_carry_over_to_genes_that_were_never_perturbed():
    data = prepare_screen(simulate_perturbations(n_genes=60, n_targets=12, n_doubles=30, n_cells=60, seed=0), batch_key="batch")
    programs = {f"program{i}": [f"gene{t}" for t in range(i, 12, 4)] for i in range(4)}
    truth = profile(data).change
    train = data[~data.obs.condition.str.contains(r"\bgene0\b")].copy()
    alone, with_sets = (fit_effects(train, data.var_names, sets).expected(["gene0"])[0] for sets in (None, programs))
    assert pearson(with_sets, truth.loc["gene0"]) > pearson(alone, truth.loc["gene0"]) + 0.1


def test_the_fewer_cells_the_less_a_perturbation_counts():
    data = prepare_screen(simulate_perturbations(n_genes=40, n_targets=4, n_doubles=2, n_cells=30, seed=0), batch_key="batch")
    few = (data.obs.condition == "gene0").to_numpy()
    few[np.flatnonzero(few)[:10]] = False
    train = data[~few].copy()
    model, n = fit_effects(train, train.var_names), profile(train).n_cells
    assert n["gene0"] == 10 and np.allclose(model.noise * n.to_numpy(), n.mean())
