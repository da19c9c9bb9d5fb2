"""The kinds of fault that scripts/chaos draws from: how each is drawn, and how it is put to a run."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from checks import chaos_judge as judge
from checks.chaos_judge import LOST, MISSED, REFUSED, SILENT, SURVIVED, Verdict
from checks.chaos_start import Ended, Planted
from checks.chaos_trial import RUN, Trial, remount
from sft.runs import saved

HANG_AFTER = 8  # seconds
Act = Callable[[Trial, Random], Verdict]


@dataclass(frozen=True)
class Kind:
    name: str
    act: Act
    weight: int  # how often it is in the deck
    layouts: tuple[str, ...] = ("single", "single, no export", "single", "ddp", "zero2")
    mounts: bool = False


def signalled(number: signal.Signals) -> Act:
    """One rank or all get it: at any time of a run, or at any of its changes to the disk."""

    def act(trial: Trial, draw: Random) -> Verdict:
        ranks = trial.ranks if draw.random() < 0.5 else [draw.choice(trial.ranks)]
        trial.copy(trial.reference.assets)
        if draw.random() < 0.5:
            rank = draw.choice(trial.ranks)
            changes = trial.reference.changes[rank]
            change = 1 + int(draw.random() * changes)
            trial.what = f"{number.name} to rank {rank} at change {change} of {changes}"
            ended = trial.keep(trial.start({rank: Planted(number, change, fault=trial.fault)}).wait(trial.limit))
            met = any(ended.codes)
        else:
            moment = draw.random() * trial.reference.seconds
            trial.what = f"{number.name} to ranks {ranks} after {moment:.2f} s"
            start = trial.start()
            time.sleep(moment)
            met = start.signal(number, ranks)
            ended = trial.keep(start.wait(trial.limit))
        return trial.bad(ended) or (trial.finish() if met else Verdict(MISSED))

    return act


def stopped(trial: Trial, draw: Random) -> Verdict:
    """As a suspended job or a laptop's sleep, longer than a rank may be silent."""
    trial.copy(trial.reference.assets)
    trial.extra = [f"cluster.hang_after={HANG_AFTER}"]
    moment = draw.random() * trial.reference.seconds
    trial.what = f"SIGSTOP after {moment:.2f} s for {HANG_AFTER * 1.5} s"
    start = trial.start()
    time.sleep(moment)
    met = start.signal(signal.SIGSTOP, trial.ranks)
    time.sleep(HANG_AFTER * 1.5)
    start.signal(signal.SIGCONT, trial.ranks)
    ended = trial.keep(start.wait(trial.limit))
    return trial.once(ended) or (trial.finish() if met else Verdict(MISSED))


def full(trial: Trial, draw: Random) -> Verdict:
    """The disk of runs_dir or of the cache has too little room for what is written, until somebody makes some."""
    folder = draw.choice(["runs", "runs", "cache"])
    level = draw.random()
    size = sum(path.stat().st_size for path in (trial.reference.whole / folder).rglob("*") if path.is_file())
    trial.copy(trial.reference.assets)
    if draw.random() < 0.75:
        options = f"size={max(8, int(level * size / 1024))}k"
    else:
        files = sum(1 for _ in (trial.reference.whole / folder).rglob("*"))
        options = f"size=64m,nr_inodes={2 + int(level * files)}"
    trial.what = f"{folder}/ on a disk of {options}"
    path = trial.mount(folder, options)
    ended = trial.keep(trial.start().wait(trial.limit))
    names = ("disk is full", "no room", "No space left", folder)
    return until_mended(trial, ended, names, lambda: remount(path, "size=64m,nr_inodes=10000"))


def until_mended(trial: Trial, ended: Ended, names: Sequence[str], mend: Callable[[], object] = bool) -> Verdict:
    """A start that met a fault refuses by one of the names; once that is mended the run ends as it should."""
    if verdict := trial.bad(ended):
        return verdict
    if not any(ended.codes):
        return Verdict(MISSED)
    line = judge.refusal(ended, names)
    if line is None:
        return Verdict(LOST, f"{ended.codes}: {ended.last}")
    mend()
    verdict = trial.finish()
    return Verdict(REFUSED, line) if verdict.outcome == SURVIVED else verdict


