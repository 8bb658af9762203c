"""From score tables to result tables: runs the attacks, the gates and the comparisons, and writes the files.

membership.csv  differences.csv  gates.csv  utility.csv  roc.parquet  ledger.parquet  summary.json
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from attacks.differences import difference_rows
from attacks.gates import count_rows, null_rows, run_blind
from attacks.ledger import ledger_facts, read_ledgers
from attacks.membership import ATTACKS, expand, parse
from attacks.rows import membership_rows, roc_points
from attacks.study import CANARIES, PAIRS, Study, load_study
from attacks.summary import summarize
from attacks.tables import TableError, read_scores
from attacks.utility import utility_gate, utility_rows

DEFAULTS = {
    "title": "",
    "attacks": list(ATTACKS),  # ids; one with a reference and none named runs against each of `references`
    "references": None,  # run names; None: those of REFERENCES that were scored
    "primary": "loss",  # the attack of the headline, fixed beforehand
    "headline_model": None,  # None: the first student, else the first run
    "role_pair": "private-heldout",  # or `averaged`, where the headline model has a swap
    "seed": 0,  # of resampling and of the blind classifiers
    "bootstrap": 1000,  # resamples
    "blind": True,  # False: no blind gate, and so no headline
    "tasks": True,  # AUC per task as well
    "unit": "record",  # what privacy is promised to
    "data": {},
    "run_settings": {},
    "versions": {},  # printed as they are
}
REFERENCES = ("base_student", "base_teacher", "null", "reference")
COLUMNS = {
    "membership": "model technique setting access attack role_pair task metric value ci_low ci_high ci_kind n_members "
    "n_nonmembers seed",
    "differences": "model_a model_b setting access attack role_pair task metric difference ci_low ci_high ci_kind "
    "p_value p_corrected n_members n_nonmembers seed",
    "gates": "gate model task metric value ci_low ci_high n seed verdict",
    "utility": "model technique setting measure value ci_low ci_high n seed",
}


def audit(scores_dir: str | Path, out_dir: str | Path, settings: dict) -> dict:
    """Audit the score tables under `scores_dir`; write the result tables into `out_dir` and return the summary.

    settings: any keys of DEFAULTS.  Values that cannot be computed are empty in the CSV files, with the reason under
    `unresolved` in the summary.  Raises TableError on tables that cannot be read, ValueError on unknown settings.
    """
    study = load_study(scores_dir, complete(settings, scores_dir))
    blind = run_blind(study, scores_dir, "private-heldout")
    membership, differences = membership_rows(study), difference_rows(study)
    gates = [
        *blind.rows(),
        *blind.excess_rows(study),
        *_canary_gate(study, scores_dir),
        *null_rows(study),
        *utility_gate(study),
        *count_rows(study),
    ]
    ledger = read_ledgers(study)
    summary = summarize(study, scores_dir, membership, differences, gates, blind)
    summary["ledger"] = ledger_facts(ledger)
    utility = utility_rows(study)

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tables = {"membership": membership, "differences": differences, "gates": gates, "utility": utility}
    for name, rows in tables.items():
        # dtype object: counts and seeds stay integers beside empty cells.
        pd.DataFrame(rows, columns=COLUMNS[name].split(), dtype=object).to_csv(out / f"{name}.csv", index=False)
    roc_points(study).to_parquet(out / "roc.parquet", compression="zstd", index=False)
    if ledger is None:
        (out / "ledger.parquet").unlink(missing_ok=True)  # of an earlier audit
    else:
        ledger.to_parquet(out / "ledger.parquet", compression="zstd", index=False)
    summary = _plain(summary)
    (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8")
    return summary


def check(primary: str, role_pair: str, bootstrap: int) -> None:
    """What of the settings can be wrong before there is a table. Raises ValueError."""
    parse(primary)
    if role_pair not in (*PAIRS, "averaged"):
        raise ValueError(f"role_pair '{role_pair}' is not one of {', '.join(PAIRS)}, averaged")
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, not {bootstrap}")


def complete(settings: dict, scores_dir: str | Path) -> dict:
    """Settings with defaults filled in from what was scored. Raises ValueError on what does not exist."""
    if unknown := set(settings) - set(DEFAULTS):
        raise ValueError(f"unknown audit settings {', '.join(sorted(unknown))}; known are {', '.join(DEFAULTS)}")
    full = DEFAULTS | settings
    runs = list(dict.fromkeys(table.run for table in read_scores(scores_dir)))
    if full["references"] is None:
        full["references"] = [run for run in REFERENCES if run in runs]
    if full["headline_model"] is None:
        full["headline_model"] = next((r for r in runs if r == "student" or r.startswith("students/")), runs[0])
    if full["headline_model"] not in runs:
        raise TableError(
            f"{scores_dir}: no score table of the headline model {full['headline_model']}; there are {', '.join(runs)}"
        )
    check(full["primary"], full["role_pair"], full["bootstrap"])
    if full["primary"] not in expand(full["attacks"], full["references"], full["headline_model"]):
        full["attacks"] = [full["primary"], *full["attacks"]]
    return full


def _canary_gate(study: Study, scores_dir: str | Path) -> list[dict]:
    scored = any("canary" in table.files for table in study.tables.values())
    return run_blind(study, scores_dir, CANARIES).rows() if scored else []


def _plain(value):
    """NumPy numbers as Python's, NaN as None: what JSON can hold."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
