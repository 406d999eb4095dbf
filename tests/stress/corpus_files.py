"""148 broken and odd cell files, each a good one with one thing done to it: name, what must come of it, what is done.

fail: every command refuses it. counts: whatever needs counts does. model: a fitted model does. scores: `evaluate` does.
same: every command gives what it gives for the good file. any: refused or accepted, but never by half.
"""
import functools
import os
import random
import shutil

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.io import mmwrite

from scformer_nb.simulate import simulate

N, GENES = 80, 60


def good_cells():
    "Cells that every command can read: counts, types, batches, perturbations, Ensembl ids, an embedding."
    adata = simulate(N, GENES, 3, 2, 0)
    del adata.uns["truth"]
    names = ["control", "gene_1", "gene_2", "gene_3", "gene_1+gene_2"]
    adata.obs["condition"] = pd.Categorical([names[i % 5] for i in range(N)])
    adata.var["gene_ids"] = [f"ENSG{i:011}" for i in range(GENES)]
    adata.obsm["X_scformer"] = np.random.default_rng(0).normal(size=(N, 8)).astype("f4")
    return adata


# ---- ways to change a file: each gives a function of the good file and a folder, which gives the path of the new one

def on_bytes(change, suffix=".h5ad"):
    def make(good, folder):
        path = folder / f"case{suffix}"
        path.write_bytes(change(good.read_bytes()))
        return path
    return make


def on_path(change, name="case.h5ad"):
    def make(good, folder):
        path = folder / name
        change(path)
        return path
    return make


def on_hdf5(change):
    def make(good, folder):
        path = shutil.copy(good, folder / "case.h5ad")
        with h5py.File(path, "r+") as file:
            change(file)
        return path
    return make


def on_cells(change, write=anndata.AnnData.write_h5ad, name="case.h5ad"):
    def make(good, folder):
        adata = anndata.read_h5ad(good)
        changed = change(adata)
        adata = adata if changed is None else changed
        write(adata, folder / name)
        return folder / name
    return make


def put(key, change):
    "A data set of the HDF5 with other values and the old attributes."
    def to(file):
        values, attributes = change(file[key][:]), dict(file[key].attrs)
        del file[key]
        file[key] = values
        file[key].attrs.update(attributes)
    return on_hdf5(to)


def drop(key):
    return on_hdf5(lambda file: file.__delitem__(key))


def at(places, value):
    def change(values):
        values = values.copy()
        values[places] = value
        return values
    return change


def shape(*size):
    return on_hdf5(lambda file: file["X"].attrs.__setitem__("shape", np.array(size, np.int64)))


def replaced(value):
    "X is something else."
    def to(file):
        del file["X"]
        file["X"] = value
    return on_hdf5(to)


def encoded(make):
    "X is another array: a function of the file makes it, anndata's marks are added."
    def to(file):
        del file["X"]
        kind = "string-array" if make(file).dtype.kind == "O" else "array"
        file["X"].attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})
    return on_hdf5(to)


def X(change):
    return on_cells(lambda a: setattr(a, "X", change(a.X)))


def genes(change):
    return on_cells(lambda a: setattr(a, "var_names", change(list(a.var_names))))


def obs(column, value):
    return on_cells(lambda a: a.obs.__setitem__(column, value))


def uns(value):
    return on_cells(lambda a: a.uns.__setitem__("dataset", value))


def obsm(value):
    return on_cells(lambda a: a.obsm.__setitem__("X_scformer", value))


# ---- what is done

def cut(share):
    return on_bytes(lambda data: data[:int(share * len(data))])


def flip(seed, n, first=0, last=None):
    "Some bits of the file, between two bytes, are turned over."
    def change(data):
        rng, data = random.Random(seed), bytearray(data)
        for _ in range(n):
            data[rng.randrange(first, last or len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    return on_bytes(change)


def write_16_GB(path):
    "A file of a few MB that says it holds 200,000 cells by 20,000 genes."
    adata = anndata.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(200_000)]),
                            var=pd.DataFrame(index=[f"gene_{i}" for i in range(20_000)]))
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file.pop("X", None)
        X = file.create_dataset("X", (200_000, 20_000), "f4", chunks=(1000, 1000), fillvalue=1)
        X.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def reverse_rows(file):
    "Indices and values of each row in the reverse order."
    X = file["X"]
    ends, indices, data = (X[name][:] for name in ("indptr", "indices", "data"))
    for i, j in zip(ends[:-1], ends[1:], strict=True):
        X["indices"][i:j], X["data"][i:j] = indices[i:j][::-1], data[i:j][::-1]


