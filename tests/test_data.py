"""Data sets, readers, input checks and preprocessing: what the page 00_data cannot hold."""
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scformer_nb import data
from scformer_nb.io import speaking_shell

EXPECTED = json.loads((Path(__file__).parent / "expected_data.json").read_text())
needs_files = pytest.mark.skipif(not os.environ.get("SCFORMER_DATA_DIR"),
                                 reason="needs the published files: set SCFORMER_DATA_DIR to the folder that holds them")


# ---- the registry

@needs_files
@pytest.mark.parametrize("name", EXPECTED)
def test_conversion_gives_the_expected_numbers(name):
    numbers, adata = EXPECTED[name], data.load(name)
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
    before = sorted(os.listdir(data.data_dir()))
    data.load("cortex_200genes")
    assert sorted(os.listdir(data.data_dir())) == before


def test_table_agrees_with_the_expected_numbers():
    table = data.datasets()
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
    monkeypatch.setitem(data._FILES, "norman.zip", (f"{url}/norman.zip", None))
    (www / "norman.zip").write_bytes(b"as published")
    assert data.fetch("norman.zip").read_bytes() == b"as published"
    assert list(json.loads((folder / "known_hashes.json").read_text())) == ["norman.zip"]
    (folder / "norman.zip").write_bytes(b"as pub")  # cut off: fetched again
    assert data.fetch("norman.zip").read_bytes() == b"as published"
    (folder / "norman.zip").unlink()
    (www / "norman.zip").write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match="norman.zip"):
        data.fetch("norman.zip")


def test_a_wrong_download_of_a_pinned_file_is_refused(cache, monkeypatch):
    folder, www, url = cache
    monkeypatch.setitem(data._FILES, "zeisel.rda", (f"{url}/zeisel.rda", data._FILES["zeisel.rda"][1]))
    (www / "zeisel.rda").write_bytes(b"not it")
    with pytest.raises(FileNotFoundError, match="under the name zeisel.rda"):
        data.fetch("zeisel.rda")
    assert not (folder / "zeisel.rda").exists()


def test_what_cannot_be_reached_says_address_folder_and_name(cache, monkeypatch):
    folder, _, _ = cache
    monkeypatch.setitem(data._FILES, "l5_all.loom", ("http://127.0.0.1:9/l5_all.loom", None))
    with pytest.raises(FileNotFoundError) as e:
        data.load("mouse_brain_atlas")
    assert all(part in str(e.value) for part in ("http://127.0.0.1:9/l5_all.loom", str(folder), "name l5_all.loom"))


def test_hash_that_cannot_be_noted_is_a_warning(cache, monkeypatch):
    folder, _, _ = cache
    folder.mkdir()
    (folder / "norman.zip").write_bytes(b"by hand")

    def refuse(*args): raise PermissionError("read-only")
    monkeypatch.setattr(data, "write_text", refuse)
    with pytest.warns(UserWarning, match="stays unchecked"):
        assert data.fetch("norman.zip") == folder / "norman.zip"


def test_wrong_numbers_are_an_error_for_pinned_sets_and_a_warning_for_the_papers(monkeypatch):
    demo = next(s for s in data._SETS if s.name == "pbmc68k_reduced")
    monkeypatch.setattr(data, "_SETS", [demo._replace(cells=701), demo._replace(name="paper", cells=701, counts=None)])
    with pytest.raises(ValueError, match="700 cells, not 701"):
        data.load("pbmc68k_reduced")
    with pytest.warns(UserWarning, match="700 cells, not 701"):
        data.load("paper")


# ---- readers of layouts that are not among the ten sets, on tiny files

