"""A run that is stopped, continued, given the wrong folder or spread over two processes, on toy cells."""
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from scformer_nb import data, training
from scformer_nb.scformer import ScFormer
from scformer_nb.training import DEFAULT, PAPER, History, TrainingModule

SMALL = dict(dim=16, n_blocks=1, hidden=16, max_masked=16)
RECIPE = replace(DEFAULT, **SMALL)
CELLS = data.simulate(60, 60, 3, 2)


def model(epochs=0, run_dir=None, resume=False, adata=CELLS, devices=1, **how):
    made = ScFormer(adata, **{"batch_key": "batch", "recipe": RECIPE} | how)
    return made.fit(epochs, run_dir, resume, progress=False, accelerator="cpu", devices=devices) if epochs else made


def same(a, b):
    "Whether two models have exactly the same weights, and learned them in the same way."
    ours, theirs = (m.network.state_dict() for m in (a, b))
    losses = [m.history.drop(columns=["seconds", "cells_per_second"]) for m in (a, b)]
    return losses[0].equals(losses[1]) and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def uninterrupted():
    return model(4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "The folder of a run of two epochs."
    folder = tmp_path_factory.mktemp("runs") / "finished"
    model(2, folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    "A copy of that folder, to be spoilt."
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def no_training(monkeypatch):
    "Fail as soon as a trainer is made: whatever is wrong has to be found before."
    monkeypatch.setattr(training, "_trainer", lambda *args, **kwargs: pytest.fail("it started to train"))


# ---- wrong values

@pytest.mark.parametrize("wrong", [dict(genes="some"), dict(loss="l1"), dict(pool="max"), dict(value="onehot"), dict(mask_ratio=1.0),
                                   dict(mask_ratio=-0.1), dict(n_heads=3), dict(batch_size=0), dict(dim=0)], ids=str)
def test_wrong_recipes_fail_before_any_training(wrong, tmp_path, no_training):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name.split('_')[0]}.*{value}"):
        model(1, tmp_path / "run", recipe=replace(RECIPE, **wrong))
    assert not (tmp_path / "run").exists()


def test_one_cell_is_too_little(no_training):
    made = model()
    made.cells.bins, made.cells.counts = made.cells.bins[:1], made.cells.counts[:1]
    with pytest.raises(ValueError, match="1 cell is too little to train on"):
        made.fit(1)


def test_a_learning_rate_that_explodes_is_said():
    with pytest.raises(FloatingPointError, match="validation loss nan after epoch 1; lower `lr`"):
        model(2, recipe=replace(RECIPE, lr=1e30))


# ---- the folder of a run

def test_a_folder_in_use_is_not_touched(tmp_path, no_training):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path} is not empty; .*resume=True"):
        model(1, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_folders_that_cannot_be_written(tmp_path, no_training):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OSError, match=f"{file} is a file, not a folder"):
        model(1, file)
    with pytest.raises(OSError, match=f"cannot write to {file}/run"):
        model(1, file / "run")
    assert file.read_text() == "mine"


def test_resume_wants_a_folder(no_training):
    with pytest.raises(ValueError, match="run_dir"):
        model(1, resume=True)


def test_a_run_leaves_a_checkpoint_and_its_history(finished):
    assert sorted(p.name for p in finished.iterdir()) == ["history.csv", "last.ckpt"]
    assert pd.read_csv(finished / "history.csv").epoch.tolist() == [1, 2]


# ---- stopped and continued

class Killed(BaseException):
    "The end of a process, as far as the code in it can see."


def kill(monkeypatch, moment):
    "Make the next run die at a moment: an epoch and a mini-batch, or the n-th time a file is moved to its place."
    end, move, seen = History.on_train_batch_end, os.replace, []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if (trainer.current_epoch, index) == moment:
            raise Killed
        end(self, trainer, module, outputs, batch, index)

    def replace_(source, target):
        seen.append(Path(target).name)
        if (seen[-1], seen.count(seen[-1])) == moment:
            raise Killed
        move(source, target)
    monkeypatch.setattr(History, "on_train_batch_end", on_train_batch_end)
    monkeypatch.setattr(os, "replace", replace_)


