"""Random damage: `python tests/stress/fuzz.py [--minutes 3] [--seed 0] [KIND ...]`.

A seed and a number make a case, which goes through the entry points of its kind as those of corpus.py do; whatever comes
of it must be an answer. A finding says the words that repeat it, and becomes a case of corpus_own.py when it is mended.
"""
import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import corpus
import h5py
import numpy as np
import torch
from corpus_models import FACTS, WEIGHTS, read, write
from corpus_own import (
    CHECKPOINT_ENTRIES,
    GMT_ENTRIES,
    LEDGER_ENTRIES,
    LINE,
    PARAMETER_ENTRIES,
    PERTURBATION_ENTRIES,
    REFERENCE,
    SETS,
    SHIPPED_ENTRIES,
    TREE_ENTRIES,
    nested,
)
from entries import FILE_ENTRIES, MODEL_ENTRIES
from report import record

CASES = 25  # of a seed, in one process
VALUES = [None, True, False, 0, 1, -1, 2, 10**9, 10**30, -10**19, .5, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "0", "nan",
          "<b>", "../x", "a" * 10_000, [], {}, [[]], [1], ["x"], ["x", "x"], {"a": 1}, {"": {}}, [None], [0, "a", None, {}]]
ARRAYS = ["f4", "f8", "i1", "i8", "u8", "f2", "c8", "?", "S5", "O"]
WORDS = ["n_hvg", "methods", "seeds", "label_key", "layer", "max_epochs", "full", "out", "x", "=", "=", "[", "]", "'", '"', ",", "PCA",
         "scFormer", "0", "-1", "1e9", "None", "\\", "\n", "\x00", "é", " ", "(", "{", "lambda: 0", "cell_type", "batch", "#", "%",
         "$(x)", "\u202e"]


def some_bytes(rng, data):
    "Bits turned, a piece cut out, doubled, zeroed or made of noise."
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i, n = rng.randrange(len(data) + 1), rng.choice([1, 4, 64, 4096])
        data[i:i + n] = rng.choice([b"", bytes(n), rng.randbytes(n), bytes(data[i:i + n]) * 2, data[i:i + n][::-1],
                                    bytes(b ^ 1 << rng.randrange(8) for b in data[i:i + n])])
    return bytes(data)


def some_array(rng, like):
    "Another array, of the same shape or not."
    shape = rng.choice([like.shape, like.shape, like.shape[:-1], (*like.shape, 2), (0,), (), tuple(n + 1 for n in like.shape)])
    kind = rng.choice(ARRAYS)
    value = rng.choice([0, 1, -1, 2**31, 1e30, float("nan"), float("inf"), 300, .5])
    with np.errstate(all="ignore"):
        if kind == "O":
            return np.full(shape, str(value), object)
        return np.full(shape, value, "f8").astype(kind)


def some_hdf5(rng, path):
    "A part deleted, replaced, exchanged with another; an attribute changed; some values of an array changed."
    with h5py.File(path, "r+") as file:
        names = []
        file.visit(names.append)
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(names)
            if name not in file:
                continue
            item, act = file[name], rng.choice("values values values array delete swap attribute attribute".split())
            if act == "values" and isinstance(item, h5py.Dataset) and item.size and item.dtype.kind in "buif":
                values = item[()].reshape(-1) if item.ndim else np.array([item[()]])
                for _ in range(rng.choice([1, 3, len(values)])):
                    with np.errstate(all="ignore"):
                        extreme = np.array(rng.choice([0, -1, 1, 7, 120, 2**31 - 1, -2**31, 3.5, 1e30, float("nan")])).astype(values.dtype)
                    values[rng.randrange(len(values))] = extreme
                item[...] = values.reshape(item.shape)
            elif act == "attribute" and len(item.attrs):
                key = rng.choice(list(item.attrs))
                item.attrs[key] = rng.choice([0, -1, 2**40, "x", "csc_matrix", "array", "dataframe", "categorical", np.arange(3),
                                              np.array([], "i8")])
            elif act == "swap":
                other = rng.choice(names)
                if other in file and not other.startswith(name) and not name.startswith(other):
                    file.move(name, "spare")
                    file.move(other, name)
                    file.move("spare", other)
            elif act == "array" and isinstance(item, h5py.Dataset) and item.shape is not None:
                attributes = dict(item.attrs)
                new = some_array(rng, item)
                del file[name]
                file.create_dataset(name, data=new, dtype=h5py.string_dtype() if new.dtype.kind == "O" else None)
                file[name].attrs.update(attributes)
            else:
                del file[name]


def some_json(rng, value):
    "One entry, however deep, deleted, doubled or replaced."
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return value
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < .7:
            place = place[key]
            continue
        act = rng.choice(["value"] * 4 + ["delete", "nest"])
        if act == "delete":
            del place[key]
        else:
            place[key] = rng.choice(VALUES) if act == "value" else [place[key], place[key]]
        return value


def some_tensors(rng, weights):
    "One tensor of another type, shape or value."
    name = rng.choice(list(weights))
    w = weights[name]
    value = rng.choice([0, 1, -1, 1e30, 2**40, float("nan"), float("inf")])
    kinds = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]
    change = {"type": lambda: w.to(rng.choice(kinds)), "value": lambda: w * 0 + torch.tensor(value).to(w.dtype),
              "one": lambda: w.reshape(-1).index_fill(0, torch.tensor([0]), value).reshape(w.shape) if w.numel() else w,
              "flip": lambda: w.flip(0) if w.ndim else w, "short": lambda: w[:-1] if w.ndim else w[None], "flat": lambda: w.reshape(-1),
              "empty": lambda: w.reshape(-1)[:0], "negative": lambda: -w if w.dtype != torch.bool else w}
    act = rng.choice([*change, "delete"])
    weights.pop(name)
    return weights | ({} if act == "delete" else {name: change[act]().contiguous()})


