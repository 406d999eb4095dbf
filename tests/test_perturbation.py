"""The perturbation model: what a user may get wrong, and what a saved or stopped model must still say."""
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import SMALL_SCREEN as SMALL

from scformer_nb.io import lock_folder
from scformer_nb.perturbation import PerturbationModel, PerturbationTask
from scformer_nb.perturbation_network import PERTURBATION_PAPER
from scformer_nb.screens import training_cells


def test_an_unknown_perturbation_offers_the_nearest_name(screen_model):
    with pytest.raises(ValueError, match="'gene1O' .did you mean 'gene1'"):
        screen_model.predict(["gene0+gene1O"])
    with pytest.raises(ValueError, match="must be named in `targets`"):
        screen_model.predict("KLF1")
    assert np.isfinite(screen_model.predict("UNMEASURED")).all().all()


@pytest.mark.parametrize("name", ["CTRL", "ctrl", "NT", "non-targeting"])
def test_names_of_control_are_no_genes(train, screen_model, name):
    with pytest.raises(ValueError, match=f"'{name}' is a name of control cells and no gene; ask for 'control'"):
        screen_model.predict([name])
    with pytest.raises(ValueError, match=f"target '{name}' is a name of control"):
        PerturbationModel(train, targets=[name], recipe=SMALL)
    assert np.array_equal(screen_model.predict(f"gene0+{name}"), screen_model.predict("gene0"))


def test_doubles_may_be_asked_for_by_other_signs(screen_model):
    assert np.array_equal(screen_model.predict("gene3_gene0"), screen_model.predict("gene0+gene3"))
    with pytest.raises(ValueError, match="'gene3_g1' seems to be a guide of 'gene3'"):
        screen_model.predict("gene3_g1")


def test_gene_sets_of_another_species_stop_before_anything_is_fitted(adata, monkeypatch):
    def never(*a, **k):
        raise AssertionError("the linear model was fitted first")
    monkeypatch.setattr("scformer_nb.perturbation.fit_effects", never)
    human = {name: [g.upper() for g in genes] for name, genes in adata.uns["truth"]["programs"].items()}
    with pytest.raises(ValueError, match="name 0 of 8 perturbed genes .8 when case is ignored: sets of another species"):
        PerturbationModel(adata, gene_sets=human, recipe=SMALL)


def test_training_does_not_see_test_cells(data, split, train):
    "The same predictions when all test cells are replaced by nonsense."
    changed = data.copy()
    hidden = ~changed.obs.condition.isin(["control", *split.index[split.part == "train"]]).to_numpy()
    X = changed.X.toarray()
    X[hidden] = 7
    changed.X = type(data.X)(X)
    test = list(split.index[split.part == "test"])
    models = [PerturbationModel(cells, targets=["gene7"], recipe=SMALL) for cells in (training_cells(changed, split), train)]
    first, second = (model.fit(1, progress=False).predict(test) for model in models)
    assert first.equals(second)


def test_held_out_perturbations_are_not_trained_on(train, adata):
    "Neither as targets of a mini-batch, nor as neighbours of what chooses the epoch."
    model = PerturbationModel(train, direction="up", gene_sets=adata.uns["truth"]["programs"], recipe=SMALL)
    task = PerturbationTask(model)
    drawn = []
    task.draw_case = lambda condition: drawn.append(condition) or PerturbationTask.draw_case(task, condition)
    assert sum(len(target) for _, target in task.train_batches(0)) == len(drawn)
    assert task.held and not set(task.held) & set(drawn) and "control" not in drawn
    assert set(drawn) | set(task.held) == set(model.effects.names)
    assert set(task.valid.condition) <= set(task.held)