@pytest.mark.parametrize("moment", [(0, 1), (1, 0), (2, 2), ("last.ckpt", 1), ("last.ckpt", 2), ("history.csv", 1), ("history.csv", 3)],
                         ids=lambda m: f"{m[0]}-{m[1]}")
def test_a_killed_run_continues_to_the_same_model(uninterrupted, monkeypatch, tmp_path, moment):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, moment)
        model(4, tmp_path / "run")
    continued = model(4, tmp_path / "run", resume=True)
    assert same(continued, uninterrupted) and np.array_equal(continued.embed_cells(CELLS), uninterrupted.embed_cells(CELLS))
    assert pd.read_csv(tmp_path / "run/history.csv").epoch.tolist() == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["history.csv", "last.ckpt"]


def test_a_killed_run_with_dropout_continues_to_the_same_model(monkeypatch, tmp_path):
    recipe = replace(RECIPE, dropout=0.2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, (2, 2))
        model(4, tmp_path, recipe=recipe)
    torch.rand(5)
    assert same(model(4, tmp_path, resume=True, recipe=recipe), model(4, recipe=recipe))


def test_a_finished_run_can_be_prolonged(run, uninterrupted):
    assert same(model(4, run, resume=True), uninterrupted)


def test_numpy_numbers_do_not_spoil_a_checkpoint(tmp_path):
    how = dict(seed=np.int64(3), recipe=replace(RECIPE, lr=np.float64(1e-3), hidden=np.int64(16)))
    model(1, tmp_path, **how)
    assert len(model(2, tmp_path, resume=True, **how).history) == 2


@pytest.mark.parametrize("epochs", [2, 1])
def test_a_finished_run_returns_without_training(run, monkeypatch, epochs):
    before = (run / "last.ckpt").read_bytes()
    monkeypatch.setattr(TrainingModule, "training_step", lambda *args: pytest.fail("it trained"))
    with pytest.warns(UserWarning, match="has 2 epochs already, more than max_epochs=1") if epochs == 1 else nullcontext():
        again = model(epochs, run, resume=True)
    monkeypatch.undo()
    assert same(again, model(2)) and (run / "last.ckpt").read_bytes() == before


def test_ctrl_c_is_a_keyboard_interrupt(uninterrupted, monkeypatch, tmp_path):
    "And another one works afterwards; what was finished is on disk."
    handler = signal.getsignal(signal.SIGINT)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill(patch, (2, 1))
            patch.setitem(globals(), "Killed", KeyboardInterrupt)
            model(4, tmp_path)
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert same(model(4, tmp_path, resume=True), uninterrupted)


# ---- a checkpoint that does not belong here

def renamed():
    "The toy cells with other gene names."
    adata = CELLS.copy()
    adata.var_names = [f"other_{i}" for i in range(60)]
    return adata


