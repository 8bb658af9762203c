"""`python -m benchmarks NAME ...` runs benchmarks/NAME.py; without a name it lists them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in known:
        raise SystemExit(f"usage: python -m benchmarks NAME [options]; NAME is one of {', '.join(known)}")
    sys.argv = [f"benchmarks {name}", *sys.argv[2:]]
    importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