def test_cortex_full(tmp_path):
    head = [["", "tissue", "ctx", "hip"], ["", "group #", "1", "2"], ["", "total mRNA mol", "10", "20"], ["", "well", "1", "2"],
            ["", "sex", "1", "1"], ["", "age", "1", "1"], ["", "diameter", "1", "1"], ["", "cell_id", "c1", "c2"],
            ["", "level1class", "glia", "neuron"], ["", "level2class", "a", "b"], []]
    rows = [["Mbp", "1", "7", "0"], ["Gad1", "2", "0", "3"]]
    (tmp_path / "x.txt").write_text("\n".join("\t".join(r) for r in head + rows) + "\n")
    a = data._cortex_full(tmp_path / "x.txt")
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
    a = data._pbmc8k(big, small, tmp_path / "genes.csv", tmp_path / "meta.pickle")
    assert a.obs_names.tolist() == ["AA-1", "CC-1"] and a.X.toarray().tolist() == [[0, 2], [5, 0]]  # GG is shared, TT unlabelled
    assert a.obs["cell_type"].tolist() == ["B cells", "NK cells"] and a.var_names.tolist() == ["B", "B-1"]


def test_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/ran",)
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not opened"):
        data._safe_pickle(tmp_path / "x.pickle")
    assert not (tmp_path / "ran").exists()


def test_scib_and_spleen(tmp_path):
    obs = pd.DataFrame({"celltype": ["a", "b"], "tech": ["x", "y"]}, index=["c1", "c2"])
    AnnData(np.ones((2, 2)) * 0.7, obs=obs, layers={"counts": np.array([[1.0, 0], [0, 2]])}).write_h5ad(tmp_path / "p.h5ad")
    a = data._scib(tmp_path / "p.h5ad", "celltype", "tech")
    assert a.X.toarray().tolist() == [[1, 0], [0, 2]] and a.obs["batch"].tolist() == ["x", "y"]
    for i, genes in enumerate((["A", "B"], ["B", "C"])):
        obs = pd.DataFrame({"tissue": ["Spleen", "Spleen", "Lymph_Node"], "leiden_subclusters": ["1", "16,0", "1"], "cell_types": "B",
                            "batch": f"SLN{i}"}, index=[f"{i}-{c}" for c in "abc"])
        AnnData(sp.csr_matrix(np.full((3, 2), i + 1.0)), obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / f"s{i}.h5ad")
    a = data._spleen17k(tmp_path / "s0.h5ad", tmp_path / "s1.h5ad")
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
        a = data._gears(tmp_path / "x.zip")
        assert a.X.toarray().tolist() == counts.tolist() and a.var_names.tolist() == ["KLF1", "SET"]
        assert a.obs["condition"].tolist() == ["control", "SET", "KLF1+SET"] and a.obs["batch"].tolist() == ["1", "1", "2"]


def test_human_brain_atlas(tmp_path):
    (tmp_path / "m.csv").write_text('sample_name,"A","B"\nn1,0,3\nn2,1,0\nn3,5,5\n')
    (tmp_path / "meta.csv").write_text("sample_name,class_label,subclass_label,cluster_label,external_donor_name_label\n"
                                       "n3,,,,H1\nn2,GABAergic,VIP,Inh 1,H1\nn1,Glutamatergic,IT,Exc 1,H2\n")
    a = data._human_brain_atlas(tmp_path / "m.csv", tmp_path / "meta.csv")
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
    assert (data._unlog(L, total if known_total else None).toarray() == counts).all()


# ---- bad input

def cells(**how):
    a = data.simulate(60, 40, 2, 2)
    for k, v in how.items():
        setattr(a, k, v(a) if callable(v) else v)
    return a


def dense(value):
    X = data.simulate(60, 40, 2, 2).X.toarray()
    X[3, 5] = value
    return X


def batch(values):
    a = cells()
    a.obs["batch"] = values
    return a


def sized(values):
    a = cells()
    a.obs["library_size"] = values
    return a


def typed(**columns):
    a = cells()
    a.var = a.var.assign(**columns)
    return a


def broken_csr(indices=None, indptr=None):
    X = cells().X
    if indices is not None:
        X.indices[7] = indices
    if indptr is not None:
        X.indptr[30] = indptr
    return X