def test_a_fit_is_reproducible_and_leaves_the_seed_alone(train, split, screen_model, adata):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again = PerturbationModel(train, direction="up", gene_sets=adata.uns["truth"]["programs"], targets=["UNMEASURED"], recipe=SMALL)
    again.fit(1, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.allclose(again.predict(split.index), screen_model.predict(split.index), atol=1e-6)


def same_losses(*models):
    first, second = (model.history.drop(columns=["seconds", "cells_per_second"]) for model in models)
    return first.equals(second)


def test_a_run_that_is_killed_loses_one_epoch_at_most(train, split, tmp_path, monkeypatch):
    def begin():
        return PerturbationModel(train, direction="up", recipe=SMALL)

    killed, validate, calls = begin(), PerturbationTask.validate, []

    def stop_in_third(self, device):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(self, device)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(PerturbationTask, "validate", stop_in_third)
        killed.fit(4, tmp_path / "run", progress=False)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"last.ckpt", "history.csv", ".lock"}
    (tmp_path / "run" / ".last.ckpt.0123456789abcdef").write_text("of a run that was killed while writing")
    again, whole = begin().fit(4, tmp_path / "run", resume=True, progress=False), begin().fit(4, progress=False)
    assert same_losses(again, whole) and np.array_equal(again.predict(split.index), whole.predict(split.index))
    with pytest.warns(UserWarning, match="has 4 epochs already, more than max_epochs=1"):
        assert len(begin().fit(1, tmp_path / "run", resume=True, progress=False).history) == 4
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"last.ckpt", "history.csv", ".lock"}


def test_two_runs_in_one_folder_are_refused(train, tmp_path):
    PerturbationModel(train, recipe=SMALL).fit(1, tmp_path / "run", progress=False)
    code = ("import sys; from scformer_nb.io import lock_folder\n"
        "with lock_folder(sys.argv[1]): print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another run is at work"):
            PerturbationModel(train, recipe=SMALL).fit(2, tmp_path / "run", resume=True, progress=False)
        other.stdin.close()
    with lock_folder(tmp_path / "run"):
        PerturbationModel(train, recipe=SMALL).fit(2, tmp_path / "run", resume=True, progress=False)


def test_a_run_goes_on_only_with_what_it_began_with(train, tmp_path):
    def begin(**k):
        return PerturbationModel(train, direction="up", recipe=replace(SMALL, **k))

    begin().fit(1, tmp_path / "run", progress=False)
    with pytest.raises(FileExistsError, match="is not empty"):
        begin().fit(1, tmp_path / "run")
    with pytest.raises(ValueError, match="`run_dir`, which is not given"):
        begin().fit(1, resume=True)
    with pytest.raises(ValueError, match=r"another recipe or data set \(lr\)"):
        begin(lr=1e-4).fit(2, tmp_path / "run", resume=True)
    (tmp_path / "run" / "last.ckpt").write_bytes(b"half")
    with pytest.raises(ValueError, match="last.ckpt is cut off or no checkpoint of this library .*; delete it and start anew"):
        begin().fit(2, tmp_path / "run", resume=True)


def test_wrong_options(train):
    with pytest.raises(ValueError, match="direction must be 'down' or 'up', not 'sideways'"):
        PerturbationModel(train, direction="sideways")
    with pytest.raises(ValueError, match="2 are the least"):
        PerturbationModel(train[train.obs.condition.isin(["control", train.obs.condition.cat.categories[-1]])].copy())
    with pytest.raises(ValueError, match="max_epochs=0"):
        PerturbationModel(train, recipe=SMALL).fit(0)


def test_a_screen_too_small_to_hold_anything_out_keeps_the_linear_model(data):
    few = data[data.obs.condition.isin(["control", *sorted(set(data.obs.condition) - {"control"})[:4]])].copy()
    model = PerturbationModel(few, recipe=SMALL)
    before = model.predict(model.vocab.genes[:10])
    with pytest.warns(UserWarning, match="4 training perturbations are too few to hold some out"):
        model.fit(max_epochs=1, progress=False)
    assert np.array_equal(model.predict(before.index), before)


def test_the_recipe_of_the_paper_gives_every_gene_a_token(train):
    paper = replace(PERTURBATION_PAPER, dim=16, d_ff=16, n_blocks=1)
    model = PerturbationModel(train, recipe=paper)
    ours = PerturbationModel(train, recipe=SMALL)
    assert (model.cells.lengths == len(model.vocab.genes)).all() and (ours.cells.lengths < len(model.vocab.genes)).any()


def test_predictions_of_damaged_weights_are_refused(screen_model, monkeypatch):
    monkeypatch.setattr("scformer_nb.perturbation.network_change", lambda model, queries, *more: np.full((len(queries), 40), np.inf))
    with pytest.raises(ValueError, match="predicts values that are not finite"):
        screen_model.predict("gene1+gene2")
