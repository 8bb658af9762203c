"""From score tables to result tables: runs the attacks, the gates and the comparisons, and writes the files.

membership.csv  differences.csv  gates.csv  utility.csv  roc.parquet  summary.json, and where there is something to say
attacks.csv  tasks.csv  decisions.csv  agreement.csv  supervision.csv  alpha.csv  exposure.csv  dataset.csv
memorization.csv  inheritance.csv  mechanism.csv  prediction.csv  disagreement.csv  claims.csv
blocks.csv  shadow.csv  counterfactual.csv  epsilon.csv
vulnerable.parquet  ledger.parquet  extraction.parquet  mechanism_points.parquet  disagreement_examples.parquet
counterfactual.parquet  influence.parquet
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from attacks import (
    agreement,
    alpha,
    blocks,
    counterfactual,
    dataset_inference,
    disagreement,
    epsilon,
    exposure,
    files,
    influence,
    inheritance,
    mechanism,
    memorization,
    prediction,
    shadow,
    supervision,
    trends,
)
from attacks.chains import Chains, read_chains
from attacks.corrections import attack_rows, corrected_facts
from attacks.cuts import Memorized
from attacks.decisions import decision_facts, decision_rows
from attacks.differences import difference_rows
from attacks.duplicates import duplicate_facts, duplicate_rows
from attacks.gates import count_rows, null_rows, run_blind
from attacks.ledger import ledger_facts, read_ledgers
from attacks.membership import ATTACKS, expand, parse
from attacks.rows import membership_rows, roc_points
from attacks.scoring import load_study
from attacks.study import CANARIES, PAIRS, Study
from attacks.summary import group_facts, summarize
from attacks.tables import TableError, read_scores
from attacks.tasks import task_facts, task_rows
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
    "cuts": [],  # (prefix, suffix) in tokens, of what is called memorized; []: attacks/cuts.py
    "filtered": {},  # run: form:run, those that were to be trained without what a filter found
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
# Written only where they have rows.
OPTIONAL = {
    "attacks": "model technique setting role_pair seed attack auc p_value p_corrected rule family null_median "
    "n_members n_nonmembers",
    "tasks": "test model model_b setting attack role_pair seed task value ci_low ci_high statistic df p_value "
    "p_corrected n_members n_nonmembers",
    "decisions": "model technique setting attack role_pair seed measure fpr prior value ci_low ci_high ci_kind "
    "by_chance verdict n_members n_nonmembers",
    "agreement": agreement.COLUMNS,
    "supervision": supervision.COLUMNS,
    "exposure": exposure.COLUMNS,
    "dataset": dataset_inference.COLUMNS,
    "alpha": alpha.COLUMNS,
    "memorization": memorization.COLUMNS,
    "inheritance": inheritance.COLUMNS,
    "mechanism": mechanism.COLUMNS,
    "prediction": prediction.COLUMNS,
    "disagreement": disagreement.COLUMNS,
    "claims": trends.COLUMNS,
    "blocks": blocks.COLUMNS,
    "shadow": shadow.COLUMNS,
    "counterfactual": counterfactual.COLUMNS,
    "epsilon": epsilon.COLUMNS,
}
PER_EXAMPLE = (  # frames that may be empty
    "vulnerable",
    "extraction",
    "mechanism_points",
    "disagreement_examples",
    "counterfactual",
    "influence",
)


def audit(scores_dir: str | Path, out_dir: str | Path, settings: dict) -> dict:
    """Audit the score tables under `scores_dir`; write the result tables into `out_dir` and return the summary.

    summary.json is the last: it is missing where an audit was cut off between two tables, and then no report is built.

    settings: any keys of DEFAULTS.  Values that cannot be computed are empty in the CSV files, with the reason under
    `unresolved` in the summary.  Raises TableError on tables that cannot be read, ValueError on unknown settings.
    """
    study = load_study(scores_dir, complete(settings, scores_dir))
    chains = read_chains(scores_dir)
    blind = run_blind(study, scores_dir, "private-heldout")
    membership, differences = membership_rows(study), difference_rows(study)
    gates = [
        *blind.rows(),
        *blind.excess_rows(study),
        *_canary_gate(study, scores_dir),
        *duplicate_rows(study, scores_dir),
        *null_rows(study),
        *utility_gate(study),
        *count_rows(study),
    ]
    tables = {"membership": membership, "differences": differences, "gates": gates, "utility": utility_rows(study)}
    tables["attacks"], tables["decisions"] = attack_rows(study), decision_rows(study)
    tables["tasks"] = task_rows(study) if study.settings["tasks"] else []
    tables["agreement"], tables["supervision"] = agreement.rows(study), supervision.rows(study)
    tables["alpha"] = alpha.curve(study, membership, tables["agreement"], tables["supervision"])
    tables["exposure"], tables["dataset"] = exposure.exposure_rows(study), dataset_inference.dataset_rows(study)
    tables["blocks"], tables["epsilon"] = blocks.rows(study), epsilon.rows(study, chains)
    memory, examples = _memorization(study, tables["exposure"])
    many, more = _chains(study, chains)
    ledger = read_ledgers(study)
    summary = summarize(study, scores_dir, membership, differences, gates, blind) | {
        "ledger": ledger_facts(ledger),
        "corrected": corrected_facts(study, tables["attacks"]),
        "tasks": task_facts(study, tables["tasks"]),
        "decisions": decision_facts(study, tables["decisions"]),
        "groups": group_facts(study),
        "near_duplicates": duplicate_facts(gates),
        "exposure": exposure.exposure_facts(tables["exposure"]),
        "claims": trends.claim_words(memory["claims"]),
        "blocks": blocks.facts(study, tables["blocks"]),
        "epsilon": epsilon.words(tables["epsilon"], study.settings["primary"]),
        "shadow": shadow.facts(many["shadow"]),
    }
    apart = (tables[name] for name in ("agreement", "supervision", "blocks", "epsilon"))
    summary["unresolved"] += _reasons([*chain(*apart, *memory.values(), *many.values())])
    summary["verdicts"] += [*summary["corrected"]["words"], summary["tasks"]["words"]]
    summary["verdicts"] += summary["near_duplicates"]["words"]
    summary["warnings"] += summary["groups"]["words"]
    if chains is None or chains.design == "cheap":
        summary["not_tested"].append("attacks by many models (LiRA, RMIA): no shadow chains of more than two teachers")
    frames = {"roc": roc_points(study), "ledger": ledger, "vulnerable": agreement.vulnerable(study)}
    summary = _plain(summary)
    last = ("summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    files.write(Path(out_dir), chain(_contents(tables | memory | many, frames | examples | more), [last]))
    return summary


def _memorization(study: Study, exposures: list[dict]) -> tuple[dict[str, list[dict]], dict[str, pd.DataFrame]]:
    """The tables of what is memorized, and its rows per example. Raises ValueError for a cut that no text has."""
    memorized = Memorized(study, [tuple(cut) for cut in study.settings["cuts"]])
    makers = dict(
        memorization=memorization.memorization_rows,
        inheritance=inheritance.rows,
        mechanism=mechanism.rows,
        prediction=prediction.rows,
        disagreement=disagreement.rows,
        claims=lambda study, memorized: trends.rows(study, memorized, exposures),
    )
    frames = {
        "extraction": memorization.extraction_table(study, memorized),
        "mechanism_points": mechanism.points(study, memorized),
        "disagreement_examples": disagreement.examples(study, memorized),
    }
    return {name: make(study, memorized) for name, make in makers.items()}, frames


def _chains(study: Study, chains: Chains | None) -> tuple[dict[str, list[dict]], dict[str, pd.DataFrame]]:
    """The tables of attacks by many models, and theirs per example; empty where there are no shadow chains."""
    if chains is None:
        none = pd.DataFrame()
        return {"shadow": [], "counterfactual": []}, {"counterfactual": none, "influence": none}
    tables = {"shadow": shadow.rows(study, chains), "counterfactual": counterfactual.rows(study, chains)}
    frames = {
        "counterfactual": counterfactual.examples(study, chains),
        "influence": influence.influences(study, chains),
    }
    return tables, frames


def _contents(
    tables: dict[str, list[dict]], frames: dict[str, pd.DataFrame | None]
) -> Iterator[tuple[str, bytes | None]]:
    """Names and contents of all tables; of those that have nothing to say None: what an earlier audit left must go."""
    for name, rows in tables.items():
        # dtype object: counts and seeds stay integers beside empty cells.
        frame = pd.DataFrame(rows, columns=(COLUMNS | OPTIONAL)[name].split(), dtype=object)
        none = name in OPTIONAL and all("reason" in row for row in rows)
        yield f"{name}.csv", None if none else frame.to_csv(index=False).encode()
    for name, frame in frames.items():
        none = frame is None or (name in PER_EXAMPLE and frame.empty)
        yield f"{name}.parquet", None if none else frame.to_parquet(compression="zstd", index=False)


def _reasons(rows: list[dict]) -> list[dict]:
    """Rows that could not be computed, as the summary's `unresolved` has them: one entry for all models and seeds that
    lack a measure for the same reason, joined by commas."""
    found: dict[tuple, dict[str, dict[str, None]]] = {}
    for row in (row for row in rows if "reason" in row):
        model = row.get("student") or row.get("model") or row.get("model_a") or "all models"
        at = [row.get(key, "all") for key in ("attack", "role_pair", "task")]
        at[1] = row.get("role", at[1])
        same = found.setdefault((*at, row.get("measure") or row["metric"], row["reason"]), {"model": {}, "seed": {}})
        same["model"][model] = same["seed"][str(row.get("seed", "all"))] = None
    names = ("attack", "role_pair", "task", "metric", "reason")
    return [
        dict(zip(names, key, strict=True)) | {name: ", ".join(each) for name, each in joined.items()}
        for key, joined in found.items()
    ]


def check(primary: str, role_pair: str, bootstrap: int) -> None:
    """What of the settings can be wrong before there is a table. Raises ValueError."""
    name, reference, _ = parse(primary)
    if ATTACKS[name].reference and not reference:
        raise ValueError(f"attack.primary {primary} needs a reference: {name}:base_student")
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
