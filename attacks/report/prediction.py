"""Which texts a student will memorize, told before it is distilled; and what is memorized when they are left out."""

import re

import pandas as pd

from attacks.report.drawing import Picture
from attacks.report.markup import NBSP, Html, figure, finite, folded, join, listed, short_measured, table, tag, text
from attacks.report.named_measures import (
    count_of,
    cut_words,
    heading,
    parse,
    percent,
    setting_words,
    settings_in,
    share,
    triple,
)
from attacks.report.results import Results, in_order, pooled

NOTE = (
    "Positives are the texts that the student memorizes. “paper”: three random negatives for each, labels of the same "
    "student; this is easy, and its trials are not independent. natural_prior: all negatives, as many as there are. "
    "matched_negatives: as compressible as the positives. halves, other_seed, other_student: trained on one, applied "
    "to the other: the only forms that could be used before a distillation."
)
FILTER = (
    "The loop: distil, predict, leave the predicted texts out, distil again with the same teacher, count again on all "
    "private texts. Removing texts at random, as many, is the control: what it prevents needs no prediction."
)
PROTOCOLS = {
    "paper": "paper (1:3)",
    "natural_prior": "natural prior",
    "matched_negatives": "matched negatives",
    "halves": "other half",
    "other_seed": "other seed",
    "other_student": "other student",
}
LOOP = "filter"
SETS = {"paper": "paper's four", "teacher_only": "teacher only", "extended": "extended"}
FEATURES = SETS | {
    "zlib_bytes": "zlib bytes", "teacher_ppl": "teacher perplexity", "baseline_ppl": "baseline perplexity",
    "kl": "KL(teacher ‖ baseline)",
}  # fmt: skip
NAMES = {"auc": "AUC", "flagged": "Share flagged", "precision_at_recall_0.95": "Precision at recall 0.95"}
FORMS = {
    "predicted": "predicted, all labels seen",
    "transferred": "predicted, its own label never seen",
    "random": "as many at random",
}
LOOP_MEASURES = {
    "removed": "Left out of training",
    "memorized_before": "Memorized before",
    "memorized_after": "Memorized after",
    "new": "Newly memorized",
    "difference": "After less before",
    "difference_to_random": "After, less after the random list",
}
OVER_TRIALS = "_over_trials"
WEIGHT = re.compile(r"(coefficient|importance):(\w+?)(_over_trials)?")


def feature_words(name: str) -> str:
    return FEATURES.get(name, name.replace("_", " "))


def weights(frame: pd.DataFrame) -> pd.DataFrame:
    """Coefficients and importances, with their `kind`, `feature` and whether their interval is `over` trials."""
    found = [WEIGHT.fullmatch(m.partition("@")[0]) for m in frame["measure"]]
    parts = [(m[1], m[2], m[3] is not None) if m else ("", "", False) for m in found]
    told = pd.DataFrame(parts, columns=["kind", "feature", "over"], index=frame.index).astype({"over": bool})
    return frame.join(told)[told["kind"] != ""]


def coefficients(results: Results) -> pd.DataFrame:
    """The coefficients of the paper's features under its protocol, of all seeds together or of the first one."""
    c = weights(pooled(results.prediction))
    c = c[(c["kind"] == "coefficient") & ~c["over"] & c["value"].notna()]
    c = c[(c["protocol"] == "paper") & (c["features"] == "paper") & ~c["measure"].str.contains("@")]
    return c[c["seed"] == c.groupby("student")["seed"].transform(lambda s: "all" if "all" in set(s) else min(s))]


