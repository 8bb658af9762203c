"""What teacher, baseline and student memorize together: the seven regions, what is inherited, transfer, overlap."""

import pandas as pd

from attacks.inheritance import REGIONS
from attacks.report.drawing import Picture, brief
from attacks.report.markup import Html, figure, finite, folded, join, p_value, table, tag, text
from attacks.report.named_measures import (
    COINCIDENCE,
    CONTROL,
    cut_words,
    heading,
    main_cut,
    parse,
    share,
)
from attacks.report.results import Results, in_order, pooled

SEVEN = {name: who for name, who in REGIONS.items() if any(who)}  # of someone; who: teacher, baseline, student
RATIOS = {  # measure: its heading
    "inheritance_rate": "Inherited: T & S not B, of T not B",
    "inherited_share": "Inherited: T & S not B, of S",
    "seed_noise_rate": "Noise of seeds: T & B2 not B, of T not B",
    "easy_share": "Easy: T & B & S, of S",
    "retention": "Easy and kept: T & B & S, of T & B",
    "coverage": "Teacher's too: T & B, of B",
    "student_only_share": "Student alone, of S",
}
NOTE = (
    "T, B, S: the texts that teacher, baseline (direct: the student's model trained on the same texts without a "
    "teacher) and student give away word for word. What T and B both have is easy text; inherited is what T and S have "
    "and B does not. Its share of T not B and its share of S are very different numbers: both are printed. Where there "
    "are several seeds, union: in any seed; intersection: in all."
)
COINCIDENCE_NOTE = (
    "Here no student was trained on the teacher's texts. What it has in common with its teacher is predictable text, "
    "or has come through the teacher's answers; its overlap with the baseline is no memory of its own. Nothing below "
    "is an inheritance rate, and none of it compares with another setting."
)
OVERLAPS = ("jaccard", "containment", "memorized_difference", "inheritance_difference")


def split(frame: pd.DataFrame) -> pd.DataFrame:
    """inheritance.csv with its measure in parts: bare `name`, `cut`, and `control` where it is of held-out records."""
    parts = [parse(m) for m in frame["measure"]]
    bare = [p.name.removeprefix(COINCIDENCE) for p in parts]
    control = [name.startswith(CONTROL) for name in bare]
    return frame.assign(name=[name.removeprefix(CONTROL) for name in bare], cut=[p.cut for p in parts], control=control)


def is_coincidence(setting: str) -> bool:
    return setting == "disjoint"


def inherited_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Inheritance of each setting in which it is defined, then coincidence, under a heading of its own."""
    i = split(results.inheritance)
    if i.empty:
        return Html("")
    cut, parts = main_cut(results), []
    for setting in sorted(set(i["setting"]), key=lambda s: (is_coincidence(s), s)):
        own = i[i["setting"] == setting]
        apart = is_coincidence(setting)
        if apart:
            parts += [tag("h3", "Disjoint setting: coincidence, not inheritance")]
        parts += [tag("p", COINCIDENCE_NOTE if apart else NOTE)]
        parts += [figure(p) for name, p in pictures.items() if name.startswith(f"regions-{setting}")]
        parts += [_regions(results, own[(own["cut"] == cut) & ~own["control"]], setting, cut)]
        parts += [_ratios(results, own[(own["cut"] == cut) & ~own["control"]], setting, cut)]
        parts += _folded(results, own, setting, cut)
    return join(*parts)


# --- regions ---------------------------------------------------------------------------------------------------------


def students_and_seeds(frame: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(student, seed, its rows): seeds first, then union and intersection."""
    rank = {"union": 1, "intersection": 2, "all": 3}
    found = []
    for student in in_order(frame["student"]):
        own = frame[frame["student"] == student]
        found += [
            (student, s, own[own["seed"] == s]) for s in sorted(set(own["seed"]), key=lambda s: (rank.get(s, 0), s))
        ]
    return found


def region_words(region: str) -> str:
    return region.replace("&", " & ")


def _regions(results: Results, frame: pd.DataFrame, setting: str, cut: str) -> Html:
    """A row for each student and seed, a column for each region; then the totals of T, B and S."""
    regions, whole = frame[frame["name"] == "region"], frame[frame["name"] == "memorized"]
    rows = []
    for student, seed, own in students_and_seeds(regions):
        totals = whole[(whole["student"] == student) & (whole["seed"] == seed)]
        rows.append({
            "Student": student, "Seed": seed,
            **{region_words(r): _counted(own[own["region"] == r]) for r in (*SEVEN, "none")},
            **{f"All of {name}": _counted(totals[totals["region"] == name]) for name in "TBS"},
            "Texts": _texts(own), "Teacher": own["teacher"].iloc[0],
        })  # fmt: skip
    caption = (
        f"{heading(setting)}{'Held-out records. ' if frame['control'].any() else ''}"
        f"{'Coincidence, not inheritance. ' if is_coincidence(setting) else ''}Cut: {cut} "
        f"({cut_words(cut)}). Counts; below, their share of all texts with a 95 % interval. none: nobody has it."
    )
    return table(rows, caption, results.headline["model"])


def _counted(rows: pd.DataFrame) -> Html:
    if rows.empty:
        return text("–")
    r = next(rows.itertuples(index=False))
    return join(f"{rows['count'].iloc[0]:,.0f}", tag("span", share(r.value, r.ci_low, r.ci_high), css="note"))


