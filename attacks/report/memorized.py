"""What is memorized, by model: greedily, by sampling, nearly; at every cut, by task, repeats and length."""

import pandas as pd

from attacks.report.drawing import Picture, spread
from attacks.report.markup import (
    NBSP,
    Html,
    figure,
    finite,
    folded,
    join,
    short_measured,
    table,
    tag,
    text,
)
from attacks.report.named_measures import (
    ROLES,
    count_of,
    cut_words,
    heading,
    main_cut,
    named,
    of_setting,
    parse,
    percent,
    rows_by,
    setting_words,
    settings_in,
    share,
)
from attacks.report.results import Results, in_order, pooled

NOTE = (
    "A text is extracted where the model, given what stands before, continues it word for word by greedy decoding. "
    "Read the gap: members less held-out records, on which no model but the swap was trained. What they show is "
    "predictable text, not memory. Texts shorter than the cut are counted, not averaged in; padding never counts."
)
WAYS = (
    "The same texts by other decodings. (n, p): one of n samples is the text with probability p or more, computed from "
    "the stored probabilities, nothing is sampled. Nearly: the greedy continuation that was really generated differs "
    "in at most a tenth of its tokens, or has a BLEU above 0.75. They can rank models differently."
)
NEAR = {"near_verbatim": "Edit distance ≤ 10 %", "bleu_above_0.75": "BLEU > 0.75"}
COUNTED = ("extracted", "exact_response", "short", "near_ties", "np_extractable", "drawable", *NEAR)
COUNTED += ("greedy_recheck", "near_tie_recheck")  # shares of texts; the others are means over texts
SHARES = (*COUNTED, "accuracy", "strength", "positional", "positional_reference", "coverage", "recall_at_100_errors")
EVERY_CUT = (
    "extracted",
    "exact_response",
    "short",
    "matched",
    "accuracy",
    "strength",
    "near_ties",
    "log_p",
    "drawable",
)
EVERY_CUT += ("greedy_recheck", "near_tie_recheck")  # at other cuts too: of these only the share extracted is shown
ROLE_WORDS = ROLES | {
    "canary_in": "canaries put in",
    "canary_out": "canaries left out",
    "canary_in-canary_out": "gap of canaries",
}
NAMES = {
    "extracted": "Extracted (exact, greedy)",
    "exact_response": "Exact response, EOS and all",
    "short": "Shorter than the cut",
    "matched": "Tokens right before the first miss",
    "accuracy": "Tokens right after the true history",
    "strength": "Extraction strength",
    "np_extractable": "(n, p)-extractable",
    "log_p": "Log-probability of the text (nats)",
    "near_ties": "Near ties (verdict may flip)",
    "drawable": "Can be drawn at all",
    "greedy_recheck": "One-pass verdicts that generation confirms",
    "near_tie_recheck": "The near ties among them",
    "generated_matched": "Generated tokens right before the first miss",
    "positional": "First 32 tokens right where they stand",
    "positional_reference": "The same, always of 32 (reference form)",
    "edit_distance": "Edit distance, of the length",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L F1",
    "longest_common_substring": "Longest common substring (tokens)",
    "coverage": "Covered by windows that can be drawn",
    "recall_at_100_errors": "Recall at 100 errors, ordered with knowledge of the first miss",
}  # fmt: skip


