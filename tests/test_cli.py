"""The command as a shell sees it: help, exit codes, bad input, what an installed package carries."""
import json
import os
import subprocess
import sys

import filelock
import h5py
import nbformat
import notebooks  # tools/notebooks.py
import numpy as np
import pytest
import typer
import warm
from typer.testing import CliRunner

import scformer_nb as scf
from scformer_nb import cli, data, embedding, recipe
from scformer_nb.datasets import load
from scformer_nb.simulate import simulate, simulate_perturbations

LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"  # as if a disk had that much room
COMMANDS = ["datasets", "fit", "embed", "evaluate", "perturb fit", "perturb predict", "run", "compare-species", "demo"]


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


def test_options_say_what_they_are():
    group = typer.main.get_command(cli.app)
    commands = [*group.commands.values(), *group.commands["perturb"].commands.values()]
    assert [(c.name, p.name) for c in commands for p in c.params if not p.help] == []


# ---- errors

def raised(error):
    "Code of a package below that raises."
    names = {"error": error, "__name__": "torch.nn"}
    exec("def work(): raise error", names)  # noqa: S102 of the test itself
    return names["work"]


@pytest.mark.parametrize("error, code, words", [
    (ValueError("a bad column"), 1, "torch failed (ValueError: a bad column); with SCFORMER_DEBUG=1"),
    (KeyError("x"), 1, "torch failed (KeyError: x)"),
    (MemoryError(), 1, "out of memory (MemoryError); fewer cells or genes (--n-hvg)"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 1, "batch_size"),
    (MemoryError(), 1, "in parts of 10,000 cells (in Python data.PART)"),
    (MemoryError(), 1, "128 cells, and one that is embedded 16,384 tokens (embedding.TOKENS)"),
    (RuntimeError("mat1 and mat2"), 1, "torch failed (RuntimeError: mat1 and mat2)"),
    (np.linalg.LinAlgError("no convergence"), 1, "torch failed (LinAlgError: no convergence)"),
    (RecursionError("too deep"), 1, "torch failed (RecursionError"),
    (AssertionError("x"), 1, "torch failed (AssertionError"),
    (OSError(28, "No space left on device"), 2, "No space left on device"),
    (ImportError("harmony needs harmonypy: pip install it"), 2, "pip install it"),
])
def test_every_error_becomes_a_line(error, code, words, scformer, monkeypatch):
    monkeypatch.setattr("scformer_nb.datasets.datasets", raised(error))
    out, said = scformer("datasets", code=code)
    assert not out and said.startswith("error: ") and words in said and "Traceback" not in said
    monkeypatch.setenv("SCFORMER_DEBUG", "1")
    assert "Traceback" in scformer("datasets", code=code)[1]


def test_the_numbers_in_the_message_are_those_of_the_code():
    assert (data.PART, embedding.TOKENS, recipe.DEFAULT.batch_size) == (10_000, 16_384, 128)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (BrokenPipeError(32, "Broken pipe"), 1)])
def test_ctrl_c_and_a_closed_pipe_say_nothing(error, code, scformer, monkeypatch):
    monkeypatch.setattr("scformer_nb.datasets.datasets", raised(error))
    assert "error" not in scformer("datasets", code=code)[1]


def test_names_that_a_terminal_obeys_are_written_out(scformer, cells):
    adata = simulate(n_cells=60, n_genes=50)
    adata.obs["\x1b]0;title\x07\nfake: done"] = "x"
    adata.write_h5ad(cells)
    said = CliRunner().invoke(cli.app, ["run", "clustering", str(cells), "-p", "label_key=fake"])
    assert said.exit_code == 2 and "\x1b" not in said.stderr and said.stderr.count("\n") == 1


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
    ([f"ENSG{i:011}" for i in range(50)], "gene symbols; translate them first, scformer genes DATA --to symbol"),
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
    assert "holds another kind of model" in said("perturb", "predict", model, "A+B", "-o", tmp_path / "out.csv")
    assert "there are none; say --basis" in said("evaluate", cells, "--batch-key", "batch")
    assert "--accelerator" in said("fit", cells, "-o", tmp_path / "run", "--accelerator", "mps")
    assert "is not a column" in said("fit", cells, "-o", tmp_path / "run2", "--batch-key", "plate")


def test_two_runs_in_one_folder(cells, scformer, tmp_path):
    code = "import sys\nfrom scformer_nb.io import lock_folder\nwith lock_folder(sys.argv[1]): print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        for command in (["fit", cells], ["run", "clustering", "pbmc68k_reduced", "--quick"]):
            assert "another run is at work in" in scformer(*command, "-o", tmp_path / "run", code=2)[1]
    finally:
        other.communicate()


