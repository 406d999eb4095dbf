"""What the attacks of `make stress` found, kept in figures/reliability.jsonl: a line per part and case, the newest."""
import fcntl
import json
import os
from datetime import date
from pathlib import Path

FILE = Path(__file__).parents[2] / "figures" / "reliability.jsonl"

recorded = set()  # parts and cases of this process


def record(part: str, case: str, passed: int, of: int, seconds: float, note: str = "") -> bool:
    "Keep one result in place of an older one of the same part and case; whether all passed. Two parts may run at once."
    recorded.add((part, case))
    line = dict(part=part, case=case, passed=int(passed), of=int(of), seconds=round(seconds, 1), date=str(date.today()), note=note)
    print(f"{part}: {case}: {passed} of {of} in {seconds:.0f} s{': ' if note else ''}{note}", flush=True)
    rewrite(lambda lines: [other for other in lines if (other["part"], other["case"]) != (part, case)] + [line])
    return passed == of


def drop_others(part: str) -> None:
    "After all cases of a part: lines of cases that are no longer there."
    rewrite(lambda lines: [line for line in lines if line["part"] != part or (part, line["case"]) in recorded])


def rewrite(change) -> None:
    "Replace the lines by others; one process at a time."
    folder = os.open(FILE.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        lines = change([json.loads(text) for text in FILE.read_text().splitlines()] if FILE.exists() else [])
        new = FILE.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda x: (x["part"], x["case"]))))
        os.replace(new, FILE)
    finally:
        os.close(folder)
