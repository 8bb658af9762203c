"""summary.json: the headline and its sentence, verdicts, warnings, and what was not computed or not tested."""

import json
import platform
import zlib
from pathlib import Path

import numpy as np
import scipy
import sklearn

from attacks.gates import NOT_RUN, SPLIT_LEAKS, Blind
from attacks.membership import ATTACKS, parse
from attacks.ranking import rankings
from attacks.rows import by_seed
from attacks.study import CANARIES, Study
from attacks.utility import UNDERTRAINED

HEADLINE = ("model", "attack", "access", "role_pair", "value", "ci_low", "ci_high", "n_members", "n_nonmembers", "seed")


def summarize(
    study: Study,
    scores_dir: str | Path,
    membership: list[dict],
    differences: list[dict],
    gates: list[dict],
    blind: Blind,
) -> dict:
    """Everything a reader needs beside the tables; keys as in the README's table of result files."""
    settings = study.settings
    headline = _headline(study, membership, blind)
    comparison = _comparison(study, membership, blind, headline)
    ranked = rankings(study, membership, differences)
    canaries = Path(scores_dir) / "text" / "canaries.json"
    return {
        "title": settings["title"],
        "headline": headline,
        "sentence": _sentence(study, headline, comparison, gates, blind),
        "comparison": comparison,
        "worst": _worst(study, membership),
        "verdicts": _verdicts(study, membership, gates, blind, headline, ranked),
        "ranking": ranked,
        "warnings": _warnings(study, blind),
        "not_tested": _not_tested(study, membership),
        "unavailable": study.unavailable,
        "unresolved": _unresolved([row for row in (*membership, *differences) if "reason" in row]),
        "runs": [_run(study, run) for run in study.runs],
        "unit": settings["unit"],
        "data": settings["data"],
        "run_settings": settings["run_settings"],
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "scikit-learn": sklearn.__version__,
            "zlib": zlib.ZLIB_RUNTIME_VERSION,
        }
        | settings["versions"],
        "canaries": json.loads(canaries.read_text(encoding="utf-8")) if canaries.exists() else [],
    }


def _run(study: Study, run: str) -> dict:
    seeds, told = study.seeds(run), study.provenance(run)
    known = {key: told.get(key) for key in ("train_roles", "teacher", "init", "recipe", "n_params")}
    training = {str(seed): study.tables[run, seed].provenance.get("training") for seed in seeds}
    return (
        study.head(run)
        | known
        | {"seeds": seeds, "step": study.tables[run, seeds[0]].step, "swap": study.swap(run)}
        | {"objective": told.get("objective"), "training": {k: v for k, v in training.items() if v}}
    )


def _unresolved(rows: list[dict]) -> list[dict]:
    """Why values are empty: one entry a row, but one for all models, attacks and seeds where a task is too small."""
    found, of_tasks = [], {}
    for row in rows:
        model = row.get("model") or f"{row['model_a']} - {row['model_b']}"
        one = {"model": model} | {key: row[key] for key in ("attack", "role_pair", "task", "metric", "seed", "reason")}
        if row["task"] == "all":
            found.append(one)
        else:
            of_tasks.setdefault((row["role_pair"], row["task"], row["metric"], row["reason"]), []).append(one)
    for same in of_tasks.values():
        joined = {key: ", ".join(dict.fromkeys(str(one[key]) for one in same)) for key in ("model", "attack", "seed")}
        found.append(same[0] | joined)
    return found


