"""The result tables of one audit, as the report reads them: loading, order, and which row speaks for a model."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from attacks.membership import ATTACKS, FIRST

TEXT = {"model", "model_a", "model_b", "technique", "setting", "access", "attack", "role_pair", "task", "metric"}
TEXT |= {"ci_kind", "seed", "gate", "verdict", "measure", "test", "rule", "teacher", "student", "class", "group"}
TEXT |= {"by_construction", "placement", "example_id"}
TEXT |= {"role", "baseline", "region", "features", "protocol", "claim", "form", "block"}
TEXT |= {"source", "method", "strategy", "valid", "conditions", "size", "design", "statistic", "against", "effect"}
NUMBERS = {("tasks.csv", "statistic")}  # of a name that is text elsewhere
COLUMNS = {
    "membership.csv": "model technique setting access attack role_pair task metric value ci_low ci_high ci_kind "
    "n_members n_nonmembers seed",
    "differences.csv": "model_a model_b setting access attack role_pair task metric difference ci_low ci_high ci_kind "
    "p_value p_corrected n_members n_nonmembers seed",
    "gates.csv": "gate model task metric value ci_low ci_high n seed verdict",
    "utility.csv": "model technique setting measure value ci_low ci_high n seed",
    "roc.parquet": "model attack role_pair seed fpr tpr",
    "attacks.csv": "model role_pair seed attack auc p_value p_corrected rule family null_median",
    "tasks.csv": "test model model_b setting attack role_pair seed task value ci_low ci_high statistic df p_value "
    "p_corrected n_members n_nonmembers",
    "decisions.csv": "model attack role_pair seed measure fpr prior value ci_low ci_high by_chance verdict n_members "
    "n_nonmembers",
    "agreement.csv": "teacher student attack rule measure class value ci_low ci_high p_corrected seed",
    "supervision.csv": "teacher student attack measure group n value ci_low ci_high p_corrected by_construction seed",
    "alpha.csv": "teacher setting technique series alpha student attack measure group value ci_low ci_high seed",
    "exposure.csv": "model seed example_id placement repeats exposure extrapolated n_references fit_p",
    "dataset.csv": "model measure n value attacks seed",
    "memorization.csv": "model technique setting measure task role value ci_low ci_high n seed",
    "claims.csv": "claim setting model_a model_b measure value ci_low ci_high p_value p_corrected n seed verdict",
    "inheritance.csv": "teacher baseline student setting measure region count denominator value ci_low ci_high "
    "p_value p_corrected seed",
    "prediction.csv": "student setting features protocol measure value ci_low ci_high n seed",
    "mechanism.csv": "student model technique setting group measure role value ci_low ci_high n seed",
    "mechanism_points.parquet": "student model seed example_id group entropy log_p",
    "blocks.csv": "model technique setting form attack block metric value ci_low ci_high p_value p_corrected sigma "
    "n_members n_nonmembers seed",
    "disagreement.csv": "model technique setting attack measure value ci_low ci_high n seed",
    "disagreement_examples.parquet": "model seed attack example_id role task membership_rank memorization_rank",
    "epsilon.csv": "model setting source attack method strategy delta significance epsilon largest least greatest n_in "
    "n_out trained_models valid conditions seed",
    "shadow.csv": "model size technique setting design attack statistic against metric value ci_low ci_high p_value "
    "p_corrected targets references n_members n_nonmembers seed",
    "counterfactual.csv": "model size technique setting design measure effect role value ci_low ci_high n chains seed",
}
# Everything but membership.csv may be absent.
KINDS = (
    "base_student",
    "base_teacher",
    "init_student",
    "reference",
    "null",
    "swap",
    "swap_student",
    "student",
    "direct",
    "teacher",
)
TECHNIQUES = ("kd", "seqkd", "imitkd", "gkd", "minillm", "distillm")
MAIN_PAIR = "private-heldout"


def kind(model: str) -> str:
    """What a run is, from its name: `students/kd` -> `student`; a name of its own kind (`null`) stays as it is."""
    return {"students": "student", "swap_students": "swap_student"}.get(model.split("/")[0], model)


def in_order(models) -> list[str]:
    """Models in the order of the story: bases, null, swap, students by technique, direct, teacher; then by name."""
    kinds = {name: i for i, name in enumerate(KINDS)}
    techniques = {name: i for i, name in enumerate(TECHNIQUES)}
    named = lambda m: techniques.get(m.partition("/")[2], len(techniques))
    return sorted(set(models), key=lambda m: (kinds.get(kind(m), len(kinds)), named(m), m))


def bare_name(attack: str) -> str:
    """`reference:null@k=0.3` -> `reference`."""
    return attack.partition("@")[0].partition(":")[0]


def pooled(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that speak for a model: seed `all` where several seeds were run, else the seed there is."""
    known = ("model", "model_a", "model_b", "attack", "role_pair", "task", "metric", "measure", "gate")
    known += ("test", "teacher", "student", "rule", "class", "group")
    known += ("role", "region", "features", "protocol", "claim", "setting", "form", "block")
    keys = [frame[k] for k in known if k in frame]
    whole = frame["seed"] == "all"
    return frame[whole | ~whole.groupby(keys).transform("any")] if len(frame) else frame


