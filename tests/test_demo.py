"""What `scformer demo` refuses before it trains."""
import json

import pytest
from typer.testing import CliRunner

from scformer_nb import cli

# ---- the command

@pytest.fixture
def demo(monkeypatch):
    "scformer demo, which must end before any training."
    monkeypatch.setattr(cli, "_run_demo", lambda *args: pytest.fail("it started to train"))
    return lambda *args: CliRunner().invoke(cli.app, ["demo", *map(str, args)])


def test_demo_refuses_the_folder_of_another_run(demo, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"sum": {"total": 42}}))
    done = demo("--out", tmp_path)
    assert done.exit_code == 2 and "holds no finished demo" in done.output


def test_demo_refuses_a_folder_that_is_not_empty(demo, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = demo("--out", tmp_path)
    assert done.exit_code == 2 and f"{tmp_path} is not empty" in done.output and "with -o" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_demo_refuses_a_place_that_cannot_be_written(demo, unwritable):
    done = demo("--out", unwritable)
    assert done.exit_code == 2 and str(unwritable) in done.output, (done.output, done.exception)


@pytest.mark.parametrize("args", [("--max-epochs", "0"), ("--max-epochs", "many"), ("--epochs", "3"), ("more",)])
def test_demo_refuses_wrong_options(demo, args, tmp_path):
    assert demo("--out", tmp_path / "demo", *args).exit_code == 2 and not (tmp_path / "demo").exists()


def test_a_finished_demo_is_shown_again_without_training(demo, tmp_path):
    numbers = {method: dict.fromkeys(["AvgBIO", "NMI", "ARI", "ASW_cell"], value) for method, value in (("PCA", 0.5), ("scFormer", 0.75))}
    (tmp_path / "metrics.json").write_text(json.dumps(numbers))
    done = demo("--out", tmp_path)
    assert done.exit_code == 0 and "holds a finished demo" in done.output and "0.750" in done.output and "metrics.json" in done.output
