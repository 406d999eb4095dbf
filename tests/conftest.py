"""Fixtures that files share, and the mark `slow`: on tests that say so and those in slow.txt, which `pytest --measure` writes."""
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import warm
from typer.testing import CliRunner

from scformer_nb import cli
from scformer_nb.batch_correction import BatchShift
from scformer_nb.screens import prepare_screen, split_perturbations, training_cells
from scformer_nb.simulate import simulate, simulate_perturbations

collect_ignore = ["stress"]  # attacks of a quarter of an hour, which `make stress` runs
SLOW = Path(__file__).with_name("slow.txt")
SECONDS = 1  # what a fast test may take, alone on a core
seconds = defaultdict(float)


def name(nodeid):
    "The name of a test function, wherever it stands and whatever its parameters."
    return nodeid.split("::")[-1].split("[")[0]


def pytest_addoption(parser):
    parser.addoption("--measure", action="store_true", help=f"keep in {SLOW.name} which of the tests that run take over {SECONDS} s")


def pytest_collection_modifyitems(items):
    slow = set(SLOW.read_text().split())
    for item in items:
        if name(item.nodeid) in slow or "run_page" in item.fixturenames:
            item.add_marker("slow")
    weight = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -weight[item.path])  # long files first, so that no process waits for the other at the end


def pytest_runtest_logreport(report):
    seconds[report.nodeid] += report.duration


def pytest_sessionfinish(session):
    if not session.config.getoption("measure") or hasattr(session.config, "workerinput"):
        return
    ran = {name(nodeid) for nodeid in seconds}
    slow = {name(nodeid) for nodeid, spent in seconds.items() if spent > SECONDS}
    code = "".join(file.read_text() for file in SLOW.parent.glob("test_*.py"))
    kept = {test for test in set(SLOW.read_text().split()) - ran | slow if f"def {test}(" in code}
    SLOW.write_text("".join(f"{test}\n" for test in sorted(kept)))


@pytest.fixture(scope="module", autouse=True)
def correction():
    "The layer of the batch correction learns in 50 steps instead of 1,000, which toy models do not need and each would pay."
    with mock.patch.object(BatchShift, "steps", 50):
        yield


@pytest.fixture
def scformer():
    "The command in this process: stdout, and stderr as one line; the exit code is held to what is expected."
    def call(*args, code=0):
        done = CliRunner().invoke(cli.app, [str(a) for a in args], env={"COLUMNS": "300", "TERM": "dumb"})
        assert done.exit_code == code, (done.output, done.exception)
        return done.stdout, " ".join(done.stderr.split())
    return call


@pytest.fixture
def run_page():
    "Execute a page in a folder, in a kernel that starts warm: run_page(PAGE, tmp_path, **parameters)."
    from test_pages import run
    with warm.kernels():
        yield run


@pytest.fixture
def cells(tmp_path):
    "A user's file."
    simulate(n_cells=60, n_genes=50, n_types=3, n_batches=2).write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture(params=["read-only", "in read-only", "a file", "in a file"])
def unwritable(request):
    "A path that cannot become a folder of results, not even for root."
    folder = Path(tempfile.mkdtemp())
    path = folder / "here"
    path.write_text("mine") if "file" in request.param else path.mkdir(0o555)
    folder.chmod(0o755)
    if root := os.geteuid() == 0:  # who may write anywhere
        os.seteuid(65534)
    yield path / "inside" if "in" in request.param.split() else path
    if root:
        os.seteuid(0)
    assert path.read_text() == "mine" if path.is_file() else not any(path.iterdir())
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def trained():
    "A small model of the toy cells, trained for two epochs."
    from toy import model
    return model(epochs=2)


@pytest.fixture(scope="module")
def Z(trained):
    "Its embedding of them."
    from toy import CELLS
    Z = trained.embed_cells(CELLS)
    assert Z.shape == (60, trained.recipe.latent) == (60, 32) and Z.dtype == np.float32 and np.isfinite(Z).all()
    return Z


@pytest.fixture(scope="module")
def adata():
    "A small simulated screen."
    return simulate_perturbations(n_genes=40, n_targets=8, n_doubles=10, n_cells=12, seed=3)


@pytest.fixture(scope="module")
def data(adata):
    "The screen as models take it."
    return prepare_screen(adata, batch_key="batch")


@pytest.fixture(scope="module")
def split(data):
    "Its perturbations, for training and for the test."
    return split_perturbations(data.obs.condition, seed=0)


@pytest.fixture(scope="module")
def train(data, split):
    "Its training cells."
    return training_cells(data, split)


@pytest.fixture(scope="module")
def screen_model(train, adata):
    "A small model of them, trained for one epoch."
    from toy import SMALL_SCREEN

    from scformer_nb.perturbation import PerturbationModel
    sets = adata.uns["truth"]["programs"]
    model = PerturbationModel(train, direction="up", gene_sets=sets, targets=["UNMEASURED"], recipe=SMALL_SCREEN)
    return model.fit(1, progress=False)
