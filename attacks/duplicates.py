"""Near-duplicate control: non-members whose text the members' texts hold already (statistics.md 6.3).

A record counts as a near-duplicate where more than 0.8 of its 13-grams of tokens occur in one of the members' texts
(`ngram_13_0.8`); a text shorter than that where it equals a member's, or differs by at most a fifth of its tokens; one
that is nothing but the template's n-grams where it equals a member's.  Members are all that the model was trained on:
the evaluated ones and the trained half of the calibration records.
Looked at are prompt and response together, which is the record, and the response alone, which is what is scored: a
short answer that two questions share says little about membership, so that the two are counted apart.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from attacks.gates import NOT_RUN, gate_row
from attacks.rows import auc_of, by_seed, estimate
from attacks.statistics import Groups
from attacks.study import Pair, Study, Unresolved
from attacks.tables import read_text

GRAM = 13
SHARE = 0.8  # of the n-grams, above which a text is a near-duplicate; of the tokens of a short one likewise
TEMPLATE = 0.1  # of the members' texts; n-grams that so many share are the template's
ODD = np.uint64(0x9E3779B97F4A7C15)


class Flat(NamedTuple):
    """Texts one after another: ids [N], and where each text starts and the last ends, [d + 1]."""

    ids: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def of(texts: list[np.ndarray]) -> "Flat":
        lengths = [len(text) for text in texts]
        ids = np.concatenate([*texts, []]).astype(np.uint64)
        return Flat(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def gram_hashes(texts: Flat, n: int = GRAM) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of all n-grams within texts, and the text of each.  Two differing n-grams share one by accident
    with a chance of 2**-64 a pair."""
    mixed = (texts.ids + np.uint64(1)) * ODD
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    size = max(len(mixed) - n + 1, 0)
    hashes = np.zeros(size, np.uint64)
    for place in range(n):
        hashes = hashes * ODD + mixed[place : place + size]
    owner = np.repeat(np.arange(len(texts.lengths)), texts.lengths)
    inside = owner[:size] == owner[n - 1 : n - 1 + size]
    return hashes[inside], owner[:size][inside]


def shared_grams(texts: list[np.ndarray], among: list[np.ndarray], n: int = GRAM) -> np.ndarray:
    """Share [d] of the n-grams of each text that occur in any of `among`; NaN for a text that has none.

    An n-gram of a tenth of `among` or more belongs to the prompts' template, not to a record: it counts nowhere.
    """
    hashes, owner = gram_hashes(Flat.of(among), n)
    order = np.lexsort((owner, hashes))
    hashes, owner = hashes[order], owner[order]
    once = np.append(True, (np.diff(hashes) != 0) | (np.diff(owner) != 0))[: len(hashes)]  # for every text that has it
    known, texts_with = np.unique(hashes[once], return_counts=True)
    template = known[texts_with >= max(TEMPLATE * len(among), 10)]
    hashes, owner = gram_hashes(Flat.of(texts), n)
    own = ~np.isin(hashes, template)
    hashes, owner = hashes[own], owner[own]
    found = np.bincount(owner, np.isin(hashes, known), len(texts))
    total = np.bincount(owner, minlength=len(texts))
    return np.where(total > 0, found / np.maximum(total, 1), np.nan)


def edit_distances(a: np.ndarray, b: np.ndarray, a_lengths: np.ndarray, b_lengths: np.ndarray) -> np.ndarray:
    """Levenshtein distance [p] of p pairs of short sequences, padded: a [p, La], b [p, Lb]."""
    row = np.tile(np.arange(b.shape[1] + 1), (len(a), 1))
    found = np.where(a_lengths == 0, b_lengths, 0)
    for i in range(a.shape[1]):
        above, row = row, np.empty_like(row)
        row[:, 0] = i + 1
        for j in range(b.shape[1]):
            changed = above[:, j] + (a[:, i] != b[:, j])
            row[:, j + 1] = np.minimum(changed, np.minimum(above[:, j + 1], row[:, j]) + 1)
        ends = a_lengths == i + 1
        found[ends] = row[ends, b_lengths[ends]]
    return found


