"""Exposure of canaries: how far up a model ranks an inserted secret among those of its kind that nobody inserted.

`exposure = log2 |R| - log2 rank` (memorization.md 5; arXiv:1802.08232).  The candidates R are the canaries with
placement `none`: same generator, same template, same length in tokens, never trained on.  The mean loss over the whole
response orders them as the log-perplexity does; of a canary that is a plain text, over the whole text, of which the
secret is the end and the name, digits too, a part of what is to be known.
"""

import numpy as np
from scipy import special, stats

from attacks.study import Study, Unresolved

COLUMNS = "model technique setting seed example_id placement repeats coin loss exposure extrapolated n_references fit_p"
FEWEST = 8  # candidates, below which no distribution is fitted
WIDTHS = np.concatenate([[0.0], np.geomspace(1e-9, 60, 6000)])  # where the tail is summed, in units of its length


def interpolated(losses: np.ndarray, references: np.ndarray) -> np.ndarray:
    """`log2 N - log2(1 + #{references <= canary})` for losses [n] among N references [n]; a tie counts against it.

    At most log2 N; slightly negative for what is worse than every reference.
    """
    better = np.searchsorted(np.sort(references), losses, side="right")
    return np.log2(len(references)) - np.log2(1 + better)


def extrapolated(losses: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, float]:
    """`-log2 CDF(canary)` under a skew-normal fitted to the references [n], and the p-value of the fit (KS).

    The log of the CDF is summed from the log-density: the CDF itself is 0 for what a model knows well.
    The KS p-value is too large, since the parameters are fitted on what it tests; a small one still says: no fit.
    """
    shape, centre, scale = stats.skewnorm.fit(references)
    fit = stats.kstest(references, lambda x: stats.skewnorm.cdf(x, shape, centre, scale)).pvalue
    return -log_cdf(losses, shape, centre, scale) / np.log(2), float(fit)


def log_cdf(x: np.ndarray, shape: float, centre: float, scale: float) -> np.ndarray:
    """Natural log of the skew-normal CDF [n], also where it is far below the smallest float."""
    points = (np.asarray(x)[:, None] - centre) / scale - WIDTHS
    log_density = np.log(2) + stats.norm.logpdf(points) + special.log_ndtr(shape * points)
    gaps = np.diff(WIDTHS)
    weights = np.log((np.append(gaps, 0) + np.insert(gaps, 0, 0)) / 2)  # trapezoids
    return np.minimum(special.logsumexp(log_density + weights, axis=1), 0)


def exposure_rows(study: Study) -> list[dict]:
    """One row per model, seed and canary with coin 1, in order of the ids; none where there are no canaries.

    `extrapolated` and `fit_p` are None with fewer than FEWEST references, or where these do not differ.
    """
    rows = []
    for (run, seed), table in study.tables.items():
        if "canary" not in table.files:
            continue
        totals = study.losses[run, seed, "canary"]
        try:
            drawn = study.split_rows(totals.ids)
        except Unresolved:
            return []
        loss = np.where(totals.below > 0, totals.above / np.maximum(totals.below, 1), np.nan)
        placement = drawn["placement"].to_numpy(str)
        references = loss[(placement == "none") & np.isfinite(loss)]
        chosen = np.flatnonzero((placement != "none") & (drawn["coin"].to_numpy() == 1) & np.isfinite(loss))
        if not len(references) or not len(chosen):
            continue
        fitted, fit = np.full(len(chosen), np.nan), None
        if len(references) >= FEWEST and np.ptp(references) > 0:
            fitted, fit = extrapolated(loss[chosen], references)
        repeats = drawn["repeats"].to_numpy() if "repeats" in drawn else np.ones(len(drawn), int)
        for i, rank, tail in zip(chosen, interpolated(loss[chosen], references), fitted, strict=True):
            rows.append(
                study.head(run)
                | {"seed": seed, "example_id": totals.ids[i], "placement": placement[i], "repeats": int(repeats[i])}
                | {"coin": 1, "loss": loss[i], "exposure": rank, "extrapolated": None if np.isnan(tail) else tail}
                | {"n_references": len(references), "fit_p": fit}
            )
    return rows


def exposure_facts(rows: list[dict]) -> list[dict]:
    """For summary.json: mean exposure by model, placement and repeats, with its standard error over the n canaries.

    A canary counts once, with its mean over seeds.  `saturates` is the greatest value that ranks among the references
    allow.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["placement"], row["repeats"]), []).append(row)
    facts = []
    for (model, placement, repeats), group in sorted(groups.items()):
        each: dict[str, list[float]] = {}
        for row in group:
            each.setdefault(row["example_id"], []).append(row["exposure"])
        values = np.array([np.mean(of) for of in each.values()])
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        tails = [row["extrapolated"] for row in group if row["extrapolated"] is not None]
        facts.append(
            {"model": model, "placement": placement, "repeats": repeats, "n": len(values)}
            | {"exposure": float(values.mean()), "standard_error": error}
            | {"extrapolated": float(np.mean(tails)) if tails else None}
            | {"saturates": float(np.log2(min(row["n_references"] for row in group)))}
        )
    return facts
