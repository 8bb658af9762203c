"""Reads score tables and runs the attacks on them: which attack runs on which model, and what it needs beside it.

Roles are read one after the other and models one after the other within a role: in memory at any time are one model's
tokens of one role, and those of the models that others are compared with.
"""

from pathlib import Path

import numpy as np

from attacks import membership, signals
from attacks.membership import ATTACKS, VARIANTS
from attacks.resampling import Resampler
from attacks.signals import CannotScore
from attacks.study import ATTACKED, MEASURED, Scores, Study, Totals, Unresolved
from attacks.tables import SEGMENTS, ScoreTable, TableError, Tokens, read_counts, read_scores, read_splits
from attacks.weights import Whitebox, read_whitebox

RELATED = ("reference", "base", "start", "teacher", "teacher_base")  # inputs that are other runs
COMPARABLE = {"dtype": "precisions", "matmul_precision": "precisions"}
ALWAYS = {"segment", "logp", "kl_ab"}  # as far as a table has them
Key = tuple[str, int]  # run, seed


def load_study(scores_dir: str | Path, settings: dict) -> Study:
    """Read all score tables and run all attacks. Raises TableError on tables that cannot be audited."""
    tables = {(t.run, t.seed): t for t in read_scores(scores_dir)}
    study = Study(settings, tables, read_splits(scores_dir), Resampler(settings["bootstrap"], settings["seed"]))
    counts = read_counts(scores_dir)
    _plan(study, counts is not None)
    for role in dict.fromkeys((*ATTACKED, *MEASURED)):
        shelf = Shelf(study, role, counts)
        for key in shelf.keys:
            _score_run(study, shelf, key)
            shelf.put_back(key)
    _note_caps(study)
    return study


# --- which attacks ---------------------------------------------------------------------------------------------------


def _plan(study: Study, counted: bool) -> None:
    """Fill `study.plan`, the attacks on every run, and `study.unavailable`, why one of the settings is not among them.

    An attack that means nothing for a run (a model without a teacher has no teacher's shift) is left out in silence.
    """
    scored = [reference for reference in study.settings["references"] if reference in study.runs]
    why: dict[str, tuple[list, list]] = {}
    for run in study.runs:
        study.plan[run] = []
        for attack_id in membership.expand(study.settings["attacks"], scored, run):
            name = membership.parse(attack_id)[0]
            if any(_related(study, run, i) is None for i in ATTACKS[name].inputs if i in RELATED and i != "reference"):
                continue
            if "pair" in ATTACKS[name].inputs and not study.provenance(run).get("teacher") and not _paired(study, run):
                continue
            reason = _lacks(study, run, name, counted)
            if reason is None:
                study.plan[run].append(attack_id)
                continue
            attacks, runs = why.setdefault(reason, ([], []))
            attacks += [name] if name not in attacks else []
            runs += [run] if run not in runs else []
    for reason, (attacks, runs) in why.items():
        models = "all models" if len(runs) == len(study.runs) else ", ".join(runs)
        study.unavailable.append({"models": models, "attacks": ", ".join(attacks), "reason": reason})


def _lacks(study: Study, run: str, name: str, counted: bool) -> str | None:
    """What this attack needs and no seed of the run has, or None."""
    tables = [study.tables[run, seed] for seed in study.seeds(run)]
    absent = sorted(set(ATTACKS[name].needs) - set.union(*(table.columns for table in tables)))
    if absent:
        return f"{name} needs {', '.join(absent)}, which the score table does not have"
    for given in ATTACKS[name].inputs:
        if given in VARIANTS and not any(given in table.variants for table in tables):
            return f"no table of the scoring variant '{given}'"
        if given == "whitebox" and (reason := _lacks_weights(tables, ATTACKS[name].weights)):
            return reason
        if given == "pair" and not _paired(study, run):
            return "no pair tables of students and their teachers (score.pairs)"
        if given == "steps" and not any(_steps(table) for table in tables):
            return "no score tables of earlier checkpoints"
        if given == "counts" and not counted:
            return "no text/token_counts.npz beside the score tables"
        if given.startswith("calib_") and (study.splits is None or not any("calib" in t.files for t in tables)):
            return "no calibration records with known coins (role 'calib', text/splits.parquet)"
    return None


def _lacks_weights(tables: list[ScoreTable], columns: tuple[str, ...]) -> str | None:
    found = [table.variants["whitebox"] for table in tables if "whitebox" in table.variants]
    if not found:
        return "no white-box table: the weights were not looked into (whitebox.runs)"
    if absent := sorted(set(columns) - set.union(*(table.columns for table in found))):
        return f"no {', '.join(absent)} in the white-box table (whitebox.forms)"
    return None