def slow(trial: Trial, draw: Random) -> Verdict:
    trial.copy(trial.reference.assets)
    seconds = draw.choice([0.02, 0.05, 0.1])
    trial.what = f"each change to the disk takes {seconds} s"
    planted = {rank: Planted(slow=seconds, fault=trial.fault) for rank in trial.ranks}
    return trial.once(trial.keep(trial.start(planted).wait(trial.limit))) or trial.finish()


def read_only(trial: Trial, draw: Random) -> Verdict:
    folder = draw.choice(["runs", "runs", "cache"])
    trial.copy(draw.choice([trial.reference.assets, trial.reference.killed]))
    path = trial.mount(folder, "size=64m")
    moment = 0.0 if draw.random() < 0.25 else draw.random() * trial.reference.seconds
    trial.what = f"{folder}/ becomes read-only after {moment:.2f} s"
    if moment == 0:
        remount(path, "ro")
    start = trial.start()
    time.sleep(moment)
    while start.running() and not remount(path, "ro"):
        time.sleep(0.02)
    ended = trial.keep(start.wait(trial.limit))
    return until_mended(trial, ended, (f"{folder}/", f"{folder}:", str(path)), lambda: remount(path, "rw"))


def clock(trial: Trial, draw: Random) -> Verdict:
    """It jumps by days while the run is at work, or while it is not: then the files are from another time."""
    jump = draw.choice([-1, 1]) * draw.choice([3600.0, 86400.0, 40 * 86400.0])
    if draw.random() < 0.5:
        trial.copy(trial.reference.killed)
        for path in trial.folder.rglob("*"):
            if RUN.parts[0] in path.parts or "cache" in path.parts:
                os.utime(path, (time.time() - jump,) * 2)
        trial.what = f"started again, and the clock has jumped by {jump / 3600:g} h"
        return trial.finish(resumes=True)
    trial.copy(trial.reference.assets)
    after = draw.random() * trial.reference.seconds
    trial.what = f"the clock jumps by {jump / 3600:g} h after {after:.2f} s"
    ranks = trial.ranks if draw.random() < 0.5 else [draw.choice(trial.ranks)]
    planted = {rank: Planted(jump=jump, jump_after=after, fault=trial.fault) for rank in ranks}
    return trial.once(trial.keep(trial.start(planted).wait(trial.limit))) or trial.finish()


def second(trial: Trial, draw: Random) -> Verdict:
    """The same command in another terminal, while the first is at work: one trains, the other is refused by name."""
    trial.copy(trial.reference.assets)
    moment = draw.random() * trial.reference.seconds * 0.9
    trial.what = f"the same command again after {moment:.2f} s"
    one = trial.start()
    time.sleep(moment)
    two = trial.start()
    ends = [trial.keep(start.wait(trial.limit)) for start in (one, two)]
    if verdict := trial.bad(ends[0]) or trial.bad(ends[1]):
        return verdict
    trained = [not any(ended.codes) and "is finished: nothing" not in ended.output for ended in ends]
    if trained == [True, True]:
        return Verdict(SILENT, "both trained")
    if not any(trained):
        return Verdict(LOST, f"none trained: {[ended.codes for ended in ends]}")
    return until_mended(trial, ends[trained.index(False)], ("runs/run",))


def tracker(trial: Trial, draw: Random) -> Verdict:
    """W&B's server, on this machine, hangs, fails, breaks off or is gone from some request on."""
    from wandb_server import KEY, Service

    trial.copy(trial.reference.assets)
    service = Service()
    service.fault = draw.choice(["hang", "hang", 500, "reset", "vanish"])
    service.at = draw.choice(["", "viewer", "upsertBucket", "file_stream", "train/loss", "createRunFiles"])
    trial.what = f"the server's fault is {service.fault}, from {service.at or 'the first request'} on"
    trial.extra, trial.limit = ["logger=wandb"], 240.0
    trial.environment = {"WANDB_BASE_URL": service.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}
    try:
        return trial.once(trial.keep(trial.start().wait(trial.limit))) or trial.finish()
    finally:
        service.vanish()


