"""Every attack on every model: those of the first pages with intervals, the strongest of all, the others folded."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from attacks.report.drawing import Picture, brief, spread
from attacks.report.markup import (
    Html,
    figure,
    finite,
    folded,
    join,
    measured,
    model_tables,
    p_value,
    table,
    tag,
)
from attacks.report.results import Results, kind

MOST = 7  # models side by side: more are not readable on a phone
LEVEL = 0.05
STAR = "*"
NOTE = (
    "One attack was named beforehand (tinted; its p-value stands as it is). The others were tried as well: * marks "
    "those of an AUC that differs from 0.5 with p < 0.05 after Holm over all other attacks on the same model. A "
    "reference stands after the colon."
)
STRONGEST = (
    "The strongest of all attacks on each model, those folded below included. The greatest of many AUCs is above 0.5 "
    "where there is nothing to find: beside it stand the median of the greatest when the labels are shuffled "
    "(members and non-members exchanged at random, the same for all attacks), and the share p of such shuffles that "
    "reach it. Access “auditor”: with other private models at hand. Left out are the two-hop attacks, teacher_shift "
    "and teacher_kl, which read the teacher itself and may show its leak on any model: read what they show above null; "
    "and attacks that saw a part of the records only, as those on the weights may."
)


@dataclass(frozen=True)
class Block:
    """Models that share a heat map and a table: one setting, at most MOST of them."""

    name: str
    said: str
    models: list[str]


def blocks(results: Results) -> list[Block]:
    """Students with null where they fit, then what they stand beside; all together where there are few."""
    groups = results.models_apart(results.models)
    found = []
    for said, models in groups:
        name = "heatmap" if len(groups) == 1 else f"heatmap-{results.settings[models[0]].strip('-') or 'none'}"
        pieces = _pieces(models)
        names = [name if not i else f"{name}-{i + 1}" for i in range(len(pieces))]
        found += [Block(n, said, piece) for n, piece in zip(names, pieces, strict=True)]
    return found


def _pieces(models: list[str]) -> list[list[str]]:
    if len(models) <= MOST:
        return [models]
    students = [m for m in models if kind(m) == "student"]
    shared = [m for m in models if m == "null"] if students else []
    rest = [m for m in models if m not in (*students, *shared)]
    return [*([*shared, *part] for part in _even(students, MOST - len(shared))), *_even(rest, MOST)]


def _even(items: list[str], most: int) -> list[list[str]]:
    return [list(part) for part in np.array_split(np.array(items, object), -(-len(items) // most))] if items else []


@dataclass(frozen=True)
class Grid:
    """AUCs of some attacks on some models: value, low, high [attack, model], and which survive Holm."""

    results: Results
    attacks: list[str]
    models: list[str]

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The rows of membership.csv behind it, with `survives`: p < LEVEL, after Holm for all but the primary."""
        rows = pd.concat([self.results.leaks(self.models, attack=a) for a in self.attacks])
        tested = self.results.attacks
        keys = ["model", "attack", "role_pair", "seed"]
        tested = tested[tested["rule"] != "maximum"].drop_duplicates(keys)[[*keys, "p_corrected"]]
        rows = rows.merge(tested, on=keys, how="left")
        return rows.assign(survives=(rows["p_corrected"] < LEVEL).astype(float))

    def of(self, column: str) -> pd.DataFrame:
        """One column as a table [attack, model]; NaN where the attack was not run."""
        wide = self.rows.pivot(index="attack", columns="model", values=column)
        return wide.reindex(index=self.attacks, columns=self.models)


