"""What can be written is known before, and a full disk leaves no half of a file."""
import resource
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from toy import CELLS, toy

from scformer_nb import writable

# ---- what can be written is known before

TABLES = {
    "a reserved name": (dict(_index=[1] * 60), "adata.obs.'_index'. cannot be written .*reserved"),
    "mixed types": (dict(note=[1, "x"] * 30), r"obs.'note'. = adata.obs.'note'..astype\(str\)"),
    "dates": (dict(day=pd.to_datetime(["2020-01-01"] * 60)), "obs.'day'. cannot be written"),
    "truth with gaps": (dict(good=pd.Series([True, None] * 30, dtype=object).to_numpy()), r"obs.'good'..astype\(str\)"),
    "lists": (dict(tags=pd.Series([["a"]] * 60).to_numpy()), "obs.'tags'. cannot be written"),
}


@pytest.mark.parametrize("case", TABLES)
def test_what_cannot_be_written_is_named(case):
    columns, message = TABLES[case]
    with pytest.raises(ValueError, match=message):
        writable.check_writable(toy(**columns))
    given = toy()
    given.raw = toy()
    for name, values in columns.items():
        given.raw.var[name] = values
    with pytest.raises(ValueError, match="adata.raw.var."):  # Seurat's converters leave columns there
        writable.check_writable(given)


@pytest.mark.parametrize("place,value", [("uns", {1, 2}), ("uns", {3: 4}), ("obsm", pd.DataFrame({"_index": range(60)}, CELLS.obs_names))])
def test_other_parts_that_cannot_be_written_are_named(place, value):
    given = toy()
    getattr(given, place)["odd"] = value
    with pytest.raises(ValueError, match=f"adata.{place}.'odd'. cannot be written"):
        writable.check_writable(given)


def test_what_can_be_written_passes_and_is_written(tmp_path):
    given = toy(text=["a", None] * 30, numbers=pd.array([1, None] * 30, dtype="Int64"), flag=True,
                kind=pd.Categorical(["x", None] * 30), real=np.nan)
    given.uns["settings"] = {"a": [1, "x"], "none": None}
    given.obsm["table"] = pd.DataFrame({"a": range(60)}, given.obs_names)
    before = given.copy()
    writable.check_writable(given)
    assert given.obs.equals(before.obs) and given.uns.keys() == before.uns.keys()
    given.write_h5ad(tmp_path / "x.h5ad")


# ---- whole or not at all

@pytest.mark.parametrize("large", [False, True])
def test_an_h5ad_needs_its_space_before_it_is_written(large, tmp_path):
    code = ("import sys; from pathlib import Path; from scformer_nb import writable; from scformer_nb.simulate import simulate\n"
        f"writable.LARGE = {0 if large else writable.LARGE}; writable.write_h5ad(simulate(60, 50), Path(sys.argv[1]))")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.h5ad"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)))
    assert done.returncode == 1 and "no space is left for it" in done.stderr and list(tmp_path.iterdir()) == []


def test_space_is_claimed_where_the_system_has_no_call_for_it(tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fallocate")
    (tmp_path / "x").write_bytes(b"kept")
    writable.claim_space(tmp_path / "x", 2**24 + 100)
    assert (tmp_path / "x").stat().st_size == 2**24 + 100 and (tmp_path / "x").read_bytes()[:6] == b"kept\0\0"
