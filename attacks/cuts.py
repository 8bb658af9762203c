"""Greedy and probabilistic extraction of one suffix a text, for any cut in tokens, from one teacher-forced pass.

Greedy decoding from the prefix gives the suffix exactly if every argmax of the pass hits: the first token is given by
the true prefix, and as long as all were right the history is the true one (arXiv:2202.07646; memorization.md 2).  The
number of leading hits is then what greedy decoding gets right, for every cut from the same pass.

A cut is in tokens that were scored; nothing is ever tokenised again.  Rows of a table are examples without padding.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from attacks.study import Study, Unresolved
from attacks.tables import SEGMENTS, ScoreTable, TableError, Tokens, read_continued

NEAR_TIE = 1e-3  # nats between the first two logits: a greedy token may flip between programs
SUFFIXES = (10, 20, 32, 50)
TEXT_PREFIX = 50  # tokens of a plain text that the model is given
ENOUGH = 0.25  # share of the private examples whose suffix is whole at the cut of the first pages
ROLES = ("private", "heldout", "canary")
PADS = {"target_ids": -1, "generated_ids": -2}  # never equal: what is not there is no hit
FIELDS = ("target_id", "top1_id", "top1_logp", "top2_gap", "logp", "entropy", "rank")
GRID = re.compile(r"(lse|topk_lse|cum_above|nucleus)(?:_[kp]([\d.]+))?_t([\d.]+)")  # what, k or p, temperature


class Cut(NamedTuple):
    """prefix: tokens of the response, or of a plain text, that the model is given.  suffix: tokens compared."""

    prefix: int
    suffix: int

    def __str__(self) -> str:
        return f"a={self.prefix},k={self.suffix}" if self.prefix else f"k={self.suffix}"


@dataclass(frozen=True)
class Extraction:
    """What one model (a run's seed) gives away of one role at one cut; arrays [n] in the order of the ids.

    length: scored tokens after the prefix, EOS not counted.  window: tokens compared, `min(k, length)`, and one more
    for an EOS that falls into the cut; 0 where nothing follows the prefix.
    matched: leading hits in the window, the tokens that greedy decoding gets right.  hits: all of them.
    strength: share of the window after the last miss, `1 - k*/window`; NaN for an empty window, as all means.
    log_p: log-probability of the window by decoding scheme ("t=1", "k=40,t=1", ...), -inf where it cannot be drawn.
    entropy: mean over the window in nats.  gap: least lead of the first over the second logit up to the first miss.
    confidence: mean log-probability of the argmaxes up to the first miss, what the model says of its own continuation;
    None where the table lacks it.
    """

    run: str
    seed: int
    role: str
    cut: Cut
    ids: np.ndarray
    task: np.ndarray
    length: np.ndarray
    window: np.ndarray
    matched: np.ndarray
    hits: np.ndarray
    strength: np.ndarray
    log_p: dict[str, np.ndarray]
    entropy: np.ndarray
    gap: np.ndarray
    confidence: np.ndarray | None = None

    @property
    def full(self) -> np.ndarray:
        """Is the whole suffix there? bool [n]."""
        return self.length >= self.cut.suffix

    @property
    def extracted(self) -> np.ndarray:
        """Does greedy decoding give the window, in a short response up to and with its EOS? bool [n]."""
        return (self.window > 0) & (self.matched == self.window)

    @property
    def near_tie(self) -> np.ndarray:
        """May the verdict be another in another program? bool [n]."""
        return self.gap < NEAR_TIE

    @property
    def accuracy(self) -> np.ndarray:
        """Share of the window's tokens that are the argmax after the true history [n]."""
        return _per_window(self.hits, self.window)


def extract(tokens: Tokens, cut: Cut, run: str, seed: int, role: str, bos: str = "none") -> Extraction:
    """Cut every example after `cut.prefix` tokens and compare the next `cut.suffix` with the model's argmax.

    tokens: with logp, top1_id, target_id; top2_gap, entropy, rank and the grids as far as there are.
    bos: what a plain text (`id#window`) begins with; with "none" its first token was not scored and is one of the
    prefix.  Raises Unresolved without the columns, ValueError for a plain text that is cut before its first token.
    """
    if absent := [name for name in ("logp", "top1_id", "target_id") if name not in tokens.token]:
        raise Unresolved(f"extraction needs {', '.join(absent)}, which the score table of {run} does not have")
    tokens = tokens.select(SEGMENTS.values())
    has_eos = np.bincount(tokens.owner[tokens.token["segment"] == SEGMENTS["eos"]], minlength=len(tokens.ids))
    skip = given(tokens.ids, cut, bos)
    length = np.maximum(tokens.lengths - has_eos - skip, 0)
    window = np.where(length > 0, np.minimum(cut.suffix, length + has_eos), 0)
    part = _window(tokens, skip, window)
    hit = part.token["top1_id"] == part.token["target_id"]
    sums = lambda values: np.bincount(part.owner, values, len(part.ids))
    reached = _before(~hit, part) == 0  # up to the first miss, that one included
    trailing = sums((_before(~hit, part) + ~hit) == sums(~hit)[part.owner])  # from the last miss on, that one included
    missed = sums(~hit) > 0
    return Extraction(
        run,
        seed,
        role,
        cut,
        tokens.ids,
        tokens.task,
        length=length,
        window=window,
        matched=sums(reached & hit).astype(int),
        hits=sums(hit).astype(int),
        strength=_per_window(trailing - missed, window),
        log_p={name: np.where(window > 0, sums(q), np.nan) for name, q in log_q(part).items()},
        entropy=_per_window(sums(part.token["entropy"]) if "entropy" in part.token else np.nan, window),
        gap=_least(part, reached, window),
        confidence=_per_window(sums(reached * part.token["top1_logp"]), sums(reached))
        if "top1_logp" in part.token
        else None,
    )


def given(ids: np.ndarray, cut: Cut, bos: str) -> np.ndarray:
    """How many leading scored tokens belong to the prefix [n]. Raises ValueError for a plain text without prefix."""
    text = is_text(ids) & (bos == "none")
    if text.any() and not cut.prefix:
        raise ValueError(f"the cut {cut} has no prefix: the first token of a plain text without BOS has no predictor")
    return cut.prefix - text.astype(int)


def is_text(ids: np.ndarray) -> np.ndarray:
    """Which ids are windows of a plain text, `record#window`? bool [n]."""
    return np.char.find(ids.astype(str), "#") >= 0


def log_q(tokens: Tokens) -> dict[str, np.ndarray]:
    """Log-probability of every token under each decoding scheme that the table has the statistics for.

    `t=1` is the model itself, `t=0.5` a temperature, `k=40,t=1` top-k, `p=0.9,t=1` top-p (memorization.md 3); -inf for
    a token that the scheme never draws.  Of logits equal to the k-th all are taken to be kept.
    """
    field = tokens.token
    logp = field["logp"].astype(np.float64)
    found = {"t=1": logp}
    for name, (what, size, t) in {name: m.groups() for name in sorted(field) if (m := GRID.fullmatch(name))}.items():
        tempered = logp / float(t)
        if what == "lse" and t != "1":
            found[f"t={t}"] = tempered - field[name]
        elif what == "topk_lse" and "rank" in field:
            found[f"k={size},t={t}"] = np.where(field["rank"] < int(size), tempered - field[name], -np.inf)
        elif what == "cum_above" and {f"nucleus_p{size}_t{t}", f"lse_t{t}"} <= set(field):
            mass = np.maximum(field[f"nucleus_p{size}_t{t}"], np.finfo(np.float32).tiny)
            inside = tempered - field[f"lse_t{t}"] - np.log(mass)
            found[f"p={size},t={t}"] = np.where(field[name] < float(size), inside, -np.inf)
    return found


def default_cuts(ids: np.ndarray, lengths: np.ndarray, bos: str = "none") -> tuple[Cut, ...]:
    """Suffixes of 10, 20, 32, 50 tokens after the prompt, or after 50 tokens of a plain text.

    ids [n], lengths [n]: scored tokens, EOS not counted.  Cuts that no example is long enough for are left out.
    """
    prefix = TEXT_PREFIX if is_text(ids).mean() > 0.5 else 0
    cuts = [Cut(prefix, suffix) for suffix in SUFFIXES]
    return tuple(cut for cut in cuts if (lengths >= given(ids, cut, bos) + cut.suffix).any())


class Memorized:
    """The extractions of a study, made when asked for.  A table is read once, for all cuts together.

    cuts: from short to long suffixes.  main: the cut of the first pages, the longest that leaves a quarter of the
    private examples whole (else the shortest).  Where a verdict hangs on a near tie and the run has continued the
    prefix itself, what it generated is the verdict.
    """

    def __init__(self, study: Study, cuts: Sequence[tuple[int, int]] = ()):
        """Raises ValueError for a cut longer than every text, or one without a suffix."""
        self.study = study
        self._passed: dict[tuple[str, int, str], dict[Cut, Extraction]] = {}
        self._made: dict[tuple[str, int, str], dict[Cut, Extraction]] = {}
        self._failed: dict[tuple[str, int, str], str] = {}
        ids, lengths, bos = _longest(study)
        chosen = sorted((Cut(*cut) for cut in cuts), key=lambda cut: (cut.suffix, cut.prefix))
        for cut in chosen:
            if cut.prefix < 0 or cut.suffix < 1:
                raise ValueError(
                    f"the cut ({cut.prefix}, {cut.suffix}) needs a prefix of 0 or more, a suffix of 1 or more"
                )
            if len(ids) and not (lengths >= given(ids, cut, bos) + cut.suffix).any():
                longest = int((lengths + (is_text(ids) & (bos == "none"))).max())
                raise ValueError(f"the cut {cut} is longer than every text: the longest has {longest} tokens")
        self.cuts = tuple(chosen) or (default_cuts(ids, lengths, bos) if len(ids) else ())
        whole = [cut for cut in self.cuts if (lengths >= given(ids, cut, bos) + cut.suffix).mean() >= ENOUGH]
        self._main = whole[-1] if whole else self.cuts[0] if self.cuts else None

    @property
    def main(self) -> Cut:
        """Raises Unresolved where no text is long enough for any cut."""
        if self._main is None:
            raise Unresolved(f"no text has {SUFFIXES[0]} tokens after its prefix: nothing to extract")
        return self._main

    def roles(self, run: str, seed: int) -> list[str]:
        """Of private, heldout and canary those that the run's seed was scored on."""
        return [role for role in ROLES if role in self.study.tables[run, seed].files]

    def of(self, run: str, seed: int, role: str, cut: Cut) -> Extraction:
        """Raises Unresolved where the table is not there, or lacks a column; TableError where it cannot be read."""
        return self._find(self._made, (run, seed, role), cut)

    def one_pass(self, run: str, seed: int, role: str, cut: Cut) -> Extraction:
        """The same as the scoring pass alone says."""
        return self._find(self._passed, (run, seed, role), cut)

    def _find(self, shelf: dict, key: tuple[str, int, str], cut: Cut) -> Extraction:
        if key not in self._made and key not in self._failed:
            try:
                self._extract(key)
            except Unresolved as why:
                self._failed[key] = str(why)
        if key in self._failed:
            raise Unresolved(self._failed[key])
        if cut not in shelf[key]:
            raise Unresolved(f"{cut} is none of the cuts {'; '.join(map(str, self.cuts))}")
        return shelf[key][cut]

    def _extract(self, key: tuple[str, int, str]) -> None:
        run, seed, role = key
        table = self.study.tables.get((run, seed))
        if table is None or role not in table.files:
            raise Unresolved(f"{run}/seed{seed} was not scored on role '{role}'")
        tokens = load(table, role)
        passed = {cut: extract(tokens, cut, run, seed, role, bos_of(table)) for cut in self.cuts}
        close = any(found.near_tie.any() for found in passed.values())
        continued = read_continued(table, role) if close else None
        self._passed[key] = passed
        self._made[key] = passed
        if continued is not None:
            self._made[key] = {cut: settled(found, continued) for cut, found in passed.items()}


def settled(found: Extraction, continued: pd.DataFrame) -> Extraction:
    """The extraction with the generated verdict where the one of the pass hangs on a near tie; see `read_continued`.

    Raises TableError where the continuations belong to other tokens.
    """
    matched, known = generated_match(found, continued)
    return replace(found, matched=np.where(found.near_tie & known, matched, found.matched))


def generated_match(found: Extraction, continued: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Leading tokens of the window that greedy generation got right [n], and of which examples that is known, bool [n].

    Raises TableError where the continuations belong to other tokens.
    """
    matched, known = np.zeros(len(found.ids), int), np.zeros(len(found.ids), bool)
    rows = continued[(continued.decoding == "greedy") & (continued.prefix == found.cut.prefix)]
    rows = rows[rows.suffix >= found.cut.suffix].sort_values("suffix").drop_duplicates("example_id")
    at = pd.Index(found.ids).get_indexer(rows.example_id.astype(str))
    rows, at = rows[at >= 0], at[at >= 0]
    if not len(rows):
        return matched, known
    target, generated = (padded(rows[name], found.cut.suffix, fill) for name, fill in PADS.items())
    if (wrong := (target >= 0).sum(axis=1) != found.window[at]).any():
        raise TableError(
            f"{found.run}/seed{found.seed}: {wrong.sum()} continuations of role '{found.role}' have other true tokens "
            f"than the score table at {found.cut}; run the score stage again"
        )
    matched[at] = np.cumprod(target == generated, axis=1).sum(axis=1)
    known[at] = True
    return matched, known


def padded(lists: pd.Series, size: int, fill: int) -> np.ndarray:
    """The first `size` ids of each list, int64 [n, size], shorter ones filled up."""
    found = np.full((len(lists), size), fill)
    lengths = np.minimum(lists.map(len).to_numpy(int), size)
    if lengths.any():
        found[np.arange(size) < lengths[:, None]] = np.concatenate([ids[:size] for ids in lists])
    return found


def load(table: ScoreTable, role: str) -> Tokens:
    """One role with the columns that extraction reads, as far as the table has them."""
    return table.load(role, {*FIELDS, *filter(GRID.fullmatch, table.columns)})


def bos_of(table: ScoreTable) -> str:
    """What the table's texts begin with; "none" where it is not known."""
    return table.provenance.get("bos") or "none"


# --- windows of flat arrays ------------------------------------------------------------------------------------------


def _longest(study: Study) -> tuple[np.ndarray, np.ndarray, str]:
    """Ids, scored tokens without EOS and BOS policy of the private examples of the first run that has some."""
    for table in study.tables.values():
        if table.files.get("private"):
            tokens = table.load("private", ()).select([SEGMENTS["response"]])
            return tokens.ids, tokens.lengths, bos_of(table)
    return np.array([], str), np.array([], int), "none"


def _window(tokens: Tokens, skip: np.ndarray, window: np.ndarray) -> Tokens:
    """Of every example the `window` tokens after `skip` leading ones."""
    place = np.arange(len(tokens.owner)) - tokens.offsets[:-1][tokens.owner]
    keep = (place >= skip[tokens.owner]) & (place < (skip + window)[tokens.owner])
    offsets = np.concatenate([[0], np.cumsum(window)])
    return Tokens(tokens.ids, tokens.task, offsets, {k: v[keep] for k, v in tokens.token.items()}, tokens.example)


def _before(flags: np.ndarray, part: Tokens) -> np.ndarray:
    """How many flags are set before each token in its own example."""
    counts = np.concatenate([[0], np.cumsum(flags)])
    return counts[:-1] - counts[part.offsets[:-1]][part.owner]


def _least(part: Tokens, considered: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Least top2_gap over the considered tokens [n]; NaN for an empty window and where the column is missing."""
    found = np.full(len(window), np.nan)
    if "top2_gap" in part.token and (window > 0).any():
        values = np.where(considered, part.token["top2_gap"], np.inf)
        found[window > 0] = np.minimum.reduceat(values, part.offsets[:-1][window > 0])
    return found


def _per_window(sums: np.ndarray | float, window: np.ndarray) -> np.ndarray:
    """Means of so many tokens; NaN of none."""
    return np.where(window > 0, sums / np.maximum(window, 1), np.nan)
