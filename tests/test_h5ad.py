"""Files that are damaged, cut off or none: what the page A0b_h5ad cannot hold."""
import os
import tempfile

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from scformer_nb import data, h5ad, hvg
from scformer_nb.datasets import load, open_cells
from scformer_nb.simulate import simulate


def cells(**how):
    a = simulate(60, 40, 2, 2)
    for k, v in how.items():
        setattr(a, k, v(a) if callable(v) else v)
    return a


COUNTS = cells().X


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("what,message", [("folder", "is a folder"), ("x.zarr", "is a Zarr store.*read_zarr"),
                                          ("x.csv", "is a .csv file"), ("cut.h5ad", "cannot be read"),
                                          ("other.h5ad", "cannot be read"), ("text.h5ad", "cannot be read")])
def test_files_that_are_no_h5ad(tmp_path, what, message):
    for folder in ("folder", "x.zarr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "x.csv").write_text("a,b\n")
    (tmp_path / "text.h5ad").write_text("not hdf5")
    cells().write_h5ad(tmp_path / "whole.h5ad")
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "whole.h5ad").read_bytes()[:5000])
    with h5py.File(tmp_path / "other.h5ad", "w") as f:
        f["x"] = 1
    with pytest.raises(ValueError, match=message):
        load(tmp_path / what)
    assert load(tmp_path / "whole.h5ad").uns["dataset"] == "simulated"


def rewrite(path, change, X=COUNTS):
    "An h5ad file with one part of its HDF5 changed."
    cells(X=X).write_h5ad(path)
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
        hvg.preprocess(load(rewrite(tmp_path / "x.h5ad", change)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named_when_they_are_read_in_parts(tmp_path, case, monkeypatch):
    change, message = DAMAGED[case]
    monkeypatch.setattr(data, "PART", 16)
    monkeypatch.setattr(hvg, "LARGE", 30)
    with pytest.raises(ValueError, match=f"{message}|cannot be read"), open_cells(rewrite(tmp_path / "x.h5ad", change)) as a:
        hvg.preprocess(a)


@pytest.mark.parametrize("part", ["layers", "raw"])
def test_layers_and_raw_are_checked_too(tmp_path, part):
    a = cells(layers={"c": COUNTS}, raw=lambda a: a.copy())
    a.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as f:
        f["layers/c/indices" if part == "layers" else "raw/X/indices"][5] = 4000
    with pytest.raises(ValueError, match=f"{part}.* is a damaged sparse matrix"):
        load(tmp_path / "x.h5ad")


def test_counts_sorted_on_disk_leave_nothing_however_the_process_ends(tmp_path, monkeypatch):
    "Their file has no name, which only the end of a process could take away."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(data, "PART", 16)
    rewrite(tmp_path / "x.h5ad", lambda file: None, COUNTS.tocsc())
    with open_cells(tmp_path / "x.h5ad") as a, pytest.warns(UserWarning, match="stored by columns"):
        reader = data.CountReader(a)
        parts = [part.X for part in reader.parts()]
        assert reader.matrix.file.tell() > 0 and [p.name for p in tmp_path.iterdir()] == ["x.h5ad"]
    assert (sp.vstack(parts) != load(tmp_path / "x.h5ad").X).nnz == 0


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5ad")
    (tmp_path / "zero.h5ad").symlink_to("/dev/zero")
    (tmp_path / "gone.h5ad").symlink_to(tmp_path / "nowhere.h5ad")
    (tmp_path / "folder.h5ad").mkdir()
    for name, kind in (("pipe", "a pipe or a device"), ("zero", "a pipe or a device"), ("folder", "is a folder")):
        with pytest.raises(ValueError, match=kind):
            load(tmp_path / f"{name}.h5ad")
    with pytest.raises(FileNotFoundError, match="leads to nothing"):
        load(tmp_path / "gone.h5ad")


def test_suffix_in_capitals_and_odd_names_are_read(tmp_path):
    for name in ("X.H5AD", "a <b>&\"' ü 日本\n.h5ad"):
        cells().write_h5ad(tmp_path / "x.h5ad")
        os.rename(tmp_path / "x.h5ad", tmp_path / name)
        assert load(tmp_path / name).shape == (60, 40)


def test_heaps_of_a_file_that_was_edited_often_are_whole(tmp_path):
    "Parts that are deleted leave pieces of heaps behind."
    rng, path = np.random.default_rng(0), tmp_path / "x.h5"
    for step in range(60):
        with h5py.File(path, "a") as file:
            for name in [name for name in file if rng.random() < .4]:
                del file[name]
            file[f"texts {step}"] = [f"t{i}" * rng.integers(40) for i in range(rng.integers(1, 120))]
            file[f"texts {step}"].attrs["note"] = "x" * rng.integers(90)
            file[f"zeros {step}"] = np.zeros(rng.integers(1, 4000))
        h5ad.check_heaps(path)
