"""The command as a shell sees it: help, exit codes, bad input, pages that fail or are killed, what an installed package carries."""
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import notebooks  # tools/notebooks.py
import numpy as np
import pytest
import typer
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from scformer_nb import cli, runner
from scformer_nb.data import simulate

COMMANDS = ["datasets", "fit", "embed", "evaluate", "perturb fit", "perturb predict", "run", "compare-species", "demo"]
PARAMETERS = """dataset: str = "toy"  # a name, or an .h5ad
label_key: str = "cell_type"  # column of obs; empty: no labels
n: int = 1  # how many
share: float = 0.5  # of all
seeds: list = [0, 1]  # of the runs
wait: bool = False  # for ever
full: bool = False  # all
out: str = "out"  # folder"""
RUN = """import time
from pathlib import Path
from scformer_nb.evaluation import Ledger
ledger, computed = Ledger(Path(out) / "toy.jsonl"), []
ledger.get_or_run("toy", "half", "default", 0, {}, lambda: computed.append(1) or {"n": n / 2})
print("computed", len(computed))"""
WAIT = "if wait: time.sleep(600)"
FAIL = "(Path(out) / 'toy.svg').write_text('<svg/>')\nif n > 1: raise ValueError('no more\\nthan one')"


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


@pytest.fixture
def toy(tmp_path):
    "A page with parameters of all types, which can wait and fail."
    tagged = {"tags": ["parameters"]}
    sources = [new_markdown_cell("# Toy\n\n> For tests"), new_code_cell(PARAMETERS, metadata=tagged), new_markdown_cell("## The runs"),
        *map(new_code_cell, [RUN, WAIT, FAIL])]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=sources, metadata=spec), tmp_path / "50_exp_toy.ipynb")
    return tmp_path / "50_exp_toy.ipynb"


@pytest.fixture
def run_toy(toy, scformer, monkeypatch):
    "scformer run toy ..."
    monkeypatch.setattr(runner, "pages", lambda: {"toy": toy})
    return lambda *args, code=0: scformer("run", "toy", *args, code=code)


def left(folder):
    "What a run left, its lock aside."
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


# ---- help

@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_parses(command, scformer):
    command = command.split()
    said = scformer(*command, "--help")[0]
    example = " ".join(said.split("Example: ")[1].split()).split()
    assert example[:1 + len(command)] == ["scformer", *command]
    group = typer.main.get_command(cli.app)
    for name in command[:-1]:
        group = group.commands[name]
    group.commands[command[-1]].make_context("example", example[1 + len(command):])


def test_help_and_import_load_nothing_heavy():
    code = "import sys; from scformer_nb import cli; print({'torch', 'scanpy', 'numpy', 'papermill', 'nbconvert'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "set()"


# ---- run: what is refused before anything runs

@pytest.mark.parametrize("given, message", [
    (["n=many"], "-p n=many: 'many' is not a whole number such as 1200"),
    (["n=1.5"], "'1.5' is not a whole number"),
    (["share=half"], "'half' is not a number such as 0.5"),
    (["wait=true"], "-p wait=true: 'true' is not True or False, with a capital letter"),
    (["wait=1"], "'1' is not True or False"),
    (["seeds=[0,x]"], "'x' is not a whole number"),
    (["lable_key=a"], "the page has no parameter 'lable_key'; did you mean label_key?"),
    (["n=1", "n=2"], "n is given twice"),
    (["n"], "a name and a value are needed"),
    (["out=here"], "named with -o"),
    (["full=True"], "--quick"),
    (["dataset=x.h5ad"], "the data is named behind the page, without -p"),
])
def test_parameters_that_are_refused(given, message, run_toy, tmp_path):
    words = [w for pair in given for w in ("-p", pair)]
    assert message in run_toy("toy", *words, "-o", tmp_path / "out", code=2)[1]
    assert not (tmp_path / "out").exists()


def test_unknown_page_and_wrong_number_of_data_sets(run_toy, scformer):
    assert "error: there is no page 'tyo': did you mean toy?" in scformer("run", "tyo", "x.h5ad", code=2)[1]
    assert "the page takes one data set, not 2: a b" in run_toy("a", "b", code=2)[1]
    assert "name a page and the data" in run_toy(code=2)[1]


