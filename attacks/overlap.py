"""The same examples under several models: which are memorized by both of two, and do two techniques differ in it?

Everything here is of examples whose suffix is whole at the cut: shorter ones are counted elsewhere, not averaged in.
"""

from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np

from attacks.cuts import Cut, Extraction, Memorized
from attacks.effects import combine, mean_of, paired, share, units, within
from attacks.measures import told
from attacks.study import Study, Unresolved

BASELINE = "direct"
COINCIDENCE = "coincidence_"


def missing(memorized: Memorized) -> str | None:
    """Why there is no cut to compare models at, or None."""
    try:
        return memorized.main and None
    except Unresolved as why:
        return str(why)


def beside(
    study: Study, memorized: Memorized, runs: tuple[str, ...], seed: int, role: str, cut: Cut
) -> list[Extraction]:
    """One extraction a run, of this seed or of the run's only one. Raises Unresolved unless the examples are alike."""
    found = []
    for run in runs:
        own = study.match(run, seed)
        if own is None:
            raise Unresolved(f"{run} has no seed {seed}")
        found.append(memorized.of(run, own, role, cut))
    for run, other in zip(runs, found, strict=True):
        if not (np.array_equal(other.ids, found[0].ids) and np.array_equal(other.length, found[0].length)):
            raise Unresolved(f"{runs[0]} and {run} were scored on different examples or tokens")
    return found


def kept(found: Extraction) -> np.ndarray:
    """Which examples are memorized: the whole suffix is there, and greedy decoding gives it. bool [n]."""
    return found.full & found.extracted


def matched_share(found: Extraction) -> np.ndarray:
    """The share of the window that greedy decoding gets right before its first miss [n]; 0 for an empty window."""
    return found.matched / np.maximum(found.window, 1)


def whole(found: Extraction) -> np.ndarray:
    """bool [n]: examples with a whole suffix. Raises Unresolved where there are fewer than two."""
    if found.full.sum() < 2:
        raise Unresolved(f"{found.full.sum()} examples have {found.cut.suffix} tokens after the prefix")
    return found.full


def prefix_of(study: Study, *runs: str) -> str:
    """`coincidence_` for models of which one was not trained on private records itself, else nothing."""
    told = [study.provenance(run) for run in runs]
    trained = all("private" in (t.get("train_roles") or ()) and t.get("setting") != "disjoint" for t in told)
    return "" if trained else COINCIDENCE


# --- overlap ---------------------------------------------------------------------------------------------------------


def overlap_rows(study: Study, memorized: Memorized, head: dict, runs: list[str]) -> Iterator[dict]:
    """Jaccard index and containment at the main cut: between seeds of every run, and between all pairs of runs.

    region `a & b`: count in both, denominator in either.  region `a in b`: count in both, denominator in a.
    `coincidence_` goes by what these two were trained on, not by the students that they stand beside.
    """
    cut = memorized.main
    found: dict[tuple[str, int], Extraction] = {}
    for run in runs:
        for seed in study.seeds(run):
            try:
                found[run, seed] = memorized.of(run, seed, "private", cut)
            except Unresolved:
                continue  # the rows of regions say why
    for run in runs:
        prefix = prefix_of(study, run)
        own = [(f"{run}/seed{seed}", found[run, seed]) for seed in study.seeds(run) if (run, seed) in found]
        for a, b in combinations(own, 2):
            yield from _overlap(study, head | {"seed": "all"}, a, b, prefix, cut)
    for a, b in combinations(runs, 2):
        prefix = prefix_of(study, a, b)
        for seed in dict.fromkeys([*study.seeds(a), *study.seeds(b)]):
            both = [(run, study.match(run, seed)) for run in (a, b)]
            if all(key in found for key in both):
                named = [(run, found[run, own]) for run, own in both]
                yield from _overlap(study, head | {"seed": seed}, *named, prefix, cut)


def _overlap(study: Study, at: dict, a: tuple, b: tuple, prefix: str, cut: Cut) -> Iterator[dict]:
    if not np.array_equal(a[1].ids, b[1].ids):
        return
    both = kept(a[1]) & kept(b[1])
    yield (
        at
        | {"measure": f"{prefix}jaccard@{cut}", "region": f"{a[0]} & {b[0]}"}
        | counted(study, a[1].ids, both, kept(a[1]) | kept(b[1]))
    )
    for (one, first), (other, _) in permutations((a, b)):
        name = {"measure": f"{prefix}containment@{cut}", "region": f"{one} in {other}"}
        yield at | name | counted(study, first.ids, both, kept(first))


def counted(study: Study, ids: np.ndarray, hits: np.ndarray, among: np.ndarray) -> dict:
    """Columns of a share: count, denominator, value and interval; no value where the denominator is 0."""
    row = {"count": int((hits & among).sum()), "denominator": int(among.sum())}
    return row | (told(share(study, ids, hits, among)) if row["denominator"] else {})


# --- techniques ------------------------------------------------------------------------------------------------------


def technique_rows(
    study: Study, memorized: Memorized, head: dict, teacher: str, students: list[str], prefix: str
) -> Iterator[dict]:
    """Paired differences between students on the same examples, with exact tests on those that only one memorizes.

    `memorized_difference`, of all examples; `inheritance_difference`, of those that the teacher memorizes and the
    baseline does not.  region `a - b`; count: discordant examples, denominator: examples.
    """
    cut = memorized.main
    for a, b in combinations(students, 2):
        found: dict[int, list[Extraction]] = {}
        for seed in study.seeds(a):
            try:
                found[seed] = beside(study, memorized, (a, b), seed, "private", cut)
            except Unresolved as why:
                yield head | {"student": a, "measure": f"{prefix}memorized_difference@{cut}", "reason": str(why)}
        at = head | {"student": a, "region": f"{a} - {b}"}
        for seed, (first, second) in found.items():
            groups = {"memorized_difference": first.full}
            try:
                trio = beside(study, memorized, (a, teacher, BASELINE), seed, "private", cut)
                groups["inheritance_difference"] = kept(trio[1]) & ~kept(trio[2])
            except Unresolved:
                pass  # without a baseline nothing is inherited; the rows of regions say so
            for measure, among in groups.items():
                if among.any():
                    gap = paired(study, first.ids, kept(first), kept(second), among)
                    count = {"count": int((kept(first) ^ kept(second))[among].sum()), "denominator": int(among.sum())}
                    name = {"measure": f"{prefix}{measure}@{cut}", "seed": seed}
                    yield at | name | count | told(gap) | {"p_value": gap.p}
        if len(found) > 1:
            yield from _over_seeds(study, at, list(found.values()), f"{prefix}memorized_difference@{cut}")


def _over_seeds(study: Study, at: dict, found: list[list[Extraction]], measure: str) -> Iterator[dict]:
    ids, full = found[0][0].ids, found[0][0].full
    if all(np.array_equal(ids, first.ids) for first, _ in found) and full.sum() > 1:
        gaps = [mean_of(kept(first).astype(float) - kept(second), full) for first, second in found]
        gap = within(combine(gaps, study.clusters(ids)), -1, 1, units(study, ids, full))
        numbers = {"seed": "all", "denominator": int(full.sum()), "p_value": gap.p}
        yield at | {"measure": measure} | numbers | told(gap)
