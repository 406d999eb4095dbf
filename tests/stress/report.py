"""What the attacks of `make stress` found, kept in figures/reliability.jsonl: a line per part and case, the newest."""
import fcntl
import json
import os
from datetime import date
from pathlib import Path

FILE = Path(__file__).parents[2] / "figures" / "reliability.jsonl"


def record(part: str, case: str, passed: int, of: int, seconds: float, note: str = "") -> bool:
    "Keep one result in place of an older one of the same part and case; whether all passed. Two parts may run at once."
    line = dict(part=part, case=case, passed=int(passed), of=int(of), seconds=round(seconds, 1), date=str(date.today()), note=note)
    print(f"{part}: {case}: {passed} of {of} in {seconds:.0f} s{': ' if note else ''}{note}", flush=True)
    folder = os.open(FILE.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        old = [json.loads(text) for text in FILE.read_text().splitlines()] if FILE.exists() else []
        kept = [other for other in old if (other["part"], other["case"]) != (part, case)]
        new = FILE.with_suffix(".new")
        new.write_text("".join(json.dumps(other) + "\n" for other in sorted(kept + [line], key=lambda x: (x["part"], x["case"]))))
        os.replace(new, FILE)
    finally:
        os.close(folder)
    return passed == of