def _find(rows: list[dict], **wanted) -> dict | None:
    """The row of all seeds together where there is one, else that of the only seed."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return next((row for row in found if row.get("seed") == "all"), found[0] if found else None)


def _leak(study: Study, membership: list[dict], model: str | None, role_pair: str) -> dict | None:
    attack = study.settings["primary"]
    row = _find(membership, model=model, attack=attack, role_pair=role_pair, task="all", metric="auc")
    return row and {key: row.get(key) for key in HEADLINE} | {"refused": row.get("reason")}


def _headline(study: Study, membership: list[dict], blind: Blind) -> dict:
    settings = study.settings
    model, attack, role_pair = (settings[key] for key in ("headline_model", "primary", "role_pair"))
    headline = _leak(study, membership, model, role_pair)
    if headline is None:
        headline = dict.fromkeys(HEADLINE) | {"model": model, "attack": attack, "role_pair": role_pair}
        headline["refused"] = f"{model} has no row of {attack} on {role_pair}"
    if blind.reason is not None:
        headline["refused"] = f"the blind gate was not run: {blind.reason}"
    elif blind.separates:
        found = _percent(_blind_leak(blind))
        headline["refused"] = f"the text alone tells members from non-members in {found} of pairs"
    return headline


def _blind_leak(blind: Blind) -> dict:
    found = blind.interval
    return {
        "model": f"blind:{blind.best}",
        "attack": blind.best,
        "access": "text",
        "role_pair": blind.pair.role_pair,
        "value": found.value,
        "ci_low": found.low,
        "ci_high": found.high,
        "n_members": len(blind.pair.members),
        "n_nonmembers": len(blind.pair.nonmembers),
        "seed": "all",
        "refused": None,
    }


def _comparison(study: Study, membership: list[dict], blind: Blind, headline: dict) -> dict:
    """What stands beside the headline, on private against held-out records: other models have no `averaged` value."""
    teacher = study.provenance(headline["model"]).get("teacher") or "teacher"
    others = {"null": "null", "teacher": teacher, "direct": "direct", "swap": study.swap(headline["model"])}
    found = {name: _leak(study, membership, run, "private-heldout") for name, run in others.items()}
    return found | {"blind": None if blind.reason is not None else _blind_leak(blind)}


def _percent(leak: dict) -> str:
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * leak[key] for key in ("value", "ci_low", "ci_high")))


def _seed_words(study: Study, run: str) -> str:
    seeds = len(study.seeds(run))
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _sentence(study: Study, headline: dict, comparison: dict, gates: list[dict], blind: Blind) -> str:
    model = headline["model"]
    if headline["refused"] is not None:
        excess = _find(gates, gate="blind", model=model, metric="auc_minus_blind") if blind.separates else None
        more = ""
        if excess:
            adds = f"adds {_percent(excess)} of pairs" if excess["ci_low"] > 0 else "adds nothing that can be resolved"
            more = f" Beyond the text, {headline['attack']} {adds}."
        return f"No headline number: {headline['refused']}.{more}"
    holder = "only the student" if model in study.students else f"only the model {model}"
    beside = [("without a teacher", "null"), ("the teacher itself", "teacher"), ("from the text alone", "blind")]
    sizes = f"{headline['n_members']:,} members, {headline['n_nonmembers']:,} non-members, {_seed_words(study, model)}"
    words = [
        f"An attacker who holds {holder} ranks a private record above an unseen one in {_percent(headline)} "
        f"of pairs ({sizes})"
    ]
    for phrase, name in beside:
        leak = comparison[name]
        words.append(f"{phrase} {_percent(leak) if leak and leak['value'] is not None else 'not measured'}")
    end = ". Models of this size; do not extrapolate."
    gap = _utility_verdict(gates, model)
    return "; ".join(words) + end + (f" This model is {UNDERTRAINED}." if gap == UNDERTRAINED else "")


def _utility_verdict(gates: list[dict], model: str) -> str | None:
    row = _find([g for g in gates if g["gate"] == "utility" and not g["metric"].endswith("_null")], model=model)
    return row and row["verdict"]


def _worst(study: Study, membership: list[dict]) -> dict:
    """The best supported leak of a student over all attacks, role pairs and tasks: the greatest lower end.

    By the value alone it would be a slice of a dozen records that happens to be separated.  Attacks that read the
    teacher itself play no part: on a student they show the teacher's leak as well.
    """
    rows = [
        row
        for row in membership
        if row["model"] in (study.students or [study.settings["headline_model"]])
        and row["metric"] == "auc"
        and "reason" not in row
        and row["role_pair"] != CANARIES
        and not ATTACKS[parse(row["attack"])[0]].reads_teacher
    ]
    found = max((row for row in rows if row["ci_low"] > 0.5), key=lambda row: row["ci_low"], default=None)
    note = f"the interval with the greatest lower end of {len(rows)} of the students, not corrected for that choice"
    return {"row": found, "rows": len(rows), "note": note if found else f"none of {len(rows)} AUC rows resolves a leak"}


def _verdicts(
    study: Study, membership: list[dict], gates: list[dict], blind: Blind, headline: dict, ranked: list[dict]
) -> list[str]:
    said = []
    for run in dict.fromkeys([headline["model"], *study.students]):
        leak = _leak(study, membership, run, study.settings["role_pair"])
        if leak is None or leak["value"] is None:
            continue
        if leak["ci_low"] > 0.5:
            said.append(f"{run}: {leak['attack']} ranks members above non-members in {_percent(leak)} of pairs.")
        elif leak["ci_high"] < 0.5:
            said.append(
                f"{run}: {leak['attack']} lies below 0.5 ({_percent(leak)}): look for a collapsed model, "
                "a sign error or a shift of the split, and at its utility."
            )
        else:
            said.append(
                f"{run}: no evidence of a leak by {leak['attack']}; one of up to {100 * leak['ci_high']:.1f} % "
                "of pairs is compatible with the data. This does not make it private."
            )
        if _utility_verdict(gates, run) == UNDERTRAINED:
            said.append(f"{run}: {UNDERTRAINED}.")
    if blind.separates:
        said.append(
            f"Blind gate: {blind.best} reaches {_percent(_blind_leak(blind))} without any model; "
            "only what an attack adds to it means anything."
        )
    split_leaks = sorted({row["model"] for row in gates if row["verdict"] == SPLIT_LEAKS})
    if split_leaks:
        said.append(
            f"Null gate: {', '.join(split_leaks)} never saw the members and is not at chance; "
            "read the differences to null."
        )
    return said + [words for ranking in ranked for words in ranking["words"]]


def _warnings(study: Study, blind: Blind) -> list[str]:
    found = [warning for table in study.tables.values() for warning in table.warnings]
    found += [*study.notes, *_training_warnings(study)]
    single = [run for run in study.runs if len(study.seeds(run)) == 1 and not run.startswith("base_")]
    if single:
        found.append(f"One seed for {', '.join(single)}: the intervals say nothing about training again.")
    if blind.reason is not None:
        found.append(f"Blind gate {NOT_RUN}: {blind.reason}.")
    absent = [run for run in study.settings["references"] if run not in study.runs]
    if absent:
        found.append(f"References without score tables, not used: {', '.join(absent)}.")
    if "null" not in study.runs:
        found.append("No null model (the student without a teacher): what an attack shows by chance is not known.")
    fingerprints = {t.provenance.get("splits_fingerprint") for t in study.tables.values()} - {None}
    if len(fingerprints) > 1:
        found.append(
            "The score tables come from more than one split of the data; only runs of the same examples are compared."
        )
    return found


def _training_warnings(study: Study) -> list[str]:
    """What the training runs warned of, one line for all seeds of a run that say the same."""
    said: dict[tuple[str, str], list[int]] = {}
    for (run, seed), table in study.tables.items():
        for warning in (table.provenance.get("training") or {}).get("warnings") or []:
            said.setdefault((run, warning), []).append(seed)
    return [f"{run} (seed {', '.join(map(str, seeds))}): {warning}" for (run, warning), seeds in said.items()]


def _not_tested(study: Study, membership: list[dict]) -> list[str]:
    roles = {role for table in study.tables.values() for role in table.files}
    absent = {
        "the teacher": "teacher",
        "a student trained on the private data directly": "direct",
        "the counterfactual teacher (swap)": "swap",
    }
    found = [f"{words}: no run '{run}'" for words, run in absent.items() if run not in study.runs]
    found += [
        f"{what}: no role '{role}'"
        for role, what in (
            ("canary", "inserted canaries"),
            ("dev", "utility"),
            ("calib", "balanced accuracy at a calibrated threshold"),
        )
        if role not in roles
    ]
    few = [
        row["metric"]
        for row in membership
        if row["role_pair"] != CANARIES and "too few non-members" in row.get("reason", "")
    ]
    rates = sorted({metric.removeprefix("tpr_at_fpr_") for metric in few})
    found += [f"TPR at an FPR of {100 * float(rate):g} %: too few non-members" for rate in rates]
    tried = dict.fromkeys(row["attack"] for row in membership)
    beyond = [] if any(row["access"] == "weights" for row in membership) else ["attacks on the weights"]
    return [*found, *beyond, f"attacks other than the {len(tried)} of this audit"]


def group_facts(study: Study) -> dict:
    """Do the evaluated records come in groups, so that intervals and tests count groups and not records?"""
    attack = study.settings["primary"]
    samples, _ = by_seed(study, study.settings["headline_model"], attack, "private-heldout")
    pair = next((sample[0] for sample in samples.values()), None)
    if pair is None or pair.groups is None:
        return {"applicable": False, "words": []}
    groups = dict(zip(("members", "nonmembers"), pair.groups.sizes, strict=True))
    words = (
        f"Records come in groups: {len(pair.members):,} members in {groups['members']:,}, {len(pair.nonmembers):,} "
        f"non-members in {groups['nonmembers']:,}. Intervals and tests count groups."
    )
    return {"applicable": True, "groups": groups, "words": [words]}
