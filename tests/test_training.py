"""A run that is stopped, continued, given the wrong folder or spread over two processes, on toy cells."""
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest
import torch
import warm

from scformer_nb import heads, training
from scformer_nb.model import Block, Encoder, ValueEmbedding
from scformer_nb.recipe import DEFAULT, PAPER, Recipe
from scformer_nb.scformer import ScFormer
from scformer_nb.simulate import simulate
from scformer_nb.tokens import make_batch
from scformer_nb.training import ScFormerTask, TrainingTask, split_cells, train

SMALL = dict(dim=16, n_blocks=1, d_ff=16, max_masked=16, batch_size=16)
RECIPE = replace(DEFAULT, **SMALL)
OLD_DEFAULT = Recipe(max_genes=150, mask_ratio=.4, n_blocks=4, latent=0, correct=False, mgm=1., mvc=1., zero=5., count=5., dar=.3,
    kl=0., nb=0., batch_size=16, lr=1e-3, lr_decay=.9, half_life=None, warmup_steps=100, epochs=30, steps=0)
OLD = replace(OLD_DEFAULT, **SMALL)
CELLS = simulate(60, 60, 3, 2)


def model(epochs=0, run_dir=None, resume=False, adata=CELLS, devices=1, **how):
    made = ScFormer(adata, **{"batch_key": "batch", "recipe": RECIPE} | how)
    return made.fit(epochs, run_dir, resume, progress=False, accelerator="cpu", devices=devices) if epochs else made


def same(a, b):
    "Whether two models have exactly the same weights, and learned them in the same way."
    ours, theirs = (m.network.state_dict() for m in (a, b))
    losses = [m.history.drop(columns=["seconds", "cells_per_second"]) for m in (a, b)]
    return losses[0].equals(losses[1]) and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def value_of_each_token(self, values, masked):
    return torch.where(masked[..., None], self.mask, self.embed(values[..., None] / self.top))


def query_of_each_gene(self, x):
    logits = self.cell(x.cell) @ self.query(x.genes).T * x.genes.shape[1] ** -.5 + self.bias + self.batch(x.b.batch)
    mean = x.b.counts.sum(1, keepdim=True) * logits.softmax(-1) + 1e-8
    theta = self.log_theta.exp()
    likelihood = torch.distributions.NegativeBinomial(theta, logits=(mean / theta).log(), validate_args=False)
    return -likelihood.log_prob(x.b.counts).mean()


def test_what_was_made_faster_changes_no_loss(monkeypatch):
    "Twenty steps with keys and values of all tokens, layers over tokens instead of tables, and a plain Adam."
    fast = model(5).history
    for owner, name, plain in (
            (Block, "attend_once", Block.attend), (ValueEmbedding, "forward", value_of_each_token),
            (Encoder, "gene_vectors", lambda self, ids: self.gene_norm(self.gene(ids))),
            (heads.NegativeBinomial, "forward", query_of_each_gene),
            (TrainingTask, "optimiser", lambda self: torch.optim.Adam(self.network.parameters(), foreach=False))):
        monkeypatch.setattr(owner, name, plain)
    slow = model(5).history
    for loss in ("train_loss", "train_nb", "train_kl", "valid_loss"):
        assert np.allclose(fast[loss], slow[loss], rtol=2e-6, atol=0)


def files(folder):
    "Names of the files in a folder, without the lock."
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


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
    "Fail as soon as a device is asked for: whatever is wrong has to be found before."
    monkeypatch.setattr(training, "new_fabric", lambda *args, **kwargs: pytest.fail("it started to train"))


# ---- wrong values

@pytest.mark.parametrize("wrong", [dict(genes="some"), dict(loss="l1"), dict(dsbn="yes"), dict(mask_ratio=1.0),
                                   dict(mask_ratio=-0.1), dict(n_heads=3), dict(batch_size=0), dict(dim=0), dict(lr=0.0),
                                   dict(dropout=1.0), dict(svd_init=-1), dict(clip=0.0), dict(ecs=-1.0)], ids=str)
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
    assert files(finished) == ["history.csv", "last.ckpt"]
    assert pd.read_csv(finished / "history.csv").epoch.tolist() == [1, 2]


