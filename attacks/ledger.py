"""The ledger: which example entered which loss, how often, and whose response stood behind its prompt.

In on-policy techniques a member's prompt can act without its response; only this table shows it.
"""

import numpy as np
import pandas as pd

from attacks.parquet import TableError, read_frame, read_schema
from attacks.study import Study
from attacks.tables import ScoreTable

COLUMNS = (
    "example_id",
    "role",
    "loss",
    "source",
    "replayed",
    "times",
    "tokens",
    "mean_age",
    "max_age",
    "first_step",
    "last_step",
)
PLAIN_TEXT = "lm_corpus"  # text without a prompt, for the language-model term: no response


def read_ledgers(study: Study) -> pd.DataFrame | None:
    """The ledgers of all runs, one row per example, loss, source and replay; `model` and `seed` (text) in front.

    None where no run kept one. Raises TableError on a ledger that lacks a column.
    """
    frames = [_read(table) for table in study.tables.values() if (table.folder / "ledger.parquet").exists()]
    return pd.concat(frames, ignore_index=True) if frames else None


def _read(table: ScoreTable) -> pd.DataFrame:
    path = table.folder / "ledger.parquet"
    if absent := [column for column in COLUMNS if column not in read_schema(path).names]:
        raise TableError(f"{path}: no column {', '.join(absent)}; a ledger has {', '.join(COLUMNS)}")
    frame = read_frame(path, COLUMNS)[list(COLUMNS)]
    frame.insert(0, "model", table.run)
    frame.insert(1, "seed", str(table.seed))
    return frame


def ledger_facts(ledger: pd.DataFrame | None) -> list[dict]:
    """What each model and seed was trained on, one dict each.

    `shares`: of the trained response tokens, by source.  `replayed`: share of them that came out of the replay buffer.
    `mean_age`, `max_age`: steps between sampling and use, of the student's own (or mixed) responses, each use counted.
    `own`, `foreign`: private records whose prompt was used with its own response, with somebody else's.
    `response_tokens`, `plain_tokens`: counts.  Shares and ages of nothing are None.
    """
    if ledger is None:
        return []
    return [_facts(*key, rows) for key, rows in ledger.groupby(["model", "seed"], sort=False)]


def _facts(model: str, seed: str, rows: pd.DataFrame) -> dict:
    response = rows[rows["source"] != PLAIN_TEXT]
    total = int(response["tokens"].sum())
    sampled = response[response["source"].isin(["student", "mixed"])]
    private = response[response["role"] == "private"]
    own = private["source"] == "dataset"
    by_source = response.groupby("source")["tokens"].sum()
    return {
        "model": model,
        "seed": seed,
        "response_tokens": total,
        "plain_tokens": int(rows["tokens"].sum()) - total,
        "shares": {source: tokens / total for source, tokens in by_source.items()} if total else None,
        "replayed": float(response.loc[response["replayed"], "tokens"].sum() / total) if total else None,
        "mean_age": float(np.average(sampled["mean_age"], weights=sampled["times"])) if len(sampled) else None,
        "max_age": float(sampled["max_age"].max()) if len(sampled) else None,
        "own": int(private.loc[own, "example_id"].nunique()),
        "foreign": int(private.loc[~own, "example_id"].nunique()),
    }
