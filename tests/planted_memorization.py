"""Score tables in which it is known what is memorized: for tests of the memorization tables."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from attacks.resampling import Resampler
from attacks.study import Study
from attacks.tables import read_scores, read_splits
from tests.planted_scores import INTEGERS, PROVENANCE
from tests.planted_study import SETTINGS

VOCAB = 50
TIMES = (1, 4, 64)  # how often a private record was trained on, a third each


class Planted:
    """Records of two roles (and canaries), and runs that know a part of their tokens.

    Every response ends in an EOS.  A token that a run knows is its argmax; of the others it gets `luck` right.
    """

    def __init__(
        self, folder: Path, n: int = 120, lengths: tuple[int, int] = (6, 40), seed: int = 0, text: bool = False
    ):
        self.folder, self.rng, self.roles, splits = Path(folder), np.random.default_rng(seed), {}, []
        for role in ("private", "heldout", "canary"):
            size = self.rng.integers(*lengths, n) if role != "canary" else np.full(n, 14)
            ids = np.array([f"{role}-{i:04d}{'#0' if text else ''}" for i in range(n)])
            self.roles[role] = {"ids": ids, "lengths": size, "targets": self.rng.integers(VOCAB, size=size.sum() + n)}
            repeats = np.array(TIMES)[np.arange(n) % 3] if role != "heldout" else np.ones(n, int)
            frame = pd.DataFrame({"example_id": [i.partition("#")[0] for i in ids], "role": role, "repeats": repeats})
            frame["coin"], frame["group"] = self.rng.integers(2, size=n), frame["example_id"]
            frame["placement"] = np.where(np.arange(n) % 4 < 2, "both", "none") if role == "canary" else ""
            splits.append(frame)
            self.roles[role] |= {"repeats": repeats, "coin": frame["coin"].to_numpy()}
            self.roles[role]["task"] = np.array(["open_qa", "summary"])[np.arange(n) % 2]
        (self.folder / "text").mkdir(parents=True)
        pd.concat(splits).to_parquet(self.folder / "text" / "splits.parquet")

    def write(self, run: str, seed: int = 0, luck: float = 0.5, knows: dict[str, int] | None = None, **told) -> None:
        """knows: by role, the repeats from which on a record is known by heart; canaries only with coin 1."""
        for role, made in self.roles.items():
            known = made["repeats"] >= (knows or {}).get(role, np.inf)
            if role == "canary":
                known &= made["coin"] == 1
            sizes = made["lengths"] + 1
            hit = np.repeat(known, sizes) | (self.rng.random(sizes.sum()) < luck)
            ends = np.cumsum(sizes) - 1
            fields = {
                "target_id": made["targets"],
                "segment": np.where(np.isin(np.arange(len(hit)), ends), 2, 1),
                "top1_id": np.where(hit, made["targets"], (made["targets"] + 1) % VOCAB),
                "top1_logp": np.where(hit, -0.01, -0.5),
                "top2_gap": np.ones(len(hit)),
                "rank": np.where(hit, 0, 3),
                "logp": np.where(hit, -0.01, -2.0),
                "entropy": np.full(len(hit), 0.7),
                "lse_t1": np.zeros(len(hit)),
                "topk_lse_k2_t1": np.full(len(hit), -0.005),
            }
            self.save(run, seed, role, made["ids"], made["task"], sizes, fields, **told)

    def save(self, run, seed, role, ids, task, sizes, fields, variant="plain", **told) -> Path:
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        columns = {"example_id": ids, "role": [role] * len(ids), "task": task}
        for name, values in fields.items():
            cast = pa.array(np.asarray(values, float)).cast(INTEGERS.get(name, pa.float32()), safe=False)
            columns[name] = pa.ListArray.from_arrays(offsets, cast)
        return self.put(pa.table(columns), run, seed, role, variant, **told)

    def continued_rows(
        self, role: str, made: dict[str, list[int]], suffix: int, decoding: str = "greedy", close: tuple[str, ...] = ()
    ) -> list[dict]:
        """Rows of a table of continuations; made: what was generated, by example id; close: only for a near tie."""
        ids, ends = self.roles[role]["ids"].tolist(), np.cumsum(self.roles[role]["lengths"] + 1)
        rows = []
        for name, generated in made.items():
            end = ends[ids.index(name)]
            start = end - self.roles[role]["lengths"][ids.index(name)] - 1
            target = self.roles[role]["targets"][start : min(start + suffix, end)].tolist()
            rows.append({"example_id": name, "role": role, "task": "all", "decoding": decoding, "prefix": 0})
            rows[-1] |= {"suffix": suffix, "target_ids": target, "generated_ids": generated, "ended": False}
            rows[-1]["drawn"] = name not in close
        return rows

    def put(self, table: pa.Table, run: str, seed: int, role: str, variant: str, **told) -> Path:
        meta = {"run": run, "seed": str(seed), "variant": variant, "provenance": json.dumps(PROVENANCE | told)}
        path = self.folder / run / f"seed{seed}" / variant / f"{role}-00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(meta), path)
        return path

    def study(self) -> Study:
        tables = {(table.run, table.seed): table for table in read_scores(self.folder)}
        return Study(SETTINGS, tables, read_splits(self.folder), Resampler(200, 0))


def chosen(rows: list[dict], **wanted) -> dict:
    """The one row that has these values."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]
