"""Rows of blocks.csv: at which block of a model members show (attacks.md 7, zhang2025).

A block's score of an example is what changes when that block alone is noised, exchanged or read; the AUC of members
against non-members by that score is the block's risk.  Risk by noise is not location: see NOTE.  `block` is
`embedding`, `0` to `L-1`, `head`, or `all` for the whole model and for what is said of a profile, the AUCs of all
blocks.  Forms, higher score = member:

  noise_absolute  rise of the mean NLL under noise of one size (`sigma`) on the block
  noise_relative  the same, the noise scaled to the root mean square of the block's weights
  swap            rise of the NLL of the model with its block exchanged for its base's
  swap_back       fall of the NLL of the base with the model's block put in
  lens            mean log-prob of the target read after the block (the last: the `loss` attack)
  lens_shift      that less its base's
  gradient        -2-norm of the gradient of the block's weights

Noise of one size also measures the scale of a block's weights, and any form how much a block matters for text at all:
so each profile stands beside the null model's, and beside noise of relative size.

metric (per seed, and `all` over seeds): `auc`; `balanced_accuracy` (threshold chosen on the other half of the records,
each half in turn); `auc_less_null` (paired).  Of a profile, block `all`:

  auc_range             greatest less least AUC, with the p-value of "all blocks have one AUC" (attacks/profiles.py)
  auc_range_less_null   the same of the differences to null
  share_above_null      of the blocks, those whose difference is positive and survives Holm over the blocks
  spearman:<run>        rank correlation with the profile of the null or of the teacher

`p_corrected`: Holm, of `auc_less_null` over the blocks of a profile, of the ranges over all profiles of one seed and
metric, those of null models apart.  Members are those of the run: of a swap teacher and its students the held-out
records.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from attacks.profiles import equal_blocks, over_seeds, profile_spearman
from attacks.rows import Sample, compare, estimate, same_examples, sizes
from attacks.statistics import Influence, Interval, balanced_accuracy, best_threshold, correct
from attacks.study import PAIRS, Pair, Scores, Study, Unresolved
from attacks.tables import TableError
from attacks.weights import VARIANT, Whitebox, read_whitebox

COLUMNS = (
    "model technique setting form attack block metric value ci_low ci_high p_value p_corrected sigma n_members "
    "n_nonmembers seed"
)
NULL = "null"
ALL = "all"
LEVEL = 0.05
FEWEST = 4  # blocks, for a rank correlation of profiles
NOTE = (
    "Noise on a block says how sharply the loss depends on it, not that it holds the members: on a planted model, one "
    "block of which was trained on members, all blocks were sharp, and only the exchange with the base (swap_back) "
    "singled that one out. Noise of one size also measures how large a block's weights are, and every form how much "
    "the block matters for any text: read a profile beside noise of relative size and beside the null model's."
)
CURVES = {  # form -> attack, column, sign
    "noise_absolute": ("mope", "noise_absolute", 1),
    "noise_relative": ("mope", "noise_relative", 1),
    "swap": ("swap", "swap", 1),
    "swap_back": ("swap", "swap_back", 1),
    "lens": ("loss", "lens", 1),
    "gradient": ("gradient_global", "gradient_block", -1),
}
WHOLE = {  # (form, attack) -> column, sign
    ("noise_absolute", "mope"): ("mope", 1),
    ("noise_absolute", "mope_antithetic"): ("mope_antithetic", 1),
    ("gradient", "gradient_norm@p=1"): ("gradient_1", -1),
    ("gradient", "gradient_norm@p=2"): ("gradient_2", -1),
    ("gradient", "gradient_norm"): ("gradient_inf", -1),
    ("gradient", "gradient_global"): ("gradient_global", -1),
    ("lens", "emergence"): ("emergence", -1),
}
SAID = {
    "noise_absolute": "noise of one size (how sharply the loss depends on a block, not what it holds)",
    "noise_relative": "noise relative to the weights (how sharply the loss depends on a block, not what it holds)",
    "swap": "block exchanged for its base's",
    "swap_back": "block put into the base",
    "lens": "log-prob read after the block",
    "lens_shift": "log-prob read after the block, less the base's",
    "gradient": "gradient of the block",
}
SIGMA = {"noise_absolute": "sigma", "noise_relative": "relative_sigma"}


@dataclass(frozen=True)
class Profile:
    """The pairs of members and non-members of one run, seed and form, one for each of `names`."""

    run: str
    seed: int
    form: str
    attack: str
    sigma: float | None
    names: tuple[str, ...]
    pairs: tuple[Pair, ...]

    @property
    def influences(self) -> list[Influence]:
        return [pair.auc for pair in self.pairs]


Block = list[Profile]  # one seed's profile, or those of all seeds


def rows(study: Study) -> list[dict]:
    """Rows of blocks.csv; empty where no weights were looked into, with a `reason` where a value cannot be computed.

    Raises TableError where a run's tables of two roles name different blocks.
    """
    profiles, wholes, found = {}, {}, []
    for run in (run for run in study.runs if any(VARIANT in study.tables[run, s].variants for s in study.seeds(run))):
        for seed in study.seeds(run):
            at = study.head(run) | {"form": "all forms of", "metric": "blocks", "seed": seed}
            try:
                for profile in _profiles(study, run, seed):
                    if isinstance(profile, dict):
                        found.append(at | profile)
                        continue
                    kept = profiles if len(profile.names) > 1 else wholes
                    kept.setdefault((run, profile.form, profile.attack), []).append(profile)
            except Unresolved as why:
                found.append(at | {"reason": str(why)})
    for own in wholes.values():
        for seed, block in _by_seed(own).items():
            found += [_at(study, block, seed) | row for row in _block_rows(block)]
    for (run, form, attack), own in profiles.items():
        others = {name: profiles.get((other, form, attack), []) for name, other in _beside(study, run).items()}
        for seed, block in _by_seed(own).items():
            made = [*_block_rows(block), *_profile_rows(study, block, others)]
            found += [_at(study, block, seed) | row for row in made]
    ranges = [row for row in found if row["metric"].startswith("auc_range")]
    correct(ranges, lambda row: (row["metric"], row["seed"], row["model"] in study.nulls))
    return [row | {"measure": f"{row['form']} {row['metric']}"} if "reason" in row else row for row in found]


# --- scores of blocks ------------------------------------------------------------------------------------------------


def _profiles(study: Study, run: str, seed: int) -> Iterator[Profile | dict]:
    """Every form that the run's white-box tables have, or the form with the `reason` why it has none: noise may leave
    a NaN where no other form has one. Raises Unresolved where members or non-members are missing."""
    roles = PAIRS["heldout-private" if study.provenance(run).get("swap_of") else "private-heldout"]
    boxes = _boxes(study, run, seed, roles)
    settings, blocks = boxes[0].settings, boxes[0].blocks
    base = _base_boxes(study, settings.get("base"), seed, roles, boxes)
    for form, (attack, column, sign) in CURVES.items():
        if column in boxes[0].columns:
            names = blocks[: boxes[0].columns[column].shape[1]]
            values = [sign * box.columns[column] for box in boxes]
            yield _profile(study, (run, seed), form, attack, settings, names, boxes, values)
    if base:
        values = [box.columns["lens"] - below.columns["lens"] for box, below in zip(boxes, base, strict=True)]
        attack = f"reference:{settings['base']}"
        yield _profile(study, (run, seed), "lens_shift", attack, settings, blocks[:-1], boxes, values)
    for (form, attack), (column, sign) in WHOLE.items():
        if column in boxes[0].columns:
            values = [sign * box.columns[column][:, None] for box in boxes]
            yield _profile(study, (run, seed), form, attack, settings, (ALL,), boxes, values)


def _boxes(study: Study, run: str, seed: int, roles: Sequence[str]) -> list[Whitebox]:
    boxes = [read_whitebox(study.tables[run, seed], role) for role in roles]
    if lacking := [role for role, box in zip(roles, boxes, strict=True) if box is None]:
        raise Unresolved(f"the weights of {run}/seed{seed} were not looked into on role {' and '.join(lacking)}")
    shapes = {(box.blocks, tuple(sorted(box.columns))) for box in boxes}
    if len(shapes) > 1:
        raise TableError(f"{run}/seed{seed}: the white-box tables of {' and '.join(roles)} differ in blocks or columns")
    return boxes


def _base_boxes(study: Study, base: str | None, seed: int, roles, boxes: list[Whitebox]) -> list[Whitebox] | None:
    """The lens of the base on the same examples, or None."""
    other = study.match(base, seed) if base in study.runs else None
    if other is None or "lens" not in boxes[0].columns:
        return None
    found = [read_whitebox(study.tables[base, other], role) for role in roles]
    if any(box is None or "lens" not in box.columns for box in found):
        return None
    alike = all(
        np.array_equal(a.ids, b.ids) and a.columns["lens"].shape == b.columns["lens"].shape
        for a, b in zip(boxes, found, strict=True)
    )
    return found if alike else None


def _profile(
    study, key, form, attack, settings, names, boxes: list[Whitebox], values: list[np.ndarray]
) -> Profile | dict:
    run, seed = key
    roles = PAIRS["heldout-private" if study.provenance(run).get("swap_of") else "private-heldout"]
    pairs = []
    for k, name in enumerate(names):
        asked = f"{form}/{attack}[{name}]"
        for role, box, of in zip(roles, boxes, values, strict=True):
            silent = np.where(box.lengths == 0, -np.inf, of[:, k])
            study.scores[run, seed, asked, role] = Scores(box.ids, box.task, silent)
        try:
            pairs += study.pairs(run, seed, asked, "-".join(roles))
        except Unresolved as why:
            return {"form": form, "attack": attack, "reason": f"block {name}: {why}"}
    return Profile(run, seed, form, attack, settings.get(SIGMA.get(form)), tuple(names), tuple(pairs))


def _beside(study: Study, run: str) -> dict[str, str]:
    """The runs that a profile is compared with: null, and the run's teacher."""
    teacher = study.provenance(run).get("teacher")
    found = {NULL: NULL if run != NULL else None, "teacher": teacher}
    return {name: other for name, other in found.items() if other in study.runs}


