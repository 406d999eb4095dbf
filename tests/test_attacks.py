"""One attack of each kind that `make stress` tries by hundreds."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("stress")))

import attack  # noqa: E402  tests/stress/attack.py
import disk  # noqa: E402
import kills  # noqa: E402
import pairs  # noqa: E402


@pytest.fixture(scope="module")
def place():
    with attack.arena() as place:
        yield place


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="timers that kill, limits, /proc")
def test_one_attack_of_each_kind(place):
    fit, embed = (attack.commands(place)[name] for name in ("fit", "embed"))
    known, cost, _ = kills.unbroken("fit", fit, place)
    kills.kill("fit", fit, place / "moment", place, [known], cpu=cost["cpu"] / 2)
    kills.kill("fit", fit, place / "change", place, [known], op=cost["ops"] - 3)  # between the two files of the model
    disk.want("fit", fit, place / "room", place, [known], room=40_000)
    known = kills.unbroken("embed", embed, place)[0]
    pairs.to_one_file("embed", embed, known, place / "two", place, 0)


def test_what_is_not_withstood_is_counted_and_named():
    def fails():
        attack.must(False, "it is half")
    passed, failed = attack.attempt({"good": lambda: None, "bad": fails})
    assert passed == 1 and failed == {"bad": "AssertionError: it is half"}
