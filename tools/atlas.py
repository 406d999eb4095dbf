"""Simulated cells on disk, from counts to a score card; what each step costs in figures/atlas.jsonl.

    python tools/atlas.py CELLS [FOLDER] [EPOCHS] [STEP]

FOLDER gets a file of 13 kB a cell and a copy of it with the embedding; a file that is there is
taken. EPOCHS of the fit; none or "": as many as the recipe needs. Each step is a process of its
own: simulate, train, embed, evaluate, recall, metrics, columns; none: all in turn."""

import datetime
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

LOG = Path(__file__).parent.parent / "figures" / "atlas.jsonl"
N_GENES, N_TYPES, N_BATCHES = 20_000, 10, 3


def note(step, cells, seconds, cpu, peak, **more):
    "Write a line of the log; one of the same step and number of cells goes."
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    numbers = dict(seconds=round(seconds, 1), cpu_seconds=round(cpu, 1), peak_gb=round(peak, 3))
    row = dict(step=step, cells=cells) | numbers | more | dict(date=date)
    old = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    rows = [r for r in old if (r["step"], r["cells"]) != (step, cells)] + [row]
    rows.sort(key=lambda r: r["cells"])
    LOG.write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(json.dumps(row), flush=True)


def measured(step, cells, command):
    "Run a command; its time on the clock, CPU seconds and highest resident size."
    start = time.time()
    _, status, used = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        sys.exit(f"{step} failed")
    note(step, cells, time.time() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)


class Peak:
    "Time on the clock, CPU seconds and highest resident size (Linux) of a block of this process."

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.start = time.time(), time.process_time()
        return self

    def __exit__(self, *_):
        wall, cpu = self.start
        lines = Path("/proc/self/status").read_text().splitlines()
        high = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        self.cost = time.time() - wall, time.process_time() - cpu, high / 2**20


def simulate(file, cells, *_):
    from scformer_nb.simulate import simulate_h5ad

    simulate_h5ad(file, cells, N_GENES, N_TYPES, N_BATCHES)


def cut(cells, n):
    "CPU seconds a cell of n mini-batches of an epoch."
    import numpy as np

    from scformer_nb.recipe import DEFAULT
    from scformer_nb.training import epoch_batches

    batches = epoch_batches(cells, np.arange(len(cells)), DEFAULT, (0,))
    next(batches)  # orders the cells
    start = time.process_time()
    done = sum(len(batch.batch) for batch in islice(batches, n))
    return (time.process_time() - start) / done


def train(file, n, epochs):
    "A model from the file, some mini-batches beside those of 1,000 of its cells, and a fit."
    import numpy as np

    from scformer_nb.scformer import ScFormer

    with Peak() as ready:
        model = ScFormer(file, "batch")
    note("ready", n, *ready.cost)
    few = model.cells.take(np.random.default_rng(0).permutation(n)[:1000])
    with Peak() as batches:
        rates = [(cut(few, 6), cut(model.cells, 6)) for _ in range(9)]
    note("batches", n, *batches.cost, rate=round(float(np.median([a / b for a, b in rates])), 3),
         cells_per_second=round(1 / float(np.median([b for _, b in rates]))))
    with Peak() as fit:
        model.fit(int(epochs) if epochs else None, progress=False)
    note("fit", n, *fit.cost, epochs=len(model.history))
    model.save(file.with_suffix(""), overwrite=True)


def by_columns(file, new):
    "A copy of a file with X as CSC, made in memory."
    from anndata import read_h5ad

    adata = read_h5ad(file)
    adata.X = adata.X.tocsc()
    adata.write_h5ad(new)


def columns(file, n, *_):
    "A model from a file that is stored by columns, which is sorted on disk first."
    from scformer_nb.scformer import ScFormer

    new = file.with_name(f"{file.stem}_columns.h5ad")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # whose memory does not count here
        pool.submit(by_columns, file, new).result()
    with Peak() as ready:
        ScFormer(new, "batch")
    note("by columns", n, *ready.cost)
    new.unlink()


def embedded(file):
    return file.with_name(f"{file.stem}_embedded.h5ad")


def embed(file, *_):
    from scformer_nb.cli import app

    embedded(file).unlink(missing_ok=True)
    app(["embed", *map(str, (file.with_suffix(""), file, "-o", embedded(file)))])


def evaluate(file, *_):
    from scformer_nb.cli import app

    app(["evaluate", str(embedded(file)), "--label-key", "cell_type", "--batch-key", "batch"])


def recall(file, n, *_):
    "Share of the exact neighbours of 1,000 cells that the approximate search finds."
    import h5py
    import numpy as np

    from scformer_nb.metrics import nearest

    with h5py.File(embedded(file)) as f:
        Z = f["obsm/X_scformer"][:].astype(float)
    with Peak() as search:
        found, _ = nearest(Z, 15)
    rows = np.random.default_rng(0).permutation(n)[:1000]
    norm = (Z * Z).sum(1)
    exact = [np.argpartition(norm - 2 * Z @ Z[i], 14)[:15] for i in rows]
    pairs = zip(found[rows], exact, strict=True)
    share = np.mean([len(np.intersect1d(*pair)) / 15 for pair in pairs])
    note("neighbours", n, *search.cost, recall=round(float(share), 4))


def metrics(file, n, *_):
    "The paper's metrics of all cells, from 128 numbers a cell: mixtures of the embedding's."
    import numpy as np

    from scformer_nb.datasets import open_cells
    from scformer_nb.metrics import evaluate

    with open_cells(embedded(file)) as adata:
        Z, obs = adata.obsm["X_scformer"][:], adata.obs
    rng = np.random.default_rng(0)
    Z = Z @ rng.standard_normal((Z.shape[1], 128)) + 0.1 * rng.standard_normal((n, 128))
    with Peak() as run:
        evaluate(Z, obs, batch_key="batch")
    note("metrics", n, *run.cost)


STEPS = dict(simulate=simulate, train=train, embed=embed, evaluate=evaluate, recall=recall,
             metrics=metrics, columns=columns)
FEW = range(10**5 + 1)  # cells; more take too long, or too much memory
ONLY = dict(recall=range(20_001, 10**9), metrics=FEW, columns=FEW)


def main(cells, folder="out/atlas", epochs="", step=None):
    "One step of a process of its own, measured; none: all in turn."
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder, f"{cells}.h5ad")
    for name in [step] if step else STEPS:
        if name == "simulate" and file.exists() or int(cells) not in ONLY.get(name, [int(cells)]):
            continue
        command = [sys.executable, __file__, cells, folder, epochs, name, "here"]
        if name in ("train", "recall", "metrics", "columns"):  # they take notes themselves
            subprocess.run(command, check=True)
        else:
            measured(name, int(cells), command)


if __name__ == "__main__":
    *given, last = sys.argv[1:]
    if last == "here":
        cells, folder, epochs, step = given
        STEPS[step](Path(folder, f"{cells}.h5ad"), int(cells), epochs)
    else:
        main(*given, last)
