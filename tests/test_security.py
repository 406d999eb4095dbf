"""What SECURITY.md promises of the code itself: nothing in a file is run, and nothing is downloaded unchecked."""
import ast
import http.server
import io
import pickle
import re
import shlex
import shutil
import tarfile
import threading
import tomllib
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

import scformer_nb as scf
from scformer_nb import cli, datasets, experiment, hub, readers, runner
from scformer_nb.runs import CHECKPOINT, read_checkpoint
from scformer_nb.simulate import simulate

ROOT = Path(__file__).parent.parent
MODULES = sorted(Path(scf.__file__).parent.glob("*.py"))
REFUSED = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pd.read_pickle",
    "yaml.load", "joblib.load", "marshal.loads", "tempfile.mktemp", "torch.hub.load"}


def calls(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def options(call):
    return {word.arg: getattr(word.value, "value", word.value) for word in call.keywords}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_can_run_what_it_reads(path):
    for call in calls(path):
        name, words = ast.unparse(call.func), options(call)
        assert name not in REFUSED, f"{path.name}, line {call.lineno}: {name}"
        assert words.get("shell") is not True and words.get("allow_pickle") is not True
        if name == "torch.load":
            assert words.get("weights_only") is True
        if name.endswith("extractall"):
            assert words.get("filter") == "data"


def test_the_scan_finds_what_it_looks_for(tmp_path):
    for text in ("eval('1')", "import torch\ntorch.load('x')", "tar.extractall('here')", "np.load('x', allow_pickle=True)"):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(AssertionError):
            test_no_module_can_run_what_it_reads(tmp_path / "bad.py")


def test_downloads_are_https_and_known_by_their_sha256():
    unknown = []
    for file, (url, sha) in datasets.FILES.items():
        assert url.startswith("https://") or "://" not in url, file
        assert sha is None or re.fullmatch("[0-9a-f]{64}", sha), file
        unknown += [file] * (sha is None)
    told = re.findall(r"^  - `(.+)`$", (ROOT / "SECURITY.md").read_text(), re.M)
    assert sorted(told) == sorted(unknown), "SECURITY.md lists the files whose publishers state no sha256"


class Planted:
    "A pickle that writes a file when it is read."
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


def planted(tmp_path):
    return pickle.dumps(Planted(tmp_path / "written")), tmp_path / "written"


def test_the_planted_pickle_would_run(tmp_path):
    data, written = planted(tmp_path)
    pickle.loads(data)  # noqa: S301
    assert written.exists()


def test_a_pickle_as_checkpoint_is_not_run(tmp_path):
    data, written = planted(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(data)
    with pytest.raises(ValueError, match="no checkpoint of this library"):
        read_checkpoint(tmp_path, {})
    assert not written.exists()


def test_a_pickle_as_kept_arrays_is_not_run(tmp_path):
    np.savez(tmp_path / "toy_mine.npz", x=np.array([Planted(tmp_path / "written")], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        assert experiment.Results("toy", "mine", str(tmp_path)).arrays
    assert not (tmp_path / "written").exists()


def test_every_promise_is_shown_by_a_test_that_exists():
    shown = re.findall(r"`tests/(\w+)\.py::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(shown) > 10
    for file, name in shown:
        assert re.search(rf"^def {name}\(", (ROOT / f"tests/{file}.py").read_text(), re.M), f"{file}::{name}"


# ---- rules that hold for the whole package

def test_no_rule_on_security_is_off_for_the_package():
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in rules["select"] and not [rule for rule in rules.get("ignore", []) if rule.startswith(("S", "ALL"))]
    off = [rule for path, off in rules["per-file-ignores"].items() if path.startswith(("scformer_nb", "tools")) for rule in off]
    assert not [rule for rule in off if rule.startswith(("S", "ALL"))]
    for path in (*MODULES, *ROOT.glob("tools/*.py")):
        for said in re.findall(r"# noqa: S\d+(.*)", path.read_text()):
            assert len(said.split()) > 1, f"{path.name}: an exception without a reason"


# ---- downloads

@pytest.fixture
def web(tmp_path, monkeypatch):
    "A server that leads on: its address, and what it was asked for."
    asked = []

    class Leads(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(302 if self.path == "/a" else 200)
            self.send_header("Location", "/b")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Leads)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SCFORMER_DATA_DIR", str(tmp_path / "cache"))
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_download_is_not_led_on_to_http(web, tmp_path, monkeypatch):
    url, asked = web
    monkeypatch.setitem(datasets.FILES, "norman.zip", (f"{url}/a", None))
    with pytest.raises(FileNotFoundError, match="norman.zip is not there and could not be downloaded"):
        datasets.fetch("norman.zip")
    assert asked == ["/a"] and not (tmp_path / "cache/norman.zip").exists()


def test_names_of_registered_files_are_no_paths():
    assert all(Path(name).name == name and not name.startswith(".") for name in datasets.FILES)


# ---- archives

def zipped(path, name, data):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(name, data)
    return path


def tarred(path, name, data):
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return path


def test_members_of_archives_stay_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "in" / "here"))
    (tmp_path / "in/here").mkdir(parents=True)
    with pytest.raises(tarfile.FilterError):
        readers.read_10x_tar(tarred(tmp_path / "a.tar.gz", "../../matrix.mtx", b"evil"))
    with pytest.raises(Exception, match="(?i)h5|signature"):
        readers.read_published_h5ad(zipped(tmp_path / "a.zip", "../../evil.h5ad", b"evil"), member="evil.h5ad")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar.gz", "a.zip", "here", "in"]


def test_archives_that_unpack_without_end_are_not_opened(tmp_path):
    zeros = bytes(120_000_000)
    with pytest.raises(ValueError, match="would unpack to 120,000,000: not opened"):
        readers.read_published_h5ad(zipped(tmp_path / "a.zip", "a.h5ad", zeros), member="a.h5ad")
    with pytest.raises(ValueError, match="would unpack to 120,000,000: not opened"):
        readers.read_10x_tar(tarred(tmp_path / "a.tar.gz", "matrix.mtx", zeros))


# ---- files of cells that point elsewhere, or claim what they do not hold

def virtual(file, other):
    layout = h5py.VirtualLayout((60, 40), "f4")
    layout[:] = h5py.VirtualSource(str(other), "X", (60, 40))
    file.create_virtual_dataset("X", layout)


ELSEWHERE = {
    "a link": lambda file, other: file.__setitem__("X", h5py.ExternalLink(str(other), "X")),
    "a link in uns": lambda file, other: file.__setitem__("uns/private", h5py.ExternalLink(str(other), "X")),
    "bytes": lambda file, other: file.create_dataset("X", (60, 40), "f4", external=[(str(other), 0, h5py.h5f.UNLIMITED)]),
    "parts": virtual,
}


@pytest.mark.parametrize("case", ELSEWHERE)
@pytest.mark.parametrize("read", [datasets.load, lambda path: datasets.open_cells(path).__enter__()], ids=["whole", "in parts"])
def test_cells_that_lie_in_another_file_are_not_read(case, read, tmp_path):
    simulate(60, 40, 2, 2).write_h5ad(tmp_path / "sent.h5ad")
    with h5py.File(tmp_path / "private.h5", "w") as file:
        file["X"] = np.ones((60, 40), "f4")
    with h5py.File(tmp_path / "sent.h5ad", "r+") as file:
        if case != "a link in uns":
            del file["X"]
        ELSEWHERE[case](file, tmp_path / "private.h5")
    with pytest.raises(ValueError, match="is read from another file, .*private.h5"):
        read(tmp_path / "sent.h5ad")


def test_a_chunk_larger_than_memory_is_not_unpacked(tmp_path):
    simulate(60, 40, 2, 2).write_h5ad(tmp_path / "sent.h5ad")
    with h5py.File(tmp_path / "sent.h5ad", "r+") as file:
        file.create_dataset("obsm/X_pca", (60, 2), "f8", chunks=(2**20, 2**8 - 1), maxshape=(None, None), compression="gzip")
    with pytest.raises(ValueError, match="obsm/X_pca claims .1048576, 255. values, but holds 0 bytes"):
        datasets.load(tmp_path / "sent.h5ad")


# ---- models

def test_facts_without_end_are_not_read(tmp_path):
    shutil.copytree(ROOT / "tests/old/bottleneck", tmp_path / "model")
    with open(tmp_path / "model/model.json", "r+b") as file:
        file.truncate(2**42)
    with pytest.raises(ValueError, match="model.json has more than 67,108,864 bytes"):
        scf.ScFormer.load(tmp_path / "model")


# ---- names that are code elsewhere

HOSTILE = ["'; import os; os.abort() #", '"""\nraise SystemExit\n"""', "{{ 7 * 7 }}", "$(touch x) `touch x`; touch x", "a\\", "\u2028x\x00"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_parameter_arrives_in_the_page_as_text(text):
    page = runner.find_page("clustering")
    nb = parameterize_notebook(load_notebook_node(str(page)), {"label_key": text, "methods": [text]})
    cell = next(c for c in nb.cells if "injected-parameters" in c.metadata.get("tags", []))
    tree = ast.parse(cell.source)
    assert {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body} == {"label_key": text, "methods": [text]}


@pytest.mark.parametrize("text", HOSTILE)
def test_the_command_of_a_report_is_one_command(text):
    line = runner._command_line("clustering", [text], [f"label_key={text}"], True, Path("out"))
    assert shlex.split(line) == ["scformer", "run", "clustering", text, "-p", f"label_key={text}", "--quick", "-o", "out"]


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\tx"])
def test_a_name_that_is_a_formula_goes_into_no_csv(name):
    with pytest.raises(ValueError, match="is a formula to a spreadsheet"):
        cli._check_cells(["CBL", name])


def test_the_name_of_a_data_set_adds_no_line_to_a_card():
    facts = {"settings": {"dataset": "x\n---\nlicense: mit\n# Title", "batches": [], "n_cells": 1, "n_bins": 2, "hvg": {"flavor": "-"}},
        "genes": ["A"]}
    assert "\n" not in hub.describe_data(facts)
