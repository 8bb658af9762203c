"""`python -m attacks SCORES_DIR --out=DIR`: audit score tables that anybody made, and build the report."""

import argparse
import json
import os
import sys
from pathlib import Path

from attacks.audit import audit


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m attacks", description="Audit score tables. No JAX, no models.")
    parser.add_argument("scores_dir", type=Path, help="folder with <run>/seed<k>/plain/<role>-*.parquet and text/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result tables and the report")
    parser.add_argument("--settings", type=Path, help="JSON file with settings of the audit (keys: attacks/audit.py)")
    parser.add_argument("--headline-model", help="run whose leak is the headline (default: the first student)")
    given = parser.parse_args()
    os.umask(0o077)  # tables of private records, one row each, are their owner's alone
    try:
        settings = json.loads(given.settings.read_text(encoding="utf-8")) if given.settings else {}
        if given.headline_model:
            settings["headline_model"] = given.headline_model
        summary = audit(given.scores_dir, given.out, settings)
    except (ValueError, OSError) as error:
        print(f"attacks: {error}", file=sys.stderr)
        return 2
    print(summary["sentence"])
    for line in (*summary["verdicts"], *summary["warnings"]):
        print(f"- {line}")
    try:
        from attacks.report import build
    except ModuleNotFoundError as missing:
        print(f"no report was built: {missing.name} is not installed; the tables are in {given.out}")
        return 0
    print(f"report: {build(given.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
