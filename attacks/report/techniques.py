"""The comparison of techniques: all students of one setting side by side, and what they were trained on."""

import numpy as np
import pandas as pd

from attacks.report.drawing import Picture
from attacks.report.markup import (
    NBSP,
    Html,
    figure,
    finite,
    folded,
    join,
    listed,
    measured,
    short_measured,
    table,
    tag,
    text,
    verdict,
)
from attacks.report.results import Results, in_order, pooled

SELECTION = {
    "last": "last step",
    "best_dev_loss": "lowest dev loss",
    "best_dev_rouge": "highest dev ROUGE-L",
}
NAMED = ("policy", "divergence")  # of an objective, what its students are told by
SOURCES = {
    "dataset": "data set",
    "teacher": "teacher's text",
    "student": "student's own text",
    "mixed": "student and teacher mixed",
    "replay": "replayed",
    "lm_corpus": "plain text",
}
LEDGER_NOTE = (
    "Which responses stood behind the prompts. Shares are of the trained response tokens, several seeds together; the "
    "age of a response is the number of steps between its sampling and its use. A private record whose prompt was used "
    "with somebody else's response can act on the student without its own response ever being seen."
)

LEDGER_CAPTION = "Per seed. Every use of every example: ledger.parquet."


def beside(results: Results, setting: str) -> list[str]:
    """The controls of one setting: null, the swaps of its students, direct."""
    swaps = [results.swap_of[m] for m in results.techniques[setting] if m in results.swap_of]
    return [m for m in ("null", *swaps, "direct") if m in results.models]


def used_measure(results: Results, students: list[str]) -> str | None:
    """ROUGE-L on the first set that all students were measured on (dev first), else dev loss, else nothing."""
    have = {m: set(results.utility.loc[results.utility["model"] == m, "measure"]) for m in students}
    shared = set.intersection(*have.values())
    sets = sorted((m for m in shared if m.startswith("rouge_l@")), key=lambda m: (m != "rouge_l@dev", m))
    return next((m for m in (*sets, "dev_loss") if m in shared), None)


def objective_words(results: Results, model: str, short: bool = False) -> str:
    """`student, jsd`: policy and divergence; where not `short`, with what differs between the students of a setting."""
    told = _objective(results, model)
    head = [str(told[key]) for key in NAMED if told.get(key) not in (None, "")]
    if short:
        return ", ".join(head)
    shared = shared_objective(results, results.settings[model])
    rest = (f"{k} {_flat(v)}" for k, v in told.items() if k not in (*NAMED, *shared) and v not in (None, ""))
    return ", ".join([*head, *rest]) or "–"


def shared_objective(results: Results, setting: str) -> dict:
    """What all students of a setting have in common in their objectives."""
    first, *others = [_objective(results, m) for m in results.techniques[setting]]
    return {k: v for k, v in first.items() if k not in NAMED and all(k in o and o[k] == v for o in others)}


def _objective(results: Results, model: str) -> dict:
    told = results.runs.get(model, {}).get("objective") or {}
    return {key: value for key, value in told.items() if key != "technique"}


def _flat(value) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_flat(v)}" for k, v in value.items()) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def technique_sections(results: Results, pictures: dict[str, Picture]) -> dict[str, tuple[str, Html]]:
    """One section for each setting with several students: anchor -> (title, content)."""
    return {
        f"techniques-{setting}": (_title(setting), _techniques(results, setting, pictures))
        for setting in results.techniques
    }


def _title(setting: str) -> str:
    return "Techniques side by side" + (f": {setting} setting" if setting != "-" else "")


def _techniques(results: Results, setting: str, pictures: dict[str, Picture]) -> Html:
    return join(
        _ranking(results, setting),
        figure(pictures.get(f"techniques-{setting}")),
        _leak_and_use(results, setting),
        figure(pictures.get(f"usefulness-{setting}")),
        _training(results, setting),
    )


def _ranking(results: Results, setting: str) -> Html:
    found = next((r for r in results.summary.get("ranking") or [] if r["setting"] == setting), None)
    return listed(found["words"]) if found else Html("")


def _leak_and_use(results: Results, setting: str) -> Html:
    head = results.headline["attack"]
    controls = beside(results, setting)
    models = [*results.techniques[setting], *controls]
    leaks = results.leaks(models, attack=head).set_index("model")
    sets = sorted({m for m in results.utility["measure"] if m.startswith("rouge_l@")})
    use = {m: results.utility_rows(models, m).set_index("model") for m in ("dev_loss", *sets)}
    gates = pooled(results.gates)
    gates = gates[(gates["gate"] == "utility") & ~gates["metric"].str.endswith("_null")]
    verdicts = gates.drop_duplicates("model").set_index("model")["verdict"]

    def cell(frame, model, show=measured):
        return show(*frame.loc[model, ["value", "ci_low", "ci_high"]]) if model in frame.index else text("–")

    rows = []
    for model in models:
        first = leaks.loc[model] if model in leaks.index else None
        twin = results.swap_of.get(model)
        rows.append({
            "Model": model,
            f"AUC of {head}": cell(leaks, model),
            **({"Its swap": cell(leaks, twin)} if any(m in results.swap_of for m in models) else {}),
            "Dev loss": cell(use["dev_loss"], model),
            **{f"ROUGE-L, {m.partition('@')[2]}": cell(use[m], model, short_measured) for m in sets},
            "Utility": verdict(verdicts[model]) if model in verdicts.index else "–",
            "Seed": "–" if first is None else first["seed"],
        })  # fmt: skip
    sample = f"{_range(leaks['n_members'])} members, {_range(leaks['n_nonmembers'])} non-members"
    pairs = ", ".join(dict.fromkeys(leaks["role_pair"]))
    caption = (
        f"Setting: {setting}. {sample}, roles {pairs}. Intervals: 95 %. "
        "Dev loss in nats per token; ROUGE-L from 0 to 100; utility: is the dev loss below that of the base model? "
        "Below the students: what no teacher, the swapped teacher and the private data themselves give."
    )
    return table(rows, caption, results.headline["model"])