@pytest.mark.parametrize("name", ["ScFormer", "PerturbationModel"])
def test_a_folder_is_the_runs_own_until_its_model_is_saved(name, cells, scformer, tmp_path, monkeypatch):
    "Another that comes between the last epoch and the model would lose one of two, and both would say done."
    kind, held = getattr(scf.scformer if name == "ScFormer" else scf.perturbation, name), []

    def save(model, folder, overwrite):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(folder / ".lock", timeout=0).acquire()
        held.append(folder)
    monkeypatch.setattr(kind, "save", save)
    simulate_perturbations(n_genes=40, n_targets=8, n_doubles=10, n_cells=12).write_h5ad(tmp_path / "screen.h5ad")
    fit = ["fit", cells, "--epochs", 1] if name == "ScFormer" else ["perturb", "fit", tmp_path / "screen.h5ad"]
    scformer(*fit, "-o", tmp_path / "run")
    assert held == [tmp_path / "run"]


@pytest.mark.parametrize("command", [["fit"], ["perturb", "fit", "--epochs", "1"]])
def test_resume_where_there_is_something_else_writes_nothing(command, cells, scformer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.docx").touch()
    assert "no run to continue" in scformer(*command, cells, "-o", tmp_path / "thesis", "--resume", code=2)[1]
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.docx"]


@pytest.mark.slow
@pytest.mark.parametrize("room", [20_000, 100_000])
def test_a_full_disk_is_a_message_and_leaves_nothing(room, model, cells, tmp_path):
    "It is full when the file is copied, or when the embedding gets its place."
    assert 20_000 < cells.stat().st_size < 100_000
    code = f"{LIMIT.format(room)}; from scformer_nb import cli; cli.app()"
    words = ["embed", str(model), str(cells), "-o", str(tmp_path / "out.h5ad")]
    done = warm.run([sys.executable, "-c", code, *words])
    assert (done.returncode, done.stdout) == (2, "") and "no space is left for it" in done.stderr
    assert done.stderr.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


def test_embed_keeps_all_that_is_in_the_file(model, scformer, tmp_path):
    adata = simulate(n_cells=60, n_genes=50)
    adata.layers["more"], adata.raw, adata.uns["mine"] = adata.X.toarray(), adata.copy(), {"a": 1}
    adata.obsm["X_scformer"] = np.ones((60, 2))
    adata.write_h5ad(tmp_path / "x.h5ad", compression="gzip")
    scformer("embed", model, tmp_path / "x.h5ad", "-o", tmp_path / "out.h5ad")
    out = load(tmp_path / "out.h5ad")
    assert (out.X != adata.X).nnz == 0 and (out.layers["more"] == adata.layers["more"]).all() and out.raw.shape == (60, 50)
    assert out.obs.equals(adata.obs) and out.uns["mine"] == {"a": 1} and out.uns["scformer"]["settings"]
    assert out.obsm["X_scformer"].shape == (60, 32) and out.varm["scformer"].shape[0] == 50
    scformer("evaluate", tmp_path / "out.h5ad", "--label-key", "cell_type")


def test_embed_leaves_what_is_not_its_own(model, scformer, tmp_path, monkeypatch):
    monkeypatch.setattr("scformer_nb.embedding.embed_tokens", lambda *args: pytest.fail("it embedded"))
    adata = simulate(n_cells=60, n_genes=50)
    adata.uns["scformer"] = "mine"
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert "uns/scformer of" in scformer("embed", model, tmp_path / "x.h5ad", "-o", tmp_path / "out.h5ad", code=2)[1]


@pytest.mark.slow
def test_two_embed_with_one_output(model, cells, tmp_path):
    words = [sys.executable, "-c", "from scformer_nb import cli; cli.app()", "embed", model, cells, "-o", tmp_path / "out.h5ad"]
    both = [warm.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 2], [0, 0]) and "Traceback" not in "".join(said)
    assert sum("is there already" in text for text in said) == sum(process.returncode == 2 for process in both)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.h5ad", "out.h5ad"]
    assert "X_scformer" in load(tmp_path / "out.h5ad").obsm


def test_planted_links_are_not_followed(model, cells, scformer, tmp_path):
    victim, output = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    output.mkdir()
    for name in (".new.new.h5ad", "new.h5ad.new", ".new.h5ad.new"):
        (output / name).symlink_to(victim)
    scformer("embed", model, cells, "-o", output / "new.h5ad")
    (output / "link.h5ad").symlink_to(tmp_path / "nowhere.h5ad")
    assert "is there already" in scformer("embed", model, cells, "-o", output / "link.h5ad", code=2)[1]
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere.h5ad").exists()