def _texts(rows: pd.DataFrame) -> str:
    return f"{rows['denominator'].iloc[0]:,.0f}" if len(rows) and finite(rows["denominator"].iloc[0]) else "–"


def _ratios(results: Results, frame: pd.DataFrame, setting: str, cut: str) -> Html:
    names = [name for name in RATIOS if (frame["name"] == name).any()]
    rows = []
    for student, seed, own in students_and_seeds(frame[frame["name"].isin(names)]):
        by = {name: own[own["name"] == name] for name in names}
        heads = {
            n: RATIOS[n].replace("Inherited", "In common") if is_coincidence(setting) else RATIOS[n] for n in names
        }
        rows.append({"Student": student, "Seed": seed} | {heads[n]: _share(by[n]) for n in names})
    noise = " B2: the baseline of another seed, in the student's place." if "seed_noise_rate" in names else ""
    caption = f"{heading(setting)}Cut: {cut}. Shares with 95 % intervals, and both numbers of each.{noise}"
    return table(rows, caption, results.headline["model"])


def _share(rows: pd.DataFrame) -> Html:
    if rows.empty:
        return text("–")
    r = rows.iloc[0]
    of = f"{r['count']:,.0f} of {r['denominator']:,.0f}" if finite(r["count"]) and finite(r["denominator"]) else ""
    return share(r["value"], r["ci_low"], r["ci_high"], of) if finite(r["value"]) else text(of or "–")


# --- folded ----------------------------------------------------------------------------------------------------------


def _folded(results: Results, frame: pd.DataFrame, setting: str, cut: str) -> list[Html]:
    """Held-out control, other cuts, seeds, transfer, overlap and differences between techniques."""
    plain, control = frame[~frame["control"]], frame[frame["control"]]
    others = [c for c in dict.fromkeys(plain["cut"]) if c not in (cut, "")]
    at = plain[plain["cut"] == cut]
    tables = {
        "The same regions on held-out records: predictable text": join(
            *(_regions(results, control[control["cut"] == c], setting, c) for c in dict.fromkeys(control["cut"]))
        ),
        "Other cuts": join(
            *(f(results, plain[plain["cut"] == c], setting, c) for c in others for f in (_regions, _ratios))
        ),
        "Transfer: texts that the teacher matches for more than t": _transfer(results, at, setting),
        "Seeds: how often a text recurs, and what is never learnt": _plain(
            results, at[at["name"].isin(["recurrence", "forgotten_core", "inherited_less_noise"])], setting
        ),
        "Overlap of models and seeds, differences between techniques": _plain(
            results, pooled(at[at["name"].isin(OVERLAPS)]), setting
        ),
    }
    return [folded(label, content) for label, content in tables.items() if content]


def _transfer(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    """Rows: student or control in its place; columns: thresholds; cells: mean share matched, and of how many texts."""
    rows = []
    own = pooled(frame[frame["name"] == "transfer"])
    for student, seed, mine in students_and_seeds(own):
        cells = {
            r["region"].replace("t>", "t > "): share(r["value"], r["ci_low"], r["ci_high"], f"{r['count']:,.0f} texts")
            for _, r in mine.iterrows()
        }
        rows.append({"Model": student, "Seed": seed} | cells)
    columns = dict.fromkeys(c for row in rows for c in row)
    caption = (
        f"{heading(setting)}Mean share of the cut that the model matches before its first miss, on the texts of which "
        "its teacher matches more than t before its own. Controls in the student's place: what they reach is easiness."
    )
    return table([{c: row.get(c, "–") for c in columns} for row in rows], caption, results.headline["model"])


def _plain(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    tested = frame["p_value"].notna().any()
    rows = [{
        "Measure": _words(r["name"]), "Of": _region(r["region"]),
        "Value": _value(r), "Count": _of(r),
        **({"p": p_value(r["p_value"]), "p corrected": p_value(r["p_corrected"])} if tested else {}), "Seed": r["seed"],
    } for _, r in frame.drop_duplicates(["measure", "region", "student", "seed"]).iterrows()]  # fmt: skip
    return table(rows, f"{heading(setting)}95 % intervals; differences in percentage points; p corrected: Holm.")


def _words(name: str) -> str:
    return {
        "jaccard": "Jaccard index (in both, of in either)", "containment": "In both, of the first",
        "memorized_difference": "Difference of the share memorized", "recurrence": "Recurs",
        "inheritance_difference": "Difference of the inheritance rate", "forgotten_core": "Forgotten core",
        "inherited_less_noise": "Inheritance rate less the noise of seeds",
    }.get(name, name.replace("_", " "))  # fmt: skip


def _region(region: str) -> str:
    return " ".join(brief(word) if word.startswith("students/") else word for word in region_words(region).split())


def _value(row: pd.Series) -> Html:
    points = "difference" in row["name"] or "less" in row["name"]
    return share(row["value"], row["ci_low"], row["ci_high"], points=points) if finite(row["value"]) else text("–")


def _of(row: pd.Series) -> str:
    if not finite(row["denominator"]):
        return "–"
    return (
        f"{row['count']:,.0f} of {row['denominator']:,.0f}" if finite(row["count"]) else f"of {row['denominator']:,.0f}"
    )