# ---- stopped and continued

class Killed(BaseException):
    "The end of a process, as far as the code in it can see."


def kill(monkeypatch, moment):
    "Make the next run die at a moment: an epoch and a mini-batch, or the n-th time a file is moved to its place."
    loss, batches, move, seen, now = ScFormerTask.loss, ScFormerTask.train_batches, os.replace, [], []

    def loss_(self, network, batch):
        if tuple(now) == moment:
            raise Killed
        now[1] += 1
        return loss(self, network, batch)

    def batches_(self, epoch, rank, world):
        now[:] = [epoch, 0]
        return batches(self, epoch, rank, world)

    def replace_(source, target):
        seen.append(Path(target).name)
        if (seen[-1], seen.count(seen[-1])) == moment:
            raise Killed
        move(source, target)
    monkeypatch.setattr(ScFormerTask, "loss", loss_)
    monkeypatch.setattr(ScFormerTask, "train_batches", batches_)
    monkeypatch.setattr(os, "replace", replace_)


@pytest.mark.parametrize("moment", [(0, 1), (1, 0), (2, 2), ("last.ckpt", 1), ("last.ckpt", 2), ("history.csv", 1), ("history.csv", 3)],
                         ids=lambda m: f"{m[0]}-{m[1]}")
def test_a_killed_run_continues_to_the_same_model(uninterrupted, monkeypatch, tmp_path, moment):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, moment)
        model(4, tmp_path / "run")
    assert set(files(tmp_path / "run")) <= {"history.csv", "last.ckpt"}
    continued = model(4, tmp_path / "run", resume=True)
    assert same(continued, uninterrupted) and np.array_equal(continued.embed_cells(CELLS), uninterrupted.embed_cells(CELLS))
    assert pd.read_csv(tmp_path / "run/history.csv").epoch.tolist() == [1, 2, 3, 4]
    assert files(tmp_path / "run") == ["history.csv", "last.ckpt"]


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
    how = dict(seed=np.int64(3), recipe=replace(RECIPE, lr=np.float64(1e-3), d_ff=np.int64(16)))
    model(1, tmp_path, **how)
    assert len(model(2, tmp_path, resume=True, **how).history) == 2


