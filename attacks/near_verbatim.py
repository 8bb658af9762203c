"""How close what a model really generates comes to the true continuation; rows of memorization.csv.

Read are the tables of continuations (`tables.read_continued`): an even sample of every role, and near ties besides,
which count in `near_tie_recheck` alone.  All is on token ids, an EOS being one of them; only examples with a whole
suffix count, except in the measures over positions.

  greedy_recheck@..    share of the one-pass verdicts that generation confirms; `near_tie_recheck@..`: of the close ones
  generated_matched@.. mean of leading tokens right
  positional@..        mean share of the first 32 tokens that are right where they stand, of those that there are
  positional_reference@..;zhang2025  the same under that paper's decoding, always over 32: short answers lose
                       (memorization.md 2.1)
  edit_distance@.. near_verbatim@..  mean Levenshtein distance by the suffix's length; share of at most 0.1
  bleu@.. bleu_above_0.75@..         mean BLEU-4 of single texts, share above 0.75 (sacrebleu on ids as words, without
                       smoothing: 0 where no 4-gram is in common)
  rouge_l@.. longest_common_substring@..  mean F1 of the longest common subsequence; mean tokens of the substring
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from rapidfuzz.distance import LCSseq, Levenshtein
from sacrebleu.metrics import BLEU

from attacks.cuts import PADS, Cut, Extraction, Memorized, generated_match, padded
from attacks.measures import Sample, measure_rows
from attacks.study import Study, Unresolved
from attacks.tables import read_continued

COMPARED = 32  # positions of zhang2025
CLOSE, SIMILAR = 0.1, 0.75
ROLES = ("private", "heldout")


def near_verbatim_rows(study: Study, memorized: Memorized) -> list[dict]:
    """Rows for every run that has continued prefixes. Raises TableError on continuations that cannot be read."""
    rows = []
    for run in study.runs:
        found: dict[str, dict[str, dict[int, Sample]]] = {}
        for seed in study.seeds(run):
            for role in (role for role in memorized.roles(run, seed) if role in ROLES):
                continued = read_continued(study.tables[run, seed], role)
                try:
                    samples = {} if continued is None else _samples(memorized, (run, seed, role), continued)
                except Unresolved:
                    continue  # a table without the columns: the rows of extraction say so
                for measure, sample in samples.items():
                    found.setdefault(measure, {}).setdefault(role, {})[seed] = sample
        for measure, by_role in found.items():
            rows += _rows(study, run, measure, by_role)
    _note_near_ties(study, memorized)
    return rows


def _rows(study: Study, run: str, measure: str, by_role: dict[str, dict[int, Sample]]) -> Iterator[dict]:
    """A measure that no example of a role has is left out: few are continued."""
    found = measure_rows(study, run, measure, by_role, gaps="recheck" not in measure)
    return (row for row in found if "reason" not in row)


def _samples(memorized: Memorized, key: tuple[str, int, str], continued: pd.DataFrame) -> dict[str, Sample]:
    found: dict[str, Sample] = {}
    for cut in memorized.cuts:
        found |= _recheck(memorized.one_pass(*key, cut), continued)
    drawn = continued[continued["drawn"].to_numpy(bool)]
    for prefix in dict.fromkeys(cut.prefix for cut in memorized.cuts):
        after = next(cut for cut in memorized.cuts if cut.prefix == prefix)
        base = memorized.one_pass(*key, after)
        for decoding, rows in drawn[drawn.prefix == prefix].groupby("decoding"):
            longest = Cut(prefix, int(rows.suffix.max()))
            found |= _positional(base, rows[rows.suffix == longest.suffix], longest, str(decoding))
            for cut in dict.fromkeys((memorized.main, longest)) if decoding == "greedy" else ():
                found |= _similarity(base, rows[(rows.prefix == cut.prefix) & (rows.suffix == cut.suffix)], cut)
    return found


# --- the verdict of the pass, against generation ---------------------------------------------------------------------


def _recheck(passed: Extraction, continued: pd.DataFrame) -> dict[str, Sample]:
    matched, known = generated_match(passed, continued)
    agree = (matched == passed.window) == passed.extracted
    full = known & passed.full
    even = continued[continued["drawn"].to_numpy(bool) & (continued.prefix == passed.cut.prefix)]
    return {
        f"greedy_recheck@{passed.cut}": Sample(passed.ids, agree, full & np.isin(passed.ids, even.example_id)),
        f"near_tie_recheck@{passed.cut}": Sample(passed.ids, agree, full & passed.near_tie),
    }


def _note_near_ties(study: Study, memorized: Memorized) -> None:
    """How many verdicts at the main cut hung on a near tie, and what became of them."""
    close = settled = turned = 0
    for run, seed in study.tables if memorized.cuts else ():
        for role in memorized.roles(run, seed):
            try:
                before, after = (each(run, seed, role, memorized.main) for each in (memorized.one_pass, memorized.of))
                continued = read_continued(study.tables[run, seed], role)
            except Unresolved:
                continue
            near = before.near_tie & before.full
            close += int(near.sum())
            if near.any() and continued is not None:
                settled += int((near & generated_match(before, continued)[1]).sum())
            turned += int((near & (before.extracted != after.extracted)).sum())
    if close:
        study.note(
            f"extraction: {close} verdicts at {memorized.main} hang on two tokens of nearly equal logits; {settled} of "
            f"them were settled by the model's own greedy generation, which turned {turned} around."
        )


# --- what was generated, against what was true -----------------------------------------------------------------------


def _positional(base: Extraction, rows: pd.DataFrame, cut: Cut, decoding: str) -> dict[str, Sample]:
    """Right tokens among the first COMPARED, where the generation is as long as that."""
    if cut.suffix < COMPARED:
        return {}
    target, generated = (padded(rows[name], COMPARED, fill) for name, fill in PADS.items())
    right = (target == generated).sum(axis=1)
    name = f"@{Cut(cut.prefix, COMPARED)}"
    if decoding != "greedy":
        return {f"positional_reference{name};{decoding}": _placed(base, rows, right / COMPARED)}
    valid = (target >= 0).sum(axis=1)
    return {f"positional{name}": _placed(base, rows, right / np.maximum(valid, 1), valid > 0)}


def _similarity(base: Extraction, rows: pd.DataFrame, cut: Cut) -> dict[str, Sample]:
    full = np.array([len(ids) == cut.suffix for ids in rows.target_ids], bool) & _is_full(base, rows, cut)
    rows = rows[full]
    target, generated = (padded(rows[name], cut.suffix, fill) for name, fill in PADS.items())
    pairs = [(list(made), list(true)) for made, true in zip(rows.generated_ids, rows.target_ids, strict=True)]
    distance = np.array([Levenshtein.distance(made, true) for made, true in pairs]) / cut.suffix
    bleu = bleu_scores(pairs)
    values = {
        "generated_matched": np.cumprod(target == generated, axis=1).sum(axis=1),
        "edit_distance": distance,
        "near_verbatim": distance <= CLOSE,
        "bleu": bleu,
        f"bleu_above_{SIMILAR:g}": bleu > SIMILAR,
        "rouge_l": np.array([rouge_l(made, true) for made, true in pairs]),
        "longest_common_substring": longest_common_substring(generated, target),
    }
    bounds = dict.fromkeys(("generated_matched", "longest_common_substring"), (0, cut.suffix))
    return {
        f"{name}@{cut}": _placed(base, rows, value, bounds=bounds.get(name, (0, 1))) for name, value in values.items()
    }


def bleu_scores(pairs: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """BLEU-4 in [0, 1] of each (generated, true) ids, brevity penalty included, no smoothing [n]."""
    metric = BLEU(tokenize="none", smooth_method="none", effective_order=True)
    words = lambda ids: " ".join(map(str, ids))
    return np.array([metric.sentence_score(words(made), [words(true)]).score / 100 for made, true in pairs])


def rouge_l(generated: list[int], target: list[int]) -> float:
    """F1 of the longest common subsequence; 0 where nothing was generated."""
    common = LCSseq.similarity(generated, target)
    return 2 * common / (len(generated) + len(target)) if common else 0.0


def longest_common_substring(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Tokens of the longest run that both have, row by row of ids [n, k] and [n, m], padded with different numbers."""
    ending, longest = np.zeros((len(a), b.shape[1] + 1), int), np.zeros(len(a), int)
    for column in a.T:  # run lengths that end at this token of a and at each of b
        ending[:, 1:] = np.where(column[:, None] == b, ending[:, :-1] + 1, 0)
        longest = np.maximum(longest, ending.max(axis=1))
    return longest


def _is_full(base: Extraction, rows: pd.DataFrame, cut: Cut) -> np.ndarray:
    """Has the response as many tokens after the prefix, EOS not counted? bool by row."""
    return base.length[pd.Index(base.ids).get_indexer(rows.example_id.astype(str))] >= cut.suffix


def _placed(
    base: Extraction, rows: pd.DataFrame, values: np.ndarray, among: np.ndarray | None = None, bounds=(0.0, 1.0)
) -> Sample:
    """A sample over all examples of the role, so that seeds with other continued examples can stand side by side."""
    at = pd.Index(base.ids).get_indexer(rows.example_id.astype(str))
    placed, known = np.zeros(len(base.ids), values.dtype), np.zeros(len(base.ids), bool)
    placed[at], known[at] = values, True if among is None else among
    return Sample(base.ids, placed, known, bounds)