def close_short(texts: list[np.ndarray], among: list[np.ndarray], n: int = GRAM) -> np.ndarray:
    """Does a text of fewer than n tokens equal one of `among`, or differ by at most a fifth of its tokens?  bool [d].

    Only pairs that share enough kinds of tokens are compared: one edit removes at most one kind.
    """
    allowed = 1 - SHARE
    short = np.array([0 < len(text) < n for text in texts])
    mine = list(dict.fromkeys(tuple(map(int, texts[i])) for i in np.flatnonzero(short)))
    longest = int(n / SHARE)
    theirs = list(dict.fromkeys(tuple(map(int, text)) for text in among if 0 < len(text) <= longest))
    if not mine or not theirs:
        return np.zeros(len(texts), bool)
    close = set(mine) & set(theirs)
    kinds = [_kinds(of) for of in (mine, theirs)]
    columns = max(k.indices.max() for k in kinds) + 1
    for k in kinds:
        k.resize((k.shape[0], columns))
    shared = (kinds[0] @ kinds[1].T).tocoo()
    lengths = [np.array([len(text) for text in of]) for of in (mine, theirs)]
    a, b = shared.row, shared.col
    most = np.floor(allowed * np.maximum(lengths[0][a], lengths[1][b]) + 1e-9).astype(int)
    own = np.diff(kinds[0].indptr)[a]
    likely = (most > 0) & (abs(lengths[0][a] - lengths[1][b]) <= most) & (shared.data >= own - most)
    a, b, most = a[likely], b[likely], most[likely]
    tables = [_padded(of, length) for of, length in zip((mine, theirs), lengths, strict=True)]
    for at in np.array_split(np.arange(len(a)), max(1, len(a) // 100_000)):
        i, j = a[at], b[at]
        near = edit_distances(tables[0][i], tables[1][j], lengths[0][i], lengths[1][j]) <= most[at]
        close |= {mine[k] for k in np.unique(i[near])}
    return np.array([is_short and tuple(map(int, text)) in close for is_short, text in zip(short, texts, strict=True)])


def same_texts(texts: list[np.ndarray], among: list[np.ndarray]) -> np.ndarray:
    """Is a text, token by token, one of `among`?  bool [d]; False for a text without tokens."""
    known = {text.astype(np.int64).tobytes() for text in among} - {b""}
    return np.array([text.astype(np.int64).tobytes() in known for text in texts], bool)


def _kinds(texts: list[tuple]) -> sparse.csr_array:
    """Which ids a text has [d, V], each once."""
    sets = [sorted(set(text)) for text in texts]
    indptr = np.concatenate([[0], np.cumsum([len(s) for s in sets])])
    columns = np.concatenate(sets).astype(np.int64)
    return sparse.csr_array((np.ones(len(columns), np.int32), columns, indptr), shape=(len(sets), columns.max() + 1))


def _padded(texts: list[tuple], lengths: np.ndarray) -> np.ndarray:
    table = np.full((len(texts), lengths.max()), -1, np.int64)
    table[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(texts)
    return table


# --- rows of gates.csv -----------------------------------------------------------------------------------------------


def near_duplicates(members: pd.DataFrame, nonmembers: pd.DataFrame) -> dict[str, np.ndarray]:
    """Which non-members [n] are near-duplicates of members: as records, and by their response alone."""
    flagged = {}
    for name, columns in (("records", ["prompt_ids", "response_ids"]), ("responses", ["response_ids"])):
        of, among = (
            [np.concatenate(parts) for parts in zip(*(frame[c] for c in columns), strict=True)]
            for frame in (nonmembers, members)
        )
        share = shared_grams(of, among)
        flagged[name] = (share > SHARE) | close_short(of, among) | (np.isnan(share) & same_texts(of, among))
    return flagged


def duplicate_rows(study: Study, scores_dir: str | Path) -> list[dict]:
    """Rows of the gate `near_duplicates`: how many non-members, and what the primary attack shows without them.

    `count:records` and `count:responses`: value of n non-members.  `auc`, and `auc_without:records`,
    `auc_without:responses` with the same members, for every student (else the headline model).
    """
    settings = study.settings
    models = study.students or [settings["headline_model"]]
    try:
        blocks = {run: _block(study, run) for run in models}
        first = next(iter(blocks.values()))[0][0]
        flagged = _flagged(study, scores_dir, first)
    except Unresolved:
        return [gate_row("near_duplicates", "all models", "count", NOT_RUN)]
    n, rows = len(first.nonmembers), []
    for name, which in flagged.items():
        count = int(which.sum())
        said = "ok: none" if not count else f"ok: {count} of {n}, see auc_without:{name}"
        rows.append(gate_row("near_duplicates", "all models", f"count:{name}", said, value=count, n=n))
    for run, block in blocks.items():
        same = all(np.array_equal(pair.nonmember_ids, first.nonmember_ids) for (pair,) in block)
        if same and any(which.any() for which in flagged.values()):
            rows += _auc_rows(study, run, block, flagged)
    return rows


def _block(study: Study, run: str) -> list[list[Pair]]:
    samples, reasons = by_seed(study, run, study.settings["primary"], "private-heldout")
    if reasons:
        raise Unresolved("; ".join(reasons.values()))
    return list(samples.values())


def _flagged(study: Study, scores_dir: str | Path, pair: Pair) -> dict[str, np.ndarray]:
    """Near-duplicates by what they are, bool [n] in the order of the pair's non-members."""
    folder = Path(scores_dir) / "text"
    texts = []
    for role, ids in zip(pair.role_pair.split("-"), (pair.member_ids, pair.nonmember_ids), strict=True):
        if not (folder / f"{role}.parquet").exists():
            raise Unresolved(f"no text/{role}.parquet beside the score tables")
        text = read_text(scores_dir, role)
        if not np.isin(ids, text.index).all():
            raise Unresolved(f"text/{role}.parquet does not have all evaluated records")
        texts.append(text.loc[ids])
    members, nonmembers = texts
    return near_duplicates(pd.concat([members, _trained_calibration(study, scores_dir, pair)]), nonmembers)


def _trained_calibration(study: Study, scores_dir: str | Path, pair: Pair) -> pd.DataFrame | None:
    """Texts of the calibration records that the model, or its teacher, was trained on; None where nobody knows."""
    if not (Path(scores_dir) / "text" / "calib.parquet").exists():
        return None
    text = read_text(scores_dir, "calib")
    try:
        coins = study.drawn_coins(text.index.to_numpy(object))
    except Unresolved:
        return None
    trained = 0 if "heldout" in study.trained_on(pair.run) else 1  # which half: kd_jax/data/roles.py
    return text[coins == trained]


def _auc_rows(study: Study, run: str, block: list[list[Pair]], flagged: dict[str, np.ndarray]) -> list[dict]:
    seed = "all" if len(block) > 1 else study.seeds(run)[0]
    parts = {"auc": block}
    for name, which in flagged.items():
        if which.any() and (~which).sum() >= 2:
            parts[f"auc_without:{name}"] = [[_without(pair, which)] for (pair,) in block]
    rows = []
    for metric, part in parts.items():
        found = estimate([auc_of(sample) for sample in part], part)
        n = len(part[0][0].members) + len(part[0][0].nonmembers)
        rows.append(gate_row("near_duplicates", run, metric, "ok", found, n=n, seed=seed))
    return rows


def _without(pair: Pair, which: np.ndarray) -> Pair:
    keep, groups = ~which, pair.groups
    parts = {name: getattr(pair, name)[keep] for name in ("nonmember_ids", "nonmembers", "nonmember_task")}
    return replace(pair, **parts, groups=groups and Groups.of(groups.members, groups.nonmembers[keep]))


def duplicate_facts(gates: list[dict]) -> dict:
    """For summary.json: how many non-members are near-duplicates of members, and the headline AUCs without them."""
    rows = [row for row in gates if row["gate"] == "near_duplicates"]
    counts = {r["metric"].partition(":")[2]: r["value"] for r in rows if r["metric"].startswith("count:")}
    n = next((row["n"] for row in rows if "n" in row), None)
    words = []
    if any(counts.values()):
        words.append(
            f"Near-duplicates: {counts['records']} of {n} non-members are nearly a member's record, "
            f"{counts['responses']} have nearly a member's response (13-grams, 0.8); see AUC without them in gates.csv."
        )
    keys = ("model", "metric", "value", "ci_low", "ci_high", "seed")
    aucs = [{key: row[key] for key in keys} for row in rows if row["metric"].startswith("auc")]
    return {"applicable": bool(counts), "n_nonmembers": n, "counts": counts, "auc": aucs, "words": words}
