"""Measures of memorization by their names in the tables, in words; and which rows stand beside each other."""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd

from attacks.report.markup import NBSP, Html, finite, join, signed, tag
from attacks.report.results import Results

CUT = re.compile(r"(?:a=(\d+),)?k=(\d+)")
NO_SETTING = "-"
ROLES = {"private": "members", "heldout": "held-out", "private-heldout": "gap"}
COINCIDENCE = "coincidence_"
CONTROL = "heldout_"


class Measure(NamedTuple):
    """`np_extractable@k=50;k=40,t=1;n=100;p=0.9`: its name, its cut, and what else it was measured with."""

    name: str
    cut: str
    rest: str


def parse(measure: str) -> Measure:
    """A cut that is none (`coverage@p=0.001`) is part of the rest."""
    name, _, after = measure.partition("@")
    cut, _, rest = after.partition(";")
    return Measure(name, cut, rest) if CUT.fullmatch(cut) else Measure(name, "", after)


def cut_words(cut: str) -> str:
    """`k=50` -> `first 50 tokens of the response`; `a=50,k=50` -> `50 tokens after 50 given ones`."""
    found = CUT.fullmatch(cut)
    if not found:
        return cut or "no cut"
    given, suffix = found.groups()
    return f"{suffix} tokens after {given} given ones" if given else f"first {suffix} tokens of the response"


def main_cut(results: Results) -> str:
    """The cut of the first pages: the one that attacks were compared at, else the one of tasks and repeats."""
    m = results.memorization
    cuts = [parse(x).cut for x in m["measure"]]
    sliced = [cut for cut, task in zip(cuts, m["task"], strict=True) if cut and task != "all"]
    elsewhere = [parse(x).cut for frame in (results.disagreement, results.mechanism) for x in frame["measure"]]
    for found in ([c for c in elsewhere if c], sliced, [c for c in cuts if c]):
        if found:
            return max(dict.fromkeys(found), key=found.count)
    return ""


def settings_in(frame: pd.DataFrame) -> list[str]:
    """The settings of these rows, the one in which students saw the texts first; `-` alone where none has one."""
    found = sorted(set(frame["setting"]) - {NO_SETTING, ""}, reverse=True)
    return found or ([NO_SETTING] if len(frame) else [])


def of_setting(frame: pd.DataFrame, setting: str) -> pd.DataFrame:
    """The rows of one setting with those of models that have none: teacher, baseline, controls stand beside both."""
    return frame[frame["setting"].isin([setting, NO_SETTING, ""])]


def named(frame: pd.DataFrame, name: str, cut: str | None = None) -> pd.DataFrame:
    """The rows of one measure, at one cut where it is given, with its `cut` and `rest` as columns."""
    parts = pd.DataFrame([parse(m) for m in frame["measure"]], columns=Measure._fields, index=frame.index)
    frame = frame.assign(cut=parts["cut"], rest=parts["rest"])
    chosen = parts["name"] == name
    return frame[chosen & (parts["cut"] == cut) if cut is not None else chosen]


def rows_by(frame: pd.DataFrame, *keys: str) -> dict[tuple[str, ...], NamedTuple]:
    """Rows by their model and role, or by other keys; of several the first."""
    found: dict[tuple[str, ...], NamedTuple] = {}
    for row in frame.itertuples():
        found.setdefault(tuple(getattr(row, key) for key in keys or ("model", "role")), row)
    return found


def heading(setting: str) -> str:
    return f"Setting: {setting}. " if setting != NO_SETTING else ""


def ending(frame: pd.DataFrame, setting: str) -> str:
    """Of a picture's name, where there are two settings: `-shared`."""
    return f"-{setting}" if len(settings_in(frame)) > 1 else ""


def setting_words(setting: str) -> str:
    """For the second line of a picture."""
    return f"{setting} setting" if setting != NO_SETTING else "no setting"


def triple(frame: pd.DataFrame) -> tuple[float, float, float]:
    """(value, low, high) of the first row; NaN where there is none."""
    return tuple(frame.iloc[0][["value", "ci_low", "ci_high"]].astype(float)) if len(frame) else (np.nan,) * 3


def percent(x: float) -> str:
    """12.3, 0.07, 0: of 100, as many digits as a small share needs."""
    return "0" if x == 0 else signed(100 * x, 2 if abs(x) < 0.00995 else 1)


def share(value: float, low: float, high: float, note: str = "", *, points: bool = False) -> Html:
    """`6.3 % [4.1, 9.2]` and below it a note; a difference of shares is in percentage points."""
    if not finite(value):
        return tag("span", "not computed", css="none")
    ends = f"[{percent(low)}, {percent(high)}]" if finite(low) and finite(high) else "[no interval]"
    sign = "+" if points and value > 0 else ""
    below = tag("span", note, css="note") if note else ""
    return join(f"{sign}{percent(value)}{NBSP}{'points' if points else '%'} ", tag("span", ends, css="ci"), below)


def count_of(value: float, n: float, seed: str) -> str:
    """`17 of 500`; over several seeds only `of 500`, since their mean is no count."""
    if not finite(n) or not finite(value):
        return ""
    return f"of {n:,.0f}" if seed == "all" else f"{round(value * n):,} of {n:,.0f}"
