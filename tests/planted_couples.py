"""A teacher and its students as studies in memory: scores by hand, without files."""

import numpy as np
import pandas as pd
import pyarrow as pa

from attacks.resampling import Resampler
from attacks.study import Scores, Study
from attacks.tables import ScoreTable

SETTINGS = {"references": [], "attacks": ["loss", "zlib"], "primary": "loss", "bootstrap": 10, "seed": 0}


def scores(prefix: str, values) -> Scores:
    ids = np.array([f"{prefix}-{i:04d}" for i in range(len(values))])
    return Scores(ids, np.full(len(values), "t"), np.asarray(values, float))


def study(runs: dict[tuple[str, int], dict[str, dict[str, list]]], groups: dict[str, str] | None = None) -> Study:
    """runs: (run, seed) -> attack -> role -> scores.  The first half of `calib` was trained on (coin 1)."""
    tables, found, plan, largest = {}, {}, {}, 0
    for (run, seed), attacks in runs.items():
        told = {"teacher": "teacher", "technique": "kd", "setting": "disjoint"} if run.startswith("students/") else {}
        tables[run, seed] = ScoreTable(run, seed, "", told | {"train_roles": []}, {"private": []})
        plan[run] = list(attacks)
        for attack, roles in attacks.items():
            for role, values in roles.items():
                found[run, seed, attack, role] = scores(role, values)
                largest = max(largest, len(values) if role == "calib" else 0)
    ids = np.unique(np.concatenate([each.ids for each in found.values()]))
    coins = [int(i.startswith("calib") and int(i.split("-")[1]) < largest // 2) for i in ids]
    splits = pd.DataFrame({"example_id": ids, "coin": coins, "placement": ""}).set_index("example_id")
    if groups:
        splits["group"] = [groups.get(i, i) for i in ids]
    return Study(SETTINGS, tables, splits, Resampler(10, 0), scores=found, plan=plan)


def row(rows: list[dict], **wanted) -> dict:
    found = [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def with_columns(table: pa.Table, **columns: np.ndarray) -> pa.Table:
    """List columns of a planted table replaced or added: flat values in the table's order."""
    offsets = table["segment"].combine_chunks().offsets
    for name, values in columns.items():
        kind = {"i": pa.int32(), "b": pa.bool_()}.get(values.dtype.kind, pa.float32())
        column = pa.ListArray.from_arrays(offsets, pa.array(values, kind))
        at = table.schema.get_field_index(name)
        table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    return table