@pytest.mark.parametrize("epochs", [2, 1])
def test_a_finished_run_returns_without_training(run, monkeypatch, epochs):
    before = (run / "last.ckpt").read_bytes()
    monkeypatch.setattr(ScFormerTask, "loss", lambda *args: pytest.fail("it trained"))
    with pytest.warns(UserWarning, match="has 2 epochs already, more than max_epochs=1") if epochs == 1 else nullcontext():
        again = model(epochs, run, resume=True)
    monkeypatch.undo()
    assert same(again, model(2)) and (run / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_a_run_in_order(uninterrupted, monkeypatch, tmp_path, number, error):
    "Another one works as before afterwards; what was finished is on disk, and nothing else."
    if number == signal.SIGINT:  # which a shell has ignored in what runs in its background
        signal.signal(number, signal.default_int_handler)
    handler, batches = signal.getsignal(number), ScFormerTask.train_batches

    def batches_(self, epoch, rank, world):
        if epoch == 2:
            os.kill(os.getpid(), number)
        return batches(self, epoch, rank, world)
    with monkeypatch.context() as patch, pytest.raises(error) as caught:
        patch.setattr(ScFormerTask, "train_batches", batches_)
        model(4, tmp_path)
    assert signal.getsignal(number) == handler and files(tmp_path) == ["history.csv", "last.ckpt"]
    assert error is KeyboardInterrupt or caught.value.code == 143
    assert same(model(4, tmp_path, resume=True), uninterrupted)


@pytest.mark.parametrize("recipe", [RECIPE, OLD, replace(RECIPE, dropout=0.2, dsbn=True), replace(PAPER, **SMALL)],
                         ids=["default", "old default", "dropout, DSBN", "paper"])
def test_embedding_between_fit_and_resume_changes_nothing(tmp_path, recipe):
    "It leaves the network in evaluation mode, and training has to leave that."
    made = model(2, tmp_path, recipe=recipe)
    made.embed_cells(CELLS)
    assert same(made.fit(4, tmp_path, resume=True, progress=False, accelerator="cpu"), model(4, recipe=recipe))


def test_embedding_before_fit_changes_nothing():
    recipe = replace(RECIPE, dropout=0.2, dsbn=True)
    made = model(recipe=recipe)
    made.embed_cells(CELLS)
    assert same(made.fit(2, progress=False, accelerator="cpu"), model(2, recipe=recipe))


def test_a_short_history_is_made_whole_from_the_checkpoint(run):
    whole = (run / "history.csv").read_text()
    for spoilt in (whole.rsplit("\n", 2)[0] + "\n", ""):
        (run / "history.csv").write_text(spoilt)
        model(2, run, resume=True)
        assert (run / "history.csv").read_text() == whole


# ---- the folder belongs to one run

def test_a_second_run_in_a_folder_is_refused(run, tmp_path, no_training):
    for folder, resume in ((run, True), (tmp_path / "new", False)):
        folder.mkdir(exist_ok=True)
        with filelock.FileLock(folder / ".lock"), pytest.raises(ValueError, match=f"another run is at work in {folder}"):
            model(4, folder, resume)
    assert files(tmp_path / "new") == []


TWO_RUNS = """
import sys, warnings
from dataclasses import replace
from pathlib import Path
warnings.simplefilter("ignore")
from scformer_nb.scformer import ScFormer
from scformer_nb.simulate import simulate
from scformer_nb.recipe import DEFAULT

recipe = replace(DEFAULT, dim=16, n_blocks=1, d_ff=16, max_masked=16, batch_size=16)
model = ScFormer(simulate(60, 60, 3, 2), batch_key="batch", recipe=recipe)
print("ready", flush=True)
sys.stdin.readline()  # both are let go at the same moment
try:
    model.fit(int(sys.argv[2]), sys.argv[1], progress=False, accelerator="cpu")
except (ValueError, FileExistsError) as e:
    sys.exit(f"refused: {e}")
"""


@pytest.mark.slow
def test_of_two_processes_in_one_folder_one_is_refused(tmp_path):
    "They start together; the other one ends with a clear error, and the files are those of one run."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(training.__file__).parents[1])}
    command, folder = [sys.executable, "-c", TWO_RUNS], tmp_path / "run"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = [warm.Popen([*command, str(folder), "40"], env=env, **pipes) for _ in range(2)]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    said = [run.communicate(timeout=170)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 1], said
    assert re.search(f"refused: (another run is at work in {folder}|{folder} is not empty)", said[codes.index(1)])
    assert files(folder) == ["history.csv", "last.ckpt"] and len(pd.read_csv(folder / "history.csv")) == 40


