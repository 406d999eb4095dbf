"""Eq. 2 on any matrix: exact against a plain definition, and refused where it has none."""
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scformer_nb.binning import bin_values

DTYPES = [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32, np.float64]
shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40)
bins = st.one_of(st.just(51), st.integers(2, 400), st.just(65536))
quick = settings(max_examples=150, deadline=None)


def elements(dtype):
    "Zeros, ties and any finite value of at least 0 that float64 holds."
    kind = np.dtype(dtype).kind
    if kind == "b":
        return st.booleans()
    if kind == "f":
        wild = st.floats(0, float(np.finfo(dtype).max), width=np.dtype(dtype).itemsize * 8)
        return st.one_of(st.just(0.0), st.integers(0, 9).map(float), wild)
    return st.one_of(st.just(0), st.integers(0, 9), st.integers(0, min(int(np.iinfo(dtype).max), 2**53)))


@st.composite
def matrices(draw, dtypes=DTYPES):
    dtype = draw(st.sampled_from(dtypes))
    return draw(hnp.arrays(dtype, draw(shapes), elements=elements(dtype)))


def plain(X, n_bins):
    "Count, for each value, the values at or below it: the definition, without sorting, in Python's integers."
    out = np.zeros(X.shape, int)
    for row, bins_of_row in zip(X.tolist(), out, strict=True):
        on = [v for v in row if v > 0]
        for j, v in enumerate(row):
            if v > 0:
                bins_of_row[j] = -(-(n_bins - 1) * sum(u <= v for u in on) // len(on))
    return out


@quick
@given(matrices(), bins)
@example(np.zeros((0, 5)), 51)
@example(np.zeros((5, 0)), 51)
@example(np.zeros((3, 3)), 51)
@example(np.array([[5e-324, 1e-300, 1.0, 1.7e308]]), 51)
def test_equals_the_definition(X, n_bins):
    binned = bin_values(X, n_bins)
    assert isinstance(binned, sp.csr_matrix) and binned.shape == X.shape
    assert binned.dtype == (np.uint8 if n_bins <= 256 else np.uint16)
    assert binned.has_canonical_format and (binned.data > 0).all()
    assert (binned.toarray() == plain(X, n_bins)).all()


@quick
@given(st.integers(0, 2**32 - 1), st.integers(33, 3000), st.sampled_from([np.float32, np.float64]), st.sampled_from([2, 51, 300]))
def test_long_cells(seed, n, dtype, n_bins):
    "Long rows of uneven spread, whatever the spread: what a sort gives."
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(scale=rng.choice([1e-4, 1, 30]), size=n)).clip(1e-30, 1e30)
    v = np.where(rng.random(n) < rng.random(), spread, rng.integers(1, 4, n)).astype(dtype)
    v[0] = rng.choice([1e-38, 1, 3e38])
    ranks = np.searchsorted(np.sort(v), v, side="right")
    assert (bin_values(v[None], n_bins).data == -(-(n_bins - 1) * ranks // n)).all()


@quick
@given(matrices(), bins)
def test_promises(X, n_bins):
    "Order kept, ties shared, highest in the last bin, an equal share where values are distinct."
    B, dense = n_bins - 1, bin_values(X, n_bins).toarray().astype(int)
    assert ((dense > 0) == (X > 0)).all()
    for v, k in zip(X, dense, strict=True):
        v, k = v[v > 0].astype(float), k[v > 0]
        order = np.argsort(v, kind="stable")
        up, step = np.diff(v[order]) > 0, np.diff(k[order])
        assert (step >= 0).all() and (step[~up] == 0).all()
        if len(v):
            assert k[v == v.max()].min() == B
        if up.all() and len(v):
            held = np.bincount(k, minlength=B + 1)[1:]
            assert held.min() >= len(v) // B and held.max() <= -(-len(v) // B)


@quick
@given(matrices([np.int16, np.uint16]), st.randoms(use_true_random=False))
def test_what_changes_nothing(X, random):
    "Normalisation within the cell, format, the order of cells and genes."
    expected = bin_values(X).toarray()
    depth = np.maximum(X.astype(float).sum(1, keepdims=True), 1)
    X = np.maximum(X, 0)
    for same in (X / depth * 1e4, np.log1p(X / depth * 1e4), sp.csc_matrix(X), sp.coo_matrix(X), sp.csr_array(X), np.asfortranarray(X)):
        assert (bin_values(same).toarray() == expected).all()
    cells, genes = (random.sample(range(n), n) for n in X.shape)
    assert (bin_values(X[cells][:, genes]).toarray() == expected[cells][:, genes]).all()


@quick
@given(matrices(), st.data())
def test_input_is_left_alone(X, data):
    "Explicit zeros are dropped, unsorted indices sorted, duplicates added up; in the result, never in the input."
    X = X.astype(np.float32) if X.dtype == np.float16 else X
    rows, cols = np.indices(X.shape)
    stored = sp.csr_matrix(X)
    if X.size:
        order = np.array(data.draw(st.permutations(range(X.shape[1]))))
        cols, values = np.tile(order, len(X)), X[:, order].ravel()
        stored = sp.csr_matrix((values, cols, np.arange(len(X) + 1) * X.shape[1]), shape=X.shape)
    before = [a.copy() for a in (stored.data, stored.indices, stored.indptr)]
    binned = bin_values(stored)
    assert (binned != bin_values(X)).nnz == 0 and binned.nnz == (X > 0).sum()
    assert all((a == b).all() for a, b in zip(before, (stored.data, stored.indices, stored.indptr), strict=True))
    assert not any(np.shares_memory(getattr(stored, a), getattr(binned, a)) for a in ("data", "indices", "indptr"))


def test_equal_values_share_the_bin_of_the_last_of_them():
    assert bin_values(np.array([[1, 1, 0, 1, 2]]), n_bins=5).toarray().tolist() == [[3, 3, 0, 3, 4]]


def test_duplicates_are_added():
    stored = sp.csr_matrix((np.array([200, 100, 250], np.uint8), [0, 0, 1], [0, 3]), shape=(1, 2))
    assert bin_values(stored).toarray().tolist() == [[50, 25]]  # 300 and 250, without overflow


def test_callers_may_be_threads():
    X = sp.random(3000, 400, 0.3, format="csr", random_state=0)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(bin_values, [X] * 8))
    assert all((r != results[0]).nnz == 0 for r in results)


def test_nothing_is_made_dense():
    "A matrix that would need 8 TB dense."
    X = sp.csr_matrix(([3.0, 1.0], ([0, 999_999], [5, 999_999])), shape=(1_000_000, 1_000_000))
    assert bin_values(X).data.tolist() == [50, 50] and bin_values(X.tocsc()).nnz == 2


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize(
    ("value", "said"), [(-2, "negative values \\(the lowest is -2\\)"), (np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "negative")]
)
def test_values_without_a_bin(kind, value, said):
    X = np.array([[0, 1, 2.0], [3, value, 0]])
    with pytest.raises(ValueError, match=f"X holds {said}.*at least 0.*layers"):
        bin_values(kind(X))


@pytest.mark.parametrize("X", [np.ones(3), np.ones((2, 2, 2)), np.ones((2, 2), complex), np.array([["a"]]), np.array([[None]]), object()])
def test_not_a_matrix(X):
    with pytest.raises(ValueError, match="numeric \\(cells, genes\\) matrix: pass adata.X"):
        bin_values(X)


@pytest.mark.parametrize("n_bins", [1, 0, -3, 65537, 50.5, True])
def test_n_bins(n_bins):
    with pytest.raises(ValueError, match=f"n_bins is {n_bins}.*from 2"):
        bin_values(np.ones((2, 2)), n_bins)


def test_cells_do_not_depend_on_each_other():
    X = sp.random(400, 500, 0.3, format="csr", random_state=0)
    X.data[: X.indptr[100]] = 0  # empty cells first, in the middle and last
    X.data[X.indptr[200] : X.indptr[250]] = 0
    X.data[X.indptr[390] :] = 0
    X.eliminate_zeros()
    assert (bin_values(X) != sp.vstack([bin_values(X[i]) for i in range(400)])).nnz == 0


def test_import_is_light():
    code = "import sys, scformer_nb.binning; print([m for m in ('numba', 'torch', 'scanpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
