"""The claims about memorization: a sentence for each, and the tests behind it, whatever they say."""

import pandas as pd

from attacks.report.markup import (
    Html,
    finite,
    folded,
    join,
    listed,
    p_value,
    short_measured,
    table,
    tag,
)
from attacks.report.named_measures import heading, of_setting, parse, settings_in, share
from attacks.report.results import Results, pooled
from attacks.trends import CONTROLS, WORDS, claim_words

CLAIMS = (
    "Three claims, stated beforehand. A value above 0 agrees with its claim, one below "
    "contradicts it; yes and no only where p < 0.05 after Holm over all comparisons of the claim, "
    "else “not resolved”, which is not the same as “no effect”. With one seed a verdict is about these trained models, "
    "not about their recipes: another training run of the same recipe may come out otherwise."
)
KINDS = {
    "canary": "canaries, whole answers",
    "heldout": "held-out records",
    "untrained": "a model never trained on them",
    "untrained_canary": "canaries, a model never trained on them",
}
VERDICTS = {"yes": "good", "no": "bad"}


def claim_section(results: Results) -> Html:
    """A sentence for each claim, then a table for each claim and setting; controls folded."""
    c = pooled(results.claims)
    c = c[c["value"].notna()]  # why others could not be computed stands in the sentences
    if c.empty:
        return Html("")
    parts = [tag("p", CLAIMS), listed(_sentences(results, c))]
    control = pd.Series([parse(m).rest in CONTROLS for m in c["measure"]], c.index, bool)
    for setting in settings_in(c):
        for claim in dict.fromkeys(c["claim"]):
            own = of_setting(c, setting)
            own = own[own["claim"] == claim]
            if own["setting"].eq(setting).any() or len(settings_in(c)) == 1:
                parts += [_claim_table(own[~control.loc[own.index]], setting, claim)]
                if len(rest := own[control.loc[own.index]]):
                    words = f"Controls: what is not memory: {WORDS.get(claim, claim)}"
                    parts += [folded(words, _claim_table(rest, setting, claim))]
    return join(*parts)


def _sentences(results: Results, claims: pd.DataFrame) -> list[str]:
    """As the audit says them; else made from the table."""
    if said := results.summary.get("claims"):
        return said
    known = [row for row in claims.to_dict("records") if row["verdict"]]
    absent = set(WORDS) - {row["claim"] for row in known}
    return claim_words([*known, *({"claim": c, "reason": "claims.csv has no row of it"} for c in WORDS if c in absent)])


def _claim_table(frame: pd.DataFrame, setting: str, claim: str) -> Html:
    rows = [{
        "Models": r.model_a if r.model_b in ("", "-") else f"{r.model_a} − {r.model_b}",
        "Measure": _claim_measure(r.measure),
        "Value": _claim_value(r), "p": p_value(r.p_value), "p corrected": p_value(r.p_corrected),
        "n": f"{r.n:,.0f}" if finite(r.n) else "–", "Seed": r.seed,
        "Verdict": tag("span", r.verdict or "–", css=VERDICTS.get(r.verdict, "")),
    } for r in frame.itertuples()]  # fmt: skip
    words = WORDS.get(claim, claim)
    return table(rows, f"{heading(setting)}Claim: {words}. Intervals: 95 %, not corrected; p corrected: Holm.")


def _claim_measure(measure: str) -> Html:
    name, cut, rest = parse(measure)
    words = {
        "extracted": "Share extracted", "extracted_gap": "Share extracted, less the same on held-out records",
        "matched": "Share of the tokens matched", "matched_gap": "Share matched, less the same on held-out records",
        "extracted_by_repeats": "Rise of the share extracted for each doubling of the repeats",
        "spearman_exposure_repeats": "Rank correlation of repeats and a canary's exposure",
        "spearman_matched_repeats": "Rank correlation of repeats and share matched",
        "extracted_by_temperature": "Fall of the share extracted for each unit of T",
        "extracted_by_temperature_gap": "The same fall, less that on held-out records",
    }.get(name, name.replace("_", " ").capitalize())  # fmt: skip
    return join(words, tag("span", ", ".join(x for x in (cut, KINDS.get(rest, rest)) if x), css="note"))


def _claim_value(row) -> Html:
    if row.measure.startswith("spearman"):
        return short_measured(row.value, row.ci_low, row.ci_high)
    return share(row.value, row.ci_low, row.ci_high, points=True)