COUNTS = cells().X
ERRORS = {
    "not an AnnData": (lambda: data.check_adata(np.ones((3, 3))), "AnnData is needed, not ndarray"),
    "no cells": (lambda: data.check_adata(cells()[:0].copy()), "empty: 0 cells x 40 genes"),
    "no genes": (lambda: data.check_adata(cells()[:, :0].copy()), "empty: 60 cells x 0 genes"),
    "no X": (lambda: data.check_adata(cells(X=None)), "X is empty: pass layer="),
    "zeros only": (lambda: data.check_adata(cells(X=COUNTS * 0)), "zeros only"),
    "logged": (lambda: data.check_adata(cells(X=COUNTS.log1p())), "as in logged data: pass layer= with the name"),
    "logged, a layer": (lambda: data.check_adata(cells(X=COUNTS.log1p(), layers={"raw": COUNTS})), "pass layer='raw', it looks"),
    "logged, .raw": (lambda: data.check_adata(cells(raw=lambda a: a.copy(), X=COUNTS.log1p())), "pass adata.raw.to_adata"),
    "logged layer": (lambda: data.check_adata(cells(layers={"log": COUNTS.log1p()}), layer="log"), "pass layer=None, it looks like counts"),
    "scaled": (lambda: data.check_adata(cells(X=COUNTS.toarray() - 1)), "are negative, as in scaled data"),
    "one negative": (lambda: data.check_adata(cells(X=dense(-1))), "1 of .* stored values are negative"),
    "NaN": (lambda: data.check_adata(cells(X=dense(np.nan))), "1 of .* stored values are NaN"),
    "infinite": (lambda: data.check_adata(cells(X=dense(np.inf))), "1 of .* stored values are infinite"),
    "text": (lambda: data.check_adata(cells(X=COUNTS.toarray().astype(str))), "are not counts; store numbers"),
    "no such layer": (lambda: data.check_adata(cells(layers={"counts": COUNTS}), layer="count"), "did you mean 'counts'"),
    "no layers": (lambda: data.check_adata(cells(), layer="counts"), "; there are none"),
    "genes twice": (lambda: data.check_adata(cells(var_names=["A"] * 40)), "39 of 40 gene names are not unique; call adata.var_names_make"),
    "batch_key missing": (lambda: data.check_adata(cells(), batch_key="bach"), "did you mean 'batch'"),
    "batch_key NaN": (lambda: data.check_adata(batch([np.nan] * 2 + ["x"] * 58), batch_key="batch"), "missing for 2 of 60 cells"),
    "label_key missing": (lambda: data.check_adata(cells(), label_key="cell_typ"), "did you mean 'cell_type'"),
    "label_key NaN": (lambda: data.check_adata(batch([None] * 2 + ["x"] * 58), label_key="batch"), "missing for 2 of 60 cells"),
    "one cell": (lambda: data.preprocess(cells()[:1].copy()), "1 cells x 40 genes"),
    "one gene": (lambda: data.preprocess(cells()[:, :1].copy()), "60 cells x 1 genes"),
    "n_hvg 0": (lambda: data.preprocess(cells(), n_hvg=0), "n_hvg=0"),
    "min_cells too high": (lambda: data.preprocess(cells(), min_cells=100), "lower min_cells"),
    "library_size too small": (lambda: data.preprocess(cells(obs=lambda a: a.obs.assign(library_size=1.0))), "sum of counts in 60"),
    "unknown name": (lambda: data.load("pancreas"), "did you mean 'pancreas"),
    "unknown file": (lambda: data.fetch("norman.zap"), "did you mean 'norman.zip'"),
    "library_size text": (lambda: data.preprocess(sized(["many"] * 60)),
                          r"obs\['library_size'\] is not a number in 60 .*'many'.*delete it"),
    "library_size NaN": (lambda: data.preprocess(sized([np.nan] + [1e6] * 59)), r"obs\['library_size'\] is not a number in 1 of 60"),
    "library_size zero": (lambda: data.preprocess(sized([0.0] + [1e6] * 59)), r"obs\['library_size'\] is below the sum of counts in 1 "),
    "library_size infinite": (lambda: data.preprocess(sized([np.inf] * 60)), r"obs\['library_size'\] is infinite in 60 of 60"),
    "library_size categories": (lambda: data.preprocess(sized(pd.Categorical(["a"] * 60))), r"obs\['library_size'\] is not a number"),
    "peaks only": (lambda: data.check_adata(typed(feature_types=["Peaks"] * 40)), r"var\['feature_types'\] holds no .* 40 'Peaks'"),
    "antibodies only": (lambda: data.check_adata(typed(modality=["ADT"] * 40)), r"var\['modality'\] holds no 'Gene Expression'"),
    "1e30": (lambda: data.check_adata(cells(X=dense(1e30))), "1 of .* stored values are above 2,147,483,647"),
    "beyond float32": (lambda: data.check_adata(cells(X=dense(1e300).astype(np.float64))), "1 of .* stored values are infinite"),
    "index out of range": (lambda: data.check_adata(cells(X=broken_csr(indices=4000))), "X is a damaged sparse matrix"),
    "index negative": (lambda: data.check_adata(cells(X=broken_csr(indices=-3))), "X is a damaged sparse matrix"),
    "index 2e9": (lambda: data.check_adata(cells(X=broken_csr(indices=2_000_000_000))), "X is a damaged sparse matrix"),
    "indptr falls": (lambda: data.check_adata(cells(X=broken_csr(indptr=0))), "X is a damaged sparse matrix"),
    "damaged layer": (lambda: data.check_adata(cells(layers={"c": broken_csr(indices=4000)}), layer="c"), r"layers\['c'\] is a damaged"),
    "counts per million": (lambda: data.check_adata(cells(X=sp.diags(1e6 / COUNTS.sum(1).A1) @ COUNTS)), "every cell sums to 1,000,000"),
}
WARNINGS = {
    "float counts": (lambda: data.check_adata(cells(X=COUNTS * 1.37)), "counts in X are not integers"),
    "cells twice": (lambda: data.check_adata(cells(obs_names=["A"] * 3 + [f"c{i}" for i in range(57)])), "2 of 60 cell names"),
    "batch_key constant": (lambda: data.check_adata(batch("x"), batch_key="batch"), "treated as no batch"),
    "batch of one cell": (lambda: data.check_adata(batch(["y"] + ["x"] * 59), batch_key="batch"), "1 of 2 batches .* one cell"),
    "cells without HVG": (lambda: data.preprocess(cells(X=sp.diags([0.0] * 3 + [1.0] * 57) @ COUNTS)), "3 of 60 cells express none"),
}