def test_embed_checks_before_it_works(model, cells, scformer, tmp_path, monkeypatch):
    monkeypatch.setattr("scformer_nb.datasets.load", raised(AssertionError("work was done")))
    for out, words in (("out.csv", "must end in .h5ad"), ("cells.h5ad", "is there already"), ("cells.h5ad/x.h5ad", "cannot write to")):
        assert words in scformer("embed", model, cells, "-o", tmp_path / out, code=2)[1]


def test_numbers_that_are_none_are_null(scformer, cells, monkeypatch):
    adata = simulate(n_cells=60, n_genes=50)
    adata.obsm["X_scformer"] = np.ones((60, 3))
    adata.write_h5ad(cells)
    monkeypatch.setattr("scformer_nb.score_card.score_card", lambda *args, **more: {"NMI": 0.5, "ASW": float("nan")})
    out = scformer("evaluate", cells, "--label-key", "cell_type", "--json")[0]
    assert json.loads(out, parse_constant=lambda name: 1 / 0) == {"NMI": 0.5, "ASW": None}


def test_the_label_key_of_two_species_may_come_either_way(scformer, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "_run", lambda page, data, out, values=(), *rest: given.append(values))
    scformer("compare-species", "a.h5ad", "b.h5ad", "--label-key", "kind")
    scformer("compare-species", "a.h5ad", "b.h5ad", "-p", "label_key=kind")
    assert given == [["label_key=kind"], ["label_key=kind"]]


def test_the_paper_preset_and_json(model, scformer, cells, tmp_path):
    scformer("fit", cells, "-o", tmp_path / "run", "--preset", "paper", "--epochs", 1, "--n-hvg", 20, "--batch-key", "batch", "--seed", 7)
    facts = json.loads((tmp_path / "run/model.json").read_text())
    assert (facts["recipe"]["loss"], facts["settings"]["seed"]) == ("ce", 7)
    scformer("embed", model, cells, "-o", tmp_path / "out.h5ad")
    out, said = scformer("evaluate", tmp_path / "out.h5ad", "--label-key", "cell_type", "--json")
    assert set(json.loads(out)) >= {"AvgBIO", "NMI", "kNN_accuracy", "participation_ratio"} and "left out" not in said


def test_any_embedding_has_a_card(scformer, tmp_path):
    adata = simulate(60, 40, 2, 2)
    adata.obsm["X_line"] = np.linspace(0, 1, 60)[:, None] + np.zeros((1, 3))
    adata.X = adata.X.astype(float) * .37   # no counts any more
    adata.write_h5ad(tmp_path / "line.h5ad")
    command = ["evaluate", tmp_path / "line.h5ad", "--basis", "X_line", "--batch-key", "batch"]
    out, said = scformer(*command, "--label-key", "cell_type")
    assert "Overall_no_ASW" in out and "depth_R2" not in out and "X holds no raw counts" in said
    assert "the participation ratio is 1.0" in said and "compare with PCA" in said
    assert "within types: say --label-key" in scformer(*command, "--controls", code=2)[1]
    bounds = json.loads(scformer(*command, "--label-key", "cell_type", "--controls", "--json")[0])
    assert list(bounds) == ["embedding", "floor", "ceiling"] and bounds["floor"]["kNN_accuracy"] < 1
    adata.obs["library_size"] = 1000. + np.arange(60)
    adata.write_h5ad(tmp_path / "line.h5ad")
    whole = scformer(*command, "--label-key", "cell_type")
    assert "depth R2 is" in whole[1]
    with h5py.File(tmp_path / "line.h5ad", "r+") as file:
        del file["X/data"]
        file["X/data"] = np.empty(0)
    assert scformer(*command, "--label-key", "cell_type") == whole, "X is not read where obs has the counts per cell"


def test_the_demo_is_a_page_on_shipped_cells(scformer, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr("scformer_nb.runner.run_page", lambda *args, **more: ran.append(args) or {"metrics": {"PCA": {"AvgBIO": 0.5}}})
    assert "0.500" in scformer("demo", "--out", tmp_path / "demo")[0]
    page, data, out, given, quick = ran[0]
    assert (page.name.partition("_")[2], data, out, quick) == ("exp_clustering.ipynb", ["pbmc68k_reduced"], tmp_path / "demo", False)
    assert given == ["methods=PCA,scFormer"]


def test_the_demo_refuses_the_folder_of_something_else(scformer, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert f"{tmp_path} is not empty and no run of a page made it" in scformer("demo", "-o", tmp_path, code=2)[1]
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


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