OTHERS = {
    "recipe": (dict(recipe=replace(RECIPE, lr=1e-4, ecs=1.0)), "recipe.*ecs, lr"),
    "fewer genes": (dict(adata=data.simulate(60, 50, 3, 2)), "genes"),
    "as many other genes": (dict(adata=data.simulate(60, 60, 3, 2, seed=1)), "genes"),
    "other names": (dict(adata=renamed()), "genes"),
    "fewer cells": (dict(adata=CELLS[:40].copy()), "cells"),
    "n_bins": (dict(n_bins=11), "n_bins"),
    "no batches": (dict(batch_key=None), "batch"),
    "seed": (dict(seed=1), "seed"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(run, no_training, case):
    how, message = OTHERS[case]
    with pytest.raises(ValueError, match=f"{run / 'last.ckpt'} was made with another .*{message}"):
        model(4, run, resume=True, **how)


class Trap:
    "A pickle that touches a file when it is read."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch '{self.path}'",)


DAMAGE = {
    "empty": lambda ckpt, trap: ckpt.write_bytes(b""),
    "cut at the start": lambda ckpt, trap: ckpt.write_bytes(ckpt.read_bytes()[:100]),
    "cut in half": lambda ckpt, trap: ckpt.write_bytes(ckpt.read_bytes()[:ckpt.stat().st_size // 2]),
    "cut at the end": lambda ckpt, trap: ckpt.write_bytes(ckpt.read_bytes()[:-1]),
    "text": lambda ckpt, trap: ckpt.write_bytes(b"garbage" * 100),
    "of something else": lambda ckpt, trap: torch.save({"state_dict": {}}, ckpt),
    "of no known kind": lambda ckpt, trap: torch.save([1], ckpt),
    "an odd recipe": lambda ckpt, trap: torch.save(torch.load(ckpt, weights_only=True) | {"recipe": 3}, ckpt),
    "a folder": lambda ckpt, trap: ckpt.unlink() or ckpt.mkdir(),
    "a pickle": lambda ckpt, trap: ckpt.write_bytes(pickle.dumps(trap)),
    "a pickle inside": lambda ckpt, trap: torch.save({"recipe": trap}, ckpt),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_checkpoint_is_refused_and_never_executed(run, tmp_path, no_training, case):
    DAMAGE[case](run / "last.ckpt", Trap(tmp_path / "sprung"))
    with pytest.raises(ValueError, match="last.ckpt is cut off or no checkpoint of this library .*; delete it and start anew"):
        model(4, run, resume=True)
    assert not (tmp_path / "sprung").exists()


# ---- two processes

SCRIPT = """
import sys, warnings
from contextlib import nullcontext
from dataclasses import replace
warnings.simplefilter("ignore")
from scformer_nb.scformer import ScFormer
from scformer_nb.data import simulate
from scformer_nb.training import DEFAULT, PAPER

if __name__ == "__main__":
    folder, adata = sys.argv[1], simulate(60, 60, 3, 2)
    small = dict(dim=16, n_blocks=1, hidden=16, max_masked=16)
    for name, batch_key, recipe in (("batches", "batch", DEFAULT), ("alone", None, DEFAULT), ("paper", "batch", PAPER)):
        model = ScFormer(adata, batch_key=batch_key, recipe=replace(recipe, **small))
        model.fit(2, f"{folder}/{name}", progress=False, accelerator="cpu", devices=2)
        model.save(f"{folder}/{name}/model")
    print("this process came to its end\\n", end="", flush=True)
"""


def test_two_processes_train_one_model(tmp_path):
    "With and without batches, as the paper: heads that are off must not keep the processes waiting for each other."
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(training.__file__).parents[1]), env.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "script.py", str(tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0 and done.stdout.count("came to its end") == 2, done.stderr[-3000:]
    for name, batch_key, recipe in (("batches", "batch", RECIPE), ("alone", None, RECIPE), ("paper", "batch", replace(PAPER, **SMALL))):
        loaded = ScFormer.load(tmp_path / name / "model")
        losses = loaded.history.filter(regex="train_|valid_")
        assert len(losses) == 2 and np.isfinite(losses).all(axis=None) and np.isfinite(loaded.embed_cells(CELLS)).all()
        one = model(2, recipe=recipe, batch_key=batch_key).history  # the same cells, other steps: losses are close, not equal
        assert np.allclose(losses.valid_loss, one.valid_loss, rtol=0.1) and not losses.valid_loss.equals(one.valid_loss)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["history.csv", "last.ckpt", "model"]


def test_more_processes_than_mini_batches_is_an_error(no_training):
    with pytest.raises(ValueError, match="devices=2"):
        model(1, devices=2, recipe=replace(RECIPE, batch_size=64))


def test_training_says_nothing_of_its_own(capfd):
    "What Lightning has to tell is for its developers."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(1)
    assert capfd.readouterr() == ("", "") and [w for w in caught if issubclass(w.category, UserWarning)] == []