def _range(values) -> str:
    v = [int(x) for x in values if finite(x)]
    return "?" if not v else f"{min(v):,}" if min(v) == max(v) else f"{min(v):,} to {max(v):,}"


# --- how they were trained -------------------------------------------------------------------------------------------


def _training(results: Results, setting: str) -> Html:
    """One row per student; facts that differ from seed to seed are listed. Nothing where no run told any."""
    students = results.techniques[setting]
    told = {m: list((results.runs.get(m, {}).get("training") or {}).values()) for m in students}
    if not any(told.values()):
        return Html("")
    rows = []
    for model, facts in told.items():
        run = results.runs[model]
        known = {key: [f[key] for f in facts if f.get(key) is not None] for key in (
            "lr", "grid", "select", "selected_step", "steps", "response_tokens", "phi", "fidelity")}  # fmt: skip
        rows.append({
            "Model": model,
            "Objective": objective_words(results, model),
            "Recipe": _together([run.get("recipe"), *known["fidelity"]]),
            "Response tokens": _numbers(known["response_tokens"]),
            "Where they came from": _shares([f.get("sources") or {} for f in facts]),
            "Learning rate": _rates(known),
            "Checkpoint": _together([SELECTION.get(s, s) for s in known["select"]]),
            "Step used": _steps(known),
            "Final phi": _together([f"{phi:g}" for phi in known["phi"]]),
        })  # fmt: skip
    if all(row["Final phi"] == "–" for row in rows):
        rows = [{k: v for k, v in row.items() if k != "Final phi"} for row in rows]
    caption = (
        f"Setting: {setting}. How each student was trained, per seed. The learning rate is the one picked by dev loss "
        "from those tried (all of them stand under Utility); phi is the share of student samples that DistiLLM's "
        "schedule ended with."
    )
    shared = [f"{k} {_flat(v)}" for k, v in shared_objective(results, setting).items() if v not in (None, "")]
    same = folded("The same in all their objectives", tag("p", ", ".join(shared))) if shared else ""
    return join(table(rows, caption, results.headline["model"]), same)


def _together(values: list) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in values if v not in (None, ""))) or "–"


def _numbers(values: list) -> str:
    return _range(values) if values else "–"


def _rates(known: dict) -> str:
    tried = max((len(grid) for grid in known["grid"]), default=0)
    return _together([f"{lr:g}" for lr in known["lr"]]) + (f" (of {tried} tried)" if tried > 1 else "")


def _steps(known: dict) -> str:
    used, of = _together(known["selected_step"]), _together(known["steps"])
    return "–" if used == of == "–" else f"{used} of {of}"


def _shares(sources: list[dict]) -> Html:
    """Shares of the response tokens by source, over all seeds together."""
    total = {}
    for each in sources:
        for source, tokens in each.items():
            total[source] = total.get(source, 0) + tokens
    whole = sum(total.values())
    parts = [(SOURCES.get(s, s), tokens / whole) for s, tokens in total.items() if tokens] if whole else []
    return _share_lines(parts)


def _share_lines(parts: list[tuple[str, float]]) -> Html:
    lines = [tag("span", f"{name} {_percent(share)}", css="line") for name, share in parts]
    return join(*lines) if lines else text("–")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}{NBSP}%"


# --- the ledger ------------------------------------------------------------------------------------------------------


def ledger_section(results: Results) -> Html:
    """One row per model, its seeds together; nothing where no run kept a ledger."""
    facts = results.summary.get("ledger") or []
    if not facts:
        return Html("")
    models = pd.DataFrame({"model": in_order({f["model"] for f in facts})})
    tables = [
        table(
            [_ledger_row(results, m, facts) for m in part["model"]],
            f"{said}{LEDGER_CAPTION}",
            results.headline["model"],
        )
        for said, part in results.apart(models)
    ]
    return join(tag("p", LEDGER_NOTE), *tables)


def _ledger_row(results: Results, model: str, facts: list[dict]) -> dict:
    own = [f for f in facts if f["model"] == model]
    weights = [f["response_tokens"] for f in own]
    sources = dict.fromkeys(source for f in own for source in f["shares"] or {})
    shares = {s: _mean([(f["shares"] or {}).get(s, 0) for f in own], weights) for s in sources}
    ages = [(f["mean_age"], f["max_age"]) for f in own if f["mean_age"] is not None]
    return {
        "Model": model, "Setting": results.settings.get(model, "-"),
        "Responses": _share_lines([(SOURCES.get(s, s), v) for s, v in shares.items()]),
        "Response tokens": _range(weights),
        "Plain-text tokens": _range([f["plain_tokens"] for f in own]),
        "Replayed": _percent(_mean([f["replayed"] or 0 for f in own], weights)),
        "Mean age (steps)": f"{np.mean([mean for mean, _ in ages]):.1f} (at most {max(m for _, m in ages):,.0f})"
                            if ages else "–",
        "Private prompts with their own response": _range([f["own"] for f in own]),
        "Private prompts with another's response": _range([f["foreign"] for f in own]),
        "Seeds": ", ".join(f["seed"] for f in own),
    }  # fmt: skip


def _mean(values: list[float], weights: list[int]) -> float:
    return float(np.average(values, weights=weights)) if sum(weights) else 0.0