# ---- genes among other features

def test_only_genes_are_kept_and_the_rest_is_counted():
    kinds = ["Gene Expression"] * 25 + ["Peaks"] * 10 + ["Antibody Capture"] * 5
    with pytest.warns(UserWarning, match="15 of 40 features are not genes by var.'feature_types'. .*10 'Peaks', 5 'Antibody Capture'"):
        out = data.check_adata(typed(feature_types=kinds))
    assert out.var_names.tolist() == cells().var_names[:25].tolist() and (out.X != COUNTS[:, :25]).nnz == 0
    assert set(out.var["feature_types"]) == {"Gene Expression"}


@pytest.mark.parametrize("columns", [{"feature_types": "Gene Expression"}, {"feature_types": "GEX"}, {"modality": "rna"},
                                     {"feature_type": ["protein_coding", "lncRNA"] * 20}, {"modality": "plate"}])
def test_columns_that_leave_nothing_out(columns, recwarn):
    assert data.check_adata(typed(**columns)).n_vars == 40
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_antibodies_may_be_no_counts_and_share_the_name_of_a_gene():
    X, names = COUNTS.toarray(), [*cells().var_names[:39], cells().var_names[0]]
    X[:, 39] = -0.5
    a = AnnData(X, obs=cells().obs, var=pd.DataFrame({"feature_types": ["Gene Expression"] * 39 + ["Antibody Capture"]}, index=names))
    with pytest.warns(UserWarning, match="1 of 40 features"):
        assert data.check_adata(a).n_vars == 39