@dataclass(frozen=True)
class Results:
    """Everything the report shows. Frames have the columns of COLUMNS; absent optional files are empty frames."""

    summary: dict
    membership: pd.DataFrame
    differences: pd.DataFrame
    gates: pd.DataFrame
    utility: pd.DataFrame
    roc: pd.DataFrame
    attacks: pd.DataFrame
    tasks: pd.DataFrame
    decisions: pd.DataFrame
    agreement: pd.DataFrame
    supervision: pd.DataFrame
    alpha: pd.DataFrame
    exposure: pd.DataFrame
    dataset: pd.DataFrame
    memorization: pd.DataFrame
    claims: pd.DataFrame
    inheritance: pd.DataFrame
    prediction: pd.DataFrame
    mechanism: pd.DataFrame
    mechanism_points: pd.DataFrame
    disagreement: pd.DataFrame
    disagreement_examples: pd.DataFrame
    blocks: pd.DataFrame
    epsilon: pd.DataFrame
    shadow: pd.DataFrame
    counterfactual: pd.DataFrame

    @cached_property
    def headline(self) -> dict:
        """The summary's headline; where it names no model, attack or pair, the first ones of the tables."""
        given = {k: v for k, v in (self.summary.get("headline") or {}).items() if v is not None}
        first = next((m for m in self.models if kind(m) == "student"), self.models[-1])
        attack = next(iter(self.membership["attack"]), "")
        return {"model": first, "attack": attack, "role_pair": MAIN_PAIR} | given

    @cached_property
    def models(self) -> list[str]:
        """Those that were attacked; where there are no non-members to attack with, those that memorization is of."""
        return in_order((self.membership if len(self.membership) else self.memorization)["model"])

    @cached_property
    def attack_ids(self) -> list[str]:
        """Attack ids, the headline's first, the others in the order of ATTACKS and then of their references."""
        head, names = self.headline["attack"], list(ATTACKS)
        found = list(self.membership["attack"].unique())
        references = {run: i for i, run in enumerate(in_order(a.partition("@")[0].partition(":")[2] for a in found))}

        def place(attack: str) -> tuple:
            name, reference = bare_name(attack), attack.partition("@")[0].partition(":")[2]
            return attack != head, names.index(name) if name in names else len(names), references[reference]

        return sorted(found, key=place)

    @cached_property
    def first_attacks(self) -> list[str]:
        """The attacks of the first pages: the headline's, then those of the papers and the strongest."""
        return [a for a in self.attack_ids if a == self.headline["attack"] or bare_name(a) in FIRST]

    @cached_property
    def chain(self) -> list[str]:
        """The models of the card's picture: null or reference, swap, the audited one and its swap, direct, teacher."""
        student = self.headline["model"]
        twin = self.swap_of.get(student)
        return [m for m in self.models if m in ("reference", "null", "swap", twin, student, "direct", "teacher")]

    @cached_property
    def runs(self) -> dict[str, dict]:
        return {run["model"]: run for run in self.summary.get("runs") or []}

    @cached_property
    def techniques(self) -> dict[str, list[str]]:
        """Setting -> its students, where there are several, in the order of the techniques and never of their leak."""
        students = [m for m in self.models if kind(m) == "student"]
        groups = {s: [m for m in students if self.settings[m] == s] for s in sorted(set(self.settings.values()))}
        return {setting: group for setting, group in groups.items() if len(group) > 1}

    def apart(self, frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """Rows (with a `model`) by setting, with words for a caption: two settings never share a table or a picture.

        Where there is one setting only, its models stand with those that have none: all rows, and no words.
        """
        settings = frame["model"].map(self.settings).fillna("-")
        if len(set(self.settings.values()) - {"-"}) < 2:
            return [("", frame)] if len(frame) else []
        words = {s: f"Setting: {s}. " if s != "-" else "Models of no setting. " for s in sorted(settings.unique())}
        return [(said, frame[settings == s]) for s, said in words.items()]

    def models_apart(self, models) -> list[tuple[str, list[str]]]:
        """The same for names of models, in the order of the story: (words, models of one setting)."""
        return [(said, list(part["model"])) for said, part in self.apart(pd.DataFrame({"model": in_order(models)}))]

    @cached_property
    def swap_of(self) -> dict[str, str]:
        """Student -> the student of the swapped teacher, where there is one: as the run says, else by its name."""
        found = {
            m: self.runs.get(m, {}).get("swap") or m.replace("students/", "swap_students/", 1) for m in self.models
        }
        return {m: twin for m, twin in found.items() if kind(m) == "student" and twin != m and twin in self.models}

    @cached_property
    def settings(self) -> dict[str, str]:
        """Model -> `disjoint`, `shared` or `-`."""
        told = pd.concat([self.memorization[["model", "setting"]], self.membership[["model", "setting"]]])
        return dict(zip(told["model"], told["setting"].replace("", "-"), strict=True))

    def setting_words(self, models) -> str:
        """The settings of these models for a title, e.g. `disjoint setting`."""
        found = sorted({self.settings.get(m, "-") for m in models} - {"-"})
        return (" and ".join(found) + (" setting" if len(found) == 1 else " settings")) if found else "no setting"

    def leaks(self, models, *, attack: str, metric: str = "auc", task: str = "all") -> pd.DataFrame:
        """One row per model, in the order given: the headline's role pair, else private-heldout."""
        m = pooled(self.membership)
        m = m[m["model"].isin(models) & (m["attack"] == attack) & (m["metric"] == metric) & (m["task"] == task)]
        m = self.of_pair(m).drop_duplicates("model").set_index("model")
        return m.loc[[name for name in models if name in m.index]].reset_index()

    def of_pair(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Of each model the rows of the headline's role pair, where it has none those of private-heldout."""
        rank = frame["role_pair"].map({MAIN_PAIR: 1} | {self.headline["role_pair"]: 0})
        return frame[rank == rank.groupby(frame["model"]).transform("min")]

    def reason(self, at: dict) -> str | None:
        """Why a value of membership.csv is empty; at: its model, attack, role_pair, task, metric and seed.

        In the summary one entry may stand for several models, attacks and seeds, joined by commas.
        """
        for entry in self._reasons.get((at["role_pair"], at["task"], at["metric"]), ()):
            if all(str(at[key]) in str(entry.get(key)).split(", ") for key in ("model", "attack", "seed")):
                return entry["reason"]
        return None

    @cached_property
    def _reasons(self) -> dict[tuple, list[dict]]:
        found: dict[tuple, list[dict]] = {}
        for entry in self.summary.get("unresolved") or []:
            found.setdefault(tuple(entry.get(key) for key in ("role_pair", "task", "metric")), []).append(entry)
        return found

    def utility_rows(self, models, measure: str = "dev_loss") -> pd.DataFrame:
        """One row per model that has this measure, in the order given."""
        u = pooled(self.utility)
        u = u[u["measure"] == measure].drop_duplicates("model").set_index("model")
        return u.loc[[m for m in models if m in u.index]].reset_index()


def _read(folder: Path, name: str) -> pd.DataFrame:
    columns = COLUMNS[name].split()
    path = folder / name
    text = {c for c in columns if c in TEXT and (name, c) not in NUMBERS}
    if not path.exists():
        return pd.DataFrame({c: pd.Series(dtype=str if c in text else float) for c in columns})
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
    else:
        # `null` is the name of a model here: only an empty field is missing.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if absent := [c for c in columns if c not in frame]:
        raise ValueError(f"{path}: no column {', '.join(absent)}; run the attack stage of this version again")
    for c in columns:
        frame[c] = frame[c].astype(str) if c in text else pd.to_numeric(frame[c].replace("", None)).astype(float)
    return frame[columns]


def load(report_dir: str | Path) -> Results:
    """Read `report_dir`. Raises FileNotFoundError without summary.json or membership.csv, ValueError on a table that
    lacks columns or rows. All other tables may be absent."""
    folder = Path(report_dir)
    for name in ("summary.json", "membership.csv"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing; run the attack stage first, it writes this file")
    frames = {name.split(".")[0]: _read(folder, name) for name in COLUMNS}
    if frames["membership"].empty and frames["memorization"].empty:
        raise ValueError(f"{folder / 'membership.csv'} has no rows: no model was attacked, so nothing can be reported")
    return Results(summary=json.loads((folder / "summary.json").read_text(encoding="utf-8")), **frames)
