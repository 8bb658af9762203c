"""Python code in a process of its own with a bound on its memory: what hostile input must not exceed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The bound is set after the imports, on top of what they have mapped; pools of threads would map more at any time.
BOUND = """
import resource
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + {mib} * 2**20, resource.RLIM_INFINITY))
"""


def run_limited(imports: str, code: str, *arguments: str, mib: int = 512) -> list[str]:
    """The lines that `code` prints, run after `imports` with at most `mib` MiB more than these need."""
    source = "\n".join([imports, BOUND.format(mib=mib), code])
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "RUST_BACKTRACE": "0"}
    settings |= {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