# ---- counts with fractions, logarithms, and both in one

DEEP = data.simulate(300, 300, 2, 2, depth=2, seed=5)


def to_total(X, total=1e4):
    return sp.csr_matrix(sp.diags(total / X.sum(1).A1) @ X)


def fractional(kind):
    rng, X = np.random.default_rng(0), DEEP.X.copy()
    if kind == "EM, small":
        X.data = np.minimum(X.data, 15)
        some = rng.random(X.nnz) < 0.3
        X.data[some] += rng.random(some.sum()).round(2)
    elif kind == "one per cent":
        X.data = np.minimum(X.data, 18)
        X.data[rng.random(X.nnz) < 0.01] += 0.37
    elif kind == "ambient, small":  # every value a little below a whole number
        X.data = np.minimum(X.data, 15) - rng.uniform(0.001, 0.15, X.nnz)
    elif kind == "UMI collisions":
        X.data = -4096 * np.log(1 - np.minimum(X.data, 4000) / 4096)
    elif kind == "one value":
        X.data[10] = 2.5
    return X.astype(np.float32)


@pytest.mark.parametrize("kind", ["EM, small", "one per cent", "ambient, small", "UMI collisions", "one value"])
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_counts_with_fractions_pass_with_a_warning(kind, batch_key):
    a = AnnData(fractional(kind), obs=DEEP.obs, var=DEEP.var)
    with pytest.warns(UserWarning, match="counts in X are not integers; taken as they are"):
        assert (data.check_adata(a, batch_key=batch_key).X != a.X).nnz == 0


def logged(kind):
    X = to_total(DEEP.X)
    if kind == "log2":
        X.data = np.log2(1 + X.data)
    elif kind == "log10":
        X.data = np.log10(1 + X.data)
    elif kind == "log2 of counts":  # three quarters of its values are whole
        X = DEEP.X.copy()
        X.data = np.log2(1 + X.data)
    elif kind == "log of TPM":  # divided by gene length first
        X = to_total(DEEP.X @ sp.diags(1 / np.random.default_rng(0).lognormal(7, 0.7, DEEP.n_vars)), 1e6).log1p()
    elif kind == "log1p":
        X = X.log1p()
    return X.tocsr().astype(np.float32)


LOGS = ["log1p", "log2", "log10", "log2 of counts", "log of TPM"]


@pytest.mark.parametrize("kind", LOGS)
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_logarithms_are_refused(kind, batch_key):
    with pytest.raises(ValueError, match="as in logged data"):
        data.check_adata(AnnData(logged(kind), obs=DEEP.obs, var=DEEP.var), batch_key=batch_key)


@pytest.mark.parametrize("kind", [*LOGS, "1e4"])
@pytest.mark.parametrize("batch_key", [None, "study"])
def test_a_logged_study_among_counts_is_named(kind, batch_key):
    first = np.arange(300) < 225
    X = sp.vstack([DEEP.X[first], logged(kind)[~first]]).tocsr()
    a = AnnData(X, obs=DEEP.obs.assign(study=np.where(first, "kept", "treated"), plate=np.arange(300) % 3), var=DEEP.var)
    word = "normalised" if kind == "1e4" else "logged"
    with pytest.raises(ValueError, match=rf"of 300 random cells \((study|batch) 'treated'\) hold values as in {word} data: pass layer="):
        data.check_adata(a, batch_key=batch_key)


