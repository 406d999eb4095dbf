"""Fixtures that several files share: the command in this process, and a user's file."""
import pytest
from typer.testing import CliRunner

from scformer_nb import cli
from scformer_nb.data import simulate


@pytest.fixture
def scformer():
    "The command in this process: stdout, and stderr as one line; the exit code is held to what is expected."
    def call(*args, code=0):
        done = CliRunner().invoke(cli.app, [str(a) for a in args], env={"COLUMNS": "300", "TERM": "dumb"})
        assert done.exit_code == code, (done.output, done.exception)
        return done.stdout, " ".join(done.stderr.split())
    return call


@pytest.fixture
def cells(tmp_path):
    "A user's file."
    simulate(n_cells=60, n_genes=50, n_types=3, n_batches=2).write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"
