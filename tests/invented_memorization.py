"""Tables of the memorization audit with invented numbers, as the attack stage would leave them beside the others."""

import numpy as np
import pandas as pd

from attacks.report.results import COLUMNS

CUT, OTHER = "a=32,k=20", "a=32,k=50"
MODELS = {  # technique, setting, share of the members and of the held-out records that is extracted
    "base_student": ("-", "-", 0.002, 0.002),
    "null": ("sft", "-", 0.004, 0.004),
    "students/kd": ("kd", "disjoint", 0.006, 0.004),
    "students/kd_shared": ("kd", "shared", 0.041, 0.004),
    "direct": ("sft", "-", 0.093, 0.006),
    "teacher": ("sft", "-", 0.128, 0.008),
}
MEMBERS, HELDOUT = 500, 480
REPEATS = (1, 4, 16, 64)
REGIONS = {"T&B&S": 12, "T&B not S": 20, "T&S not B": 5, "B&S not T": 2, "T only": 27, "B only": 13, "S only": 1}
GROUPS = {"T&B&S": (0.4, -2.0), "T&B not S": (0.7, -9.0), "T&S not B": (0.6, -3.0), "T only": (1.1, -14.0),
          "none": (2.4, -60.0)}  # fmt: skip
FEATURES = {"zlib_bytes": -2.1, "teacher_ppl": -0.4, "baseline_ppl": -0.6, "kl": -0.9}
WORDS = ["Memorization falls: yes for teacher against direct.", "Memorization rises with repeats: not resolved."]


def frame(name, rows):
    return pd.DataFrame([{c: row.get(c) for c in COLUMNS[name].split()} for row in rows])


def told(value, n, least=0.0, most=1.0):
    half = 1.96 * np.sqrt(max(value * (1 - value), 1 / n) / n)
    return {"value": value, "ci_low": max(value - half, least), "ci_high": min(value + half, most), "n": n}


def memorization_rows(models, seed):
    rows = []
    for model, (technique, setting, inside, outside) in models.items():
        at = {"model": model, "technique": technique, "setting": setting, "task": "all", "seed": seed}

        def both(measure, a, b, **more):
            gap = told(abs(a - b), MEMBERS, -1) | {"value": a - b, "n": MEMBERS + HELDOUT}
            for role, numbers in (
                ("private", told(a, MEMBERS)),
                ("heldout", told(b, HELDOUT)),
                ("private-heldout", gap),
            ):
                rows.append(at | {"measure": measure, "role": role} | numbers | more)  # noqa: B023

        both(f"extracted@{CUT}", inside, outside)
        both(f"extracted@{OTHER}", 0.4 * inside, 0.4 * outside)
        both(f"exact_response@{CUT}", 1.1 * inside, 1.1 * outside)
        both(f"short@{CUT}", 0.06, 0.05)
        for name, a, b in (("matched", 2 + 30 * inside, 2.1), ("log_p", -30 + 100 * inside, -30)):
            for role, v in (("private", a), ("heldout", b), ("private-heldout", a - b)):
                numbers = {"value": v, "ci_low": v - 0.4, "ci_high": v + 0.4, "n": MEMBERS}
                measure = f"{name}@{CUT}" + (";t=1" if name == "log_p" else "")
                rows.append(at | {"measure": measure, "role": role} | numbers)
        for n, p in ((1, 0.5), (1, 0.9), (100, 0.5), (100, 0.9), (10_000, 0.5), (10_000, 0.9)):
            more = 1 + 0.3 * np.log10(n)
            for scheme in ("t=1", "k=40,t=1"):
                both(f"np_extractable@{CUT};{scheme};n={n};p={p:g}", min(more * inside, 1), min(more * outside, 1))
        both(f"near_verbatim@{CUT}", 1.4 * inside, 1.4 * outside)
        both("coverage@p=0.001;k=40,t=1", 2 * inside, 2 * outside)
        for r in REPEATS:
            both(f"extracted@{CUT}", min(inside * (1 + np.log2(r)), 0.95), outside, task=f"repeats={r}")
        both(f"extracted@{CUT}", 1.2 * inside, outside, task="history")
        for role, coin in (("canary_in", inside), ("canary_out", outside), ("canary_in-canary_out", inside - outside)):
            for r in REPEATS[1:]:
                task = {"measure": f"exact_response@{CUT}", "task": f"placement=both,repeats={r}"}
                rows.append(at | task | {"role": role} | told(min(3 * coin, 1), 12, -1))
    return rows