def test_logged_cells_that_no_column_names_are_counted():
    odd = np.arange(300) % 10 == 0
    X = sp.csr_matrix(np.where(odd[:, None], logged("log1p").toarray(), DEEP.X.toarray()))
    with pytest.raises(ValueError, match="30 of 300 random cells hold values as in logged data"):
        data.check_adata(AnnData(X, obs=DEEP.obs, var=DEEP.var))


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_sampled_cells_are_random_and_hold_something(form, tmp_path):
    X = DEEP.X.toarray()
    X[:150] = 0
    AnnData(form(X), obs=DEEP.obs, layers={"log": form(np.log1p(X))}).write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    whole = data.load(tmp_path / "x.h5ad")
    for layer in (None, "log"):
        some = data.sample_cells(backed, 40, seed=1, layer=layer)
        assert some.shape == (40, 300) and not some.isbacked and (np.asarray(some.X.sum(1)).ravel() > 0).all()
        assert some.obs_names.equals(data.sample_cells(whole, 40, seed=1, layer=layer).obs_names)
    assert not some.obs_names.equals(data.sample_cells(backed, 40, seed=2).obs_names)
    assert data.sample_cells(backed, 999).n_obs == 150
    backed.file.close()


# ---- batches that look like numbers

@pytest.mark.parametrize("values", [np.arange(60) % 2, (np.arange(60) % 2).astype(float), pd.Categorical((np.arange(60) % 2).astype(float)),
                                    (np.arange(60) % 2).astype(str)])
def test_one_and_one_point_zero_are_one_batch(values):
    assert data.check_adata(batch(values), batch_key="batch").obs["batch"].cat.categories.tolist() == ["0", "1"]


def test_levels_that_no_cell_has_are_dropped():
    values = pd.Categorical(["a", "b"] * 30, categories=["a", "b", "never"])
    assert data.check_adata(batch(values), batch_key="batch").obs["batch"].cat.categories.tolist() == ["a", "b"]


def test_names_seen_stand_in_the_messages():
    with pytest.raises(ValueError, match="missing for 1 of 60 cells .others have '1', '2'"):
        data.check_adata(batch([np.nan] + [1, 2] * 29 + [1]), batch_key="batch")
    with pytest.warns(UserWarning, match="1 of 2 batches in 'batch' have one cell only .'7'"):
        data.check_adata(batch([7.0] + [1.0] * 59), batch_key="batch")


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_a_clear_error(case):
    run, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("case", WARNINGS)
@pytest.mark.filterwarnings("ignore::anndata.ImplicitModificationWarning")
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_odd_input_is_a_counted_warning(case):
    run, message = WARNINGS[case]
    with pytest.warns(UserWarning, match=message):
        run()


@pytest.mark.parametrize("form", [COUNTS.toarray(), COUNTS.tocsc(), COUNTS.astype(np.int64), sp.csr_array(COUNTS), COUNTS.astype(float)],
                         ids=["dense", "CSC", "int64", "csr_array", "float64"])
def test_every_form_of_counts_gives_the_same(form, tmp_path, recwarn):
    given = cells(X=form)
    given.write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    for a in (given, backed, given[:, :]):
        checked = data.check_adata(a, batch_key="batch", label_key="cell_type")
        assert sp.isspmatrix_csr(checked.X) and checked.X.dtype == np.float32 and checked.X.has_sorted_indices
        assert (checked.X != COUNTS).nnz == 0 and checked.obs.equals(given.obs)
    backed.file.close()
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_explicit_zeros_and_unsorted_indices_are_put_right():
    X = sp.csr_matrix((np.array([3.0, 0, 1]), np.array([2, 0, 1]), np.array([0, 3, 3])), shape=(2, 3))
    checked = data.check_adata(AnnData(X)).X
    assert checked.indices.tolist() == [1, 2] and checked.data.tolist() == [1, 3]


