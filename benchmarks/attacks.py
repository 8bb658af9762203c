"""Every attack on score tables of 20,000 texts of 256 tokens: seconds and peak memory on this machine.

    python -m benchmarks attacks [--records 20000] [--tokens 256] [--bootstrap 1000] [--extras]

Invented tables are written to a temporary folder first: a student, its base, the student under a ReCaLL prefix, half of
the records members, and a tenth as many calibration records. What is timed runs in a process of its own: reading them
role by role, all attacks that the tables allow, and AUC, DeLong intervals and TPRs with their bootstrap intervals for
both models. With --extras also label permutations over all attacks and BCa intervals, timed apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

VOCAB, SHARD = 50257, 4096
ALLOWED = {"seconds": 60, "gigabytes": 4}
PROVENANCE = {"technique": "kd", "setting": "disjoint", "train_roles": ["public"], "init": "base_student"}
INTEGERS = ("target_id", "rank", "ties", "top1_id")


def write_tables(folder: Path, records: int, tokens: int) -> None:
    """Tables of both models and all roles; the student is a little surer of its members."""
    rng = np.random.default_rng(0)
    splits = []
    for role, n in (("private", records // 2), ("heldout", records - records // 2), ("calib", records // 10)):
        ids = np.array([f"{role}-{i:06d}" for i in range(n)])
        coin = rng.integers(2, size=n)
        splits.append(pd.DataFrame({"example_id": ids, "group": ids, "role": role, "coin": coin, "placement": ""}))
        for shard, start in enumerate(range(0, n, SHARD)):
            part = slice(start, min(start + SHARD, n))
            lengths = rng.integers(tokens * 3 // 4, tokens * 5 // 4, part.stop - part.start)
            known = np.repeat(coin[part] if role == "calib" else np.full(len(lengths), role == "private"), lengths)
            hard, target = rng.gamma(1.5, 1.5, lengths.sum()), rng.integers(VOCAB, size=lengths.sum())
            for run, variant, factor in (
                ("students/kd", "plain", 1 - 0.02 * known),
                ("students/kd", "recall", 1 + 0.01 * known),
                ("base_student", "plain", 1.05),
            ):
                noise = np.exp(0.1 * rng.normal(size=lengths.sum()))
                table = _table(rng, ids[part], role, lengths, target, -hard * factor * noise)
                told = {"run": run, "seed": "0", "variant": variant, "step": "1"}
                provenance = PROVENANCE if run != "base_student" else {"train_roles": []}
                path = folder / run / "seed0" / variant / f"{role}-{shard:05d}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table.replace_schema_metadata(told | {"provenance": json.dumps(provenance)}), path)
    (folder / "text").mkdir()
    pd.concat(splits).to_parquet(folder / "text" / "splits.parquet")
    np.savez(folder / "text" / "token_counts.npz", counts=rng.integers(1000, size=VOCAB))


def _table(rng, ids: np.ndarray, role: str, lengths: np.ndarray, target: np.ndarray, logp: np.ndarray) -> pa.Table:
    hit = logp > np.log(0.5)
    fields = {
        "target_id": target,
        "segment": np.ones(len(target), np.int8),
        "logp": logp,
        "log1m_p": np.log1p(-np.exp(np.minimum(logp, -1e-6))),
        "entropy": 0.3 + 0.6 * np.abs(logp),
        "logp_std": 0.7 + rng.random(len(target)),
        "rank": np.where(hit, 0, 3),
        "ties": np.zeros(len(target)),
        "top1_id": np.where(hit, target, (target + 1) % VOCAB),
        "top1_logp": np.where(hit, logp, np.maximum(logp, -0.6)),
        "top2_gap": np.ones(len(target)),
    }
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    kind = lambda name: pa.int8() if name == "segment" else pa.int32() if name in INTEGERS else pa.float32()
    lists = {k: pa.ListArray.from_arrays(offsets, pa.array(v).cast(kind(k), safe=False)) for k, v in fields.items()}
    sizes = {"n_tokens": lengths, "n_bytes": 4 * lengths, "zlib_bytes": 2 * lengths, "first_div": 0 * lengths}
    return pa.table({"example_id": ids, "role": [role] * len(ids), "task": ["t"] * len(ids)} | sizes | lists)


def measure(folder: Path, bootstrap: int, extras: bool) -> None:
    """Print seconds per stage, peak memory, and whether both are within what is allowed."""
    from attacks.audit import complete
    from attacks.rows import membership_rows
    from attacks.scoring import load_study

    settings = complete({"bootstrap": bootstrap, "tasks": False, "references": ["base_student"]}, folder)
    begin = time.perf_counter()
    study = load_study(folder, settings)
    scored = time.perf_counter()
    rows = membership_rows(study)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    numbers = [row for row in rows if row["metric"] == "auc" and "reason" not in row]
    print(f"{len(study.plan['students/kd'])} attacks on the student, {len(study.plan['base_student'])} on its base")
    print(f"read and scored: {scored - begin:.1f} s")
    print(f"AUC, DeLong, TPRs of {len(numbers)} model-attack pairs, {bootstrap} resamples: {end - scored:.1f} s")
    fine = end - begin <= ALLOWED["seconds"] and peak <= ALLOWED["gigabytes"]
    print(f"together {end - begin:.1f} s (allowed {ALLOWED['seconds']}), peak memory {peak:.2f} GB (allowed 4)")
    if extras:
        _extras(study)
    if not fine:
        raise SystemExit("slower or larger than allowed")


def _extras(study) -> None:
    from attacks.corrections import attack_rows
    from attacks.decisions import decision_rows

    for what, make in (
        ("label permutations, maximum over all attacks (attacks.csv)", attack_rows),
        ("BCa intervals of the primary attack and decisions (decisions.csv)", decision_rows),
    ):
        begin = time.perf_counter()
        rows = make(study)
        print(f"{what}: {len(rows)} rows in {time.perf_counter() - begin:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks attacks", description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--extras", action="store_true", help="permutations and BCa as well")
    parser.add_argument("--folder", type=Path, help="tables that an earlier call left: only measure")
    given = parser.parse_args()
    if given.folder:
        return measure(given.folder, given.bootstrap, given.extras)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "scores"
        folder.mkdir()
        write_tables(folder, given.records, given.tokens)
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet")) / 2**20
        print(f"{given.records:,} records of about {given.tokens} tokens, {size:.0f} MB of Parquet", flush=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            "attacks",
            f"--folder={folder}",
            f"--bootstrap={given.bootstrap}",
        ]
        raise SystemExit(subprocess.run([*command, *(["--extras"] if given.extras else [])]).returncode)


if __name__ == "__main__":
    main()
