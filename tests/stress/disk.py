"""No room on the disk, no right to write, no file handles left: a line says so, and what was there stays as it was."""
import shutil
import subprocess
import sys
from functools import partial

import attack
from attack import call, check_done, check_refused, listing, must, report_all
from kills import BESIDE, check_left, result, target, unbroken
from report import drop_others

NAMES = ("fit", "pretrain", "perturb", "linear", "embed", "predict", "run", "writing", "ledger")
SHARES = (0, .02, .3, .6, .95)  # of the largest file of an unbroken run
NO_ROOM = ("no space", "No space", "not written whole", "be full", "too large")
HANDLES = (5, 8, 12, 16, 24, 40)


def files(folder):
    "Content of all files but those of the temporary folder."
    return {name: text for name, text in listing(folder).items() if not name.startswith("tmp")}


def want(name, words, folder, place, known, start=None, **plan):
    "A process in want: it ends well or says what it lacks, leaves nothing half, and can be run again."
    out = target(folder, name)
    if start:
        shutil.copytree(start, out) if start.is_dir() else shutil.copyfile(start, out)
    before = files(folder)
    done = call([*words, out], place, tmp=folder / "tmp", **plan)
    if done.returncode == 0:
        check_done(done)
        must(result(name, out) == known[-1], "it said done, and the result is another one")
    else:
        check_refused(done, *(NO_ROOM if "room" in plan else ()))
        check_left(name, out, known)
        beside = [p.name for p in folder.rglob("*") if BESIDE.fullmatch(p.name)]
        must(not beside, f"{beside} stay")
        lost = {file for file in before if file not in files(folder)}
        must(not lost, f"{lost} were there before")
        resume = ["--resume"] if name in ("fit", "pretrain", "perturb") and "--resume" not in words else []
        check_done(call([*words, out, *resume], place, tmp=folder / "tmp"))
        must(result(name, out) == known[-1], "with room again, the result is another one")
    shutil.rmtree(folder)


def no_room(place, names=NAMES, shares=SHARES):
    "As if the disk had room for so many bytes of a file."
    cases, words_of = {}, attack.commands(place, 2)
    for name in names:
        known, _, out = unbroken(name, words_of[name], place, "_room")
        largest = max(p.stat().st_size for p in ([out] if out.suffix else out.rglob("*")))
        cases[f"{name}, no room"] = {f"{name} with {int(share * largest)} bytes": partial(
            want, name, words_of[name], place / f"{name}_room{share}", place, [known], room=int(share * largest)) for share in shares}
    return cases


def no_room_for_more(place, shares=SHARES[1:]):
    "A run is continued, and its old model stays where the new one has no room."
    old, _, start = unbroken("fit", attack.commands(place, 2)["fit"], place, "_short")
    words = attack.commands(place, 3)["fit"]
    new, _, _ = unbroken("fit", words, place, "_long")
    size = max(p.stat().st_size for p in start.iterdir())
    return {"fit --resume over a model, no room": {f"resume with {share:.0%} of the room": partial(want, "fit",
        [*words[:-1], "--resume", "-o"], place / f"more_{share}", place, [old, new], start, room=int(share * size)) for share in shares}}


def full_disk(place, names=("fit", "embed", "ledger", "writing")):
    "A small file system, where this may be mounted: the errors are those of a disk."
    if subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        return {}
    subprocess.run(["umount", "/mnt"], check=True)
    words_of, cases = attack.commands(place, 2), {}
    for name in names:
        known, _, _ = unbroken(name, words_of[name], place, "_disk")
        cases[f"{name}, full file system"] = {f"{name} on {size} kB": partial(
            on_small_disk, name, words_of[name], place / f"{name}_{size}", place, known, size) for size in (8, 60, 140)}
    return cases


def on_small_disk(name, words, folder, place, known, size):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder], check=True)
    try:
        out = target(folder / "here", name)
        done = call([*words, out], place, tmp=place)
        check_done(done) if done.returncode == 0 else check_refused(done, *NO_ROOM)
        must(done.returncode or result(name, out) == known, "it said done, and the result is another one")
        check_left(name, out, [known])
        must(not [p for p in folder.rglob("*") if BESIDE.fullmatch(p.name)], "a half file stays")
    finally:
        subprocess.run(["umount", folder], check=True)


def read_only(place, names=NAMES):
    "A folder in which this user may not write, and one with a result in it."
    cases, words_of = {}, attack.commands(place, 2)
    for name in names:
        _, _, out = unbroken(name, words_of[name], place, "_mine")
        cases[f"{name}, read-only folder"] = {
            f"{name} in an empty one": partial(refused, name, words_of[name], place / f"{name}_empty", place),
            f"{name} beside a result": partial(refused, name, words_of[name], place / f"{name}_there", place, out)}
    return cases


def refused(name, words, folder, place, start=None):
    out = target(folder, name)
    if start:
        shutil.copytree(start, out) if start.is_dir() else shutil.copyfile(start, out)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (folder / "tmp").chmod(0o755)
    before, resume = files(folder), ["--resume"] if (out / "last.ckpt").exists() else []
    other = [7] if name == "ledger" else []  # a run that is not there
    done = call([*words, out, *resume, *other], place, tmp=folder / "tmp", rights=0)
    check_refused(done, "cannot write", "Permission denied", "not permitted", "there already", "is not empty")
    must(files(folder) == before, "something has changed")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def no_handles(place, names=NAMES):
    "So many files may be open."
    cases, words_of = {}, attack.commands(place, 2)
    for name in names:
        known, _, _ = unbroken(name, words_of[name], place, "_handles")
        cases[f"{name}, no file handles"] = {f"{name} with {n} handles": partial(
            want, name, words_of[name], place / f"{name}_handles{n}", place, [known], handles=n) for n in HANDLES}
    return cases


if __name__ == "__main__":
    with attack.arena() as place:
        code = 0
        for cases_of in (no_room, no_room_for_more, full_disk, read_only, no_handles):
            code |= report_all("disk", cases_of(place))
        drop_others("disk")
    sys.exit(code)