def prediction_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Of each setting: scores by protocol and feature set, coefficients, single features, the loop with its filter."""
    p = pooled(results.prediction)
    if p.empty:
        return Html("")
    settings, parts = settings_in(p), []
    for setting in settings:
        own = p[p["setting"] == setting]
        weighed, loop = weights(own), own[own["protocol"] == LOOP]
        scores = own.drop([*weighed.index, *loop.index])
        over = scores["measure"].str.contains(f"{OVER_TRIALS}(?:@|$)")
        several = scores["features"].isin(SETS)
        if len(scores):
            parts += [tag("h3", f"Predicted: {setting_words(setting)}")] if len(settings) > 1 else []
            parts += [tag("p", NOTE), _priors(scores[scores["measure"] == "memorized"])]
            parts += [_scores(results, scores[several & ~over], setting)]
        parts += [figure(pictures.get("coefficients" + (f"-{setting}" if len(settings) > 1 else "")))]
        folds = {
            "Single features": _scores(results, scores[~several & ~over & (scores["features"] != "")], setting),
            "Coefficients and importances": _weights(results, weighed[~weighed["over"]], setting),
            "Intervals over trials, as the paper has them: far too narrow, since trials share their texts": join(
                _scores(results, scores[over], setting), _weights(results, weighed[weighed["over"]], setting)
            ),
        }
        parts += [folded(label, content) for label, content in folds.items() if content]
        if len(loop):
            parts += [tag("h3", "Filter and distil again"), tag("p", FILTER), _loop(results, loop, setting)]
    return join(*parts)


def _priors(frame: pd.DataFrame) -> Html:
    """What share of the texts is to be found."""
    return (
        listed(
            join(
                f"{r.student} memorizes ",
                share(r.value, r.ci_low, r.ci_high),
                f", {count_of(r.value, r.n, r.seed)}, seed {r.seed}.",
            )
            for r in frame.itertuples()
        )
        if len(frame)
        else Html("")
    )


def _scores(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    """A row for each student, protocol and feature set; a column for each measure."""
    parts = [parse(m) for m in frame["measure"]]
    frame = frame.assign(name=[p.name for p in parts], variant=[p.rest for p in parts])
    names = list(dict.fromkeys(frame.loc[frame["features"] != "", "name"]))
    order = {name: i for i, name in enumerate(PROTOCOLS)}
    keys, rows = ["protocol", "variant", "features", "seed"], []
    for student in in_order(frame["student"]):
        own = frame[frame["student"] == student]
        own = own.sort_values("protocol", key=lambda c: c.map(order).fillna(len(order)), kind="stable")
        for (protocol, variant, features, seed), mine in own.groupby(keys, sort=False):
            by = {name: mine[mine["name"] == name] for name in names}
            rows.append({
                "Student": student, "Tested on": _protocol(protocol, variant), "Features": feature_words(features),
                **{_measure(name): short_measured(*triple(r)) if len(r) else text("–") for name, r in by.items()},
                "n": _n(mine), "Seed": seed,
            })  # fmt: skip
    caption = (
        f"{heading(setting)}{_over(frame)}. AUC 0.5: no better than a coin. n: memorized texts among those judged."
    )
    return table(rows, caption, results.headline["model"])


def _over(frame: pd.DataFrame) -> str:
    """What the intervals of these rows are over;"""
    return (
        "Middle 95 % of the trials"
        if frame["measure"].str.contains(OVER_TRIALS).any()
        else "95 % intervals, over texts"
    )


def _protocol(protocol: str, variant: str) -> Html:
    of = variant.removeprefix("from=").replace(",", ", ")
    return join(PROTOCOLS.get(protocol, protocol), tag("span", of, css="note") if of else "")


def _measure(measure: str) -> str:
    name = measure.removesuffix(OVER_TRIALS)
    return NAMES.get(name, name.replace("_", " ").capitalize())


def _n(frame: pd.DataFrame) -> str:
    return " / ".join(dict.fromkeys(f"{n:,.0f}" for n in frame["n"] if finite(n))) or "–"


def _weights(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    rows = [{
        "Student": r.student, "Feature": feature_words(r.feature), "Of": feature_words(r.features),
        "Tested on": _protocol(r.protocol, parse(r.measure).rest), "What": r.kind.capitalize(),
        "Value": short_measured(r.value, r.ci_low, r.ci_high), "n": f"{r.n:,.0f}" if finite(r.n) else "–",
        "Seed": r.seed,
    } for r in frame.itertuples()]  # fmt: skip
    caption = (
        f"{heading(setting)}Coefficient: log-odds for each standard deviation of a feature. Importance: what the AUC "
        f"loses when the feature is shuffled. {_over(frame)}."
    )
    return table(rows, caption, results.headline["model"])


def _loop(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    """A row for each student that was distilled again: memorized before, after and newly, and the differences."""
    frame = frame.assign(name=[parse(m).name for m in frame["measure"]])
    shown = {name: words for name, words in LOOP_MEASURES.items() if (frame["name"] == name).any()}
    rows = []
    for student in in_order(frame["student"]):
        own = frame[frame["student"] == student]
        for (features, seed), mine in own.groupby(["features", "seed"], sort=False):
            by = {name: mine[mine["name"] == name] for name in shown}
            rows.append({
                "Distilled again": student, "Left out": FORMS.get(features, features),
                **{words: _loop_cell(name, by[name]) for name, words in shown.items()}, "Seed": seed,
            })  # fmt: skip
    cut = next((parse(m).cut for m in frame["measure"] if parse(m).cut), "")
    caption = (
        f"{heading(setting)}Cut: {cut} ({cut_words(cut)}). Shares of all private texts with a whole cut, those left "
        "out among them, and their counts; differences in percentage points, paired on the same texts; 95 % intervals."
    )
    return table(rows, caption, results.headline["model"])


def _loop_cell(name: str, rows: pd.DataFrame) -> Html:
    if rows.empty or not finite(rows["value"].iloc[0]):
        return text("–")
    r = next(rows.itertuples())
    points = name.startswith("difference")
    if name == "removed":  # a decision, not an estimate
        return join(f"{percent(r.value)}{NBSP}%", tag("span", count_of(r.value, r.n, r.seed), css="note"))
    return share(r.value, r.ci_low, r.ci_high, "" if points else count_of(r.value, r.n, r.seed), points=points)
