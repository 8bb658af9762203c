"""How much of a long text can be drawn out of a model from somewhere: overlapping windows (arXiv:2505.12546).

Read is the scoring variant `windows`, whose ids are `<record>@<first token>`; only the suffix of a window was scored.
A token is covered where it stands in the suffix of a window that is drawn with probability p_z or more, under top-k 40
at T = 1 where the table has it, else from the model itself.  `coverage@p=..;scheme;window=<tokens of a suffix>` is the
mean over texts of the share of their tokens that are covered, of those that stand in the suffix of any window: a text's
first ones never do.
"""

import numpy as np

from attacks.cuts import FIELDS, GRID, log_q
from attacks.measures import Sample, measure_rows
from attacks.study import Study
from attacks.tables import TableError, Tokens

THRESHOLDS = (0.5, 0.1, 0.01, 0.001, 0.0001)
SCHEMES = ("k=40,t=1", "t=1")  # the first that the table has
ROLES = ("private", "heldout")


def coverage_rows(study: Study) -> list[dict]:
    """Rows of memorization.csv for every run whose texts were scored in windows; n counts texts."""
    rows = []
    for run in study.runs:
        found: dict[str, dict[str, dict[int, Sample]]] = {}
        for seed in study.seeds(run):
            table = study.tables[run, seed].variants.get("windows")
            for role in ROLES if table is not None else ():
                if role not in table.files:
                    continue
                tokens = table.load(role, {*FIELDS, *filter(GRID.fullmatch, table.columns)})
                for measure, sample in _samples(tokens).items():
                    found.setdefault(measure, {}).setdefault(role, {})[seed] = sample
        for measure, by_role in found.items():
            rows += measure_rows(study, run, measure, by_role)
    return rows


def _samples(tokens: Tokens) -> dict[str, Sample]:
    by_scheme = log_q(tokens)
    scheme = next(name for name in SCHEMES if name in by_scheme)
    log_p = np.bincount(tokens.owner, by_scheme[scheme], len(tokens.ids))
    found, size = {}, int(tokens.lengths.max(initial=0))
    for threshold in THRESHOLDS:
        texts, shares = coverage(tokens.ids, tokens.lengths, log_p >= np.log(threshold))
        found[f"coverage@p={threshold:g};{scheme};window={size}"] = Sample(texts, shares, np.ones(len(texts), bool))
    return found


def coverage(ids: np.ndarray, lengths: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Names of the texts [m], and the share of each one's tokens that stand in a drawn window (bool [n]).

    ids: `<text>@<first token>` [n].  lengths: scored tokens of each window [n].
    Raises TableError for other ids.
    """
    parts = [name.rpartition("@") for name in ids.tolist()]
    if wrong := [name for name, part in zip(ids, parts, strict=True) if not part[2].isdigit() or not part[0]]:
        raise TableError(f"{len(wrong)} ids of windows are not <record>@<first token>, the first is {wrong[0]}")
    texts, owner = np.unique([part[0] for part in parts], return_inverse=True)
    starts = np.array([int(part[2]) for part in parts])
    sizes = np.zeros(len(texts), int)
    np.maximum.at(sizes, owner, starts + lengths + 1)  # and one place where the last window ends
    first = np.cumsum(sizes) - sizes
    reached, covered = (
        np.bincount(
            np.repeat(np.arange(len(texts)), sizes), _inside(first[owner] + starts, lengths, which, sizes.sum())
        )
        for which in (np.ones(len(ids), bool), drawn)
    )
    return texts, covered / np.maximum(reached, 1)


def _inside(starts: np.ndarray, lengths: np.ndarray, which: np.ndarray, size: int) -> np.ndarray:
    """Which of `size` places lie in any of these windows, bool [size]."""
    steps = np.zeros(size, int)
    np.add.at(steps, starts[which], 1)
    np.add.at(steps, (starts + lengths)[which], -1)
    return np.cumsum(steps) > 0