def damage(path: Path, draw: Random) -> str:
    """Damages a file; what was done to it. Half of the time the file system doesn't show that it has changed."""
    data, stat = path.read_bytes(), path.stat()
    text = path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".html", ".jinja")
    ways = ["flip", "flip", "truncate", "empty", "delete", "garbage"]
    ways += ["duplicate a line", "change a digit", "change a digit"] if text else []
    way, at = draw.choice(ways), int(draw.random() * len(data))
    digits = [match.start() for match in re.finditer(rb"[0-9]", data)]
    if way == "delete" or not data:
        path.unlink()
        return "delete"
    if way == "flip":
        data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    elif way == "truncate":
        data = data[:at]
    elif way == "empty":
        data = b""
    elif way == "garbage":
        data = draw.randbytes(len(data))
    elif way == "change a digit" and digits:
        at = digits[int(draw.random() * len(digits))]
        data = data[:at] + str((int(data[at : at + 1]) + draw.randint(1, 9)) % 10).encode() + data[at + 1 :]
    else:
        lines = data.splitlines(keepends=True)
        number = int(draw.random() * len(lines))
        data = b"".join([*lines[: number + 1], *lines[number:]])
    path.write_bytes(data)
    if draw.random() < 0.5:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return f"{way} at {at}"


def damaged(pattern: str, leaving: str = "") -> Act:
    """A file of a run that was killed, damaged before it is started again."""

    def act(trial: Trial, draw: Random) -> Verdict:
        trial.copy(trial.reference.killed)
        files = sorted(path for path in trial.folder.glob(pattern) if path.is_file() and path.stat().st_size)
        files = [path for path in files if not leaving or not re.search(leaving, str(path.relative_to(trial.folder)))]
        if not files:
            return Verdict(MISSED)
        path = files[int(draw.random() * len(files))]
        # Of checkpoints sometimes the same file of each, so that none is whole.
        every = [other for other in files if other.name == path.name] if draw.random() < 0.25 else [path]
        place = path.relative_to(trial.folder)
        before = {other: other.read_bytes() for other in every}
        done = [damage(other, draw) for other in every]
        trial.what = f"{place}{' and in each other' if len(every) > 1 else ''}: {', '.join(done)}"

        def heal() -> None:
            for other, content in before.items():
                other.parent.mkdir(parents=True, exist_ok=True)
                other.write_bytes(content)

        return trial.finish((path.name, f"{place.parent}"), heal, resumes=True, may_begin_anew=len(every) > 1)

    return act


def stray(trial: Trial, draw: Random) -> Verdict:
    """What a kill, an interrupted backup or an editor leaves behind, beside what belongs there."""
    trial.copy(trial.reference.killed)
    checkpoints = trial.run / "checkpoints"
    newest = max(saved.folders(checkpoints).values())
    name = draw.choice(
        [
            *(".unfinished-step-00000006", "step-00000002 (copy)", "step-00000006.bak", "step-6", "step-00000099"),
            *(".DS_Store", "step-latest", "step-0000000a", ".nfs000001"),
        ]
    )
    place = checkpoints / name
    how = draw.choice(["copy", "half a copy", "empty folder", "file"])
    trial.what = f"{place.relative_to(trial.folder)}: {how}"
    if "copy" in how:
        shutil.copytree(newest, place)
        if how != "copy":
            files = sorted(place.iterdir())
            for path in files[: 1 + int(draw.random() * (len(files) - 1))]:
                path.unlink()
    elif how == "file":
        place.write_bytes(draw.randbytes(100))
    else:
        place.mkdir()
    return trial.finish((name, "checkpoints"), resumes=True)


