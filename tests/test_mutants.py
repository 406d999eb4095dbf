"""The seeded faults of mutants.toml are where the code is today; what notices them is for `make mutants` to say."""
import ast
import json
from collections import Counter

import mutants  # tests/mutants.py
import notebooks  # tools/notebooks.py
import pytest

TABLE = mutants.mutants()
NAMES = {path.name for path in (notebooks.ROOT / "tests").glob("test_*.py")} | {page.stem for page in notebooks.pages()}


@pytest.mark.parametrize("name", TABLE)
def test_a_fault_has_its_place_and_compiles(name):
    fault = TABLE[name]
    (module, after), (page, notebook) = mutants.mutated(name, fault).items()
    assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(module.read_text())), "it changes nothing"
    assert sum(fault["new"] in "".join(cell["source"]) for cell in json.loads(notebook)["cells"]) and page.exists()
    assert fault.keys() == {"module", "old", "new", "tests"} and {test.split("::")[0] for test in fault["tests"]} <= NAMES
    for file, function in (test.split("[")[0].split("::") for test in fault["tests"] if "::" in test):
        assert f"def {function}(" in (notebooks.ROOT / "tests" / file).read_text()


def test_every_module_has_a_fault():
    number = Counter(fault["module"] for fault in TABLE.values())
    assert number.keys() == notebooks.modules().keys() and number.total() >= 60


def test_code_that_has_moved_on_is_named():
    for old in ("what nobody wrote", "return "):
        with pytest.raises(ValueError, match="wrong-place: its old code stands .* correct mutants.toml"):
            mutants.mutated("wrong-place", TABLE["mask-inverted"] | {"old": old})


def test_a_fault_is_in_a_copy_only_and_gone_afterwards(tmp_path):
    (tmp_path / "module.py").write_text("right")
    with pytest.raises(ZeroDivisionError), mutants.in_place({tmp_path / "module.py": "wrong"}):
        assert (tmp_path / "module.py").read_text() == "wrong"
        1 / 0  # noqa: B018
    assert (tmp_path / "module.py").read_text() == "right"