def _by_seed(own: list[Profile]) -> dict[int | str, Block]:
    """Each seed alone, and all where there are several of the same blocks."""
    found: dict[int | str, Block] = {profile.seed: [profile] for profile in own}
    if len(own) > 1 and len({profile.names for profile in own}) == 1:
        found[ALL] = own
    return found


def _at(study: Study, block: Block, seed: int | str) -> dict:
    first = block[0]
    m, n = sizes([[first.pairs[0]]])
    return study.head(first.run) | {
        "form": first.form, "attack": first.attack, "sigma": first.sigma, "n_members": m, "n_nonmembers": n,
        "seed": seed,
    }  # fmt: skip


# --- rows ------------------------------------------------------------------------------------------------------------


def _block_rows(block: Block) -> Iterator[dict]:
    samples: list[Sample] = [[profile.pairs[0]] for profile in block]
    for k, name in enumerate(block[0].names):
        pairs = [profile.pairs[k] for profile in block]
        yield {"block": name, "metric": "auc"} | _interval(estimate([pair.auc for pair in pairs], samples))
        accuracies = [_crossed_accuracy(pair) for pair in pairs]
        yield {"block": name, "metric": "balanced_accuracy"} | _interval(estimate(accuracies, samples))


def _interval(found: Interval) -> dict:
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high}


