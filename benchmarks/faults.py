"""Nothing lost: copies of a small study are killed at random points, started again, and must end with equal tables.

    python -m benchmarks.faults --minutes=30 [--seed=0] [--workdir=FOLDER] [--config=...]

The study runs undisturbed once. Then copy after copy of it is started, killed up to `--faults` times, and run to its
end. The first fault of a copy falls into a stage, into each as often as into the others. A fault is SIGKILL or SIGTERM
at a random moment, or SIGKILL just before or just after the n-th time that the program renames, removes or makes a file
or folder: that is also where a folder has its name and its manifest is not there yet. Every CSV file of the report,
every score table, ledger and fingerprint must then be that of the undisturbed study. Prints how many faults fell into
which stage, and ends with 1 where anything differs or a start failed.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
OPERATIONS = ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "remove"), (os, "mkdir"), (shutil, "rmtree"))
AGAIN = 75  # exit code after SIGTERM


# ------------------------------------------------------------------------------------------------ the program, killed


def die_at(number: int) -> Callable[[], int]:
    """Let this process die by SIGKILL at its `number`-th operation on files: odd numbers before it, even ones after.

    Returns what says how many there were so far.
    """
    numbers, count = itertools.count(1), 0

    def watched(operation: Callable) -> Callable:
        def call(*arguments, **keywords):
            nonlocal count
            count = mine = next(numbers)  # one number each, whatever other threads do
            if mine == number and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            found = operation(*arguments, **keywords)
            if mine == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    for module, name in OPERATIONS:
        setattr(module, name, watched(getattr(module, name)))
    return lambda: count


def program(number: int, arguments: list[str]) -> None:
    """main.py in this process, which says when a stage begins: `stage NAME SECONDS OPERATIONS`."""
    import atexit

    began, count = time.monotonic(), die_at(number)

    def announce(name: str) -> None:
        print(f"stage {name} {time.monotonic() - began:.2f} {count()}", file=sys.stderr, flush=True)

    announce("start")
    from absl import app

    import main

    def announced(name: str, stage: Callable) -> Callable:
        def run(study):
            announce(name)
            return stage(study)

        return run

    main.STAGES.update({name: announced(name, stage) for name, stage in main.STAGES.items()})
    atexit.register(announce, "end")
    main.flags.mark_flag_as_required("config")
    app.run(main.main, argv=["main.py", *arguments])


# ------------------------------------------------------------------------------------------------ starts and faults


class Moment(NamedTuple):
    """When a stage of the undisturbed study began."""

    stage: str
    seconds: float
    operations: int


def start(workdir: Path, config: str, cache: Path, *, operation: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.faults", f"--die-at={operation}", "--"]
    command += [f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def said(workdir: Path) -> list[str]:
    return (workdir.parent / f"{workdir.name}.log").read_text(errors="replace").splitlines()


def moments(workdir: Path, since: int = 0) -> list[Moment]:
    """The stages that a start announced; `since` counts the lines of the log before it."""
    words = [line.split() for line in said(workdir)[since:] if line.startswith("stage ")]
    return [Moment(name, float(seconds), int(operations)) for _, name, seconds, operations in words]


def disturb(workdir: Path, config: str, cache: Path, chance: random.Random, between: tuple[Moment, Moment]):
    """One start with one fault: returns (kind, stage, exit code); kind is "" where it ended before the fault."""
    kind = chance.choice(["SIGKILL", "SIGTERM", "operation", "operation"])
    since = len(said(workdir)) if (workdir.parent / f"{workdir.name}.log").exists() else 0
    share = chance.random()
    at = lambda what: (1 - share) * getattr(between[0], what) + share * getattr(between[1], what)
    number = 1 + int(at("operations")) if kind == "operation" else 0
    process = start(workdir, config, cache, operation=number)
    try:
        process.wait(timeout=None if number else at("seconds"))
    except subprocess.TimeoutExpired:
        process.send_signal(getattr(signal, kind))
        process.wait()
    code = process.returncode
    hit = code in (-signal.SIGKILL, -signal.SIGTERM, AGAIN)
    seen = [moment.stage for moment in moments(workdir, since) if moment.stage != "end"]  # SIGTERM ends in order
    return (kind if hit else ""), (seen[-1] if seen else "start"), code


# ------------------------------------------------------------------------------------------------------ comparison


def results(workdir: Path) -> dict[str, object]:
    """What must be equal, by name: bytes of CSV files, tables with what they say of themselves, fingerprints."""
    import pyarrow.parquet as pq

    found: dict[str, object] = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir).as_posix()
        if path.suffix == ".csv":
            found[name] = path.read_bytes()
        elif path.suffix == ".parquet" and "/ledger/" not in name:
            table = pq.read_table(path)
            found[name] = (table.replace_schema_metadata(), table.schema.metadata)
        elif path.name == "manifest.json" and name.startswith("runs/") and path.parent.name.startswith("seed"):
            facts = json.loads(path.read_text())["facts"]
            found[name] = {key: facts[key] for key in ("params_fingerprint", "selected_step", "dev", "grid")}
    return found


def differing(expected: dict, found: dict) -> list[str]:
    missing = sorted(expected.keys() ^ found.keys())
    return missing + [name for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]


# ------------------------------------------------------------------------------------------------------------ main


def soak(folder: Path, config: str, minutes: float, seed: int, faults: int) -> int:
    """Returns the number of copies that failed or differ."""
    chance, cache = random.Random(seed), folder / "compiled"
    undisturbed = folder / "undisturbed"
    for _ in range(2):  # once to fill the cache of compiled programs, once to take the times
        shutil.rmtree(undisturbed, ignore_errors=True)
        (folder / "undisturbed.log").unlink(missing_ok=True)
        if start(undisturbed, config, cache).wait():
            print("\n".join(["the undisturbed study failed:", *said(undisturbed)[-20:]]))
            return 1
    known = moments(undisturbed)
    stages, expected = list(zip(known, known[1:])), results(undisturbed)
    print(f"undisturbed: {known[-1].seconds:.0f} s, {known[-1].operations} operations on files, {len(expected)} tables")
    print(", ".join(f"{a.stage} {b.seconds - a.seconds:.0f} s" for a, b in stages), flush=True)

    until, met, bad, copies = time.monotonic() + 60 * minutes, collections.Counter(), 0, 0
    while time.monotonic() < until or not copies:
        copies += 1
        workdir = folder / f"copy{copies}"
        between = stages[(copies - 1) % len(stages)]
        for _ in range(chance.randint(1, faults)):
            kind, stage, code = disturb(workdir, config, cache, chance, between)
            if not kind:
                break
            met[kind, stage] += 1
            between = chance.choice(stages)
        problem = [f"a start ended with {code}"] if not kind and code else []
        if not problem and (code := start(workdir, config, cache).wait()):
            problem = [f"the last start ended with {code}"]
        problem += [] if problem else differing(expected, results(workdir))
        if problem:
            bad += 1
            print("\n".join([f"{workdir}: {', '.join(problem[:8])}", *said(workdir)[-15:]]), flush=True)
        else:
            shutil.rmtree(workdir)
    for (kind, stage), number in sorted(met.items()):
        print(f"{number:4d}  {kind} in {stage}")
    print(f"{copies} copies, {sum(met.values())} faults, {copies - bad} with all {len(expected)} tables equal")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="copies begin within this time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--faults", type=int, default=4, help="of a copy, at most")
    parser.add_argument("--config", default="benchmarks/_faults_study.py")
    parser.add_argument("--workdir", type=Path, help="kept; default a temporary folder")
    parser.add_argument("--die-at", type=int, default=None, help=argparse.SUPPRESS)  # how it starts the program
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.die_at is not None:
        return program(options.die_at, options.arguments)
    settings = options.config, options.minutes, options.seed, options.faults
    if options.workdir:
        if options.workdir.exists():
            parser.error(f"--workdir={options.workdir} exists: name a folder that does not")
        options.workdir.mkdir(parents=True)
        sys.exit(min(1, soak(options.workdir.absolute(), *settings)))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(min(1, soak(Path(folder), *settings)))


if __name__ == "__main__":
    main()
