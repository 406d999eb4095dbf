"""Batch correction: batches mix within types, types stay apart, and nothing breaks where there is little to correct."""
import warnings

import numpy as np
import pytest
import torch

from scformer_nb.batch_correction import BatchShift, correct_batches


def clouds(per=60, types=4, batches=2, seed=0, shift=2.0):
    "Types far apart; each batch moves each type its own way. (cells, 8), types, batches"
    rng = np.random.default_rng(seed)
    kind, batch = np.repeat(np.arange(types), per), np.arange(per * types) % batches
    moved = rng.normal(size=(types, batches, 8)) * shift / 8**.5
    return 8 * np.eye(8)[kind] + moved[kind, batch] + rng.normal(scale=.3, size=(len(kind), 8)), kind, batch


def others(Z, batch, kind, k=10):
    "Share of a cell's nearest neighbours of its type that are of other batches."
    d = np.linalg.norm(Z[:, None] - Z[None], axis=2) + 1e9 * (kind[:, None] != kind) + 1e9 * np.eye(len(Z))
    return (batch[np.argsort(d, 1)[:, :k]] != batch[:, None]).mean()


@pytest.mark.parametrize("batches", [2, 3])
def test_batches_mix_and_types_stay_apart(batches):
    Z, kind, batch = clouds(batches=batches)
    corrected = correct_batches(Z, batch)
    assert others(Z, batch, kind) < .2 and others(corrected, batch, kind) > .8 * (1 - 1 / batches)
    d = np.linalg.norm(corrected[:, None] - corrected[None], axis=2) + 1e9 * np.eye(len(Z))
    assert (kind[d.argmin(1)] == kind).all()


def test_a_type_that_one_batch_alone_has_stays_where_it_is():
    Z, kind, batch = clouds()
    here = (kind != 3) | (batch == 0)
    corrected = correct_batches(Z[here], batch[here])
    own = kind[here] == 3
    gap = np.linalg.norm(corrected[own].mean(0) - corrected[~own], axis=1).min()
    assert gap > 5, "it is not moved onto another type of the other batch"


def test_the_same_seed_gives_the_same_and_the_input_is_left_alone():
    Z, _, batch = clouds(per=20)
    before = Z.copy()
    assert np.array_equal(correct_batches(Z, batch, 3), correct_batches(Z, batch, 3)) and np.array_equal(Z, before)
    assert np.abs(correct_batches(Z, batch, 3) - correct_batches(Z, batch, 4)).max() < 1


ODD = {
    "one batch": lambda Z, batch: (Z, 0 * batch),
    "a batch of one cell": lambda Z, batch: (Z, (np.arange(len(Z)) == 5).astype(int)),
    "each cell its own batch": lambda Z, batch: (Z[:12], np.arange(12)),
    "a batch that is not in the sample": lambda Z, batch: (Z, 2 * batch),
    "constant": lambda Z, batch: (np.ones_like(Z), batch),
    "all zero": lambda Z, batch: (0 * Z, batch),
    "three cells": lambda Z, batch: (Z[:3], batch[:3]),
    "two cells": lambda Z, batch: (Z[:2], batch[:2]),
    "float32": lambda Z, batch: (Z.astype(np.float32), batch),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_embeddings_are_survived(case):
    Z, batch = ODD[case](*clouds(per=15)[::2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corrected = correct_batches(Z, batch)
    assert corrected.shape == Z.shape and np.isfinite(corrected).all()
    if case in ("one batch", "constant", "all zero"):
        assert np.abs(corrected - Z).max() < 1e-3, "there is nothing to correct"


# ---- the layer that learns it

def learned(Z, shift, seed=0, dim=16):
    torch.manual_seed(0)
    h_c = torch.tensor(Z @ np.random.default_rng(1).normal(size=(Z.shape[1], dim))).float()
    layer = BatchShift(dim, Z.shape[1])
    explained = layer.learn(h_c, torch.tensor(shift).float(), seed)
    return layer, h_c, explained


def test_a_layer_that_sees_no_batch_does_the_same(monkeypatch):
    Z, kind, batch = clouds()
    shift = correct_batches(Z, batch) - Z
    once, again = (learned(Z, shift)[0].state_dict().values() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    monkeypatch.setattr(BatchShift, "steps", 1000)  # as it is
    layer, h_c, explained = learned(Z, shift)
    assert explained > .8 and others(Z + layer(h_c).numpy(), batch, kind) > .4


def test_learning_leaves_the_random_state_and_asks_for_no_gradient():
    Z, _, batch = clouds(per=10)
    torch.manual_seed(5)
    layer, shift = BatchShift(8, 8), torch.tensor(correct_batches(Z, batch) - Z).float()
    state = torch.get_rng_state()
    with torch.no_grad():
        layer.learn(torch.tensor(Z).float(), shift)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(w.requires_grad for w in layer.parameters()), "several processes would wait for its gradients"


@pytest.mark.parametrize("cells", [2, 3])
@pytest.mark.parametrize("moved", [0.0, 1.0])
def test_few_cells_and_no_shift_are_learned(cells, moved):
    Z = clouds()[0][:cells]
    layer, h_c, _ = learned(Z, np.full_like(Z, moved))
    assert torch.isfinite(layer(h_c)).all() and (moved or layer(h_c).abs().max() < 1e-3)
