"""The page on pathway tokens: a user's own file and sets, twice; finished runs of the integration page are not paid again."""
import json

import notebooks  # tools/notebooks.py
from own_data import own_parameters, shown

from scformer_nb.datasets import load
from scformer_nb.ledger import Ledger

PAGE = notebooks.ROOT / "nbs/24c_exp_external_tokens.ipynb"


def test_a_users_own_file_twice(tmp_path, run_page):
    parameters = own_parameters(PAGE, tmp_path)
    genes = list(load(parameters["dataset"]).var_names)
    (tmp_path / "sets.gmt").write_text("\n".join("\t".join([f"set {j}", "", *genes[j::4]]) for j in range(3)))
    parameters |= {"tokens": str(tmp_path / "sets.gmt")}
    run_page(PAGE, tmp_path, **parameters)
    ledger = tmp_path / "results/external_tokens.jsonl"
    table = Ledger(ledger).table().set_index("option")
    assert set(table.index) == {"pathways", "shuffled", "without"}
    assert table["kNN_accuracy"].between(0, 1).all() and table["NMI_ARI"].notna().all()
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len({line["settings"]["tokens"] for line in lines}) == 3

    plain, *_ = [line for line in lines if line["option"] == "without"]
    del plain["settings"]["tokens"]
    known = plain | {"experiment": "integration", "option": "default", "metrics": plain["metrics"] | {"kNN_accuracy": .123}}
    ledger.with_name("integration.jsonl").write_text(json.dumps(known))
    ledger.write_text("\n".join(json.dumps(line) for line in lines if line["option"] != "without"))
    notebook = run_page(PAGE, tmp_path, **parameters)
    table = Ledger(ledger).table().set_index("option")
    assert len(table) == 3 and table.loc["without", "kNN_accuracy"] == .123
    assert "pathways help" in shown(notebook, "helps =") and (ledger.parent / "external_tokens_gains.png").exists()