def _crossed_accuracy(pair: Pair) -> Influence:
    """Balanced accuracy, each half of the records at the threshold that is best on the other half.

    Halves by place in the order of the ids, which are hashes; groups stay whole where there are any.
    """
    codes = pair.groups or (np.arange(len(pair.members)), np.arange(len(pair.nonmembers)))
    halves = [each % 2 == 0 for each in codes]
    hits, rejections = np.empty(len(pair.members)), np.empty(len(pair.nonmembers))
    for side in (True, False):
        here, there = ([half == s for half in halves] for s in (side, not side))
        if not (there[0].any() and there[1].any()):
            there = here
        threshold = best_threshold(pair.members[there[0]], pair.nonmembers[there[1]])
        found = balanced_accuracy(pair.members[here[0]], pair.nonmembers[here[1]], threshold)
        hits[here[0]], rejections[here[1]] = found.members, found.nonmembers
    return Influence(float(hits.mean() + rejections.mean()), hits, rejections, pair.groups)


def _profile_rows(study: Study, block: Block, others: dict[str, list[Profile]]) -> Iterator[dict]:
    """What is said of a profile as a whole, and of its blocks beside the null's. others: profiles of the same form."""
    first, rng = block[0], np.random.default_rng([study.settings["seed"], len(block)])
    own = [profile.influences for profile in block]
    yield {"block": ALL, "metric": "auc_range"} | _equality(own, rng)
    found = {name: _matched(study, block, those) for name, those in others.items() if those}
    null = found.get(NULL)
    if null and null[0].names == first.names:
        samples: list[Sample] = [[profile.pairs[0]] for profile in block]
        gaps = []
        for k, name in enumerate(first.names):
            gap = compare([of[k] for of in own], [p.pairs[k].auc for p in null], samples)
            gaps.append({"block": name, "metric": "auc_less_null", "p_value": gap.p} | _interval(Interval(*gap[:3])))
        correct(gaps)
        yield from gaps
        above = np.mean([row["value"] > 0 and row["p_corrected"] < LEVEL for row in gaps])
        yield {"block": ALL, "metric": "share_above_null", "value": float(above)}
        less = [[a.minus(p.auc) for a, p in zip(of, b.pairs, strict=True)] for of, b in zip(own, null, strict=True)]
        yield {"block": ALL, "metric": "auc_range_less_null"} | _equality(less, rng)
    for other in found.values():
        if other and min(len(first.names), len(other[0].names)) >= FEWEST:
            yield {"block": ALL, "metric": f"spearman:{other[0].run}"} | _correlation(block, other, rng)


