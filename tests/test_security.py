"""What SECURITY.md promises of the code itself: nothing in a file is run, and nothing is downloaded unchecked."""
import ast
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

import scformer_nb as scf
from scformer_nb import datasets, experiment
from scformer_nb.runs import CHECKPOINT, read_checkpoint

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