def split_values(file):
    "Every count as two stored values of one place, which add up to it."
    X = file["X"]
    new = {"indptr": X["indptr"][:] * 2, "indices": np.repeat(X["indices"][:], 2),
           "data": np.stack([X["data"][:] - 1, np.ones(len(X["data"]), "f4")], 1).ravel()}
    for name, values in new.items():
        del X[name]
        X[name] = values


def swapped(ends):
    ends[30], ends[31] = ends[31] + 100, ends[30]
    return ends


def counts_in_layer(adata):
    adata.layers["counts"], adata.X = adata.X.copy(), None


def counts_in_raw(adata):
    adata.raw = adata.copy()
    adata.X = adata.X.log1p()


def normalised(X):
    return sp.csr_matrix(X.toarray() / X.toarray().sum(1, keepdims=True) * 1e4)


def no_column(adata):
    adata.obsm["X_scformer"] = np.zeros((N, 0))


def write_loom(adata, path):
    with h5py.File(path, "w") as file:
        file["matrix"] = adata.X.toarray().T
        file["row_attrs/Gene"], file["col_attrs/CellID"] = adata.var_names.to_numpy("S"), adata.obs_names.to_numpy("S")


def write_10x(adata, path):
    with h5py.File(path, "w") as file:
        for name in ("data", "indices", "indptr"):
            file[f"matrix/{name}"] = getattr(adata.X, name)
        file["matrix/shape"], file["matrix/barcodes"] = [GENES, N], adata.obs_names.to_numpy("S")
        file["matrix/features/name"] = adata.var_names.to_numpy("S")


def write_mtx(adata, path):
    path.mkdir()
    mmwrite(path / "matrix.mtx", adata.X.T)


def write_csv(adata, path):
    adata.to_df().to_csv(path)


KEEP = lambda adata: None  # noqa: E731
NUMBERS = np.random.default_rng(1).random((N, 8))
CODES, HALF = "obs/cell_type/codes", np.arange(N) % 2 == 0