def _matched(study: Study, block: Block, others: list[Profile]) -> Block:
    """Of another run the profile to set beside each of the block's, on the same records; none where one is lacking."""
    by_seed = {profile.seed: profile for profile in others}
    seeds = [study.match(others[0].run, profile.seed) for profile in block]
    found = [by_seed[seed] for seed in seeds if seed in by_seed]
    alike = len(found) == len(block) and all(
        same_examples([a.pairs[0]], [b.pairs[0]]) for a, b in zip(block, found, strict=True)
    )
    return found if alike else []


def _equality(profiles: list[list[Influence]], rng: np.random.Generator) -> dict:
    means = np.mean([[part.value for part in profile] for profile in profiles], axis=0)
    try:
        return {"value": float(np.ptp(means)), "p_value": equal_blocks(profiles, rng)}
    except Unresolved as why:
        return {"reason": str(why)}


def _correlation(block: Block, other: Block, rng: np.random.Generator) -> dict:
    try:
        return _interval(profile_spearman(*(over_seeds([p.influences for p in of]) for of in (block, other)), rng))
    except Unresolved as why:
        return {"reason": str(why)}


# --- words -----------------------------------------------------------------------------------------------------------


def facts(study: Study, found: list[dict]) -> dict:
    """For summary.json: of each model but the nulls and each form, which block shows most, and do blocks differ."""
    words = []
    for run in (run for run in study.runs if run not in study.nulls):
        for form in SAID:
            of = [row for row in found if row["model"] == run and row.get("form") == form and "reason" not in row]
            of = [row for row in of if row["seed"] == ALL] or of
            curve = [row for row in of if row["metric"] == "auc" and row["block"] != ALL]
            test = next((row for row in of if row["metric"] == "auc_range"), None)
            if curve and test:
                words.append(_sentence(run, form, curve, test, of))
    return {"words": words, "note": NOTE if words else ""}


def _sentence(run: str, form: str, curve: list[dict], test: dict, of: list[dict]) -> str:
    top = max(curve, key=lambda row: row["value"])
    said = f"{run}, {SAID[form]}: {place(top['block'], [row['block'] for row in curve])} shows most, AUC {_number(top)}"
    gap = next((row for row in of if row["metric"] == "auc_less_null" and row["block"] == top["block"]), None)
    said += f", {_number(gap, '+')} above null at the same block" if gap else ", no null model to set beside it"
    less = next((row for row in of if row["metric"] == "auc_range_less_null"), None)
    return f"{said}; {_verdict(test['p_corrected'], less and less['p_corrected'])}."


def _verdict(p: float, to_null: float | None) -> str:
    differ = p < LEVEL
    said = f"{'blocks differ' if differ else 'no evidence that blocks differ'} (p = {p:.2g})"
    if to_null is None:
        return said
    link = {
        (True, True): "and so do their differences to null",
        (True, False): "but there is no evidence that their differences to null do",
        (False, True): "but their differences to null do",
        (False, False): "nor that their differences to null do",
    }
    return f"{said}, {link[differ, to_null < LEVEL]} (p = {to_null:.2g})"


def place(block: str, blocks: list[str]) -> str:
    """`embedding`, `head`, or `block 5 of 12` (counted from 1)."""
    layers = [name for name in blocks if name.isdigit()]
    return f"block {int(block) + 1} of {len(layers)}" if block.isdigit() else f"the {block}"


def _number(row: dict, sign: str = "") -> str:
    return f"{row['value']:{sign}.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