def inputs(trial: Trial, draw: Random) -> Verdict:
    """The data or the model is another than the one that the run began with."""
    trial.copy(trial.reference.killed)
    path = draw.choice(["rows.jsonl", "rows.jsonl", "model/model.safetensors", "model/config.json", "model/tokenizer"])
    file = trial.folder / path
    if path == "model/tokenizer":
        file = next(file for file in sorted((trial.folder / "model").iterdir()) if b"im_start" in file.read_bytes())
    before, stat = file.read_bytes(), file.stat()
    if file.name == "model.safetensors":
        at = len(before) // 2 + int(draw.random() * (len(before) // 2))
        after, how = before[:at] + bytes([before[at] ^ 64]) + before[at + 1 :], f"a bit of byte {at}"
    elif file.name == "config.json":
        after, how = before.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 2e-06'), "rms_norm_eps"
    elif file.name == "rows.jsonl":
        lines = before.splitlines(keepends=True)
        number = int(draw.random() * len(lines))
        way = draw.choice(["a letter", "a letter", "a row less", "a row twice"])
        line = re.sub(rb'(response": ").', rb"\1x", lines[number])  # no word of the rows has one
        new = {"a letter": [line], "a row less": [], "a row twice": [line, line]}[way]
        after, how = b"".join([*lines[:number], *new, *lines[number + 1 :]]), f"{way}, row {number}"
    else:
        after, how = before.replace(b"im_start", b"im_stort", 1), "im_start"
    if after == before:
        return Verdict(MISSED)
    file.write_bytes(after)
    same_time = draw.random() < 0.5
    if same_time:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    trial.what = f"{file.relative_to(trial.folder)}: {how} changed{', of the same time' if same_time else ''}"
    what = {"rows.jsonl": "the data", "config.json": "the model", "model.safetensors": "the model"}
    names = (file.name, what.get(file.name, "template"), "tokenizer") if "model" in path else (file.name, "the data")
    used = file.name != "model.safetensors"  # a resumed run has weights of its own
    return trial.finish(names, lambda: file.write_bytes(before), resumes=True, must_name=used)


def exported(trial: Trial, draw: Random) -> Verdict:
    """A file of a finished run's export, damaged before the export is used."""
    trial.copy(trial.reference.whole)
    files = sorted(path for path in (trial.run / "export").rglob("*") if path.is_file() and path.suffix != ".md")
    weights = [path for path in files if path.suffix == ".safetensors"]
    path = draw.choice(weights if draw.random() < 0.4 else files)
    command = draw.choice(
        [("score", "run=run"), ("generate", "run=run", "--prompt", "Reverse abc (7).", "max_new_tokens=16")]
    )
    truth = trial.reference.answer(command)
    trial.what = f"{path.relative_to(trial.folder)}: {damage(path, draw)}; sft {command[0]}"
    ended = trial.command(*command)
    if verdict := trial.bad(ended):
        return verdict
    if not any(ended.codes):
        if path in weights or ended.output != truth:
            return Verdict(SILENT, f"sft {command[0]} ended with 0")
        return Verdict(SURVIVED)
    line = judge.refusal(ended, (path.name, f"{RUN}/export", "no exported model"))
    if line is None:
        return Verdict(LOST, f"{ended.codes}: {ended.last}")
    if (target := judge.to_remove(line)) and not trial._remove(target):
        return Verdict(LOST, f"its advice can't be followed: {line[:300]}")
    return _export_again(trial, line)


def damaged_and_exported(trial: Trial, draw: Random) -> Verdict:
    """The checkpoint of a finished run, damaged before it is exported once more."""
    trial.copy(trial.reference.whole)
    last = max(saved.folders(trial.run / "checkpoints").values())
    path = draw.choice(sorted(path for path in last.iterdir() if path.is_file()))
    before = path.read_bytes()
    trial.what = f"{path.relative_to(trial.folder)}: {damage(path, draw)}; sft export"
    shutil.rmtree(trial.run / "export")
    ended = trial.command("export", "run=run")
    if verdict := trial.bad(ended):
        return verdict
    if not any(ended.codes):
        exports = Verdict(SURVIVED), Verdict(SILENT, "the export has other weights")
        return exports[_exported_truth(trial) != 0]
    line = judge.refusal(ended, (path.name, last.name))
    if line is None:
        return Verdict(LOST, f"{ended.codes}: {ended.last}")
    path.write_bytes(before)
    return _export_again(trial, line)


