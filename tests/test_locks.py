"""One work directory, one program: real processes that hold its locks, and what dies with them."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from kd_jax import locks
from kd_jax.errors import ConfigError

ROOT = Path(__file__).parent.parent

HOLD = """
import sys, time
from pathlib import Path
from kd_jax import locks
held = locks.take(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3])
print("held", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def holding(workdir: Path, stages: str, only: str = ""):
    environment = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir), stages, only], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_program_on_a_work_directory_is_refused(tmp_path):
    everything_, alone = ["train", "score", "attack", "report"], ["train", "score"]
    with holding(tmp_path, "train,score") as first:
        for only in ("", "students/kd"):
            with pytest.raises(
                ConfigError, match=f"in use by process {first.pid} on .*, started 20.*: wait for its end"
            ):
                locks.take(tmp_path, alone, only)
        audit = locks.take(tmp_path, ["attack", "report"])  # beside it
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"):
            locks.take(tmp_path, ["report"])
        [handle.close() for handle in audit]
        first.send_signal(signal.SIGKILL)
        first.wait()
        [handle.close() for handle in locks.take(tmp_path, everything_)]  # taken over from the dead
    with holding(tmp_path, "train,score", "students/kd") as first:
        other = locks.take(tmp_path, alone, "students/gkd")
        for only in ("students/kd", ""):
            with pytest.raises(ConfigError, match=f"in use by .*process {first.pid} on"):
                locks.take(tmp_path, alone, only)
        [handle.close() for handle in other]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())


def test_what_killed_programs_left_is_deleted_by_who_alone_writes_there(tmp_path):
    places = ("runs/teacher", "scores/null", "report")
    left = [tmp_path / place / ".half.0123456789ab.tmp" for place in places]
    for path in left:
        path.parent.mkdir(parents=True)
        path.write_text("x")
    there = lambda: [path.exists() for path in left]
    for stages, only, expected in (
        (["train", "score"], "students/kd", [True, True, True]),
        (["train", "score"], "teacher", [False, True, True]),
        (["train", "score"], "", [False, False, True]),
        (["attack", "report"], "", [False, False, False]),
    ):
        [handle.close() for handle in locks.take(tmp_path, stages, only)]
        assert there() == expected


def test_a_bucket_has_no_lock():
    assert locks.take(epath.Path("gs://bucket/study"), ["train"]) == []