def test_check_never_modifies_its_input():
    a = cells(layers={"log": COUNTS.log1p()})
    a.obs["batch"] = np.arange(60) % 3
    before = a.copy()
    out = data.check_adata(a, batch_key="batch")
    out.X.data[:], out.obs["new"], out.var["new"] = 7, 1, 1
    assert (a.X != before.X).nnz == 0 and a.obs.equals(before.obs) and a.var.equals(before.var)
    assert out.obs["batch"].tolist() == [str(i % 3) for i in range(60)]


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
        data.load(tmp_path / what)
    assert data.load(tmp_path / "whole.h5ad").uns["dataset"] == "simulated"


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
        data.preprocess(data.load(rewrite(tmp_path / "x.h5ad", change)))


@pytest.mark.parametrize("part", ["layers", "raw"])
def test_layers_and_raw_are_checked_too(tmp_path, part):
    a = cells(layers={"c": COUNTS}, raw=lambda a: a.copy())
    a.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as f:
        f["layers/c/indices" if part == "layers" else "raw/X/indices"][5] = 4000
    with pytest.raises(ValueError, match=f"{part}.* is a damaged sparse matrix"):
        data.load(tmp_path / "x.h5ad")


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5ad")
    (tmp_path / "zero.h5ad").symlink_to("/dev/zero")
    (tmp_path / "gone.h5ad").symlink_to(tmp_path / "nowhere.h5ad")
    (tmp_path / "folder.h5ad").mkdir()
    for name, kind in (("pipe", "a pipe or a device"), ("zero", "a pipe or a device"), ("folder", "is a folder")):
        with pytest.raises(ValueError, match=kind):
            data.load(tmp_path / f"{name}.h5ad")
    with pytest.raises(FileNotFoundError, match="leads to nothing"):
        data.load(tmp_path / "gone.h5ad")


def test_suffix_in_capitals_and_odd_names_are_read(tmp_path):
    for name in ("X.H5AD", "a <b>&\"' ü 日本\n.h5ad"):
        cells().write_h5ad(tmp_path / "x.h5ad")
        os.rename(tmp_path / "x.h5ad", tmp_path / name)
        assert data.load(tmp_path / name).shape == (60, 40)


def test_way_out_is_worded_for_the_shell():
    a = cells(X=COUNTS.log1p(), layers={"raw": COUNTS})
    with speaking_shell(), pytest.raises(ValueError, match="pass --layer raw, it looks like counts"):
        data.check_adata(a)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"norman.zip": {}}', "null"])
def test_a_damaged_note_of_hashes_is_written_anew(cache, text, monkeypatch):
    folder, _, _ = cache
    folder.mkdir()
    (folder / "norman.zip").write_bytes(b"by hand")
    (folder / "known_hashes.json").write_bytes(text.encode("latin1"))
    with pytest.warns(UserWarning, match="known_hashes.json is damaged"):
        assert data.fetch("norman.zip") == folder / "norman.zip"
    assert len(json.loads((folder / "known_hashes.json").read_text())["norman.zip"]) == 64
    assert sorted(os.listdir(folder)) == ["known_hashes.json", "norman.zip"]


def test_missing_file_and_missing_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.load(tmp_path / "no.h5ad")
    with pytest.raises(ValueError, match="neither a data set nor a file; did you mean 'pbmc3k'"):
        data.load("pbmc3kk")


# ---- preprocessing

@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_preprocess_selects_exactly_and_keeps_counts(batch_key):
    a = data.simulate(400, 300, 3, 2)
    before = a.copy()
    out = data.preprocess(a, n_hvg=77, batch_key=batch_key)
    assert out.n_vars == 77 and out.uns["hvg"] == {"flavor": "seurat_v3", "n_hvg": 77}
    assert (out.layers["counts"] != a[:, out.var_names].X).nnz == 0 and (a.X != before.X).nnz == 0
    total = np.asarray(a.X.sum(1)).ravel()
    assert abs(np.expm1(out.X).multiply(total[:, None] / 1e4) - out.layers["counts"]).max() < 1e-2
    assert sp.isspmatrix_csr(out.X) and sp.isspmatrix_csr(out.layers["counts"]) and out.X.dtype == np.float32
    assert out.var_names.tolist() == [g for g in a.var_names if g in set(out.var_names)]  # order kept