def _related(study: Study, run: str, what: str) -> str | None:
    """The run's start, its base (where the chain of `init` begins), its teacher, or its teacher's base; None without.

    The null model has no teacher of its own: it stands beside the students', as what they show without one.
    """
    if what == "teacher_base":
        teacher = _related(study, run, "teacher")
        return teacher and _related(study, teacher, "base")
    if what == "teacher":
        students = [study.provenance(student).get("teacher") for student in study.students]
        taught_by = study.provenance(run).get("teacher") or (run == "null" and next(filter(None, students), None))
        return taught_by if taught_by in study.runs else None
    if what == "start":
        source = study.provenance(run).get("init")
        return source if source in study.runs else None
    seen = [run]
    while (source := study.provenance(seen[-1]).get("init")) in study.runs and source not in seen:
        seen.append(source)
    return seen[-1] if len(seen) > 1 else None


def _paired(study: Study, run: str) -> bool:
    """Was any seed of the run scored beside its teacher?"""
    name = f"pair:{_related(study, run, 'teacher')}"
    return any(name in study.tables[run, seed].variants for seed in study.seeds(run))


def _steps(table: ScoreTable) -> list[tuple[int, str]]:
    """Earlier checkpoints that were scored: (step, variant), by step."""
    names = [name for name in table.variants if name.startswith("step-")]
    return sorted((int(name.removeprefix("step-")), name) for name in names)


# --- what is in memory -----------------------------------------------------------------------------------------------


class Shelf:
    """The Tokens of one role, read when asked for; those that other models are compared with stay."""

    def __init__(self, study: Study, role: str, counts: np.ndarray | None):
        self.study, self.role, self.counts = study, role, counts
        self.keys = [key for key, table in study.tables.items() if role in table.files]
        self.held: dict[tuple[Key, str, str], object] = {}
        self.fields: dict[Key, set[str]] = {key: set() for key in study.tables}
        self.segments = {SEGMENTS["response"]}
        self.shared: set[Key] = set()
        for run, seed in self.keys:
            for attack_id in study.plan[run] if role in ATTACKED else ():
                name = membership.parse(attack_id)[0]
                self.segments |= set(membership.segments(attack_id))
                related = [self.beside((run, seed), attack_id, i) for i in ATTACKS[name].inputs if i in RELATED]
                self.shared |= {key for key in related if key is not None}
                for key in [(run, seed), *filter(None, related)]:
                    self.fields[key] |= {*ATTACKS[name].needs, "target_id"}

    def put_back(self, key: Key) -> None:
        """Forget a model that no other is compared with."""
        for place in [p for p in self.held if p[0] == key and (p[1:] != (self.role, "") or key not in self.shared)]:
            del self.held[place]

    def tokens(self, key: Key, variant: str = "", role: str = "") -> Tokens:
        """Raises Unresolved where this was not scored."""
        role = role or self.role
        place = (key, role, variant)
        if place not in self.held:
            table = self.study.tables[key].variants.get(variant) if variant else self.study.tables[key]
            if table is None or role not in table.files:
                what = f"the variant {variant} of {key[0]}" if variant else f"{key[0]}"
                raise Unresolved(f"{what} has no score table of role '{role}' and seed {key[1]}")
            fields = {"logp_std", *self.fields[key]}
            self.held[place] = table.load(role, fields | ALWAYS).select(self.segments)
        return self.held[place]

    def inputs(self, key: Key, attack_id: str) -> dict[str, object]:
        """What the attack takes beside the target's Tokens. Raises Unresolved with the reason where it is not there."""
        return {given: self._input(key, attack_id, given) for given in ATTACKS[membership.parse(attack_id)[0]].inputs}

    def _input(self, key: Key, attack_id: str, given: str) -> object:
        if given in RELATED:
            other = self.beside(key, attack_id, given)
            if other is None or other not in self.keys:
                name = membership.parse(attack_id)[1] if given == "reference" else _related(self.study, key[0], given)
                raise Unresolved(
                    f"the {given} {name} has no score table of role '{self.role}' to set beside seed {key[1]}"
                )
            return self.tokens(other)
        if given in VARIANTS:
            return self.tokens(key, given)
        if given == "pair":
            return self.tokens(key, f"pair:{_related(self.study, key[0], 'teacher')}")
        if given == "steps":
            return [(step, self.tokens(key, variant)) for step, variant in _steps(self.study.tables[key])]
        if given == "whitebox":
            return self._whitebox(key)
        if given == "counts":
            return self.counts
        return self._calib(key)[given]

    def _whitebox(self, key: Key) -> Whitebox:
        place = (key, self.role, "whitebox")
        if place not in self.held:
            self.held[place] = read_whitebox(self.study.tables[key], self.role)
        if self.held[place] is None:
            raise Unresolved(f"the weights of {key[0]}/seed{key[1]} were not looked into on role '{self.role}'")
        return self.held[place]

    def beside(self, key: Key, attack_id: str, given: str) -> Key | None:
        """The run and seed to set beside this one as the attack's input `given`, or None."""
        name = membership.parse(attack_id)[1] if given == "reference" else _related(self.study, key[0], given)
        seed = self.study.match(name, key[1]) if name in self.study.runs else None
        return None if seed is None else (name, seed)

    def _calib(self, key: Key) -> dict[str, Tokens]:
        """The calibration records by whether the run, or its teacher, was trained on them."""
        if self.role == "calib":
            raise Unresolved("it is fitted on the calibration records, which therefore give no threshold")
        tokens = self.tokens(key, role="calib")
        trained = 0 if "heldout" in self.study.trained_on(key[0]) else 1  # which half: kd_jax/data/roles.py
        coins = self.study.drawn_coins(tokens.ids)
        place = (key, "calib", "halves")
        if place not in self.held:
            self.held[place] = {
                "calib_members": tokens.take(coins == trained),
                "calib_nonmembers": tokens.take(coins == 1 - trained),
            }
        return self.held[place]


