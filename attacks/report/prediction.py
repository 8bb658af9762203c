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
    "matched_negatives: as compressible as the positives. halves: trained on one half of the texts, applied to the "
    "other, so that no text's own label plays a part. other_seed, other_student: labels of an earlier distillation "
    "alone: the only forms that could be used before one."
)
FILTER = (
    "The loop: distil, predict, leave the predicted texts out, distil again with the same teacher, count again on all "
    "private texts. Removing as many texts as were predicted, of each number of repeats the same, but drawn at random, "
    "is the control: what it prevents needs no prediction. A list of another length is not compared with it."
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
    "removed": "Left out, of the scored texts",
    "removed_exposures": "Left out, of the training data with repeats",
    "memorized_before": "Memorized before",
    "memorized_after": "Memorized after",
    "new": "Newly memorized",
    "difference": "After less before",
    "difference_to_random": "After, less after the random list",
}
OVER_TRIALS = "_over_trials"
WEIGHT = re.compile(r"(coefficient|importance):(\w+)")


def feature_words(name: str) -> str:
    return FEATURES.get(name, name.replace("_", " "))


def weights(frame: pd.DataFrame) -> pd.DataFrame:
    """Coefficients and importances, with their `kind` and `feature`."""
    found = [WEIGHT.fullmatch(m) for m in frame["measure"]]
    parts = [(m[1], m[2]) if m else ("", "") for m in found]
    told = pd.DataFrame(parts, columns=["kind", "feature"], index=frame.index)
    return frame.join(told)[told["kind"] != ""]


def over_trials(frame: pd.DataFrame) -> pd.Series:
    """Which rows have intervals over trials, which are too narrow: bool."""
    return frame["protocol"].str.endswith(OVER_TRIALS)


def coefficients(results: Results) -> pd.DataFrame:
    """The coefficients of the paper's features under its protocol, of all seeds together or of the first one."""
    c = weights(pooled(results.prediction))
    c = c[(c["kind"] == "coefficient") & (c["protocol"] == "paper") & (c["features"] == "paper") & c["value"].notna()]
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
        priors = own[own["measure"] == "memorized"]
        scores = own.drop([*weighed.index, *loop.index, *priors.index])
        over, several = over_trials(scores), scores["features"].isin(SETS)
        if len(scores) or len(priors):
            parts += [tag("h3", f"Predicted: {setting_words(setting)}")] if len(settings) > 1 else []
            parts += [tag("p", NOTE), _priors(priors)]
            parts += [_scores(results, scores[several & ~over], setting)]
        parts += [figure(pictures.get("coefficients" + (f"-{setting}" if len(settings) > 1 else "")))]
        folds = {
            "Single features": _scores(results, scores[~several & ~over], setting),
            "Coefficients": _weights(results, weighed[~over_trials(weighed)], setting),
            "Intervals over trials, as the paper has them: far too narrow, since trials share their texts": join(
                _scores(results, scores[over], setting), _weights(results, weighed[over_trials(weighed)], setting)
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
    names = list(dict.fromkeys(frame["measure"]))
    order = {name: i for i, name in enumerate(PROTOCOLS)}
    keys, rows = ["protocol", "features", "seed"], []
    for student in in_order(frame["student"]):
        own = frame[frame["student"] == student]
        place = own["protocol"].map(lambda p: order.get(_parts(p)[0], len(order)))
        own = own.loc[place.sort_values(kind="stable").index]
        for (protocol, features, seed), mine in own.groupby(keys, sort=False):
            by = {name: mine[mine["measure"] == name] for name in names}
            rows.append({
                "Student": student, "Tested on": _protocol(protocol), "Features": feature_words(features),
                **{_measure(name): short_measured(*triple(r)) if len(r) else text("–") for name, r in by.items()},
                "n": _n(mine), "Seed": seed,
            })  # fmt: skip
    caption = (
        f"{heading(setting)}{_over(frame)}. AUC 0.5: no better than a coin. n: memorized texts among those judged."
    )
    return table(rows, caption, results.headline["model"])


def _over(frame: pd.DataFrame) -> str:
    """What the intervals of these rows are over;"""
    return "Middle 95 % of the trials" if over_trials(frame).any() else "95 % intervals, over texts"


def _parts(protocol: str) -> tuple[str, str]:
    """`matched_negatives:zlib_bytes,teacher_ppl` and `other_student:students/x`: its name, and what follows."""
    name, _, of = protocol.removesuffix(OVER_TRIALS).partition(":")
    return name, of


def _protocol(protocol: str) -> Html:
    name, of = _parts(protocol)
    if name == "matched_negatives":
        of = ", ".join(map(feature_words, of.split(","))) if of else ""
    return join(PROTOCOLS.get(name, name), tag("span", of, css="note") if of else "")


def _measure(measure: str) -> str:
    return NAMES.get(measure, measure.replace("_", " ").capitalize())


def _n(frame: pd.DataFrame) -> str:
    return " / ".join(dict.fromkeys(f"{n:,.0f}" for n in frame["n"] if finite(n))) or "–"


def _weights(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    rows = [{
        "Student": r.student, "Feature": feature_words(r.feature), "Of": feature_words(r.features),
        "Tested on": _protocol(r.protocol), "What": r.kind.capitalize(),
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
    if name.startswith("removed"):  # a decision, not an estimate
        return join(f"{percent(r.value)}{NBSP}%", tag("span", count_of(r.value, r.n, r.seed), css="note"))
    return share(r.value, r.ci_low, r.ci_high, "" if points else count_of(r.value, r.n, r.seed), points=points)