def test_fallback_is_recorded_and_leaves_log_values():
    out = data.preprocess(data.simulate(300, 30, 2, 2), n_hvg=10, batch_key="batch")
    assert out.uns["hvg"] == {"flavor": "seurat", "n_hvg": 10}
    total_all = data.simulate(300, 30, 2, 2).X.sum(1).A1
    assert abs(np.expm1(out.X).multiply(total_all[:, None] / 1e4) - out.layers["counts"]).max() < 1e-2


def test_selection_within_batches_ignores_batch_effects():
    a = data.simulate(2000, 300, 3, 2, batch_sd=0)
    b = (a.obs["batch"] == "batch_1").to_numpy()
    plain = np.flatnonzero(a.var["marker_of"] == "none")[:20]
    X = a.X.tolil()
    for j in plain:  # twenty genes that differ between the batches and in nothing else
        X[np.flatnonzero(b), j] = X[np.flatnonzero(b), j].toarray() * 10
    a.X = X.tocsr()
    share = [a.var_names[plain].isin(data.preprocess(a, n_hvg=60, batch_key=k).var_names).mean() for k in (None, "batch")]
    assert share[0] > 0.7 and share[1] < share[0] / 2, share


def test_genes_too_few_for_loess_do_not_kill_the_process():
    code = ("from scformer_nb import data; import warnings; warnings.simplefilter('ignore')\n"
            "for n, g in ((300, 3), (2, 200), (60, 20)):\n"
            "    print(data.preprocess(data.simulate(n, g, 1, 1), n_hvg=2, min_cells=1).uns['hvg'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("'seurat'") == 3, done.stderr


@pytest.mark.filterwarnings("ignore:.* of the .* genes kept")
def test_nothing_densifies():
    X = sp.random(10_000, 2_000, 0.01, "csr", np.float32, 0, lambda n: np.random.default_rng(0).poisson(2, n) + 1)
    adata = AnnData(X, obs=pd.DataFrame({"batch": np.arange(10_000) % 2}, index=[str(i) for i in range(10_000)]))
    data.preprocess(adata[:5000].copy(), n_hvg=100, batch_key="batch")  # imports and compiles
    tracemalloc.start()
    data.preprocess(adata, n_hvg=1000, batch_key="batch")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000 * 2_000 * 4 / 4, f"{peak / 1e6:.0f} MB, the dense matrix would take 80 MB"


def test_import_is_light():
    code = "import sys, scformer_nb.data; print([m for m in ('scanpy', 'torch', 'rdata', 'pooch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- simulator

def test_simulator_is_seeded_and_finds_back_its_truth():
    a, again, other = data.simulate(3000, 200, 3, 2, seed=4), data.simulate(3000, 200, 3, 2, seed=4), data.simulate(3000, 200, 3, 2, seed=5)
    assert (a.X != again.X).nnz == 0 and (a.X != other.X).nnz > 0
    truth = a.uns["truth"]
    share = truth["rate"][a.obs["cell_type"].cat.codes] * truth["batch_factor"][a.obs["batch"].cat.codes]
    mean = truth["library_size"][:, None] * share / share.sum(1, keepdims=True)
    assert np.corrcoef(mean.mean(0), a.X.mean(0).A1)[0, 1] > 0.99
    for j in np.flatnonzero(a.var["marker_of"] != "none"):
        by_type = pd.Series(a.X[:, j].toarray().ravel()).groupby(a.obs["cell_type"].to_numpy()).mean()
        assert by_type.idxmax() == a.var["marker_of"].iloc[j]
