"""The page: headline, audit card, and the sections below them, put into page.html. One file, nothing outside it."""

from html import escape
from pathlib import Path
from string import Template

from attacks.report import sections
from attacks.report.drawing import Picture, tagged
from attacks.report.markup import (
    Html,
    counted,
    figure,
    is_rate,
    join,
    listed,
    measured,
    metric_name,
    tag,
    text,
    verdict,
)
from attacks.report.results import Results, pooled

ACCESS = {
    "text": "the text of the record and no model",
    "logprobs": "the probability the model gives to each token of a text",
    "distribution": "the whole next-token distribution at each token of a text",
    "weights": "the model's weights",
    "auditor": "more than any outsider has: runs that only the auditor can make",
    "public-data": "the public data, or a model trained on it",
    "base-model": "the checkpoint the model started from",
    "nonmembers": "some records known not to be members",
    "members": "some records known to be members",
}
SETTINGS = {
    "disjoint": "the student is distilled on public records, never on the teacher's private ones",
    "shared": "the student is distilled on the very records the teacher was trained on",
}
ATTACKED = ("Members / non-members", "Attacker's access", "Worst resolvable leak")
REFUSED = "The headline was refused: what this picture shows may come from the split and not from the models."


def page(results: Results, pictures: dict[str, Picture], show_canaries: bool) -> str:
    """The whole page as HTML. The figures are inlined; nothing in it refers to another file or host."""
    s, model = results.summary, results.headline["model"]
    body = sections.all_sections(results, pictures, show_canaries)
    links = [("how", "How to read this"), *((k, title) for k, (title, _) in body.items()), ("glossary", "Glossary")]
    notes = [tag("li", w, css="warning") for w in s.get("warnings") or []]
    told_below = {words for r in s.get("ranking") or [] if len(r["words"]) > 1 for words in r["words"]}
    # What is said of every student stands in its section; of these only the audited model's is said on top.
    told_below |= {w for w in (s.get("corrected") or {}).get("words") or [] if not w.startswith(f"{model}: ")}
    told_below |= {(s.get("tasks") or {}).get("words")}
    notes += [tag("li", v) for v in s.get("verdicts") or [] if v not in told_below]
    setting = results.setting_words([model])
    chips = [setting, _seeds(results), f"unit of privacy: {s.get('unit') or 'not stated'}"]
    layout = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return layout.substitute(
        title=escape(f"{s.get('title') or 'Privacy audit'} ({results.setting_words(results.models)})"),
        headline=_headline(s),
        chips=join(*(tag("span", c, css="chip") for c in chips)),
        notes=tag("ul", join(*notes), css="notes") if notes else "",
        card=_card(results),
        card_picture=figure(pictures.get("chain"), REFUSED if (s.get("headline") or {}).get("refused") else ""),
        contents=join(*(tag("a", title, href=f"#{k}") for k, title in links), separator=" "),
        sections=join(*(join("\n", tag("h2", title, id=k), "\n", part) for k, (title, part) in body.items())),
    )


def _headline(summary: dict) -> Html:
    refused = (summary.get("headline") or {}).get("refused")
    sentence = summary.get("sentence") or ""
    if refused:
        # The audit's sentence may say more than the reason; one without the reason was not made for a refusal.
        return tag("p", sentence if refused in sentence else f"No headline number: {refused}.", css="headline refused")
    return tag("p", sentence or "The audit gave no headline sentence.", css="headline")


def _seeds(results: Results) -> str:
    seeds = sorted((set(results.membership["seed"]) or set(results.memorization["seed"])) - {"all"})
    return f"one seed ({seeds[0]}): no ranking" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(seeds)})"


def _card(results: Results) -> Html:
    s, head = results.summary, results.headline
    model, attack = head["model"], head["attack"]
    setting = results.settings.get(model, "-")
    rows = results.leaks([model], attack=attack)
    leak = {"n_members": None, "n_nonmembers": None, "access": ""} if rows.empty else rows.iloc[0]
    access = (head.get("access") or leak["access"] or "not stated").split("+")
    unit = s.get("unit")
    people = "; somebody with several records is protected less than these numbers say" if unit == "record" else ""
    facts = {
        "Audited": _audited(model, results.runs.get(model, {})),
        "Setting": f"{setting}: {SETTINGS[setting]}" if setting in SETTINGS else "none: nothing was distilled here",
        "Members / non-members": f"{counted(leak['n_members'], leak['n_nonmembers'])}, roles {head['role_pair']}",
        "Unit of privacy": f"one {unit}{people}" if unit else "not stated",
        "Attacker's access": f"{', plus '.join(ACCESS.get(part, part) for part in access)} (attack: {attack})",
        "Worst resolvable leak": _worst(results),
        "Utility (dev loss, nats per token)": _utility(results, model),
        "Not tested": listed(s["not_tested"]) if s.get("not_tested") else "the audit lists nothing",
    }
    if results.membership.empty:  # no non-members: what is memorized was measured, and nothing was attacked
        facts = {k: v for k, v in facts.items() if k not in ATTACKED}
    return tag("dl", join(*(join(tag("dt", k), tag("dd", v)) for k, v in facts.items())))


def _audited(model: str, run: dict) -> str:
    told = {"technique": "technique {}", "teacher": "taught by {}", "init": "started from {}", "recipe": "recipe {}"}
    parts = [words.format(run[key]) for key, words in told.items() if run.get(key)]
    scales = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))
    size = run.get("n_params") or 0
    parts += [f"{size / scale:.3g} {word} parameters" for scale, word in scales if size >= scale][:1]
    return ", ".join([model, *parts])


def _worst(results: Results) -> Html:
    worst = results.summary.get("worst") or {}
    row, note = worst.get("row"), worst.get("note")
    if not row:
        return text(f"no leak could be resolved{f': {note}' if note else ''}")
    model = tagged(results, row["model"])
    task = "" if row["task"] == "all" else f", task {row['task']}"
    number = measured(row["value"], row["ci_low"], row["ci_high"], percent=is_rate(row["metric"]))
    sample = f"n {counted(row['n_members'], row['n_nonmembers'])}, seed {row['seed']}"
    words = f" of {model} by {row['attack']}, {row['role_pair']}{task}, {sample}; {note}"
    return join(f"{metric_name(row['metric'])} ", number, words)


def _utility(results: Results, model: str) -> Html:
    rows = results.utility_rows(dict.fromkeys([model, "null", "base_student", "teacher"]))
    if rows.empty:
        return text("not measured: a low leak would be no evidence")
    lines = [join(r.model, " ", measured(r.value, r.ci_low, r.ci_high), f" n {r.n:,.0f}") for r in rows.itertuples()]
    g = pooled(results.gates)
    g = g[(g["model"] == model) & (g["gate"] == "utility")].drop_duplicates("metric")
    lines += [join(metric_name(r.metric), ": ", verdict(r.verdict)) for r in g.itertuples()]
    return join(*lines, separator=Html("<br>"))