def memorized_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Of each setting: main cut, other ways to extract, repeats, temperature, long texts; the rest folded."""
    m = pooled(results.memorization)
    if m.empty:
        return Html("")
    cut, settings = main_cut(results), settings_in(m)
    parts = [tag("p", NOTE)]
    for setting in settings:
        own, end = of_setting(m, setting), f"-{setting}" if len(settings) > 1 else ""
        drawn = {name: figure(pictures.get(f"{name}{end}")) for name in ("memorized", "repeats", "temperature")}
        if len(settings) > 1:
            parts.append(tag("h3", f"Memorized: {setting_words(setting)}"))
        parts += [drawn["memorized"], _main_table(results, own, setting, cut)]
        if ways := _ways_table(results, own, setting, cut):
            parts += [tag("h3", "Other ways to extract the same texts"), tag("p", WAYS), ways]
        parts += [drawn["repeats"], drawn["temperature"]]
        if covered := _coverage_table(results, own, setting):
            parts += [tag("h3", "Long texts"), covered]
        parts += _folded(results, own, setting, cut)
    parts.append(_seeds(results, settings, cut))
    return join(*parts)


def _main_table(results: Results, frame: pd.DataFrame, setting: str, cut: str) -> Html:
    whole = frame[frame["task"] == "all"]
    of = {name: rows_by(named(whole, name, cut)) for name in ("extracted", "matched", "exact_response", "short")}
    rows = []
    for model in in_order(model for model, _ in of["extracted"]):
        at = lambda name, role, model=model: of[name].get((model, role))
        rows.append({
            "Model": model,
            **{f"Extracted: {words}": _cell(at("extracted", role)) for role, words in ROLES.items()},
            "Tokens matched: members": _cell(at("matched", "private")),
            "Tokens matched: held-out": _cell(at("matched", "heldout")),
            "Exact response: members": _cell(at("exact_response", "private")),
            "Exact response: gap": _cell(at("exact_response", "private-heldout")),
            "Too short: members": _cell(at("short", "private")),
            "Seed": ", ".join(dict.fromkeys(row.seed for (m, _), row in of["extracted"].items() if m == model)),
        })  # fmt: skip
    caption = (
        f"{heading(setting)}Cut: {cut} ({cut_words(cut)}). 95 % intervals; below each share its count, which leaves "
        "out texts shorter than the cut (exact response counts them). Gap in percentage points."
    )
    return table(_without_empty(rows), caption, results.headline["model"])


def _without_empty(rows: list[dict]) -> list[dict]:
    """Columns that no row has anything for are left out."""
    kept = [c for c in (rows[0] if rows else ()) if any(row[c] != "–" for row in rows)]
    return [{c: row[c] for c in kept} for row in rows]


def _cell(row) -> Html:
    """A row of memorization.csv as a cell: a share in percent with its count, a gap in points, else a number."""
    if row is None:
        return text("–")
    if parse(row.measure).name not in SHARES:
        return short_measured(row.value, row.ci_low, row.ci_high)
    gap = "-" in row.role
    return share(row.value, row.ci_low, row.ci_high, "" if gap else _sample(row), points=gap)


def _sample(row) -> str:
    """`17 of 500` of what is counted, `of 500` of a mean."""
    counted = parse(row.measure).name in COUNTED
    return count_of(row.value, row.n, row.seed if counted else "all")


def _ways_table(results: Results, frame: pd.DataFrame, setting: str, cut: str) -> Html:
    """Members and held-out by greedy, probabilistic and near-verbatim extraction; nothing where there is only one."""
    whole = frame[frame["task"] == "all"]
    columns = {"Greedy, exact": named(whole, "extracted", cut)}
    columns |= {_np_words(rest): own for rest, own in _chosen_np(named(whole, "np_extractable", cut))}
    for name, words in NEAR.items():
        near = named(whole, name)
        at = cut if cut in set(near["cut"]) else next(iter(near["cut"]), "")
        columns[words + (f", {at}" if at != cut else "")] = near[near["cut"] == at]
    columns = {words: own for words, own in columns.items() if len(own)}
    caption = f"{heading(setting)}Cut: {cut}. Members with a 95 % interval and count; below, held-out records."
    return _side_by_side(results, columns, caption) if len(columns) > 1 else Html("")


def _coverage_table(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    """How much of long texts can be drawn from some window, a column for each threshold."""
    covered = named(frame[frame["task"] == "all"], "coverage")
    columns = {_coverage_words(rest): own for rest, own in covered.groupby("rest", sort=False)}
    caption = (
        f"{heading(setting)}Share of the tokens of a text that stand in a window which is drawn with this probability "
        "or more; means over texts, 95 % intervals; below, held-out texts."
    )
    return _side_by_side(results, columns, caption) if columns else Html("")


def _coverage_words(rest: str) -> str:
    threshold, scheme, *size = rest.split(";")
    of = "".join(f", {one.replace('window=', 'windows of ')} tokens" for one in size)
    return f"{threshold.replace('p=', 'p ≥ ')}, {_scheme_words(scheme)}{of}"


def _side_by_side(results: Results, columns: dict[str, pd.DataFrame], caption: str) -> Html:
    by, rows = {words: rows_by(own) for words, own in columns.items()}, []
    for model in in_order(pd.concat(columns.values())["model"]):
        seeds = dict.fromkeys(row.seed for found in by.values() for (m, _), row in found.items() if m == model)
        both = {w: (found.get((model, "private")), found.get((model, "heldout"))) for w, found in by.items()}
        rows.append(
            {"Model": model, **{words: _beside(*pair) for words, pair in both.items()}, "Seed": ", ".join(seeds)}
        )
    return table(rows, caption, results.headline["model"])


def _beside(members, heldout) -> Html:
    if heldout is None:
        return _cell(members)
    ends = f" [{percent(heldout.ci_low)}, {percent(heldout.ci_high)}]" if finite(heldout.ci_low) else ""
    words = f"held-out {percent(heldout.value)}{NBSP}%{ends}, {_sample(heldout)}"
    return join(_cell(members), tag("span", words, css="note"))


def _chosen_np(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Two of the grid: easily and hardly sampled, of top-k 40 at T = 1 where it was measured, else of T = 1 alone."""
    grid = {rest: own for rest, own in frame.groupby("rest", sort=False)}
    scheme = "k=40,t=1;" if any(rest.startswith("k=40,t=1;") for rest in grid) else "t=1;"
    wanted = [rest for rest in grid if rest.startswith(scheme)]
    sizes = sorted(wanted, key=lambda rest: (_np(rest)[0], -_np(rest)[1]))
    return [(rest, grid[rest]) for rest in dict.fromkeys([*sizes[len(sizes) // 2 :][:1], *sizes[-1:]])]


def _np(rest: str) -> tuple[float, float]:
    told = dict(part.partition("=")[::2] for part in rest.split(";")[1:])
    return float(told.get("n", "nan")), float(told.get("p", "nan"))


def _np_words(rest: str) -> str:
    n, p = _np(rest)
    return f"({n:,.0f}, {p:g}), {_scheme_words(rest.partition(';')[0])}"


def _scheme_words(scheme: str) -> str:
    return scheme.replace("t=", "T=").replace(",", ", ")


def _folded(results: Results, frame: pd.DataFrame, setting: str, cut: str) -> list[Html]:
    """Other cuts; tasks, lengths, repeats; every measure at the main cut; what has no cut."""
    whole, sliced = frame[frame["task"] == "all"], frame[frame["task"] != "all"]
    extracted = named(whole, "extracted")
    parts_of = [parse(measure) for measure in whole["measure"]]
    shown = [p.cut in (cut, "") or p.name not in EVERY_CUT for p in parts_of]
    told = sliced["measure"].isin([f"extracted@{cut}", f"exact_response@{cut}"])
    parts = [
        ("Every cut", _long_table(results, extracted, setting, "cut")),
        (
            "By task, length, repeats and placement",
            _long_table(results, sliced[told], setting, "slice"),
        ),
        ("All measures at this cut", _long_table(results, whole[shown], setting, "measure")),
    ]
    return [folded(label, content) for label, content in parts if content]


def _long_table(results: Results, frame: pd.DataFrame, setting: str, by: str) -> Html:
    """A row for each measure (of `by` cut: cut; of `by` slice: and slice) and model; a column for each role."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for (measure, task, model, role), row in rows_by(frame, "measure", "task", "model", "role").items():
        found.setdefault((measure, task), {}).setdefault(model, {})[role] = row
    roles = [role for role in ROLE_WORDS if role in set(frame["role"])]
    rows = []
    for (measure, task), models in found.items():
        what = {"Cut": parse(measure).cut} if by == "cut" else {"Measure": _measure_words(measure)}
        for model in in_order(models):
            own = models[model]
            sizes = (f"{row.n:,.0f}" for role, row in own.items() if "-" not in role and finite(row.n))
            rows.append({
                "Model": model, **({"Slice": task} if by == "slice" else {}), **what,
                **{ROLE_WORDS[role].capitalize(): _cell(own.get(role)) for role in roles},
                "n": " / ".join(sizes) or "–", "Seed": ", ".join(dict.fromkeys(row.seed for row in own.values())),
            })  # fmt: skip
    return table(rows, f"{heading(setting)}95 % intervals. Everything: memorization.csv.", results.headline["model"])


def _measure_words(measure: str) -> Html:
    name, cut, rest = parse(measure)
    words = _np_words(rest) if name == "np_extractable" else NAMES.get(name, NEAR.get(name, name.replace("_", " ")))
    return join(
        words, tag("span", ", ".join(x for x in (cut, "" if name == "np_extractable" else rest) if x), css="note")
    )


def _seeds(results: Results, settings: list[str], cut: str) -> Html:
    """The exact share of every seed, where several were run."""
    m = results.memorization
    if "all" not in set(m["seed"]):
        return Html("")
    single = m[(m["seed"] != "all") & (m["task"] == "all")]
    found = named(single, "extracted", cut)
    tables = []
    for setting in settings:
        own = of_setting(found, setting)
        by = rows_by(own, "model", "seed", "role")
        keys = [(model, seed) for model in in_order(own["model"]) for seed in sorted(set(own["seed"]))]
        rows = [
            {"Model": m, "Seed": s} | {words.capitalize(): _cell(by.get((m, s, role))) for role, words in ROLES.items()}
            for m, s in keys
            if any((m, s, role) in by for role in ROLES)
        ]
        caption = f"{heading(setting)}Extracted at {cut}, {spread(own['n'])} texts."
        tables.append(table(rows, caption, results.headline["model"]))
    return folded("Every seed", join(*tables))