CHECKED = ("config.yaml", "status.json", "provenance.json", "data.json", "checkpoints/*/*", "export/*")  # of a run


def checked(trial: Trial, draw: Random) -> Verdict:
    """A file of a finished run, its token stores or its data, damaged: sft check names it."""
    trial.copy(trial.reference.whole)
    places = [*(f"{RUN}/{place}" for place in CHECKED), "cache/stores/*/*", "rows.jsonl"]
    files = sorted({path for place in places for path in trial.folder.glob(place) if path.is_file()})
    path = draw.choice([path for path in files if path.stat().st_size and path.name != "README.md"])
    before = _meaning(path)
    trial.what = f"{path.relative_to(trial.folder)}: {damage(path, draw)}; sft check"
    ended = trial.command("check", "run=run")
    if verdict := trial.bad(ended):
        return verdict
    if not any(ended.codes):
        return Verdict(SURVIVED) if _meaning(path) == before else Verdict(SILENT, "sft check ended with 0")
    said = next((line for line in ended.output.splitlines() if path.name in line), None)
    if ended.code == 1 and said:
        return Verdict(REFUSED, said)
    return Verdict(LOST, f"{ended.codes}: {ended.last}")


def _meaning(path: Path) -> object:
    """Of a file's bytes: a line that JSON has twice changes nothing."""
    try:
        data = path.read_bytes()
        return json.loads(data) if path.suffix == ".json" else data
    except (OSError, ValueError):
        return None


def _exported_truth(trial: Trial) -> int:
    """How many of the export's files have other weights than they should."""
    files = {name: value for name, value in trial.reference.truth.files.items() if name.startswith("export/")}
    return sum(
        judge.digest(path) != value if (path := trial.run / name).exists() else 1 for name, value in files.items()
    )


def _export_again(trial: Trial, line: str) -> Verdict:
    """After a refusal: sft export makes it whole."""
    ended: Ended = trial.command("export", "run=run")
    if verdict := trial.once(ended):
        return verdict
    return Verdict(SILENT, "exported again it has other weights") if _exported_truth(trial) else Verdict(REFUSED, line)


SINGLE = ("single",)
KINDS = [
    Kind("SIGKILL", signalled(signal.SIGKILL), 6),
    Kind("SIGTERM", signalled(signal.SIGTERM), 4),
    Kind("SIGUSR1", signalled(signal.SIGUSR1), 4),
    Kind("Ctrl-C (SIGINT)", signalled(signal.SIGINT), 3),
    Kind("closed terminal (SIGHUP)", signalled(signal.SIGHUP), 3),
    Kind("stopped longer than hang_after", stopped, 2),
    Kind("full disk", full, 4, ("single", "ddp"), mounts=True),
    Kind("read-only folder", read_only, 2, ("single", "ddp"), mounts=True),
    Kind("slow disk", slow, 1, ("single", "ddp")),
    Kind("clock that jumps", clock, 2, ("single", "ddp")),
    Kind("second owner", second, 3, ("single", "single", "ddp")),
    Kind("W&B server that fails", tracker, 2, SINGLE),
    Kind("damaged token store", damaged("cache/**/*", "lock$"), 5, SINGLE),
    Kind("damaged checkpoint", damaged("runs/run/checkpoints/step-*/*"), 7, ("single", "single", "ddp", "zero2")),
    Kind("damaged file of the run", damaged("runs/run/*", r"base\.safetensors"), 6, ("single", "single", "ddp")),
    Kind("damaged export", exported, 4, SINGLE),
    Kind("damaged checkpoint, exported", damaged_and_exported, 2, ("single", "ddp")),
    Kind("damaged file, sft check", checked, 3, SINGLE),
    Kind("stray file or folder", stray, 3, ("single", "ddp")),
    Kind("data or model changed", inputs, 4, ("single", "ddp")),
]
