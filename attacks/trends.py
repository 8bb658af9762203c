"""Three claims as tests: memorization falls from teacher to baseline to student, rises with repeats, falls with T.

claims.csv, at the main cut (after an `@`), per seed and over seeds; `value` is positive where the claim would hold:

  chain        model_a less model_b, on the same private examples: `extracted` share (exact McNemar test), mean
               `matched` share of the window, and both less the same difference on heldout records (`..._gap`), since a
               larger model predicts more of any text
  repeats      model_a by how often a record was trained on: `extracted_by_repeats`, rise of the share per doubling
               (Cochran and Armitage's test; over groups where records come in groups), and rank correlations of the
               repeats with the matched share and with the exposure of canaries.  `;canary`: canaries with coin 1, whole
               answers.  Controls: `;heldout`, records that would have been repeated had they been trained on;
               `;untrained`, `;untrained_canary`, models that never were
  temperature  students that differ in the temperature alone: model_a less model_b for neighbours in T (McNemar), and
               `extracted_by_temperature`, fall of the share per unit of T from the first model to the last; p-value
               from shuffling the temperatures within each example (whole groups alike); `..._gap`: less that fall on
               heldout records, where it is of predictable text

`p_corrected`: Holm over all rows of one claim, setting and seed, controls apart.  verdict: `yes` where p_corrected <
0.05 and the value is positive, `no` where it is negative, else `not resolved`.  With one seed it is a verdict about the
models that were trained, not about how they were.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from attacks.cuts import Extraction, Memorized
from attacks.effects import Effect, combine, mean_of, paired, slope_of_share, units, within
from attacks.inheritance import taught
from attacks.measures import blocks, told
from attacks.mechanism import swept, temperatures
from attacks.overlap import BASELINE, beside, kept, matched_share, missing, whole
from attacks.repeats import EXPOSURE, repeats_rows
from attacks.statistics import Difference, correct
from attacks.study import Study, Unresolved

COLUMNS = "claim setting model_a model_b measure value ci_low ci_high p_value p_corrected n seed verdict"
LEVEL = 0.05
VERDICTS = ("yes", "no", "not resolved")
CONTROLS = ("heldout", "untrained", "untrained_canary")
PERMUTATIONS = 2000
Value = Callable[[Extraction], np.ndarray]
CELLS = 2**22  # numbers in memory at once
CHAIN, REPEATS, TEMPERATURE = "chain", "repeats", "temperature"
WORDS = {
    CHAIN: "memorization falls from teacher to baseline to student",
    REPEATS: "memorization rises with repeats",
    TEMPERATURE: "memorization falls with the temperature of distillation",
}

NOTHING = {
    CHAIN: f"no student whose teacher was scored as well, or no run '{BASELINE}'",
    REPEATS: "no records or canaries that were trained on more than once (data.repeated, data.canaries)",
    TEMPERATURE: "no two students that differ in the temperature alone (objectives: student_T, teacher_T)",
}


def rows(study: Study, memorized: Memorized, exposures: Sequence[dict] = ()) -> list[dict]:
    """Rows of claims.csv; one that could not be computed has a `reason`. exposures: rows of exposure.csv."""
    if reason := missing(memorized):
        return [{"claim": claim, "measure": claim, "reason": reason} for claim in WORDS]
    cut = memorized.main
    found = []
    makers = {CHAIN: _chain_rows, REPEATS: partial(repeats_rows, exposures), TEMPERATURE: _temperature_rows}
    for claim, make in makers.items():
        own = [{"claim": claim, "model_b": "-"} | row for row in make(study, memorized)]
        for row in own:
            name, _, control = row["measure"].partition(";")
            if name != EXPOSURE:
                row["measure"] = f"{name}@{cut}" + (f";{control}" if control else "")
        found += own or [{"claim": claim, "measure": claim, "reason": NOTHING[claim]}]
    control = lambda row: row["measure"].partition(";")[2] in CONTROLS
    correct(found, lambda row: (row["claim"], row["setting"], row["seed"], control(row)))
    for row in found:
        if "p_corrected" in row:
            row["verdict"] = verdict(row)
    return found


def verdict(row: dict) -> str:
    """`yes`, `no` or `not resolved`, from the corrected p-value and the sign."""
    yes, no, unresolved = VERDICTS
    if not row["p_corrected"] < LEVEL:
        return unresolved
    return yes if row["value"] > 0 else no


def _blocks(found: dict[int, list[Extraction]]) -> dict[int | str, list[list[Extraction]]]:
    """Each seed alone, and all together where there are several on the same examples."""
    first = next(iter(found.values()), None)
    alike = all(np.array_equal(each[0].ids, first[0].ids) for each in found.values())
    return {seed: block for seed, block in blocks(found).items() if alike or seed != "all"}


# --- teacher, baseline, student --------------------------------------------------------------------------------------


def _chain_rows(study: Study, memorized: Memorized) -> Iterator[dict]:
    done = set()
    for teacher, student in taught(study):
        setting = study.head(student)["setting"]
        links = [(teacher, BASELINE), (BASELINE, student)] if BASELINE in study.runs else []
        for link in (*links, (teacher, student)):
            if (setting, link) not in done:
                done.add((setting, link))
                at = {"setting": setting, "model_a": link[0], "model_b": link[1]}
                yield from (at | row for row in _link_rows(study, memorized, link))


def _link_rows(study: Study, memorized: Memorized, link: tuple[str, str]) -> Iterator[dict]:
    roles: dict[str, dict[int, list[Extraction]]] = {"private": {}, "heldout": {}}
    seeds = max((study.seeds(run) for run in link), key=len)
    for role, found in roles.items():
        for seed in seeds:
            try:
                found[seed] = beside(study, memorized, link, seed, role, memorized.main)
                whole(found[seed][0])
            except Unresolved as why:
                found.pop(seed, None)
                if role == "private":
                    yield {"measure": "extracted", "seed": seed, "reason": str(why)}
    others = _blocks(roles["heldout"])
    for seed, block in _blocks(roles["private"]).items():
        at, n = {"seed": seed}, int(block[0][0].full.sum())
        if seed == "all":
            gap = _paired_mean(study, block, kept)
        else:
            ((a, b),) = block
            gap = paired(study, a.ids, kept(a), kept(b), a.full)
        yield at | {"measure": "extracted", "n": n, "p_value": gap.p} | told(gap)
        matched = _paired_mean(study, block, matched_share)
        yield at | {"measure": "matched", "n": n, "p_value": matched.p} | told(matched)
        for name, value in (("extracted_gap", kept), ("matched_gap", matched_share)) if seed in others else ():
            excess = _excess(study, block, others[seed], value)
            yield at | {"measure": name, "n": n, "p_value": excess.p} | told(excess)


def _paired_mean(study: Study, block: list[list[Extraction]], value: Value) -> Difference:
    effects = [mean_of(value(a).astype(float) - value(b), a.full) for a, b in block]
    ids, full = block[0][0].ids, block[0][0].full
    return within(combine(effects, study.clusters(ids)), -1, 1, units(study, ids, full))


def _excess(study: Study, private: list[list[Extraction]], heldout: list[list[Extraction]], value: Value) -> Difference:
    """The paired difference on private records less that on heldout ones."""
    effects = []
    for (a, b), (c, d) in zip(private, heldout, strict=True):
        gaps = np.concatenate([value(a).astype(float) - value(b), value(c).astype(float) - value(d)])
        member = np.arange(len(gaps)) < len(a.ids)
        full = np.concatenate([a.full, c.full])
        effects.append(mean_of(gaps, member & full).minus(mean_of(gaps, ~member & full)))
    ids = np.concatenate([private[0][0].ids, heldout[0][0].ids])
    full = np.concatenate([private[0][0].full, heldout[0][0].full])
    return within(combine(effects, study.clusters(ids)), -2, 2, units(study, ids, full))


# --- temperature -----------------------------------------------------------------------------------------------------


def _temperature_rows(study: Study, memorized: Memorized) -> Iterator[dict]:
    for series in temperatures(study):
        runs, T = list(series.values()), np.array(list(series))
        at = {"setting": study.head(runs[0])["setting"]}
        both = {role: swept(study, memorized, series, role) for role in ("private", "heldout")}
        for role, control in (("private", ""), ("heldout", ";heldout")):
            found, reasons = both[role]
            for reason in dict.fromkeys(reasons) if role == "private" else ():
                yield at | {"model_a": runs[0], "measure": "extracted_by_temperature", "seed": "all", "reason": reason}
            for seed, block in _blocks(found).items():
                for row in _sweep_rows(study, block, runs, T):
                    yield at | row | {"measure": row["measure"] + control, "seed": seed}
        of_private, of_heldout = (_blocks(found) for found, _ in both.values())
        for seed in (seed for seed in of_private if seed in of_heldout):
            row = _fall_beyond(study, of_private[seed], of_heldout[seed], T)
            yield at | {"model_a": runs[0], "model_b": runs[-1], "seed": seed} | row


def _sweep_rows(study: Study, block: list[list[Extraction]], runs: list[str], T: np.ndarray) -> Iterator[dict]:
    ids, full = block[0][0].ids, block[0][0].full
    n = int(full.sum())
    for i in range(len(runs) - 1):
        pairs = [[each[i], each[i + 1]] for each in block]
        if len(pairs) == 1:
            gap = paired(study, ids, kept(pairs[0][0]), kept(pairs[0][1]), full)
        else:
            gap = _paired_mean(study, pairs, kept)
        at = {"model_a": runs[i], "model_b": runs[i + 1], "measure": f"extracted_T={T[i]:g}-T={T[i + 1]:g}"}
        yield at | {"n": n, "p_value": gap.p} | told(gap)
    shares = [np.stack([kept(found) for found in each], axis=1) for each in block]
    fall = slope_of_share(study, [falling(each, T, full) for each in shares], ids, full, T)
    p = fall.p if len(block) > 1 else shuffled(shares[0][full], T, _codes(study, ids[full]), study.settings["seed"])
    at = {"model_a": runs[0], "model_b": runs[-1], "measure": "extracted_by_temperature"}
    yield at | {"n": n, "p_value": p} | told(fall)


def _fall_beyond(study: Study, private: list[list[Extraction]], heldout: list[list[Extraction]], T: np.ndarray) -> dict:
    """The fall by T of the share extracted of private records less that of heldout ones."""
    effects = []
    for each, others in zip(private, heldout, strict=True):
        hits = np.concatenate([np.stack([kept(found) for found in side], axis=1) for side in (each, others)])
        full = np.concatenate([each[0].full, others[0].full])
        member = np.arange(len(full)) < len(each[0].ids)
        effects.append(falling(hits, T, member & full).minus(falling(hits, T, ~member & full)))
    ids = np.concatenate([private[0][0].ids, heldout[0][0].ids])
    steepest = 3 / np.ptp(T)  # twice that of one share, see slope_of_share
    gap = within(combine(effects, study.clusters(ids)), -steepest, steepest, units(study, ids, full))
    name = {"measure": "extracted_by_temperature_gap", "n": int(private[0][0].full.sum())}
    return name | {"p_value": gap.p} | told(gap)


def _codes(study: Study, ids: np.ndarray) -> np.ndarray:
    clusters = study.clusters(ids)
    return np.arange(len(ids)) if clusters is None else clusters


def falling(hits: np.ndarray, T: np.ndarray, among: np.ndarray) -> Effect:
    """Fall of the share of hits (bool [n, K]) per unit of T [K], by least squares within each example."""
    apart = T - T.mean()
    return mean_of(-(hits @ apart) / (apart @ apart), among)


def shuffled(hits: np.ndarray, T: np.ndarray, clusters: np.ndarray, seed: int) -> float:
    """Two-sided p-value of no trend of hits (bool [n, K]) with T [K]: T is shuffled within examples.

    clusters: codes [n]; the examples of one are shuffled alike, so that what is exchangeable is the cluster.
    """
    codes = np.unique(clusters, return_inverse=True)[1]
    sums = np.stack([np.bincount(codes, column) for column in hits.T], axis=1)  # [clusters, K]
    sums = sums[np.ptp(sums, axis=1) > 0]  # the others give the same under any order
    if not len(sums):
        return 1.0
    apart, rng = T - T.mean(), np.random.default_rng([seed, len(sums)])
    real = abs(float((sums @ apart).sum()))
    reached, size = 0, max(1, CELLS // sums.size)
    for first in range(0, PERMUTATIONS, size):
        count = min(size, PERMUTATIONS - first)
        orders = rng.permuted(np.broadcast_to(apart, (count, *sums.shape)), axis=2)
        reached += int(np.sum(np.abs(np.einsum("bck,ck->b", orders, sums)) >= real - 1e-9))
    return (1 + reached) / (1 + PERMUTATIONS)


# --- words -----------------------------------------------------------------------------------------------------------

HEADLINES = {  # the exact share first, then what is finer than it
    CHAIN: {"extracted": "verbatim", "matched_gap": "matched tokens beyond those of heldout records"},
    REPEATS: {
        "extracted_by_repeats": "verbatim, per doubling",
        "spearman_matched_repeats": "matched tokens, rank correlation",
        "extracted_by_repeats;canary": "whole canaries, per doubling",
        EXPOSURE: "exposure of canaries, rank correlation",
    },
    TEMPERATURE: {
        "extracted_by_temperature": "verbatim, per unit of T",
        "extracted_by_temperature_gap": "the same beyond that of heldout records",
    },
}
FEW = 4  # models up to which a sentence has their numbers


def claim_words(rows: list[dict]) -> list[str]:
    """One sentence a claim and setting: what held, what did not and what stays open.

    Of each pair of models over all seeds where there are several, else of its one seed; and of how many texts.
    """
    said = []
    for claim, words in WORDS.items():
        own, sentence = [row for row in rows if row["claim"] == claim], words[0].upper() + words[1:]
        tested = [row for row in own if "verdict" in row]
        for setting in dict.fromkeys(row["setting"] for row in tested):
            where = "" if setting == "-" else f" ({setting} setting)"
            of_setting = [row for row in tested if row["setting"] == setting]
            parts = [_answers(_chosen(of_setting, m), name) for m, name in HEADLINES[claim].items()]
            said += [f"{sentence}{where}: {'; '.join(filter(None, parts))}."] if any(parts) else []
        if not tested:
            reasons = dict.fromkeys(row["reason"] for row in own if "reason" in row)
            said.append(f"{sentence}: not tested; {'; '.join(reasons)}.")
    return said


def _chosen(rows: list[dict], measure: str) -> list[dict]:
    """One row a pair of models: of a chain its two links alone, where there is a baseline."""
    chosen: dict[tuple[str, str], dict] = {}
    for row in rows:
        name, _, cut = row["measure"].partition("@")
        control = cut.partition(";")[1:]
        pair = row["model_a"], row["model_b"]
        if "".join([name, *control]) == measure and (pair not in chosen or row["seed"] == "all"):
            chosen[pair] = row
    linked = any(BASELINE in pair for pair in chosen)
    return [row for pair, row in chosen.items() if not linked or row["claim"] != CHAIN or BASELINE in pair]


def _answers(rows: list[dict], name: str) -> str:
    by_verdict: dict[str, list[str]] = {}
    for row in rows:
        by_verdict.setdefault(row["verdict"], []).append(_one(row, len(rows) <= FEW))
    found = [f"{verdict} for {', '.join(by_verdict[verdict])}" for verdict in VERDICTS if verdict in by_verdict]
    return f"{name}: {'; '.join(found)} ({_sizes(rows, 'canaries' if 'canar' in name else 'texts')})" if found else ""


def _sizes(rows: list[dict], noun: str) -> str:
    """`300 texts, seed 0`: of what the verdicts are; the least and the most where rows differ."""
    n = sorted({int(float(row["n"])) for row in rows})
    seeds = sorted({str(row["seed"]) for row in rows} - {"all"})
    alone = f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" if seeds else ""
    joint = "all seeds together" if any(row["seed"] == "all" for row in rows) else ""
    return ", ".join(
        filter(None, [f"{' to '.join(f'{k:,}' for k in dict.fromkeys((n[0], n[-1])))} {noun}", alone, joint])
    )


def _one(row: dict, numbers: bool) -> str:
    models = row["model_a"] if row["model_b"] == "-" else f"{row['model_a']} over {row['model_b']}"
    if not numbers:
        return models
    ranks = row["measure"].startswith("spearman")
    ends = [row[key] for key in ("value", "ci_low", "ci_high")]
    value, low, high = ((1 if ranks else 100) * (np.nan if end is None else float(end)) for end in ends)
    unit = "" if ranks else " points"
    interval = f"[{low:.2f}, {high:.2f}]" if np.isfinite([low, high]).all() else "[no interval]"
    return f"{models} ({value:+.2f}{unit} {interval}, p = {float(row['p_corrected']):.2g})"
