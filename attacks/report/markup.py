"""Pieces of the page: escaping, tables, figures, and numbers in words."""

import base64
from collections.abc import Iterable
from html import escape

import numpy as np

from attacks.report.drawing import Picture
from attacks.report.results import Results

NBSP = "\N{NO-BREAK SPACE}"


class Html(str):
    """Text that is HTML already. Everything else that reaches the page is escaped."""


def text(value) -> Html:
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(*parts, separator: str = "") -> Html:
    return Html(text(separator).join(text(p) for p in parts))


def tag(name: str, content, **attributes: str) -> Html:
    """An element; `css` is its class, and in the names of other attributes _ stands for -."""
    named = {"class" if k == "css" else k.replace("_", "-"): v for k, v in attributes.items() if v}
    opening = " ".join([name, *(f'{k}="{escape(v)}"' for k, v in named.items())])
    return Html(f"<{opening}>{text(content)}</{name}>")


def table(rows: list[dict], caption: str = "", audited: str | None = None) -> Html:
    """A table of rows with the same keys, which are the headings; the first cell heads its row. On a phone each row
    becomes a small card. Rows that start with `audited` are tinted. No rows, no table."""
    if not rows:
        return Html("")
    head = join(*(tag("th", c, scope="col") for c in rows[0]))
    body = []
    for row in rows:
        (_, first), *rest = row.items()
        cells = (tag("td", tag("span", x), data_label=c) for c, x in rest)
        body.append(tag("tr", join(tag("th", first, scope="row"), *cells), css="audited" if first == audited else ""))
    parts = [tag("caption", caption)] if caption else []
    parts += [tag("thead", tag("tr", head)), tag("tbody", join(*body))]
    return tag("div", tag("table", join(*parts)), css="scroll")


def model_tables(results: Results, rows: dict[str, dict | list[dict]], caption: str) -> Html:
    """Rows by their model as one table for each setting: two settings never share a table."""
    parts = []
    for said, models in results.models_apart(rows):
        own = [row for m in models for row in (rows[m] if isinstance(rows[m], list) else [rows[m]])]
        parts.append(table(own, said + caption, results.headline["model"]))
    return join(*parts)


def folded(label: str, content: Html) -> Html:
    return tag("details", join(tag("summary", label), content))


def listed(items: Iterable) -> Html:
    return tag("ul", join(*(tag("li", i) for i in items)))


def figure(picture: Picture | None, warning: str = "") -> Html:
    """The picture itself, inlined, with its caption; nothing where there is no picture."""
    if picture is None:
        return Html("")
    data = base64.b64encode(picture.png).decode()
    image = Html(f'<img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">')
    caption = join(tag("b", warning), " ", picture.caption) if warning else picture.caption
    return tag("figure", join(image, tag("figcaption", caption)))


def finite(x) -> bool:
    return x is not None and bool(np.isfinite(x))


def signed(x: float | None, digits: int = 3) -> str:
    """A number with a true minus sign; empty where there is none."""
    return f"{x:.{digits}f}".replace("-", "−") if finite(x) else ""


def measured(value: float, low: float, high: float, *, percent: bool = False) -> Html:
    """`0.712 [0.684, 0.739]`, or `3.2 % [1.4, 5.6]`; says so where there is no value or no interval."""
    if not finite(value):
        return tag("span", "not computed", css="none")
    scale, digits, unit = (100, 1, NBSP + "%") if percent else (1, 3, "")
    v, a, b = (signed(scale * x if finite(x) else None, digits) for x in (value, low, high))
    return join(v, unit, " ", tag("span", f"[{a}, {b}]" if a and b else "[no interval]", css="ci"))


def short_measured(value: float, low: float, high: float) -> Html:
    """`0.56 [0.53, 0.60]` or `23.4 [22.1, 24.8]`: for tables with many numbers in a row."""
    if not finite(value):
        return tag("span", "not computed", css="none")
    digits = 2 if abs(value) < 2 else 1
    v, a, b = (signed(x, digits) for x in (value, low, high))
    return join(v, " ", tag("span", f"[{a}, {b}]", css="ci")) if a and b else text(v)


def counted(members: float, nonmembers: float) -> str:
    return f"{NBSP}/{NBSP}".join(f"{int(n):,}" if finite(n) else "?" for n in (members, nonmembers))


def is_rate(metric: str) -> bool:
    return metric.startswith("tpr_at_fpr")


def metric_name(metric: str) -> str:
    """`auc:loss` -> `AUC of loss`, `tpr_at_fpr_0.01` -> `TPR at FPR 1 %`, `auc_minus_blind` -> `AUC − blind`."""
    if is_rate(metric):
        return f"TPR at FPR {100 * float(metric.rsplit('_', 1)[1]):g}{NBSP}%"
    if metric.startswith("auc"):
        metric = "AUC" + metric.removeprefix("auc").replace(":", " of ")
    return metric.replace("_minus_", " − ").replace("balanced_accuracy", "Balanced accuracy")


def p_value(p: float) -> str:
    return "–" if not finite(p) else (f"<{NBSP}0.001" if p < 0.001 else f"{p:.3f}")


def verdict(words: str) -> Html:
    return tag("span", words or "–", css="good" if words.lower().startswith(("ok", "pass")) else "bad" if words else "")