# --- scores ----------------------------------------------------------------------------------------------------------


def _score_run(study: Study, shelf: Shelf, key: Key) -> None:
    role, tokens = shelf.role, shelf.tokens(key)
    response = tokens.select([SEGMENTS["response"]])
    if role in MEASURED:
        nats = -signals.segment_sum(response.token["logp"], response)
        study.losses[(*key, role)] = Totals(response.ids, nats, response.lengths)
    if role not in ATTACKED:
        return
    if "logp_std" in response.token:
        _count(study.clamps, key, signals.clamped(response), len(response.owner))
    for attack_id in study.plan[key[0]]:
        try:
            scored, inputs = _alike(tokens, role, shelf.inputs(key, attack_id))
            crossed = _compare(study, shelf, key, attack_id)
            values = membership.score(attack_id, scored, cross_tokenizer=crossed, **inputs)
            study.scores[(*key, attack_id, role)] = Scores(scored.ids, scored.task, values)
        except (Unresolved, CannotScore) as why:
            study.missing[(*key, attack_id, role)] = str(why)
    if (*key, "dc_pdd", role) in study.scores:
        terms = signals.dc_pdd_terms(response, shelf.counts)
        _count(study.caps, key, int((terms >= 0.01).sum()), len(terms))


def _alike(tokens: Tokens, role: str, inputs: dict[str, object]) -> tuple[Tokens, dict[str, object]]:
    """Of the calibration records only those that a variant has: the shots of its own prefix are left out of it.

    Of all roles only those whose white-box table the attack needs: passes with other weights are dear.
    """
    if "whitebox" in inputs:
        if unknown := set(inputs["whitebox"].ids) - set(tokens.ids):
            raise TableError(
                f"the white-box table of role '{role}' has {len(unknown)} examples that the plain one lacks, the first "
                f"is {min(unknown)}; score both on the same records"
            )
        tokens = tokens.take(np.isin(tokens.ids, inputs["whitebox"].ids))
    for name in VARIANTS if role == "calib" else ():
        if name in inputs and name != "neighbours":
            tokens = tokens.take(np.isin(tokens.ids, inputs[name].ids))
    for name, value in inputs.items() if role == "calib" else ():
        if name in VARIANTS and name != "neighbours" and len(value.ids) != len(tokens.ids):
            inputs[name] = value.take(np.isin(value.ids, tokens.ids))
    return tokens, inputs


def _compare(study: Study, shelf: Shelf, key: Key, attack_id: str) -> bool:
    """May these runs be subtracted?  Returns whether their tokenizers differ. Raises Unresolved where they may not."""
    attack, crossed = ATTACKS[membership.parse(attack_id)[0]], False
    for given in (name for name in attack.inputs if name in RELATED):
        other = shelf.beside(key, attack_id, given)
        told = [study.tables[k].provenance for k in (key, other)]
        names = [*COMPARABLE, *([] if attack.text_level else ["tokenizer_fingerprint"])]
        for name in names:
            if told[0].get(name) != told[1].get(name):
                raise Unresolved(
                    f"{key[0]} and {other[0]} have different {COMPARABLE.get(name, 'tokenizers')} ({name} "
                    f"{told[0].get(name)} and {told[1].get(name)}): not subtracted; score both alike"
                )
        if told[0].get("tokenizer_fingerprint") != told[1].get("tokenizer_fingerprint"):
            crossed = True
            study.note(
                f"cross_tokenizer: {key[0]} and {other[0]} have different tokenizers; attacks with this reference "
                "compare means over each model's own tokens, and those that need the same tokens were not run."
            )
    return crossed


def _count(counts: dict, key: Key, some: int, of: int) -> None:
    before = counts.get(key, (0, 0))
    counts[key] = (before[0] + some, before[1] + of)


def _note_caps(study: Study) -> None:
    shares = [100 * some / of for some, of in study.caps.values() if of]
    if shares:
        ends = dict.fromkeys(f"{share:.0f}" for share in (min(shares), max(shares)))
        study.note(
            f"dc_pdd: {' to '.join(ends)} % of a model's terms are at the cap of 0.01; "
            "near 100 % it tells nothing apart."
        )
