"""A page on a user's data: what is refused before it starts, pages that fail or are killed, what a run leaves."""
import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import anndata
import nbformat
import notebooks  # tools/notebooks.py
import numpy as np
import pytest
import scipy.sparse as sp
import warm
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from scformer_nb import data, io, runner
from scformer_nb.h5ad import memory_of
from scformer_nb.simulate import simulate

PARAMETERS = """dataset: str = "toy"  # a name, or an .h5ad
label_key: str = "cell_type"  # column of obs; empty: no labels
side: str = ""  # "left" or "right"; empty: both
file: str = "x"  # a text that is needed
gene_sets: str = ""  # .gmt; empty: none
n: int = 1  # how many
n_hvg: int = 20  # genes
methods: list = ["PCA", "linear + gene sets", "one, two"]  # rows; also "old"
seeds: list = [0, 1]  # of the runs
wait: bool = False  # for ever
full: bool = False  # all
out: str = "out"  # folder"""
RUN = """import os
import time
from pathlib import Path
from scformer_nb.ledger import Ledger
ledger, computed = Ledger(Path(out) / "toy.jsonl"), []
ledger.get_or_run("toy", "half", "default", 0, {}, lambda: computed.append(1) or {"n": n / 2, "none": float("nan")})
print("computed", len(computed))
(Path(out) / "pid").write_text(str(os.getpid()))"""
WAIT = "if wait: time.sleep(600)"
FAIL = "(Path(out) / 'toy.svg').write_text('<svg/>')\nif n > 1: raise ValueError('no more\\nthan one')"
ALL = [(page, p) for page, file in runner.pages().items() for p in runner.parameters(file).values()]


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
    with warm.kernels():
        yield lambda *args, code=0: scformer("run", "toy", *args, code=code)


def left(folder):
    "What a run left, its lock aside."
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


# ---- parameters

@pytest.mark.parametrize("page, p", ALL, ids=[f"{page}-{p.name}" for page, p in ALL])
def test_every_default_reads_back_as_itself(page, p):
    assert runner.read_value(p, repr(p.default)) == p.default
    assert runner.read_value(p, str(p.default)) == p.default
    runner.check_value(p, p.default)
    if p.type == "list" and not any("," in str(v) for v in p.default):
        assert runner.read_value(p, ",".join(map(str, p.default))) == p.default
    if p.type == "list":
        assert runner.read_value(p, json.dumps(p.default)) == p.default


@pytest.mark.parametrize("text, value", [
    ("PCA", ["PCA"]), ("PCA, linear + gene sets", ["PCA", "linear + gene sets"]), ("[PCA,old]", ["PCA", "old"]),
    ('["PCA", "one, two"]', ["PCA", "one, two"]), ('PCA,"one, two"', ["PCA", "one, two"]), ("'one, two'", ["one, two"]),
])
def test_lists_of_words(text, value, toy):
    params = runner.parameters(toy)
    assert runner.read_given(params, [f"methods={text}"]) == {"methods": value}


@pytest.mark.parametrize("given, message", [
    (["n=many"], "-p n=many: 'many' is not a whole number such as 1200"),
    (["n={[]: 1}"], "'{[]: 1}' is not a whole number"),
    (["n=1.5"], "'1.5' is not a whole number"),
    (["n=True"], "'True' is not a whole number"),
    (["n=__import__('os').getpid()"], "is not a whole number"),
    (["wait=true"], "-p wait=true: 'true' is not True or False, with a capital letter"),
    (["wait=1"], "'1' is not True or False"),
    (["seeds=[0,x]"], "'x' is not a whole number"),
    (["seeds=0,1.5"], "'1.5' is not a whole number"),
    (["lable_key=a"], "the page has no parameter 'lable_key'; did you mean 'label_key'?"),
    (["n=1", "n=2"], "n is given twice"),
    (["n"], "a name and a value are needed"),
    (["out=here"], "named with -o"),
    (["full=True"], "--quick"),
    (["dataset=x.h5ad"], "the data is named behind the page, without -p"),
    (['methods=["PCA", "No, such"]'], "'No, such' is unknown; known are 'PCA'"),
    (["methods=pca"], "'pca' is unknown; did you mean 'PCA'?"),
    (['methods="PCA'], '\'"PCA\' is unknown; did you mean'),
    (["methods=PCA,PCA"], "'PCA' is there twice"),
    (["methods="], "-p methods=: the value is empty"),
    (["seeds="], "-p seeds=: the value is empty"),
    (["seeds=-1"], "-1 is not a whole number from 0 to"),
    (["seeds=4294967296"], "is not a whole number from 0 to 4,294,967,295"),
    (["n_hvg=0"], "-p n_hvg=0: 0 is not a whole number from 2 to"),
    (["n=-1"], "-1 is not a whole number from 1 to"),
    (["side=lft"], "'lft' is unknown; did you mean 'left'?"),
    (["file="], "-p file=: the value is empty, and the page needs one: a text that is needed"),
])
def test_parameters_that_are_refused(given, message, run_toy, tmp_path):
    words = [w for pair in given for w in ("-p", pair)]
    assert message in run_toy("toy", *words, "-o", tmp_path / "out", code=2)[1]
    assert not (tmp_path / "out").exists()