FILES = {
    # cut off, flipped, nothing, no file
    **{f"cut at {5 + 10 * k}%": ("fail", cut(.05 + k / 10)) for k in range(10)},
    **{f"30 bits flipped, {k}": ("any", flip(k, 30)) for k in range(20)},
    **{f"10 bits of the head flipped, {k}": ("any", flip(100 + k, 10, 96, 8192)) for k in range(5)},
    "zero bytes": ("fail", on_bytes(lambda data: b"")),
    "text": ("fail", on_bytes(lambda data: b"hello\nworld\n")),
    "a folder": ("fail", on_path(os.mkdir)),
    "a link to nothing": ("fail", on_path(functools.partial(os.symlink, "/nowhere/x.h5ad"))),
    "a pipe": ("fail", on_path(os.mkfifo)),
    "a device": ("fail", on_path(functools.partial(os.symlink, "/dev/zero"))),
    # sizes that are not so
    "10^12 columns": ("fail", shape(N, 10**12)),
    "10^9 rows": ("fail", shape(10**9, GENES)),
    "minus one row": ("fail", shape(-1, GENES)),
    "half of the shape": ("fail", shape(N // 2, GENES // 2)),
    "dense, 4 TB, no chunk": ("fail", encoded(lambda f: f.create_dataset("X", (10**6, 10**6), "f4", chunks=(1000, 1000)))),
    "dense, 16 GB of ones": ("fail", on_path(write_16_GB)),
    # a sparse matrix that is none
    "indptr short": ("fail", put("X/indptr", lambda v: v[:-5])),
    "indptr beyond": ("fail", put("X/indptr", lambda v: at(-1, v[-1] + 50)(v))),
    "indptr falls": ("fail", put("X/indptr", swapped)),
    "indptr negative": ("fail", put("X/indptr", at(0, -5))),
    "indices far out": ("fail", put("X/indices", at([3, 77, 500], 5000))),
    "indices just out": ("fail", put("X/indices", at([3, 77, 500], GENES))),
    "indices negative": ("fail", put("X/indices", at([3, 77, 500], -3))),
    "indices of 2e9": ("fail", put("X/indices", at([3, 77, 500], 2_000_000_000))),
    "indices unsorted": ("same", on_hdf5(reverse_rows)),
    "indices twice": ("same", on_hdf5(split_values)),
    "data short": ("fail", put("X/data", lambda v: v[:-7])),
    "indices as floats": ("any", put("X/indices", lambda v: v.astype("f4"))),
    "data of text": ("fail", put("X/data", lambda v: np.array([b"a"] * len(v)))),
    # parts that are missing or something else
    "no X": ("counts", drop("X")),
    "no obs": ("fail", drop("obs")),
    "no var": ("fail", drop("var")),
    "X of text": ("counts", encoded(lambda f: f.create_dataset("X", data=np.full((N, GENES), "a", object), dtype=h5py.string_dtype()))),
    "X is a number": ("fail", replaced(5)),
    "obs short": ("fail", put("obs/_index", lambda v: v[:N - 10])),
    "var short": ("fail", put("var/_index", lambda v: v[:GENES - 10])),
    "an external link": ("fail", replaced(h5py.ExternalLink("/etc/passwd", "/X"))),
    "a link to itself": ("fail", replaced(h5py.SoftLink("/X"))),
    "obsm of fewer cells": ("any evaluate:fail", put("obsm/X_scformer", lambda v: v[:N - 10])),
    # values
    "NaN": ("counts", put("X/data", at([10, 11], np.nan))),
    "infinite": ("counts", put("X/data", at([10, 11], np.inf))),
    "negative": ("counts", put("X/data", at([10, 11], -1))),
    "1e30": ("any", put("X/data", at([10, 11], 1e30))),
    "2.5": ("any", put("X/data", at([10, 11], 2.5))),
    "the largest float": ("any", put("X/data", at([10, 11], 3.4e38))),
    "codes beyond": ("fail", put(CODES, at(slice(5), 100))),
    "codes of -5": ("fail", put(CODES, at(slice(5), -5))),
    "codes of -1": ("any", put(CODES, at(slice(5), -1))),
    # other types of numbers
    "dense": ("same", X(lambda X: X.toarray())),
    "by columns": ("same", X(lambda X: X.tocsc())),
    **{kind: ("same", X(lambda X, kind=kind: X.astype(kind))) for kind in ("int64", "uint16", "float64")},
    "float16": ("any", X(lambda X: X.toarray().astype("f2"))),
    "bool": ("any", X(lambda X: X > 0)),
    "complex": ("counts", X(lambda X: X.toarray().astype(complex))),
    "counts above 2^33": ("any", X(lambda X: X.astype("i8") * 2**33)),
    # sizes
    "all zero": ("counts", X(lambda X: X * 0)),
    "one cell": ("any fit:fail perturb:fail evaluate:fail", on_cells(lambda a: a[:1].copy())),
    "one gene": ("counts", on_cells(lambda a: a[:, :1].copy())),
    "no cells": ("fail genes:any", on_cells(lambda a: a[:0].copy())),
    "no genes": ("counts", on_cells(lambda a: a[:, :0].copy())),
    "two cells": ("any", on_cells(lambda a: a[:2].copy())),
    "six cells": ("any", on_cells(lambda a: a[:6].copy())),
    "logged": ("counts", X(lambda X: X.log1p())),
    "normalised": ("counts", X(normalised)),
    # names of genes and cells
    "genes are numbers": ("model", genes(lambda v: list(map(str, range(len(v)))))),
    "a gene twice": ("counts", genes(lambda v: v[:-1] + v[:1])),
    "a gene without a name": ("any", genes(lambda v: ["", *v[1:]])),
    "no gene has a name": ("counts", genes(lambda v: [""] * len(v))),
    "genes end in a space": ("any", genes(lambda v: [g + " " for g in v])),
    "genes in Greek": ("any", genes(lambda v: ["γ" + g for g in v])),
    "genes of 100,000 letters": ("any", genes(lambda v: ["A" * 100_000 + g for g in v])),
    "genes in capitals": ("any", genes(lambda v: [g.upper() for g in v])),
    "genes of two lines": ("any", genes(lambda v: [g.replace("gene", "ge\u2028ne") for g in v])),
    "genes as bytes": ("same", put("var/_index", lambda v: v.astype("S"))),
    "genes as HDF5's numbers": ("model", on_hdf5(lambda f: (put_numbers(f)))),
    "genes in no encoding": ("fail", put("var/_index", lambda v: np.array([b"\xff\xfe" + g for g in v.astype("S")]))),
    "cells of one name": ("any", on_cells(lambda a: setattr(a, "obs_names", ["x"] * N))),
    # labels
    "one label": ("any", obs("cell_type", "a")),
    "a label a cell": ("any", obs("cell_type", [f"c{i}" for i in range(N)])),
    "labels are numbers": ("any", obs("cell_type", np.arange(N) % 3)),
    "most labels missing": ("any", obs("cell_type", pd.Categorical([None] * (N - 10) + ["a"] * 10))),
    "labels are true or false": ("any", obs("cell_type", HALF)),
    "labels of HTML": ("any", obs("cell_type", np.where(HALF, "<script>alert(1)</script>", "b"))),
    "library size as text": ("scores", obs("library_size", "many")),
    "library size NaN": ("scores", obs("library_size", np.nan)),
    "library size 0": ("scores", obs("library_size", 0.)),
    "library size infinite": ("scores", obs("library_size", np.inf)),
    "library size true": ("any", obs("library_size", True)),
    "uns a number": ("any", uns(5)),
    "uns an array": ("any", uns(np.arange(5))),
    "uns a dict": ("any", uns({"a": "b"})),
    "uns of 2 MB": ("any", uns("x" * 2_000_000)),
    # embeddings
    "embedding of NaN": ("any evaluate:fail", obsm(np.full((N, 8), np.nan))),
    "embedding of a column": ("any", obsm(np.arange(N, dtype=float)[:, None])),
    "embedding constant": ("any", obsm(np.ones((N, 8)))),
    "embedding in 3D": ("any evaluate:fail", obsm(np.ones((N, 2, 2)))),
    "embedding sparse": ("any", obsm(sp.csr_matrix(NUMBERS))),
    "embedding a table": ("any", on_cells(lambda a: a.obsm.__setitem__("X_scformer",
                                                                    pd.DataFrame(NUMBERS, a.obs_names, list("abcdefgh"))))),
    "embedding true or false": ("any", obsm(NUMBERS > .5)),
    "embedding of no column": ("any evaluate:fail", on_cells(no_column)),
    "embedding of 1e200": ("any", obsm(NUMBERS * 1e200)),
    # counts elsewhere, other formats, names of files
    "counts in a layer": ("counts", on_cells(counts_in_layer)),
    "counts in raw": ("counts", on_cells(counts_in_raw)),
    "zarr as .h5ad": ("fail", on_cells(KEEP, anndata.AnnData.write_zarr)),
    "zarr": ("any", on_cells(KEEP, anndata.AnnData.write_zarr, "case.zarr")),
    "loom": ("fail", on_cells(KEEP, write_loom, "case.loom")),
    "loom as .h5ad": ("fail", on_cells(KEEP, write_loom)),
    "csv": ("fail", on_cells(KEEP, write_csv, "case.csv")),
    "10x .h5": ("fail", on_cells(KEEP, write_10x, "case.h5")),
    "10x as .h5ad": ("fail", on_cells(KEEP, write_10x)),
    "a folder of .mtx": ("fail", on_cells(KEEP, write_mtx, "case")),
    "no suffix": ("fail", on_bytes(lambda data: data, "")),
    ".H5AD": ("any", on_bytes(lambda data: data, ".H5AD")),
    ".h5ad.gz": ("fail", on_bytes(lambda data: data, ".h5ad.gz")),
    "a name of signs": ("same two:any", lambda good, folder: shutil.copy(good, folder / "weird <b>&\"' ü 日本\n.h5ad")),
}


def put_numbers(file):
    put_in = file["var"]
    attributes = dict(put_in["_index"].attrs) | {"encoding-type": "array"}
    del put_in["_index"]
    put_in["_index"] = np.arange(GENES)
    put_in["_index"].attrs.update(attributes)