def attack_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Heat maps, the strongest attacks, tables of AUCs; secondary attacks folded."""
    if results.membership.empty:
        return Html("")
    first = results.first_attacks
    second = [a for a in results.attack_ids if a not in first]
    parts = [tag("p", NOTE if len(results.attacks) else "Many comparisons, not corrected for their number.")]
    found = blocks(results)
    parts += [figure(pictures.get(block.name)) for block in found]
    parts += [_strongest(results)]
    parts += [_auc_table(results, first, block) for block in found]
    if second:
        rest = [_auc_table(results, second, block) for block in found]
        parts.append(folded(f"The {len(second)} other attacks", join(*rest)))
    return join(*parts)


def _auc_table(results: Results, attacks: list[str], block: Block) -> Html:
    """A row for each attack with its access, a column for each model; below, what the numbers rest on."""
    grid = Grid(results, attacks, block.models)
    m = grid.rows
    if m.empty:
        return Html("")
    by = {key: row for key, row in zip(zip(m["attack"], m["model"], strict=True), m.itertuples(), strict=True)}
    access = dict(zip(m["attack"], m["access"], strict=True))
    names = {model: brief(model) if block.said or len(results.techniques) < 2 else model for model in block.models}

    def cell(attack: str, model: str) -> Html:
        row = by.get((attack, model))
        if row is None:
            return tag("span", "not run", css="none")
        if not finite(row.value):
            return tag("span", f"not computed: {_reason(results, row) or 'see below'}", css="none")
        return join(STAR if row.survives else "", measured(row.value, row.ci_low, row.ci_high))

    rows = [
        {"Attack": join(a, tag("span", access[a].replace("+", " + "), css="note"))}
        | {names[model]: cell(a, model) for model in block.models}
        for a in attacks
        if a in access
    ]  # fmt: skip
    if results.headline["attack"] in attacks:
        rows[0]["Attack"] = join(rows[0]["Attack"], tag("span", "named beforehand", css="note"))
    below = {
        "Members / non-members": lambda own: f"{spread(own['n_members'])} / {spread(own['n_nonmembers'])}",
        "Roles": lambda own: ", ".join(dict.fromkeys(own["role_pair"])),
        "Seed": lambda own: ", ".join(dict.fromkeys(own["seed"])),
    }
    rows += [{"Attack": title} | {names[x]: words(m[m["model"] == x]) for x in block.models}
             for title, words in below.items()]  # fmt: skip
    use = results.utility_rows(block.models).set_index("model")
    rows.append({"Attack": "Dev loss"} | {
        names[x]: measured(*use.loc[x, ["value", "ci_low", "ci_high"]]) if x in use.index else "–"
        for x in block.models})  # fmt: skip
    setting = block.said or f"{results.setting_words(block.models).capitalize()}. "
    caption = f"{setting}AUC with its 95 % interval, which is not corrected for the number of attacks."
    return table(rows, caption, rows[0]["Attack"] if results.headline["attack"] in attacks else None)


def _reason(results: Results, row) -> str | None:
    keys = ("model", "attack", "role_pair", "task", "metric", "seed")
    return results.reason({key: getattr(row, key) for key in keys})


def _strongest(results: Results) -> Html:
    """The primary attack, how many others survive Holm, and the maximum over all: a table for each setting."""
    rows = {row["Model"]: row for row in _strongest_rows(results)}
    if not rows:
        return Html("")
    return join(tag("h3", "The strongest attack"), tag("p", STRONGEST), model_tables(results, rows, ""))


def _strongest_rows(results: Results) -> Iterator[dict]:
    tested = results.of_pair(results.attacks)
    primary = results.leaks(results.models, attack=results.headline["attack"]).set_index("model")
    access = dict(zip(results.membership["attack"], results.membership["access"], strict=True))
    for model in results.models:
        if model not in primary.index:
            continue
        own = tested[(tested["model"] == model) & (tested["seed"] == primary.seed[model])]
        top = own[own["rule"] == "maximum"]
        if top.empty:
            continue
        (best,), others = top.head(1).itertuples(), own[own["rule"] == "holm"]
        first = own[own["rule"] == "primary"]
        yield {
            "Model": model, "Setting": results.settings.get(model, "-"),
            f"AUC of {results.headline['attack']}": measured(*primary.loc[model, ["value", "ci_low", "ci_high"]]),
            "p": p_value(first["p_value"].iloc[0]) if len(first) else "–",
            "Others with p < 0.05 after Holm": f"{(others['p_corrected'] < LEVEL).sum()} of {len(others)}",
            "Strongest": join(best.attack, tag("span", access.get(best.attack, ""), css="note")),
            "Its AUC": f"{best.auc:.3f}",
            "Strongest of shuffled labels (median)": f"{best.null_median:.3f}",
            "p of the strongest": p_value(best.p_corrected), "Of": f"{best.family:.0f} attacks",
            "Roles": best.role_pair, "Seed": best.seed,
        }  # fmt: skip