def test_data_that_is_refused(run_toy, cells, tmp_path):
    def refused(data, *words):
        said = run_toy(data, *words, "-o", tmp_path / "out", code=2)[1]
        assert not (tmp_path / "out").exists()
        return said

    adata = simulate(n_cells=60, n_genes=50)
    adata.X = np.log1p(adata.X)
    adata.write_h5ad(tmp_path / "logged.h5ad")
    (tmp_path / "cut.h5ad").write_bytes(cells.read_bytes()[:3000])
    assert "does not exist" in refused(tmp_path / "gone.h5ad")
    assert "is neither a data set nor a file" in refused("kang_pmbc")
    assert "cannot be read as .h5ad" in refused(tmp_path / "cut.h5ad")
    assert "must hold raw counts" in refused(tmp_path / "logged.h5ad")
    assert "label_key='celltype' is not a column of obs: did you mean cell_type?" in refused(cells, "-p", "label_key=celltype")


def test_folders_that_are_refused(run_toy, cells, tmp_path):
    thesis, other = tmp_path / "thesis", tmp_path / "other"
    for folder in (thesis, other):
        folder.mkdir()
    (thesis / "thesis.docx").touch()
    (other / "run.json").write_text('{"page": "clustering"}')

    def refused(folder):
        return run_toy(cells, "-o", folder, code=2)[1]

    assert "is not empty and no run of a page made it" in refused(thesis) and left(thesis) == ["thesis.docx"]
    assert "holds a run of the page clustering" in refused(other)
    assert "is a file" in refused(cells)
    with runner.claimed(tmp_path / "busy", "toy", {"dataset": "toy"}):
        assert "another run is at work in" in refused(tmp_path / "busy")


def test_genes_without_symbols_are_told_of(cells):
    adata = simulate(n_cells=60, n_genes=50)
    adata.var_names = [f"ENSG{i:011}" for i in range(50)]
    adata.write_h5ad(cells)
    params = runner.parameters(runner.find_page("clustering"))
    assert "genes go by Ensembl ids" in runner.look(str(cells), {name: p.default for name, p in params.items()}, params)[1][0]


def test_a_finished_run_is_not_replaced_by_one_on_other_data(run_toy, cells, tmp_path):
    run_toy(cells, "-o", tmp_path / "run")
    numbers = (tmp_path / "run/metrics.json").read_bytes()
    others = tmp_path / "others.h5ad"
    others.write_bytes(cells.read_bytes())
    assert f"holds a run on {cells}" in run_toy(others, "-o", tmp_path / "run", code=2)[1]
    assert (tmp_path / "run/metrics.json").read_bytes() == numbers


def test_the_label_key_of_two_species_may_come_either_way(scformer, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "_run", lambda page, data, out, values, *rest: given.append(values))
    scformer("compare-species", "a.h5ad", "b.h5ad", "--label-key", "kind")
    scformer("compare-species", "a.h5ad", "b.h5ad", "-p", "label_key=kind")
    assert given == [["label_key=kind"], ["label_key=kind"]]


# ---- run: a page that fails, is killed, and is continued

def test_a_page_that_fails_leaves_the_cell_and_the_reason(run_toy, cells, tmp_path):
    out, said = run_toy(cells, "-p", "n=2", "-o", tmp_path / "out", code=1)
    assert not out and "error: toy failed: in cell 5 (The runs): ValueError: no more; the page so far is" in said
    assert left(tmp_path / "out") == ["run.json", "toy.failed.ipynb", "work"]
    assert "than one" in (tmp_path / "out/toy.failed.ipynb").read_text()
    assert json.loads((tmp_path / "out/run.json").read_text())["state"] == "failed"


