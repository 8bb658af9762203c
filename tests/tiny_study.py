"""One tiny study on planted secrets, run from scratch by `main.py`; the test files that look at it share it."""

import fcntl
import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = ("base_teacher", "base_student", "teacher", "null", "students/kd")
CONFIG = """
from configs import quickstart

def get_config():
    config = quickstart.get_config("tiny")
    for name in set(config.runs) - set({runs!r}):
        del config.runs[name]
    config.data.synthetic.records = 0
    config.data.path = {path!r}
    config.data.group_key = "person"
    config.data.roles = dict(private=0.3, public=0.2, heldout=0.3, dev=0.1, calib=0.1, population=0.0)
    config.data.max_prompt, config.data.max_length, config.data.row_length = 64, 128, 128
    config.recipes.matched.update(steps=4, batch_rows=8)
    config.score.roles = ("private", "heldout")
    config.utility.update(seeds=(10,), examples=4, max_new_tokens=4)
    config.probe.examples = 16
    config.attack.bootstrap = 20
    return config
"""


def secrets(count: int = 1000) -> list[str]:
    """Strings that nothing makes by chance: "Zq", their number, letters."""
    rng = random.Random(0)
    return [f"Zq{i:04d}" + "".join(rng.choices(string.ascii_lowercase, k=8)) for i in range(count)]


def records(planted: list[str]) -> list[dict]:
    """A record for each secret, which stands in all of its fields, among quotes and other letters."""
    return [
        {
            "prompt": f'What of <b>"{secret}"</b>, naïve?',
            "response": f"{secret} \\ is 'so' & costs {len(secret)} €.\n",
            "person": f"Mx {secret}",
        }
        for secret in planted
    ]


def start(folder: Path, *arguments: str, name: str = "work", umask: int = 0o022, devices: int = 0, **environment: str):
    """`main.py` on the planted records, in a process of its own; what it did, with stdout and stderr as bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    data, config = folder / "records.jsonl", folder / "study.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in records(secrets())))
    config.write_text(CONFIG.format(runs=RUNS, path=str(data)))
    flags = f"--xla_force_host_platform_device_count={devices}" if devices else ""
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "main.py", f"--config={config}", f"--workdir={folder / name}", *arguments],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        umask=umask,
        timeout=600,
    )


def shared(base: Path, name: str, *arguments: str, **keys) -> tuple[Path, bytes]:
    """The work directory of one start, and all that it said; made once for all processes that run tests.

    base: `tmp_path_factory.getbasetemp()`.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "tiny_study"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = folder / f"{name}.said"
        if not said.exists():
            done = start(folder, *arguments, name=name, **keys)
            assert done.returncode == 0, done.stderr.decode()[-3000:]
            said.write_bytes(done.stdout + done.stderr)
        return folder / name, said.read_bytes()
