"""The graph of runs that a config lists: which model is trained from what, on which roles, by which teacher."""

from __future__ import annotations

import dataclasses

from kd_jax.errors import ConfigError

BASES = ("none", "sft")  # without a teacher; none: a base, as loaded, drawn or pre-trained
SETTINGS = ("-", "disjoint", "shared")
FILTERS = ("predicted", "transferred", "random")  # forms of the list that a filter writes for a run


# The order among runs that do not need each other: the first verdict (teacher, null) comes first.
PRIORITY = (
    "base_teacher",
    "base_student",
    "init_student",
    "teacher",
    "null",
    "students/",
    "direct",
    "swap",
    "swap_students/",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One node, e.g. `students/kd`; it is trained once for each of its seeds."""

    name: str
    model: str  # a key of config.models
    technique: str  # none | sft | one of kd_jax.distill.objective.TECHNIQUES
    init: str = ""  # the run it starts from; "" for a base
    train_roles: tuple[str, ...] = ()
    teacher: str = ""  # the run that teaches it
    recipe: str = ""  # a key of config.recipes
    objective: str = ""  # a key of config.objectives; "" = the one of the technique's name
    setting: str = "-"  # students: disjoint | shared
    swap_of: str = ""  # the run of which this is the counterfactual, taught by or trained on `heldout`
    exclude: str = ""  # predicted:RUN | transferred:RUN | random:RUN: without the records that a filter found for RUN
    seeds: tuple[int, ...] = (0,)

    @property
    def objective_name(self) -> str:
        return self.objective or ("sft" if self.technique == "none" else self.technique)

    @property
    def needs(self) -> list[str]:
        """The runs that come before this one."""
        return [name for name in (self.init, self.teacher, self.swap_of, self.excluded_of) if name]

    @property
    def excluded_of(self) -> str:
        """The run whose filter says which records this one leaves out; "" for none."""
        return self.exclude.partition(":")[2]

    def seed_for(self, seed: int) -> int:
        """The seed of this run that a dependent run with `seed` uses: the same one where there is one."""
        return seed if seed in self.seeds else self.seeds[0]


def parse(runs: dict[str, dict], models: set[str], recipes: set[str], objectives: dict[str, str]) -> list[Run]:
    """Runs in an order in which every run comes after those it needs. Raises ConfigError naming run and key.

    objectives: the technique of each.
    """
    parsed = {name: _run(name, dict(entry), models, recipes, objectives) for name, entry in runs.items()}
    for run in parsed.values():
        for key in ("init", "teacher", "swap_of"):
            other = getattr(run, key)
            if other and other not in parsed:
                raise ConfigError(f"runs.{run.name}.{key} names {other!r}, which is not a run; runs: {sorted(parsed)}")
        _check_exclude(run, parsed)
    return _ordered(parsed)


def _run(name: str, entry: dict, models: set[str], recipes: set[str], objectives: dict[str, str]) -> Run:
    known = {f.name for f in dataclasses.fields(Run)} - {"name"}
    if unknown := set(entry) - known:
        raise ConfigError(f"runs.{name} has unknown keys {sorted(unknown)}; known: {sorted(known)}")
    run = Run(name=name, **{k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in entry.items()})
    techniques = [*BASES, *sorted(set(objectives.values()) - set(BASES))]
    objective = run.objective_name
    trained = run.technique != "none" or bool(run.train_roles)
    checks = [
        (run.model in models, f"model {run.model!r} is not one of {sorted(models)}"),
        (
            run.technique in techniques,
            f"technique {run.technique!r} is not one of {', '.join(techniques)}, which config.objectives has",
        ),
        (objective in objectives, f"objective {objective!r} is not one of {sorted(objectives)}"),
        (
            run.technique == "none" or objectives.get(objective) == run.technique,
            f"objective {objective!r} is of technique {objectives.get(objective)!r}, the run of {run.technique!r}",
        ),
        (run.setting in SETTINGS, f"setting {run.setting!r} is not one of {SETTINGS}"),
        (bool(run.seeds), "seeds is empty"),
        (
            bool(run.teacher) == (run.technique not in BASES),
            f"technique {run.technique!r} and teacher {run.teacher!r}: a distilled run has a teacher, and no other run",
        ),
        (not trained or run.recipe in recipes, f"recipe {run.recipe!r} is not one of {sorted(recipes)}"),
        (run.technique == "none" or bool(run.init), "init must name the run it starts from"),
        (run.technique == "none" or bool(run.train_roles), "train_roles is empty"),
        (
            set(run.train_roles) <= ({"pretrain"} if run.technique == "none" else {"private", "public", "heldout"}),
            f"train_roles {run.train_roles}: a base takes pretrain or nothing, others private, public, heldout",
        ),
        (run.setting != "disjoint" or "private" not in run.train_roles, "setting disjoint, but trains on private"),
    ]
    for good, message in checks:
        if not good:
            raise ConfigError(f"runs.{name}: {message}")
    return run


def _check_exclude(run: Run, runs: dict[str, Run]) -> None:
    if not run.exclude:
        return
    form, _, other = run.exclude.partition(":")
    first = runs.get(other)
    checks = [
        (form in FILTERS and first is not None, f"is none of {', '.join(FILTERS)}, a colon, and a run"),
        (first is not None and bool(first.teacher), f"names {other}, which no teacher teaches"),
        (first is not None and not first.exclude, f"names {other}, which excludes records itself"),
        ("private" in run.train_roles, "filters records of the role private, which the run is not trained on"),
    ]
    for good, message in checks:
        if not good:
            raise ConfigError(f"runs.{run.name}.exclude {run.exclude!r} {message}; runs: {sorted(runs)}")


def _ordered(runs: dict[str, Run]) -> list[Run]:
    done: dict[str, Run] = {}
    waiting = {name: runs[name] for name in sorted(runs, key=_priority)}
    while waiting:
        ready = [r for r in waiting.values() if all(d in done for d in r.needs)]
        if not ready:
            raise ConfigError(f"runs depend on one another in a circle: {sorted(waiting)}")
        done[ready[0].name] = waiting.pop(ready[0].name)
    return list(done.values())


def _priority(name: str) -> tuple[int, str]:
    ranks = [i for i, first in enumerate(PRIORITY) if name == first or (first.endswith("/") and name.startswith(first))]
    return (ranks[0] if ranks else len(PRIORITY), name)
