"""Is more memorized of what was trained on more often?  Records and canaries by their repeats (see trends.py)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from attacks.cuts import Memorized
from attacks.disagreement import correlation, interval
from attacks.effects import slope_of, slope_of_share, units
from attacks.measures import blocks, told
from attacks.overlap import kept, matched_share
from attacks.statistics import SeedMean, difference, over_seeds
from attacks.study import Study, Unresolved

EXPOSURE = "spearman_exposure_repeats"  # of whole answers: it has no cut


def repeats_rows(exposures: Sequence[dict], study: Study, memorized: Memorized) -> Iterator[dict]:
    """Rows of claims.csv without claim, cut and verdict; none where nothing was trained on more than once."""
    if study.splits is None or "repeats" not in study.splits:
        return
    yield from _exposure_rows(study, exposures)
    for run in (run for run in study.runs if not study.provenance(run).get("swap_of")):
        seen = study.trained_on(run)
        private = "" if "private" in seen else ";untrained"
        canary = ";canary" if {"private", "public"} & seen else ";untrained_canary"
        for role, control in (("private", private), ("heldout", ";heldout"), ("canary", canary)):
            found: dict[int, Repeated] = {}
            for seed in study.seeds(run):
                try:
                    found[seed] = _repeated(study, memorized, run, seed, role)
                except Unresolved:
                    continue  # most runs have no canaries, most studies no repeats: the claim says so where none has
            at = {"setting": study.head(run)["setting"], "model_a": run}
            for seed, each in found.items():
                yield from (at | {"seed": seed} | row for row in _trend_rows(study, [each], control))
            same = all(np.array_equal(each.ids, next(iter(found.values())).ids) for each in found.values())
            if len(found) > 1 and same:
                yield from (at | {"seed": "all"} | row for row in _trend_rows(study, list(found.values()), control))


class Repeated(NamedTuple):
    """Examples that were, or would have been, trained on several times: str, float, bool, float [n] each."""

    ids: np.ndarray
    doublings: np.ndarray
    memorized: np.ndarray
    matched: np.ndarray


def _repeated(study: Study, memorized: Memorized, run: str, seed: int, role: str) -> Repeated:
    """Raises Unresolved where all have the same number of repeats."""
    found = memorized.of(run, seed, role, memorized.main)
    drawn = study.split_rows(found.ids)
    repeats = drawn["repeats"].to_numpy(float)
    if role == "canary":  # short answers: memorized is the whole of one, up to its EOS
        placed = np.isin(drawn["placement"].to_numpy(str), study.carried(run))
        used, hit = placed & (drawn["coin"].to_numpy() == 1) & (found.window > 0), found.extracted
    else:
        used, hit = found.full, kept(found)
    used = used & (repeats > 0)
    if len(np.unique(repeats[used])) < 2:
        raise Unresolved(f"all {used.sum()} records of role '{role}' have the same number of repeats")
    return Repeated(found.ids[used], np.log2(repeats[used]), hit[used], matched_share(found)[used])


def _trend_rows(study: Study, block: list[Repeated], control: str) -> Iterator[dict]:
    ids, everyone = block[0].ids, np.ones(len(block[0].ids), bool)
    clusters = study.clusters(ids)
    effects = [slope_of(each.memorized.astype(float), each.doublings, everyone) for each in block]
    rise = slope_of_share(study, effects, ids, everyone, block[0].doublings)
    p = armitage(block[0].memorized, block[0].doublings) if len(block) == 1 and clusters is None else rise.p
    yield {"measure": f"extracted_by_repeats{control}", "n": len(ids), "p_value": p} | told(rise)
    try:
        rank = _rank(study, ids, [(each.matched, each.doublings) for each in block])
    except Unresolved:
        return  # nobody matches a token more than another: the share above says as much
    yield {"measure": f"spearman_matched_repeats{control}", "n": len(ids)} | rank


def _rank(study: Study, ids: np.ndarray, seeds: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """Spearman's correlation of two values of each example, one couple a seed, with its interval and p-value."""
    found = [correlation(study, ids, *each) for each in seeds]
    numbers = told(interval(found, -1.0, 1.0))
    if len(seeds) == 1 and units(study, ids, np.ones(len(ids), bool)) == len(ids):
        return numbers | {"p_value": float(stats.spearmanr(*seeds[0]).pvalue)}
    mean = (
        over_seeds([each.value for each in found], np.mean([each.draws for each in found], axis=0).var())
        if len(found) > 1
        else SeedMean(found[0].value, float(found[0].draws.std()), np.inf)
    )
    return numbers | {"p_value": difference(mean.value, max(mean.se, 1e-9), df=mean.df).p}


def _exposure_rows(study: Study, exposures: Sequence[dict]) -> Iterator[dict]:
    """Rank correlation of repeats and the exposure of canaries that the run or its teacher was trained on."""
    frame = pd.DataFrame(exposures)
    for run, own in frame.groupby("model", sort=False) if len(frame) else ():
        own = own[own["placement"].isin(study.carried(run)) & (own["repeats"] > 0)]
        each = {seed: part.sort_values("example_id") for seed, part in own.groupby("seed")}
        alike = len({tuple(part["example_id"]) for part in each.values()}) == 1
        for seed, block in blocks(each).items():
            if not {"private", "public"} & study.trained_on(run) or (seed == "all" and not alike):
                continue
            ids = block[0]["example_id"].to_numpy(str)
            try:
                rank = _rank(study, ids, [(p["exposure"].to_numpy(float), p["repeats"].to_numpy(float)) for p in block])
            except Unresolved:
                continue  # one number of repeats, or one exposure
            at = {"setting": study.head(run)["setting"], "model_a": run, "measure": EXPOSURE, "seed": seed}
            yield at | {"n": len(ids)} | rank


def armitage(hits: np.ndarray, x: np.ndarray) -> float:
    """Two-sided p-value of no trend of a share by x (bool [n], float [n]), Cochran and Armitage's test.

    `z = sum (x - mean x)(y - p) / sqrt(p (1 - p) sum (x - mean x)^2)`; 1 where nothing varies.
    """
    apart, p = x - x.mean(), hits.mean()
    spread = p * (1 - p) * float(apart @ apart)
    return float(2 * stats.norm.sf(abs(apart @ hits) / np.sqrt(spread))) if spread > 0 else 1.0