# ---- kinds: entry points, and a function of a random generator, the good input and a folder

def make_bytes(rng, good, folder):
    path = folder / "case.h5ad"
    path.write_bytes(some_bytes(rng, good.read_bytes()))
    return path


def make_hdf5(rng, good, folder):
    path = shutil.copy(good, folder / "case.h5ad")
    some_hdf5(rng, path)
    return path


def make_model(rng, good, folder):
    facts, weights = read(good)
    if rng.random() < .6:
        return write(folder, some_json(rng, facts), weights)
    return write(folder, facts, some_tensors(rng, weights))


def make_bytes_of(*names):
    def make(rng, good, folder):
        shutil.copytree(good, folder / "case")
        path = folder / "case" / rng.choice(names)
        path.write_bytes(some_bytes(rng, path.read_bytes()))
        return folder / "case"
    return make


def make_state(rng, good, folder):
    "A checkpoint with one entry, however deep, changed; tensors among the entries."
    shutil.copytree(good / "run", folder / "case")
    path = folder / "case/last.ckpt"
    torch.save(some_json(rng, torch.load(path, weights_only=True)), path)
    return folder / "case"


def make_text(name, texts):
    "Bytes or characters of a text changed."
    def make(rng, good, folder):
        text = rng.choice(texts)
        signs = "".join(rng.choices("\t\n,()':\x00\u2028é[{\"", k=rng.randint(1, 5)))
        i = rng.randrange(len(text))
        new = rng.choice([text[:i] + signs + text[i:], text[:i] + text[i + rng.randint(1, 9):], text[:i] * 3])
        path = folder / name
        path.write_bytes(new.encode() if rng.random() < .7 else some_bytes(rng, text.encode()))
        return path
    return make


def make_ledger(rng, good, folder):
    lines = [LINE, some_json(rng, json.loads(json.dumps(LINE))), some_json(rng, json.loads(json.dumps(LINE)) | {"seed": 1})]
    path = folder / "case.jsonl"
    path.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode())
    return path


def make_parameter(rng, good, folder):
    name = rng.choice(WORDS[:8]) + "="
    return name + "".join(rng.choice(WORDS) for _ in range(rng.randint(0, 6)))


TREE_TEXTS = {"case.nwk": ["((a,b)c,(d,'e f')g);"], "case.csv": ["type,one,two\nx,A,a\ny,A,b\nz,B,c\n"],
              "case.json": [nested(2), '{"a": {"b": ["x"]}, "c": "y"}']}
KINDS = {
    "bytes of cells": (FILE_ENTRIES, make_bytes), "parts of cells": (FILE_ENTRIES, make_hdf5),
    "models": (MODEL_ENTRIES[:3], make_model), "bytes of models": (MODEL_ENTRIES[:2], make_bytes_of(FACTS, WEIGHTS)),
    "perturbation models": (PERTURBATION_ENTRIES, make_model), "labelled cells": (SHIPPED_ENTRIES, make_bytes_of(REFERENCE)),
    "checkpoints": (CHECKPOINT_ENTRIES, make_state), "parameters": (PARAMETER_ENTRIES, make_parameter),
    "ledgers": (LEDGER_ENTRIES, make_ledger), "gene sets": (GMT_ENTRIES, make_text("case.gmt", [SETS])),
    **{f"trees {name[-4:]}": (TREE_ENTRIES, make_text(name, texts)) for name, texts in TREE_TEXTS.items()},
}


class Tables:
    "Cases of a kind and a seed, as the tables of corpus_own.py."
    def __getitem__(self, group):
        kind, _, seed = group.rpartition(" ")
        entries, make = KINDS[kind]
        rng = random.Random(group)
        some = rng.sample(entries, min(3, len(entries)))

        def case(number):
            return "any", lambda good, folder: make(random.Random(f"{group} {number}"), good, folder)
        return {f"{number} of {group!r}": case(number) for number in range(CASES)}, some


GROUPS = Tables()


def main(minutes, seed, kinds):
    end, done, bad, first = time.time() + 60 * minutes, {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        while time.time() < end:
            for kind in kinds or KINDS:
                start = time.time()
                wrong, _ = corpus.watch([f"{kind} {seed}"], Path(folder), module="fuzz")
                done[kind] = done.get(kind, 0) + len(wrong)
                first += [f"; {case}: {said}" for case, said in wrong.items() if said][:1]
                bad[kind] = bad.get(kind, 0) + sum(map(bool, wrong.values()))
                print(f"{kind}, seed {seed}: {len(wrong)} cases, {bad[kind]} wrong so far, {time.time() - start:.0f} s", flush=True)
                if time.time() > end:
                    break
            seed += 1
    note = f"{len(done)} kinds{''.join(first)[:300]}"
    record("fuzz", "random damage", sum(done.values()) - sum(bad.values()), sum(done.values()), 60 * minutes, note)
    return sum(bad.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(bool(main(given.minutes, given.seed, given.kinds)))