def test_every_parameter_reaches_the_page(toy, tmp_path, monkeypatch):
    ran, values = [], {"n": 3, "seeds": [2, 5], "methods": ["old"], "full": True}
    monkeypatch.setattr(runner.papermill, "execute_notebook", lambda nb, place, given, **how: ran.append(given))
    runner.execute(toy, tmp_path, values, show=False)
    assert ran == [values]


def test_old_names_of_pages_are_read():
    assert runner.find_page("20_exp_clustering") == runner.find_page("clustering.ipynb") == runner.pages()["clustering"]


# ---- data and folders

def test_unknown_page_and_wrong_number_of_data_sets(run_toy, scformer):
    assert "error: there is no page 'tyo'; did you mean 'toy'?" in scformer("run", "tyo", "x.h5ad", code=2)[1]
    assert "the page takes one data set, not 2: a b" in run_toy("a", "b", code=2)[1]
    assert "name a page and the data" in run_toy(code=2)[1]


def test_two_files_of_one_name_are_refused_at_once(scformer, tmp_path):
    said = scformer("compare-species", "a/cells.h5ad", "b/cells.h5ad", "-o", tmp_path / "out", code=2)[1]
    assert "both files are called cells" in said and not (tmp_path / "out").exists()


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
    assert "label_key='celltype' is not a column of obs; did you mean 'cell_type'?" in refused(cells, "-p", "label_key=celltype")


def test_a_large_file_is_checked_in_parts_and_what_the_page_needs_is_said(run_toy, cells, tmp_path, monkeypatch):
    a = simulate(n_cells=300, n_genes=200)
    a.write_h5ad(tmp_path / "large.h5ad")
    monkeypatch.setattr(runner, "LARGE", 250)
    monkeypatch.setattr(data, "PART", 100)
    monkeypatch.setattr(runner, "execute", lambda *args: (_ for _ in ()).throw(runner.PageFailed("the page began")))
    need = 2 * memory_of(tmp_path / "large.h5ad") / 1e9
    said = run_toy(tmp_path / "large.h5ad", "-o", tmp_path / "out", code=1)[1]
    assert f"warning: large.h5ad has 300 cells, and a page reads them whole: it takes about {need:,.1f} GB" in said
    a.X.data[a.X.indptr[250]] = -1
    a.write_h5ad(tmp_path / "bad.h5ad")
    assert "among cells 201 to 300 1 of" in run_toy(tmp_path / "bad.h5ad", "-o", tmp_path / "new", code=2)[1]


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_cells_are_judged_by_those_that_hold_something(kind, cells, tmp_path):
    params = runner.parameters(runner.find_page("clustering"))
    values = {name: p.default for name, p in params.items()}
    adata = simulate(n_cells=600, n_genes=50)
    for logged in (False, True):
        X = adata.X.toarray()
        X[:300] = 0
        X = np.log1p(X) if logged else X
        anndata.AnnData(sp.csr_matrix(X) if kind == "sparse" else X, adata.obs, adata.var).write_h5ad(cells)
        if logged:
            with pytest.raises(ValueError, match="must hold raw counts"):
                runner.inspect_data(str(cells), values, params)
        else:
            assert "600 cells" in runner.inspect_data(str(cells), values, params)[0]


def test_folders_that_are_refused(run_toy, cells, tmp_path):
    thesis, other = tmp_path / "thesis", tmp_path / "other"
    for folder in (thesis, other):
        folder.mkdir()
    (thesis / "thesis.docx").touch()
    (other / "run.json").write_text('{"page": "clustering", "parameters": {"dataset": "x"}}')

    def refused(folder):
        return run_toy(cells, "-o", folder, code=2)[1]

    assert "is not empty and no run of a page made it" in refused(thesis) and left(thesis) == ["thesis.docx"]
    assert "holds a run of the page clustering" in refused(other)
    for text in ("[]", '{"page": 1}', "{", '{"page": "toy", "parameters": 3}'):
        (other / "run.json").write_text(text)
        assert "is not empty and no run of a page made it" in refused(other)
    assert "is a file" in refused(cells)
    with io.lock_folder(tmp_path / "busy"):
        code = f"from scformer_nb.io import lock_folder\nwith lock_folder({str(tmp_path / 'busy')!r}): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another run is at work in" in done.stderr