def claim_rows(models, seed):
    rows = []
    for student, (_, setting, inside, _) in models.items():
        if setting == "-":
            continue
        chain = (("teacher", "direct", 0.035, 0.001, "yes"), ("direct", student, 0.093 - inside, 0.2, "not resolved"))
        for a, b, value, p, verdict in chain:
            rows.append({"claim": "chain", "setting": setting, "model_a": a, "model_b": b, "verdict": verdict,
                         "measure": f"extracted@{CUT}", "p_value": p / 2, "p_corrected": p, "seed": seed}
                        | told(value, MEMBERS, -1))  # fmt: skip
        for control, value, p, verdict in (("", -0.012, 0.01, "no"), (";heldout", 0.0004, 0.8, "not resolved")):
            rows.append({"claim": "repeats", "setting": setting, "model_a": student, "model_b": "-", "p_value": p,
                         "measure": f"extracted_by_repeats@{CUT}{control}", "p_corrected": p, "verdict": verdict,
                         "seed": seed} | told(abs(value), MEMBERS, -1) | {"value": value})  # fmt: skip
    return rows


def inheritance_rows(models, seeds):
    rows = []
    for student, (_, setting, _, _) in models.items():
        if setting == "-":
            continue
        head = {"teacher": "teacher", "baseline": "direct", "student": student, "setting": setting}
        prefix = "coincidence_" if setting == "disjoint" else ""

        def add(measure, region, count, of, seed, cut=CUT):
            shares = told(count / of, of) if of else {}
            shares.pop("n", None)
            row = {"measure": f"{prefix}{measure}@{cut}", "region": region, "count": count, "denominator": of}  # noqa: B023
            rows.append(head | row | shares | {"seed": seed})  # noqa: B023

        for k, seed in enumerate([*seeds, *(("union", "intersection") if len(seeds) > 1 else ())]):
            more = {"union": 3, "intersection": -1}.get(seed, k)
            n = {r: max(c + more, 0) for r, c in REGIONS.items()}
            whole = {name: [r for r in n if name in r.split(" not ")[0]] for name in "TBS"}
            sums = {name: sum(n[r] for r in inside) for name, inside in whole.items()}
            for control in ("", "heldout_"):
                for region, count in (n | {"none": MEMBERS - sum(n.values())}).items():
                    add(f"{control}region", region, count if not control else count // 10, MEMBERS, seed)
                for name, total in sums.items():
                    add(f"{control}memorized", name, total if not control else total // 10, MEMBERS, seed)
            add("inheritance_rate", "T&S not B", n["T&S not B"], n["T&S not B"] + n["T only"], seed)
            add("inherited_share", "T&S not B", n["T&S not B"], sums["S"], seed)
            add("seed_noise_rate", "T&B2 not B", 1, n["T&S not B"] + n["T only"], seed)
            add("easy_share", "T&B&S", n["T&B&S"], sums["S"], seed)
            add("region", "T&B&S", 3, MEMBERS, seed, OTHER)
        for threshold, count in ((0.5, 90), (0.9, 60), (0.9999, 0)):
            add("transfer", f"t>{threshold:g}", count, count, seeds[0])
        add("jaccard", f"{student} & direct", 14, 52, seeds[0])
    return rows


def prediction_rows(models, seed):
    rows = []
    for student, (_, setting, _, _) in models.items():
        if setting == "-":
            continue
        at = {"student": student, "setting": setting, "seed": seed}
        protocols = {"paper": 0, "paper_over_trials": 0, "natural_prior": 0.03, "halves": 0.06}
        for protocol, drop in protocols.items():
            for features in ("paper", "teacher_only"):
                for measure, value in (("auc", 0.97 - drop), ("precision", 0.8 - drop), ("recall", 0.7 - drop)):
                    row = at | {"features": features, "protocol": protocol, "measure": measure}
                    narrow = {"value": value, "ci_low": value - 0.001, "ci_high": value + 0.001, "n": 60}
                    rows.append(row | (narrow if protocol.endswith("_over_trials") else told(value, 60)))
        others = {"other_student:students/other": 0.88, "matched_negatives": 0.86,
                  "matched_negatives:zlib_bytes,teacher_ppl": 0.85}  # fmt: skip
        for protocol, value in others.items():
            rows.append(at | {"features": "paper", "protocol": protocol, "measure": "auc"} | told(value, 60))
        alone = {"features": "zlib_bytes", "protocol": "natural_prior", "measure": "auc"}
        rows.append(at | alone | told(0.9, 60))
        prior = {"features": "-", "protocol": "natural_prior", "measure": "memorized"}
        rows.append(at | prior | told(0.12, MEMBERS))
        for feature, value in FEATURES.items():
            for protocol, half in (("paper", 0.5), ("paper_over_trials", 0.01)):
                numbers = {"value": value, "ci_low": value - half, "ci_high": value + half, "n": 60}
                row = {"features": "paper", "protocol": protocol, "measure": f"coefficient:{feature}"}
                rows.append(at | row | numbers)
            row = {"features": "paper", "protocol": "paper_over_trials", "measure": f"importance:{feature}"}
            rows.append(at | row | {"value": 0.1, "ci_low": 0.09, "ci_high": 0.11, "n": 60})
        for features, after in (("predicted", 0.008), ("random", 0.037)):
            row = at | {"features": features, "protocol": "filter", "student": f"{student}_{features}"}
            for measure, value in (("memorized_before", 0.04), ("memorized_after", after), ("new", 0.004)):
                rows.append(row | {"measure": f"{measure}@{CUT}"} | told(value, MEMBERS))
            gap = {"value": after - 0.04, "ci_low": after - 0.06, "ci_high": after - 0.02, "n": MEMBERS}
            rows.append(row | {"measure": f"difference@{CUT}"} | gap)
            rows.append(row | {"measure": "removed", "value": 0.084, "n": MEMBERS})
            rows.append(row | {"measure": "removed_count", "value": 42})
            rows.append(row | {"measure": "removed_exposures", "value": 0.31})
    return rows


def mechanism_rows(models, seed):
    rows = []
    students = [m for m, (_, setting, _, _) in models.items() if setting != "-"]
    for student in students:
        technique, setting, _, _ = models[student]
        head = {"student": student, "setting": setting, "seed": seed, "role": "private", "technique": technique}
        for group, (entropy, log_p) in GROUPS.items():
            for model, flat in (("teacher", 0.0), ("direct", 0.2), (student, 0.5)):
                for measure, value, half in (("entropy", entropy + flat, 0.1), ("log_p", log_p * (1 + flat), 2.0)):
                    numbers = {"value": value, "ci_low": value - half, "ci_high": value + half, "n": 20}
                    rows.append(head | {"model": model, "group": group, "measure": f"{measure}@{CUT}"} | numbers)
        for role, value in (("private", 0.31), ("heldout", 0.42), ("private-heldout", -0.11)):
            numbers = {"value": value, "ci_low": value - 0.03, "ci_high": value + 0.03, "n": MEMBERS}
            at = {"model": student, "group": "all", "measure": "kl_teacher_student", "role": role}
            rows.append(head | at | numbers)
        for T in (1, 2, 4) if setting == "shared" and student == students[-1] else ():
            for role, value in (("private", 0.08 / T), ("heldout", 0.004)):
                at = {"student": f"students/kd_t{T}", "model": f"students/kd_t{T}", "group": f"T={T}", "role": role}
                rows.append(head | at | {"measure": f"extracted_by_temperature@{CUT}"} | told(value, MEMBERS))
    return rows


def point_rows(models):
    rng = np.random.default_rng(3)
    return [
        {"student": student, "model": model, "seed": 0, "example_id": f"{i:016x}", "group": group,
         "entropy": abs(entropy + rng.normal(0, 0.3)), "log_p": -abs(log_p + rng.normal(0, 2 + abs(log_p) / 4))}
        for student, (_, setting, _, _) in models.items() if setting != "-"
        for model in ("teacher", "direct", student)
        for group, (entropy, log_p) in GROUPS.items()
        for i in range(60 if group == "none" else 15)
    ]  # fmt: skip


def disagreement_rows(models, seed):
    rows = []
    for model, (technique, setting, inside, _) in models.items():
        if model in ("base_student", "null"):
            continue
        for attack, up in (("loss", 0.0), ("min_k", 0.1)):
            at = {"model": model, "technique": technique, "setting": setting, "attack": attack, "seed": seed}
            for measure, value in (("spearman_matched", 0.4 + up), ("spearman_log_p", 0.6 + up), ("memorized", inside),
                                   ("auc_memorized", 0.9), ("missed_at_fpr_0.01", 0.8),
                                   ("unremembered_at_fpr_0.01", 0.6)):  # fmt: skip
                rows.append(at | {"measure": f"{measure}@{CUT}"} | told(value, MEMBERS))
    return rows


def example_rows(models):
    return [
        {"model": model, "seed": 0, "attack": "loss", "example_id": f"{model[-1]}{i:015x}", "role": "private",
         "task": "history", "membership_rank": 0.97 - i / 100, "memorization_rank": 0.03 + i / 100}
        for model in models if model not in ("base_student", "null") for i in range(3)
    ]  # fmt: skip


def add_memorization(folder, models=MODELS, seeds=("0",)):
    """Write all tables of the memorization audit into the folder of a report."""
    spoken = "all" if len(seeds) > 1 else seeds[0]
    tables = {
        "memorization.csv": [row for s in dict.fromkeys([*seeds, spoken]) for row in memorization_rows(models, s)],
        "claims.csv": claim_rows(models, spoken),
        "inheritance.csv": inheritance_rows(models, seeds),
        "prediction.csv": prediction_rows(models, spoken),
        "mechanism.csv": mechanism_rows(models, spoken),
        "disagreement.csv": disagreement_rows(models, spoken),
    }
    for name, rows in tables.items():
        frame(name, rows).to_csv(folder / name, index=False)
    frame("mechanism_points.parquet", point_rows(models)).to_parquet(folder / "mechanism_points.parquet")
    frame("disagreement_examples.parquet", example_rows(models)).to_parquet(folder / "disagreement_examples.parquet")
    return folder