def test_a_killed_run_leaves_nothing_half_written_and_is_continued(toy, run_toy, cells, tmp_path):
    folder, ledger = tmp_path / "out", tmp_path / "out/work/toy.jsonl"
    script = tmp_path / "command.py"
    script.write_text("from pathlib import Path\nfrom scformer_nb import cli, runner\n"
        f"runner.pages = lambda: {{'toy': Path({str(toy)!r})}}\ncli.app()")
    words = ["run", "toy", str(cells), "-o", str(folder)]
    process = subprocess.Popen([sys.executable, script, *words, "-p", "wait=True"], start_new_session=True)
    try:
        end = time.monotonic() + 240
        while not (ledger.exists() and ledger.read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        busy = run_toy(cells, "-o", folder, code=2)[1]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "another run is at work" in busy
    assert {name for name in left(folder) if not name.startswith(".")} == {"run.json", "work"}
    out, said = run_toy(cells, "-o", folder, "--json")
    metrics = json.loads(out)
    assert said == "" and metrics["metrics"] == {"half": {"n": 0.5}} and metrics["parameters"]["seeds"] == [0]
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert left(folder) == ["figures", "metrics.json", "report.html", "run.json", "toy.ipynb", "work"]
    assert "computed 0" in (folder / "toy.ipynb").read_text() and json.loads((folder / "run.json").read_text())["state"] == "finished"


def test_a_quick_run_of_a_real_page_leaves_a_report(scformer, tmp_path, monkeypatch):
    (tmp_path / "scvi").mkdir()
    (tmp_path / "scvi/__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(notebooks.ROOT)]))
    monkeypatch.setenv("PATH", str(notebooks.BIN))  # no Rscript
    out, said = scformer("run", "clustering", "pbmc68k_reduced", "--quick", "-p", "methods=PCA,scVI", "-o", tmp_path / "out")
    report = (tmp_path / "out/report.html").read_text()
    assert "scFormer" in out and out.rstrip().endswith("report.html") and said == ""
    assert "a quick look" in report and "pbmc68k_reduced: 700 cells, 765 genes, 10 cell types (cell_type)" in report
    assert "scformer run clustering pbmc68k_reduced -p methods=PCA,scVI --quick" in report and "pip install" in report
    assert report.count("<img") >= 3 and "<script" not in report and "src=\"http" not in report
    names = {p.name for p in (tmp_path / "out/figures").iterdir()}
    assert {"clustering_pbmc68k_reduced_umap.png", "clustering_pbmc68k_reduced_history.png"} <= names
    assert set(json.loads((tmp_path / "out/metrics.json").read_text())["metrics"]) == {"PCA", "scFormer"}


# ---- the other commands

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A fitted model of gene symbols."
    folder = tmp_path_factory.mktemp("model")
    simulate(n_cells=60, n_genes=50).write_h5ad(folder / "cells.h5ad")
    done = CliRunner().invoke(cli.app, ["fit", str(folder / "cells.h5ad"), "-o", str(folder / "run"), "--epochs", "1"])
    assert done.exit_code == 0 and done.stderr == "", done.output
    return folder / "run"


@pytest.mark.parametrize("names, message", [
    ([f"other{i}" for i in range(50)], "only 0 of the model's 50 genes are in the data"),
    ([f"ENSG{i:011}" for i in range(50)], "the data has Ensembl ids, the model gene symbols; map one to the other first"),
])
def test_embed_refuses_data_with_other_genes(names, message, model, scformer, tmp_path):
    adata = simulate(n_cells=60, n_genes=50)
    adata.var_names = names
    adata.write_h5ad(tmp_path / "new.h5ad")
    assert message in scformer("embed", model, tmp_path / "new.h5ad", "-o", tmp_path / "out.h5ad", code=2)[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.h5ad"]


def test_files_and_folders_that_the_commands_refuse(model, scformer, cells, tmp_path):
    def said(*args):
        return scformer(*args, code=2)[1]

    assert "holds no saved model" in said("embed", tmp_path, cells, "-o", tmp_path / "out.h5ad")
    assert "must end in .h5ad" in said("embed", model, cells, "-o", tmp_path / "out.csv")
    assert "is there already" in said("embed", model, cells, "-o", cells)
    for fit in (["fit"], ["perturb", "fit"]):
        assert "is not empty" in said(*fit, cells, "-o", model)
    assert "holds no perturbation model" in said("perturb", "predict", model, "A+B", "-o", tmp_path / "out.csv")
    assert "it has no embeddings" in said("evaluate", cells)
    assert "--accelerator" in said("fit", cells, "-o", tmp_path / "run", "--accelerator", "mps")
    assert "is not a column" in said("fit", cells, "-o", tmp_path / "run2", "--batch-key", "plate")


def test_the_paper_preset_and_json(model, scformer, cells, tmp_path):
    scformer("fit", cells, "-o", tmp_path / "run", "--preset", "paper", "--epochs", 1, "--n-hvg", 20, "--batch-key", "batch")
    assert json.loads((tmp_path / "run/model.json").read_text())["recipe"]["loss"] == "ce"
    scformer("embed", model, cells, "-o", tmp_path / "out.h5ad")
    out, said = scformer("evaluate", tmp_path / "out.h5ad", "--label-key", "cell_type", "--json")
    assert set(json.loads(out)) >= {"AvgBIO", "NMI"} and not said


# ---- the package

def test_an_installed_package_carries_pages_and_template(tmp_path):
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=notebooks.ROOT, check=True, capture_output=True)
    code = "from scformer_nb import report, runner; print(report.TEMPLATES / 'report/style.css', *runner.pages().values(), sep='\\n')"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    style, *found = [os.path.relpath(line, tmp_path) for line in done.stdout.split()]
    assert (tmp_path / style).exists() and found == [f"scformer_nb/pages/{page.name}" for page in notebooks.pages() if "_exp_" in page.stem]
    assert all(not cell.get("outputs") for name in found for cell in nbformat.read(tmp_path / name, 4).cells)
