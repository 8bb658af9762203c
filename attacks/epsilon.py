"""Rows of epsilon.csv: lower bounds on epsilon, each with the design it comes from and what makes it valid.

source                       what was put in by a coin, and by whom it was met
canaries:teacher_only        invented records, in the teacher's data alone; `both`: in its student's as well
canaries:...@repeats=4       of these, the ones that go in four times.  Named beforehand: all together, and each number
chains:full                  the pool of private and held-out records, over again for each shadow chain
chains:...@one_a_run         of these, one record from one chain of each pair: runs that have nothing in common
private-heldout              natural members of the main study: refused

A bound of a student is about the whole chain, teacher and student, with respect to what was put in.  The unit is a
canary with all of its copies, or a group of records.  `valid`: yes; estimate, where it rests on an assumption that
cannot be checked; no.  Over several models (chains, seeds) the median of their bounds counts, each taken at half the
significance: twice a median of p-values is a p-value, however they depend on each other (arXiv:0811.2177); never the
best of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from attacks import shadow
from attacks.chains import MODELS, Chains
from attacks.lower_bounds import DELTA, METHODS, SIGNIFICANCE, STRATEGIES, Bound, Rule, bounds, largest, lower_bound
from attacks.statistics import holm
from attacks.study import CANARIES, Study, Unresolved

COLUMNS = (
    "model technique setting source attack method strategy delta significance epsilon largest least greatest "
    "n_in n_out trained_models valid conditions seed"
)
PLACEMENTS = {"teacher_only": {"private"}, "both": {"private", "public"}}  # train roles whose runs meet the canaries
ATTACKS = ("loss", "reference:base_student", "reference:base_teacher")  # beside the primary one, named beforehand
WITHOUT_REFERENCES = ("loss",)  # no other chain's model has a part in the score
CHAIN_ATTACKS = ("lira_online", "rmia_offline", "loss")  # the first that there is speaks for the chains
UNFAIR = 1e-3  # p-value below which inclusion was no fair coin
REFUSED = (
    "refused: the tables do not show that each record's membership was drawn by a coin of its own; canaries and the "
    "shadow chains are drawn so"
)
CHEAP = "refused: with two teachers in all, scores are calibrated by models that were trained on the very same coins"
STRATEGY = {
    "split": "threshold from a seeded half of the scores, bound from the other",
    "bonferroni": "corrected for the number of thresholds on the hull of the ROC",
    "explicit": "threshold fixed on calibration records",
}
GAUSSIAN = "assumed: a Gaussian trade-off function"
HULL = "assumed: that this is enough, though the scores chose the thresholds (holds on null scores, no proof)"


class Trial(NamedTuple):
    """One number per independent coin, of what was put in [m] and left out [n], and what is known of the design.

    coin_p: p-value of a fair coin.  words: what was checked, then what was bounded.  threshold: fixed on other records.
    dependence: what counts of TPR and FPR take for granted; "" for runs that have nothing in common.
    """

    inside: np.ndarray
    outside: np.ndarray
    coin_p: float
    words: list[str]
    threshold: float | None = None
    dependence: str = "assumed: canaries independent of each other within one model"


def rows(study: Study, chains: Chains | None = None) -> list[dict]:
    """Rows of epsilon.csv from the canaries of the study and from shadow chains; a `reason` where there is nothing."""
    found: list[dict] = []
    try:
        found += canary_rows(study)
    except Unresolved as why:  # no splits: the coins are not known
        found = [_reason(str(why))]
    if chains is not None:
        try:
            found += chain_rows(chains, shadow.bound_scores(study, chains), study.settings["seed"])
        except Unresolved as why:
            found.append(_reason(f"shadow chains: {why}"))
    if not any("valid" in row for row in found):
        return found or [_reason("no canaries drawn by a coin and no shadow chains: no design that allows a bound")]
    natural = {"source": "private-heldout", "attack": study.settings["primary"], "valid": "no", "conditions": REFUSED}
    audited = [run for run in ("teacher", *study.students) if run in study.runs]
    return found + [study.head(run) | natural | {"seed": "all"} for run in audited]


def _reason(words: str) -> dict:
    return {"measure": "epsilon", "reason": words}


# --- canaries --------------------------------------------------------------------------------------------------------


def canary_rows(study: Study) -> Iterator[dict]:
    """Bounds from the canaries, of each model that meets some and of the null, whose `teacher_only` ones must be 0.

    Of each seed, and where there are several the median over them: they share their coins and are no further evidence.
    """
    for run in [r for r in ("teacher", "direct", "null") if r in study.runs] + study.students:
        for attack in dict.fromkeys((study.settings["primary"], *ATTACKS)):
            seeds = [seed for seed in study.seeds(run) if (run, seed, attack, "canary") in study.scores]
            cells: dict[tuple[str, str], dict[int, Trial]] = {}
            for seed in seeds:
                for key, trial in _trials(study, run, seed, attack):
                    cells.setdefault(key, {})[seed] = trial
            for (source, strategy), trials in cells.items():
                head = study.head(run) | {"source": source, "attack": attack, "strategy": strategy}
                for seed, trial in trials.items():
                    yield from trial_rows(trial, head | {"seed": seed, "trained_models": 1}, study.settings["seed"])
                if 1 < len(trials) == len(seeds):
                    at = head | {"seed": "all", "trained_models": len(seeds)}
                    yield from median_rows([*trials.values()], at, "seeds", study.settings["seed"], METHODS)


def _trials(study: Study, run: str, seed: int, attack: str) -> Iterator[tuple[tuple[str, str], Trial]]:
    """By source and strategy, the canaries of one trained model; a number of repeats for the primary attack alone."""
    scores = study.scores[run, seed, attack, "canary"]
    drawn = study.split_rows(scores.ids)
    coin, placement = drawn["coin"].to_numpy() == 1, drawn["placement"].to_numpy(str)
    groups, threshold = study.group_names(scores.ids), _calibrated(study, run, seed, attack)
    repeats = drawn["repeats"].to_numpy() if "repeats" in drawn else np.ones(len(drawn), int)
    strategies = STRATEGIES if threshold is not None else STRATEGIES[:2]
    for name in PLACEMENTS:
        placed = placement == name
        counts = sorted(set(repeats[placed])) if attack == study.settings["primary"] else []
        cells = {"": placed} | {f"@repeats={c}": placed & (repeats == c) for c in counts if len(counts) > 1}
        for ending, chosen in cells.items():
            if not chosen.any():
                continue
            words = [_who_met(study, run, name), _copies(repeats[chosen])]
            trial = units_of(coin[chosen], scores.values[chosen], groups[chosen], words, threshold)
            for strategy in strategies[:1] if ending else strategies:
                yield (f"canaries:{name}{ending}", strategy), trial


def _calibrated(study: Study, run: str, seed: int, attack: str) -> float | None:
    """The threshold of best balanced accuracy on natural calibration records, where there are any."""
    try:
        return study.threshold(study.pairs(run, seed, attack, CANARIES)[0])
    except Unresolved:
        return None


def _who_met(study: Study, run: str, placement: str) -> str:
    """In whose data the canaries of a placement are, as far as the runs say."""
    told = study.provenance(run)
    teacher = study.provenance(told["teacher"]) if told.get("teacher") in study.runs else {}
    own, before = (bool(PLACEMENTS[placement] & set(each.get("train_roles") or ())) for each in (told, teacher))
    if not own and told.get("teacher") and told["teacher"] not in study.runs:
        return "not known: whether this model's teacher, which was not scored, met the canaries"
    if own and before:
        return "canaries in the data of the model and of its teacher: both together are bounded"
    if before:
        return "canaries in the teacher's data alone: the chain of teacher and student is bounded"
    return "canaries in the model's own data" if own else "canaries in no data of this model: a control, to be 0"


def _copies(repeats: np.ndarray) -> str:
    some = ", ".join(f"{count:g}" for count in sorted(set(repeats)))
    return f"unit: a canary with all its copies ({some})"


# --- chains ----------------------------------------------------------------------------------------------------------


def chain_rows(chains: Chains, scores: Mapping[tuple[str, str], np.ndarray], seed: int) -> Iterator[dict]:
    """Bounds from shadow chains: of each target by one run, and of one record a run over independent runs.

    scores: by model (`shadow/teacher`) and attack, of every chain as the target [c, n], with references outside its
    pair.
    """
    if chains.design == "cheap":
        refused = {"source": "chains:cheap", "attack": "all", "valid": "no", "conditions": CHEAP}
        yield from (_told(chains, f"shadow/{name}") | refused for name in MODELS)
        return
    for (model, attack), values in scores.items():
        head = _told(chains, model) | {"source": f"chains:{chains.design}", "attack": attack}
        bounded = "the teacher" if model == "shadow/teacher" else "the chain of teacher and student"
        sizes = " and ".join(f"{name} {chains.sizes[name]}" for name in MODELS)
        words = [f"put into the teacher's data: {bounded} is bounded", "unit: a group of records", sizes]
        known = ~np.isnan(values).all(axis=0)  # a record without response tokens has no score, in or out
        inside, values, groups = chains.teacher_in[:, known], values[:, known], chains.group[known]
        trials = [units_of(*each, groups, words) for each in zip(inside, values, strict=True)]
        for strategy in STRATEGIES[:2]:
            at = head | {"strategy": strategy, "trained_models": len(trials)}
            methods = METHODS[: 2 if strategy == "split" else 1]  # f-DP takes seconds for thousands of records
            yield from median_rows(trials, at, "targets", seed, methods)
        first = np.unique(chains.pairs, return_index=True)[1]  # of each pair: what completes it is no further run
        yield from _one_a_run(inside[first], values[first], groups, head, words, seed)


def _told(chains: Chains, model: str) -> dict:
    told = shadow.head(chains, model.removeprefix("shadow/"))
    return {key: told[key] for key in ("model", "technique", "setting", "seed")}


def _one_a_run(
    inside: np.ndarray, values: np.ndarray, groups: np.ndarray, head: dict, words: list[str], seed: int
) -> Iterator[dict]:
    """One record of each run [c, n], drawn by seed: independent runs, as Clopper and Pearson need."""
    of_group = np.unique(groups, return_index=True)[1]
    drawn = np.random.default_rng(seed).permutation(of_group)[: len(inside)]
    each = (np.arange(len(drawn)), drawn)
    alone = head["attack"] in WITHOUT_REFERENCES
    words = [*words, "one record a run, one run of each pair: independent runs"]
    trial = units_of(inside[each], values[each], groups[drawn], words)
    trial = trial._replace(
        dependence="" if alone else "assumed: independent scores, though runs are references of others"
    )
    for strategy in STRATEGIES[:2]:
        at = head | {"source": f"{head['source']}@one_a_run", "strategy": strategy, "trained_models": len(drawn)}
        yield from trial_rows(trial, at, seed, METHODS[2:3])


# --- what makes a bound valid ----------------------------------------------------------------------------------------


def units_of(
    inside: np.ndarray, scores: np.ndarray, groups: np.ndarray, words: Iterable[str], threshold: float | None = None
) -> Trial:
    """Records [n] reduced to what has a coin of its own: of a group of records the mean of their scores.

    Raises Unresolved where records of one group were put in and left out.
    """
    names, first, code = np.unique(groups, return_index=True, return_inverse=True)
    if (inside[first][code] != inside).any():
        raise Unresolved("records of one group were put in and left out: they are not one unit")
    means, coin = np.bincount(code, scores) / np.bincount(code), inside[first]
    p = float(stats.binomtest(int(coin.sum()), len(coin)).pvalue)
    grouped = "" if len(names) == len(groups) else f", {len(groups)} records in {len(names)} groups"
    checked = f"checked: a coin each, {coin.sum()} of {len(coin)} in (p {p:.2g}){grouped}"
    return Trial(means[coin], means[~coin], p, [checked, *words], threshold)


def trial_rows(trial: Trial, head: dict, seed: int, methods: tuple[str, ...] = METHODS) -> Iterator[dict]:
    """One row per method; one with a `reason` where there is no bound."""
    rule = {"strategy": head["strategy"], "seed": seed, "threshold": trial.threshold, "methods": methods}
    try:
        found = bounds(trial.inside, trial.outside, **rule)
    except Unresolved as why:
        yield head | _reason(str(why))
        return
    sizes = {"n_in": len(trial.inside), "n_out": len(trial.outside)}
    for bound in found:
        yield _row(bound, head | sizes, trial, trial.words)


def median_rows(trials: list[Trial], head: dict, of: str, seed: int, methods: tuple[str, ...]) -> Iterator[dict]:
    """One row per method: the median over models of each one's bound at half the significance, and their range.

    `largest` is that of a model with the median number of units.
    """
    rule = Rule(significance=SIGNIFICANCE / 2, strategy=head["strategy"], seed=seed)
    sizes = [int(np.median([len(side) for side in sides])) for sides in zip(*(t[:2] for t in trials), strict=True)]
    together = trials[0]._replace(coin_p=min(holm([trial.coin_p for trial in trials])))
    checked = f"checked: the coins of {len(trials)} {of} (least p after Holm {together.coin_p:.2g})"
    words = [checked, f"median over {of}, never the best", *trials[0].words[1:]]
    at = head | dict(zip(("n_in", "n_out"), sizes, strict=True))
    for method in methods:
        try:
            each = [lower_bound(method, t.inside, t.outside, rule._replace(threshold=t.threshold)) for t in trials]
        except Unresolved as why:
            yield head | _reason(str(why))
            return
        bound = Bound(method, head["strategy"], float(np.median(each)), largest(method, *sizes, rule))
        yield _row(bound, at, together, words, (min(each), max(each)))


def _row(bound: Bound, head: dict, trial: Trial, words: list[str], span: tuple = (None, None)) -> dict:
    valid, more = verdict(bound.method, trial.coin_p, trial.dependence, bound.strategy)
    rule = {"method": bound.method, "delta": DELTA, "significance": SIGNIFICANCE, "largest": bound.largest}
    numbers = dict(zip(("epsilon", "least", "greatest"), (bound.epsilon, *span), strict=True)) if valid != "no" else {}
    return head | rule | numbers | {"valid": valid, "conditions": "; ".join([*words, STRATEGY[bound.strategy], *more])}


def verdict(method: str, coin_p: float, dependence: str, strategy: str = "split") -> tuple[str, list[str]]:
    """yes, estimate or no, and what that rests on beside what was checked.

    One threshold that the scores behind the bound did not choose is proven; dividing by the number of hull thresholds,
    which they did choose, is only seen to hold (statistics.md 5.2).
    """
    if coin_p < UNFAIR:
        return "no", ["refused: inclusion was no fair coin"]
    more = [] if method.startswith("one_run") or not dependence else [dependence]
    more += [GAUSSIAN] if method in ("one_run_fdp", "gdp") else []
    more += [HULL] if strategy == "bonferroni" else []
    return "estimate" if more else "yes", ["assumed: the attack was named before the coins were looked at", *more]


# --- in words --------------------------------------------------------------------------------------------------------


def headlines(found: list[dict], primary: str) -> list[dict]:
    """Of each model and design the row that was named beforehand: one run, threshold from a split, the first attack.

    Canaries of the teacher's data alone, with all numbers of repeats, by the primary attack; chains by the first of
    CHAIN_ATTACKS that there is.
    """
    named = [row for row in found if row.get("method") == "one_run" and row.get("strategy") == "split"]
    chosen = [r for r in named if r["source"] == "canaries:teacher_only" and r["attack"] == primary]
    for attack in CHAIN_ATTACKS:
        if of_chains := [r for r in named if r["source"].startswith("chains:") and r["attack"] == attack]:
            return chosen + of_chains
    return chosen


def sentence(row: Mapping) -> str:
    """A bound in plain words, with its unit; one of 0 with what the design could have shown."""
    unit = "".join(f", {said}" for said in row["conditions"].split("; ") if said.startswith("unit: "))
    design = f"{row['n_in']:.0f} in, {row['n_out']:.0f} out, {row['attack']}, delta {row['delta']:g}{unit}"
    most = f"this design could have shown up to {row['largest']:.2f} ({design})"
    if row["valid"] == "no":
        return f"{row['model']}: no bound: {row['conditions'].rpartition('refused: ')[2]}."
    if row["epsilon"] <= 0 and "a control" in row["conditions"]:
        return f"{row['model']}, a control that met nothing: bound 0, as it must be; {most}."
    if row["epsilon"] <= 0:
        return f"{row['model']}: no evidence: bound 0; {most}. This does not make it private."
    sure = f"{100 * (1 - row['significance']):g} %"
    return f"{row['model']}: epsilon is at least {row['epsilon']:.2f} with {sure} confidence; {most}."


def words(found: list[dict], primary: str) -> list[str]:
    """For summary.json: the headlines as sentences, one line for models with several seeds."""
    chosen = headlines(found, primary)
    pooled = {(row["model"], row["source"]) for row in chosen if row["seed"] == "all"}
    return [sentence(r) for r in chosen if r["seed"] == "all" or (r["model"], r["source"]) not in pooled]
