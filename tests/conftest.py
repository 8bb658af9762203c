"""Eight virtual devices for every test, programs compiled quickly and once, and the table of scientific checks."""

import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiling is most of the work. Machine code is left as LLVM makes it without its passes; the quickstart and
# tests/test_end_to_end.py run what users run, and with JAX_DISABLE_MOST_OPTIMIZATIONS=0 so does every test.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

_CHECKS: dict[str, tuple[float, float, int]] = {}  # name -> worst deviation, its tolerance, number of comparisons


def pytest_configure(config):
    """What one process of the tests compiled, another one, or a program that a test starts, need not compile again."""
    if not hasattr(config, "workerinput") and not jax.config.jax_compilation_cache_dir:
        folder = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
        for name, value in settings.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """XLA maps memory for every CPU program it keeps; some thousands of them exhaust the kernel's limit on mappings."""
    yield
    jax.clear_caches()


@pytest.fixture
def check():
    """`check(name, deviation, tolerance)`: assert that a deviation is within tolerance and put it in the table."""

    def check(name: str, deviation: float, tolerance: float) -> None:
        deviation = float(deviation)
        worst, _, count = _CHECKS.get(name, (float("-inf"), tolerance, 0))
        _CHECKS[name] = (max(worst, deviation), tolerance, count + 1)
        assert deviation <= tolerance, f"{name}: deviation {deviation:.3g} exceeds {tolerance:.3g}"

    return check


def pytest_sessionfinish(session):
    """A process that ran a part of the tests hands its checks to the one that prints the table."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["checks"] = _CHECKS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for name, (worst, tolerance, count) in getattr(node, "workeroutput", {}).get("checks", {}).items():
        before = _CHECKS.get(name, (float("-inf"), tolerance, 0))
        _CHECKS[name] = (max(worst, before[0]), tolerance, count + before[2])


def pytest_terminal_summary(terminalreporter):
    if not _CHECKS:
        return
    terminalreporter.section("scientific checks: worst deviation")
    width = max(map(len, _CHECKS))
    for name, (worst, tolerance, count) in sorted(_CHECKS.items()):
        terminalreporter.write_line(f"{name:<{width}}  {worst:10.3g}  (allowed {tolerance:.3g}, {count} comparisons)")
    try:
        import torch

        terminalreporter.write_line(f"parity against PyTorch {torch.__version__}, run here")
    except ImportError:
        terminalreporter.write_line(
            "parity against stored float64 logits of PyTorch (made on Python 3.11; no PyTorch here)"
        )