def test_resume_writes_nothing_into_a_folder_that_no_run_made(tmp_path, no_training):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path} holds no run to continue"):
        model(1, tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_what_a_killed_run_left_is_removed(finished, tmp_path):
    (tmp_path / ".last.ckpt.a1b2c3a1b2c3a1b2").write_bytes(b"half")
    assert len(model(1, tmp_path, resume=True).history) == 1
    assert files(tmp_path) == files(finished)


def test_a_pipe_is_no_checkpoint(run, no_training):
    (run / "last.ckpt").unlink()
    os.mkfifo(run / "last.ckpt")
    with pytest.raises(ValueError, match="last.ckpt is a pipe or a device"):
        model(4, run, resume=True)


@pytest.mark.slow
def test_a_checkpoint_without_room_says_so(tmp_path):
    "torch hides the error of a full disk behind one of its own."
    code = ("import resource, sys, torch; from pathlib import Path\nfrom scformer_nb.runs import write_run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "write_run(Path(sys.argv[1]), {'rows': [], 'x': torch.zeros(100_000)})")
    done = warm.run([sys.executable, "-c", code, tmp_path])
    assert done.returncode == 1 and "no space is left for it" in done.stderr and files(tmp_path) == []


def test_names_of_temporary_files_cannot_be_guessed(tmp_path, monkeypatch):
    "They differ from run to run, and what lies there already is never opened."
    names, move = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: names.append(Path(source).name) or move(source, target))
    for folder in ("a", "b"):
        model(1, tmp_path / folder)
    assert len(names) == 4 == len(set(names)) and all(name.startswith(".") for name in names)


# ---- what no other test would see

class Watched(ScFormerTask):
    "Remembers the learning rate of each step; scores can be given."
    scores = ()

    def optimiser(self):
        self.adam, self.rates = super().optimiser(), []
        return self.adam

    def loss(self, network, batch):
        self.rates += [group["lr"] for group in self.adam.param_groups]
        return super().loss(network, batch)

    def validate(self, device):
        found = super().validate(device)
        return found | {self.monitor: self.scores.pop(0)} if self.scores else found


def watched(epochs, scores=(), recipe=RECIPE):
    made = model(recipe=recipe)
    task = Watched(made.network, made.cells)
    task.scores = list(scores)
    train(task, epochs, progress=False, accelerator="cpu")
    return task


@pytest.mark.parametrize("recipe", [OLD, replace(OLD, mgm=0)], ids=["by MGM", "by the sum"])
def test_the_best_epoch_is_kept_not_the_last(recipe):
    kept = watched(3, [3.0, 1.0, 2.0], recipe).network.state_dict()
    best, last = (watched(n, [3.0, 2.0, 1.0], recipe).network.state_dict() for n in (2, 3))
    assert all(torch.equal(kept[k], best[k]) for k in kept) and not all(torch.equal(kept[k], last[k]) for k in kept)


def test_with_a_bottleneck_the_last_epoch_is_kept():
    "Its price for information is a goal of training, not a sign of being over-trained."
    task = watched(3)
    assert task.monitor is None and task.state["best"]["epoch"] == 3
    kept, last = task.network.state_dict(), task.state["network"]
    assert all(torch.equal(kept[k], last[k]) for k in kept)


def test_validation_never_sees_training_cells(monkeypatch):
    rows = []
    monkeypatch.setattr(training, "make_batch", lambda cells, chosen, *args: rows.append(chosen) or make_batch(cells, chosen, *args))
    task = watched(1)
    n = len(task.rates)  # steps of training
    trained, held = (set(np.concatenate(part)) for part in (rows[:n], rows[n:]))
    assert not trained & held and len(trained | held) == 60
    assert held == set(split_cells(60, 0)[1])


def test_the_learning_rate_falls_after_each_epoch():
    task = watched(3, recipe=replace(RECIPE, warmup_steps=0, lr=1e-3, lr_decay=0.5, half_life=None))
    assert np.allclose(task.rates, np.repeat([1e-3, 5e-4, 2.5e-4], len(task.rates) // 3))


def test_the_learning_rate_halves_by_steps():
    task = watched(2, recipe=replace(RECIPE, warmup_steps=0, lr=1e-3, half_life=3))
    assert np.allclose(task.rates, 1e-3 * 0.5 ** (np.arange(len(task.rates)) / 3)) and len(task.rates) == 8


def test_a_fit_that_is_not_told_how_long_takes_as_many_epochs_as_the_recipe_needs():
    made = model(recipe=replace(RECIPE, steps=10, epochs=2)).fit(progress=False, accelerator="cpu")
    assert len(made.history) == 3, "54 cells are four steps an epoch"


def test_the_learning_rate_rises_over_the_first_steps():
    task = watched(1, recipe=replace(RECIPE, warmup_steps=10, lr=1e-3, half_life=None))
    assert np.allclose(task.rates, 1e-4 * np.arange(1, len(task.rates) + 1))


def test_each_cell_has_its_own_batch_label_whatever_the_order():
    cells = model().cells
    rows = np.random.default_rng(0).permutation(60)
    b = make_batch(cells, rows)
    assert np.array_equal(b.batch, cells.batch[rows]) and len(set(cells.batch)) == 2
    assert np.array_equal(b.counts, cells.counts[rows].toarray())


# ---- the loop with another task

class Line(TrainingTask):
    "A line through points: no validation, and a random generator that goes on from epoch to epoch."
    def __init__(self, stop=None):
        torch.manual_seed(0)
        self.network, self.n_cells, self.rng, self.stop = torch.nn.Linear(1, 1), 32, np.random.default_rng(0), stop

    def train_batches(self, epoch, rank, world):
        if epoch == self.stop:
            raise Killed
        x = self.rng.standard_normal((4, 8, 1)).astype(np.float32)
        return [(torch.from_numpy(part), torch.from_numpy(2 * part + 1)) for part in x]

    def loss(self, network, batch):
        x, y = batch
        return {"loss": (network(x) - y).square().mean()}

    def size(self, batch):
        return len(batch[0])

    def learning_rate(self, epoch, step):
        return 0.1

    def identity(self):
        return {"kind": "line"}

    def state_dict(self):
        return {"rng": json.dumps(self.rng.bit_generator.state)}

    def load_state_dict(self, state):
        self.rng.bit_generator.state = json.loads(state["rng"])


def test_another_task_is_trained_continued_and_kept(tmp_path):
    "From a checkpoint, and in memory; without validation the last epoch is kept."
    quiet = dict(progress=False, accelerator="cpu")
    whole, parts = Line(), Line()
    history = train(whole, 6, **quiet)
    assert list(history)[:2] == ["epoch", "train_loss"] and history.train_loss.iloc[-1] < history.train_loss.iloc[0] / 10
    train(parts, 2, **quiet)
    assert len(train(parts, 6, **quiet)) == 6
    with pytest.raises(Killed):
        train(Line(stop=3), 6, run_dir=tmp_path, **quiet)
    resumed = Line()
    assert len(train(resumed, 6, run_dir=tmp_path, resume=True, **quiet)) == 6
    for task in (parts, resumed):
        assert torch.equal(task.network.weight, whole.network.weight)


# ---- a checkpoint that does not belong here

def renamed():
    "The toy cells with other gene names."
    adata = CELLS.copy()
    adata.var_names = [f"other_{i}" for i in range(60)]
    return adata


OTHERS = {
    "recipe": (dict(recipe=replace(RECIPE, lr=1e-4, ecs=1.0)), "recipe.*ecs, lr"),
    "fewer genes": (dict(adata=simulate(60, 50, 3, 2)), "genes"),
    "as many other genes": (dict(adata=simulate(60, 60, 3, 2, seed=1)), "genes"),
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


def spoil(ckpt, change):
    "The weights of a checkpoint are others."
    state = torch.load(ckpt, weights_only=True)
    weights = {name: change(w) if w.is_floating_point() else w for name, w in state["network"].items()}
    torch.save(state | {"network": weights}, ckpt)


DAMAGE = {
    "empty": lambda ckpt, trap: ckpt.write_bytes(b""),
    "cut at the start": lambda ckpt, trap: ckpt.write_bytes(ckpt.read_bytes()[:100]),
    "cut in half": lambda ckpt, trap: ckpt.write_bytes(ckpt.read_bytes()[:ckpt.stat().st_size // 2]),
    "cut at the end": lambda ckpt, trap: ckpt.write_bytes(ckpt.read_bytes()[:-1]),
    "text": lambda ckpt, trap: ckpt.write_bytes(b"garbage" * 100),
    "of something else": lambda ckpt, trap: torch.save({"state_dict": {}}, ckpt),
    "of no known kind": lambda ckpt, trap: torch.save([1], ckpt),
    "an odd identity": lambda ckpt, trap: torch.save(torch.load(ckpt, weights_only=True) | {"identity": 3}, ckpt),
    "a part missing": lambda ckpt, trap: torch.save({"identity": torch.load(ckpt, weights_only=True)["identity"]}, ckpt),
    **{f"{part} of text": lambda ckpt, trap, part=part: torch.save(torch.load(ckpt, weights_only=True) | {part: "x"}, ckpt)
       for part in ("rows", "step", "best", "optimiser", "network")},
    "weights of NaN": lambda ckpt, trap: spoil(ckpt, lambda w: w * float("nan")),
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


def test_a_checkpoint_of_other_shapes_is_refused_and_named(run):
    spoil(run / "last.ckpt", lambda w: w[:1] if w.ndim else w)
    with pytest.raises(ValueError, match="the state of the run is damaged") as error:
        model(4, run, resume=True)
    assert error.value.__notes__ == [str(run)]


def test_a_score_of_text_is_refused(run):
    state = torch.load(run / "last.ckpt", weights_only=True)
    torch.save(state | {"best": state["best"] | {"score": "x"}}, run / "last.ckpt")
    with pytest.raises(ValueError, match="the state of the run is damaged"):
        model(4, run, resume=True)


@pytest.mark.parametrize("odd", [lambda m: [m, m], lambda m: torch.zeros(3)], ids=["in a list", "of another shape"])
def test_damaged_moments_of_the_optimiser_are_refused(run, odd):
    state = torch.load(run / "last.ckpt", weights_only=True)
    moments = state["optimiser"]["state"][0]
    moments["exp_avg"] = odd(moments["exp_avg"])
    torch.save(state, run / "last.ckpt")
    with pytest.raises(ValueError, match="the state of the run is damaged"):
        model(4, run, resume=True)


def test_settings_of_the_optimiser_are_those_of_the_recipe(run):
    "Whatever a checkpoint says of them."
    state = torch.load(run / "last.ckpt", weights_only=True)
    expected = model(4, run, resume=True).history
    state["optimiser"]["param_groups"][0].update(betas=(.1, .1, .1), eps=9.)
    torch.save(state, run / "last.ckpt")
    assert model(4, run, resume=True).history.filter(like="loss").equals(expected.filter(like="loss"))


def test_a_checkpoint_that_leads_to_nothing_is_no_new_run(run, no_training):
    (run / "last.ckpt").unlink()
    (run / "last.ckpt").symlink_to(run / "nowhere")
    with pytest.raises(FileNotFoundError, match="last.ckpt leads to nothing"):
        model(4, run, resume=True)


# ---- two processes

SCRIPT = """
import sys, warnings
from dataclasses import replace
warnings.simplefilter("ignore")
from scformer_nb.scformer import ScFormer
from scformer_nb.simulate import simulate
from scformer_nb.recipe import DEFAULT, PAPER

if __name__ == "__main__":
    folder, adata, devices, num_nodes, names = sys.argv[1], simulate(60, 60, 3, 2), *map(int, sys.argv[2:4]), sys.argv[4:]
    small = dict(dim=16, n_blocks=1, d_ff=16, max_masked=16, batch_size=16)
    for name, batch_key, recipe in (("batches", "batch", DEFAULT), ("alone", None, DEFAULT), ("paper", "batch", PAPER)):
        if name in names:
            model = ScFormer(adata, batch_key=batch_key, recipe=replace(recipe, **small))
            model.fit(2, f"{folder}/{name}", progress=False, accelerator="cpu", devices=devices, num_nodes=num_nodes)
            model.save(f"{folder}/{name}/model")
    print("this process came to its end\\n", end="", flush=True)
"""

OF_A_LAUNCHER = re.compile("(LOCAL_RANK|RANK|WORLD_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT|SLURM_.*)$")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no_python"]
SLURM = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "JOB_NAME": "x", "JOB_ID": 1, "NODELIST": "localhost", "NNODES": 1, "NODEID": 0}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launched(folder, command, places, start=subprocess.Popen):
    "Output of a process for each of `places`, its variables; all of them must end well."
    clean = {k: v for k, v in os.environ.items() if not OF_A_LAUNCHER.match(k)}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(training.__file__).parents[1]), clean.get("PYTHONPATH", "")])}
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started = [start(command, cwd=folder, env=clean | place, **pipes) for place in places]
    said = [process.communicate(timeout=300) for process in started]
    assert all(process.returncode == 0 for process in started), said[0][1][-3000:] + said[-1][1][-3000:]
    return "".join(out for out, _ in said)


def train_and_valid(history):
    return history.filter(regex="train_|valid_")


def run_script(folder, launcher, devices, num_nodes, *names):
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(folder), str(devices), str(num_nodes), *names]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    slurm = {f"SLURM_{k}": str(v) for k, v in SLURM.items()} | where
    said = {
        "by itself": lambda: launched(folder, command, [{}]),
        "by torchrun": lambda: launched(folder, TORCHRUN + command, [{}]),
        "as two machines": lambda: launched(folder, command, [where | {"NODE_RANK": str(i)} for i in (0, 1)], warm.Popen),
        "as srun does": lambda: launched(folder, command, [slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in (0, 1)]),
    }[launcher]()
    assert said.count("came to its end") == 2
    assert all(files(folder / name) == ["history.csv", "last.ckpt", "model"] for name in names)


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    "With and without batches; in the paper's recipe some losses are not means over cells: those are close, not equal."
    run_script(tmp_path, "by itself", 2, 1, "batches", "alone", "paper")
    for name, batch_key, recipe in (("batches", "batch", RECIPE), ("alone", None, RECIPE), ("paper", "batch", replace(PAPER, **SMALL))):
        loaded = ScFormer.load(tmp_path / name / "model")
        one = model(2, recipe=recipe, batch_key=batch_key)
        ours, theirs = train_and_valid(loaded.history), train_and_valid(one.history)
        assert len(ours) == 2 and np.isfinite(ours).all(axis=None) and np.isfinite(loaded.embed_cells(CELLS)).all()
        equal, close = np.allclose(ours, theirs[ours.columns], atol=1e-4), np.allclose(ours.valid_loss, theirs.valid_loss, rtol=.1)
        assert equal if recipe.latent else close
        alone = ScFormerTask(loaded.network, one.cells).validate(torch.device("cpu"))
        kept = ours.valid_loss.iloc[-1] if recipe.latent else ours.valid_mgm.min()
        assert alone["valid_loss" if recipe.latent else "valid_mgm"] == kept, "over all held-out cells, as one process does it"
    shutil.rmtree(tmp_path / "batches/model")
    goes_on, unbroken = model(4, tmp_path / "batches", resume=True), model(4)
    ours, theirs = train_and_valid(goes_on.history), train_and_valid(unbroken.history)
    assert np.allclose(ours, theirs[ours.columns], atol=1e-4), "two epochs of two processes, then two of one"


@pytest.mark.slow
@pytest.mark.parametrize("launcher, devices, num_nodes", [("by torchrun", 2, 1), ("as two machines", 1, 2), ("as srun does", 2, 1)])
def test_two_processes_of_any_launcher(tmp_path, launcher, devices, num_nodes):
    run_script(tmp_path, launcher, devices, num_nodes, "batches")
    ours, theirs = train_and_valid(ScFormer.load(tmp_path / "batches/model").history), train_and_valid(model(2).history)
    assert np.allclose(ours, theirs[ours.columns], atol=1e-4)


@pytest.mark.slow
def test_the_command_in_two_processes(tmp_path, scformer):
    CELLS.write_h5ad(tmp_path / "x.h5ad")
    words = ["fit", str(tmp_path / "x.h5ad"), "--batch-key", "batch", "--epochs", "1", "--accelerator", "cpu"]
    command = [sys.executable, str(Path(sys.executable).with_name("scformer")), *words, "--devices", "2", "-o", "2"]
    said = launched(tmp_path, command, [{}])
    assert said.count("trained for 1 epoch") == 1, "the first process speaks"
    scformer(*words, "--devices", "1", "-o", tmp_path / "1")
    ours, theirs = (train_and_valid(ScFormer.load(tmp_path / devices).history) for devices in ("2", "1"))
    assert np.allclose(ours, theirs[ours.columns], atol=1e-4)


def test_more_processes_than_cells_of_a_mini_batch_is_an_error(no_training):
    with pytest.raises(ValueError, match="mini-batches of 1 cells are too small for 2 processes"):
        model(1, devices=2, recipe=replace(RECIPE, batch_size=1))
    with pytest.raises(ValueError, match="mini-batches of 16 cells are too small for 18 processes"):
        training.train(ScFormerTask(model().network, model().cells), 1, devices=2, num_nodes=9)


def test_training_says_nothing_of_its_own(capfd):
    "What Lightning has to tell is for its developers."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(1)
    assert capfd.readouterr() == ("", "") and [w for w in caught if issubclass(w.category, UserWarning)] == []