def test_genes_without_symbols_are_noted(cells):
    adata = simulate(n_cells=60, n_genes=50)
    adata.var_names = [f"ENSG{i:011}" for i in range(50)]
    adata.write_h5ad(cells)
    params = runner.parameters(runner.find_page("clustering"))
    values = {name: p.default for name, p in params.items()}
    assert "genes go by names such as ENSG00000000000;" in runner.inspect_data(str(cells), values, params)[1][0]


@pytest.mark.slow
def test_a_finished_run_is_not_replaced_by_one_on_other_data(run_toy, cells, tmp_path):
    run_toy(cells, "-o", tmp_path / "run")
    numbers = (tmp_path / "run/metrics.json").read_bytes()
    others = tmp_path / "others.h5ad"
    others.write_bytes(cells.read_bytes())
    assert f"holds a run on {cells}" in run_toy(others, "-o", tmp_path / "run", code=2)[1]
    assert (tmp_path / "run/metrics.json").read_bytes() == numbers


def test_too_few_open_files_are_said_before_a_kernel_starts(run_toy, cells, tmp_path):
    with mock.patch("resource.getrlimit", return_value=(40, 4096)):
        assert "and 40 are allowed here; say ulimit -n 1024 first" in run_toy(cells, "-o", tmp_path / "out", code=2)[1]
    assert not (tmp_path / "out").exists()


# ---- a page that fails, is killed, and is continued

@pytest.mark.slow
def test_a_page_that_fails_leaves_the_cell_and_the_reason(run_toy, cells, tmp_path):
    out, said = run_toy(cells, "-p", "n=2", "-o", tmp_path / "out", code=1)
    assert not out and "error: the page failed in cell 5 (The runs): ValueError: no more; the page so far is" in said
    assert left(tmp_path / "out") == ["failed.ipynb", "run.json", "work"]
    assert left(tmp_path / "out/work") == ["pid", "toy.jsonl", "toy.svg"]
    assert "than one" in (tmp_path / "out/failed.ipynb").read_text()
    assert not (tmp_path / "out/metrics.json").exists()


def alive(pid):
    "Whether a process runs; one that has ended and was not yet waited for does not."
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_takes_its_kernel_along_and_is_continued(toy, run_toy, cells, tmp_path):
    folder, pid = tmp_path / "a {folder} %s", tmp_path / "a {folder} %s/work/pid"
    script = tmp_path / "command.py"
    script.write_text("from pathlib import Path\nfrom scformer_nb import cli, runner\n"
        f"runner.pages = lambda: {{'toy': Path({str(toy)!r})}}\ncli.app()")
    words = ["run", "toy", str(cells), "-o", str(folder)]
    process = subprocess.Popen([sys.executable, script, *words, "-p", "wait=True"], start_new_session=True)
    try:
        end = time.monotonic() + 240
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        busy = run_toy(cells, "-o", folder, code=2)[1]
        kernel = int(pid.read_text())
        assert alive(kernel)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.3)
    assert not alive(kernel) and "another run is at work" in busy
    assert {name for name in left(folder) if not name.startswith(".")} == {"run.json", "work"}
    out, said = run_toy(cells, "-o", folder, "--json")
    metrics = json.loads(out, parse_constant=lambda name: 1 / 0)
    assert said == "" and metrics["metrics"] == {"half": {"n": 0.5}} and metrics["parameters"]["seeds"] == [0]
    assert metrics == json.loads((folder / "metrics.json").read_text()) and metrics["runs"][0]["metrics"]["none"] is None
    assert left(folder) == ["figures", "metrics.json", "report.html", "run.json", "toy.ipynb", "work"]
    assert left(folder / "work") == ["pid", "toy.jsonl", "toy.svg"]
    assert "computed 0" in (folder / "toy.ipynb").read_text()


@pytest.mark.slow
def test_a_quick_run_of_a_real_page_leaves_a_report(scformer, tmp_path, monkeypatch):
    (tmp_path / "scvi").mkdir()
    (tmp_path / "scvi/__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(notebooks.ROOT)]))
    monkeypatch.setenv("PATH", str(notebooks.BIN))  # no Rscript
    with warm.kernels():
        out, said = scformer("run", "clustering", "pbmc68k_reduced", "--quick", "-p", "methods=PCA,scVI", "-o", tmp_path / "out")
    report = (tmp_path / "out/report.html").read_text()
    assert "scFormer" in out and out.rstrip().endswith("report.html") and said == ""
    assert "a quick look" in report and "pbmc68k_reduced: 700 cells, 765 genes, 10 cell types (cell_type)" in report
    assert "scformer run clustering pbmc68k_reduced -p methods=PCA,scVI --quick" in report and "pip install" in report
    assert report.count("<img") >= 3 and "<script" not in report and "src=\"http" not in report
    names = {p.name for p in (tmp_path / "out/figures").iterdir()}
    assert any(name.startswith("clustering_pbmc68k_reduced_umap.png") for name in names)
    assert set(json.loads((tmp_path / "out/metrics.json").read_text())["metrics"]) == {"PCA", "scFormer"}
