"""Lower bounds on epsilon: a sentence for each model, the bounds, and what each of them rests on."""

import pandas as pd

from attacks.epsilon import headlines, sentence
from attacks.report.markup import Html, finite, folded, join, listed, signed, table, tag, verdict
from attacks.report.results import Results, in_order

EPSILON = (
    "A claim of (ε, δ)-differential privacy for the unit named, with an ε below the bound, is refuted with 95 % "
    "confidence, by this attack on these records; of a canary with many copies it says nothing about a single record. "
    "What was put in was drawn by a fair coin each, and what was left out by the other side of it. A "
    "bound of 0 is no evidence, and says nothing of how private the model is: beside it stands the largest bound that "
    "the same design could have shown, had the attack been perfect. Named beforehand: one training run, the threshold "
    "from a half of the records, the primary attack; every further row is at its own confidence, not corrected for "
    "their number. A student's bound is about teacher and student together. Everything: epsilon.csv."
)
METHODS = {
    "one_run": "one run",
    "one_run_fdp": "one run, f-DP",
    "clopper_pearson": "Clopper–Pearson",
    "gdp": "Gaussian DP",
}
STRATEGIES = {"split": "a half of the records", "bonferroni": "all, corrected", "explicit": "calibration records"}
PLACES = {"teacher_only": "canaries, teacher's data only", "both": "canaries, data of teacher and student"}
DESIGNS = {"full": "records of the shadow chains", "two_by_two": "records of the shadow chains (2 × 2)"}
VERDICTS = {"yes": "good", "no": "bad"}


def epsilon_section(results: Results) -> Html:
    """Sentences, the bounds named beforehand, all of the primary attack folded, and their conditions in words."""
    e = pooled_bounds(results.epsilon)
    if e.empty:
        return Html("")
    rows, primary = e.to_dict("records"), results.headline["attack"]
    main = [row for row in headlines(rows, primary) if row["valid"] != "no"]
    given = e[(e["valid"] != "no") & e["attack"].isin({primary, *(row["attack"] for row in main)})]
    named = [(row["model"], row["source"], row["attack"]) for row in main]
    named += [(row["model"], "canaries:both", primary) for row in main]
    first = given[(given["method"] == "one_run") & (given["strategy"] == "split")]
    first = first[[key in named for key in zip(first["model"], first["source"], first["attack"], strict=True)]]
    parts = [listed(sentence(row) for row in main) if main else "", tag("p", EPSILON)]
    parts.append(_bounds(first, "One run, threshold from a half of the records."))
    parts.append(folded("Every method, threshold and number of repeats", _bounds(given, "The same attacks.")))
    parts.append(folded("What each bound rests on", _conditions(given)))
    parts.append(_refused(e[e["valid"] == "no"]))
    return join(*parts)


def pooled_bounds(frame: pd.DataFrame) -> pd.DataFrame:
    """Of several seeds their median, in the order of the story; without what could not be computed."""
    frame = frame[frame["valid"] != ""]
    if frame.empty:
        return frame
    keys = [frame[k] for k in ("model", "source", "attack", "method", "strategy")]
    whole = frame["seed"] == "all"
    frame = frame[whole | ~whole.groupby(keys).transform("any")]
    order = {model: i for i, model in enumerate(in_order(frame["model"]))}
    return frame.sort_values("model", key=lambda c: c.map(order), kind="stable")


def _bounds(frame: pd.DataFrame, caption: str) -> Html:
    """One table for each setting."""
    parts = []
    for setting in sorted(frame["setting"].unique()):
        own = frame[frame["setting"] == setting]
        said = f"Setting: {setting}. " if setting != "-" else "Models of no setting. "
        parts.append(table([_row(r) for r in own.itertuples()], said + caption + _at(own)))
    return join(*parts)


def _at(frame: pd.DataFrame) -> str:
    delta, level = (", ".join(f"{x:g}" for x in sorted(frame[c].unique())) for c in ("delta", "significance"))
    return f" δ {delta}, significance {level}."


def _row(r) -> dict:
    several = finite(r.least) and r.trained_models > 1
    span = tag("span", f"[{signed(r.least, 2)}, {signed(r.greatest, 2)}]", css="ci") if several and r.greatest else ""
    return {
        "Model": r.model, "Put in by a coin": source_words(r.source), "Attack": r.attack,
        "ε at least": join(signed(r.epsilon, 2) if r.epsilon > 0 else "0: no evidence", " " if span else "", span),
        "Could have shown": signed(r.largest, 2), "In / out": f"{r.n_in:,.0f} / {r.n_out:,.0f}",
        "Models": f"{r.trained_models:,.0f}" + (" (median, range)" if several else ""),
        "Method": METHODS.get(r.method, r.method), "Threshold from": STRATEGIES.get(r.strategy, r.strategy),
        "Valid": tag("span", r.valid, css=VERDICTS.get(r.valid, "")), "Seed": r.seed,
    }  # fmt: skip


def source_words(source: str) -> str:
    """`canaries:teacher_only@repeats=4` -> `canaries, teacher's data only, 4 times each`."""
    name, _, of = source.partition("@")
    kind, _, where = name.partition(":")
    words = PLACES.get(where, name) if kind == "canaries" else DESIGNS.get(where, name)
    times = {"1": "once each"}.get(of.removeprefix("repeats="), f"{of.removeprefix('repeats=')} times each")
    more = {"": "", "one_a_run": "one a run"}.get(of, times)
    return f"{words}, {more}" if more else words


def _conditions(frame: pd.DataFrame) -> Html:
    """What was checked, what is bounded, and what is assumed: once for all rows that say the same."""
    rows = [{
        "Conditions": listed(said.split("; ")), "Models": ", ".join(dict.fromkeys(own["model"])),
        "Put in": "; ".join(dict.fromkeys(map(source_words, own["source"]))),
        "Methods": ", ".join(METHODS.get(m, m) for m in dict.fromkeys(own["method"])),
        "Valid": ", ".join(dict.fromkeys(own["valid"])),
    } for said, own in frame.groupby("conditions", sort=False)]  # fmt: skip
    caption = "Checked: by the audit, on its tables. Assumed: what no table shows."
    return table(rows, caption)


def _refused(frame: pd.DataFrame) -> Html:
    """Designs that allow no bound, each with its reason."""
    rows = [{
        "No bound from": {"private-heldout": "natural members"}.get(source, source_words(source)),
        "Models": ", ".join(dict.fromkeys(own["model"])),
        "Why": verdict(reason.rpartition("refused: ")[2]),
    } for (source, reason), own in frame.groupby(["source", "conditions"], sort=False)]  # fmt: skip
    return table(rows, "Refused.")
