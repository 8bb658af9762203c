"""What is known of a training example before a student is distilled on it, and what the student then makes of it.

borkar2026 2.6: bytes of the compressed text, perplexity of the teacher and of the baseline (`direct`), and
KL(teacher || baseline) per token at T = 1.  All are of the whole scored text (a response, or a plain text), prefix and
suffix alike; the paper does not say which span it takes.  Bytes are those of zlib at level 6.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from attacks.cuts import Extraction, Memorized
from attacks.membership import same_tokens
from attacks.memorization import repeats_of
from attacks.overlap import BASELINE, beside, kept, matched_share, whole
from attacks.signals import loss, segment_mean
from attacks.study import Study, Unresolved
from attacks.tables import SEGMENTS, Tokens

ROLE = "private"
PAPER = ("zlib_bytes", "teacher_ppl", "baseline_ppl", "kl")
TEACHER_ONLY = ("zlib_bytes", "teacher_ppl")
# Beyond the paper; where a table lacks what one is made of, it is left out.
MORE = {  # +1: the greater, the more at risk
    "zlib_ratio": -1,  # compressed bytes by bytes
    "tokens": -1,
    "teacher_entropy": -1,
    "teacher_rank": -1,  # mean of log(1 + rank) of the true tokens
    "teacher_matched": 1,  # share of the suffix that greedy decoding gets right before its first miss
    "teacher_log_p": 1,  # log-probability of the suffix
    "start_matched": 1,  # the same of the model that the student starts from
    "start_log_p": 1,
    "repeats": 1,  # how often the example is trained on
}
RISK = dict.fromkeys(PAPER, -1) | MORE
COLUMNS = ("logp", "entropy", "rank", "target_id", "zlib_bytes", "n_bytes", "kl_ab")
MOST_NATS = 50.0  # per token; above, a perplexity says nothing more and overflows


@dataclass(frozen=True)
class Candidates:
    """The private examples of one student's seed whose suffix is whole; arrays [n] in the order of their ids.

    memorized: bool, by the student at the main cut.  values: features by name.  clusters: codes of examples that belong
    together, None where each is its own.  half: bool, by a hash of that group: the same for all seeds and students.
    """

    ids: np.ndarray
    memorized: np.ndarray
    values: dict[str, np.ndarray]
    clusters: np.ndarray | None
    half: np.ndarray

    def matrix(self, names: tuple[str, ...]) -> np.ndarray:
        """The features in this order [n, F]."""
        return np.stack([self.values[name] for name in names], axis=1)

    @property
    def groups(self) -> np.ndarray:
        """Codes of what is split and resampled as one [n]."""
        return np.arange(len(self.ids)) if self.clusters is None else self.clusters


def sets(found: Candidates) -> dict[str, tuple[str, ...]]:
    """The sets of features that classifiers are given, by name."""
    more = tuple(name for name in MORE if name in found.values)
    return {"paper": PAPER, "teacher_only": TEACHER_ONLY, "extended": (*PAPER, *more)}


def candidates(study: Study, memorized: Memorized, student: str, seed: int) -> Candidates:
    """Read the tables of teacher, baseline and their pair. Raises Unresolved with what is missing."""
    teacher = study.provenance(student).get("teacher")
    if not teacher or teacher not in study.runs or BASELINE not in study.runs:
        raise Unresolved(f"prediction needs scores of {student}'s teacher and of a run '{BASELINE}'")
    own, of_teacher = beside(study, memorized, (student, teacher), seed, ROLE, memorized.main)
    full = whole(own)
    runs = {"teacher": teacher, "baseline": BASELINE}
    tables = {name: study.tables[run, _seed(study, run, seed)] for name, run in runs.items()}
    pair = tables["baseline"].variants.get(f"pair:{teacher}")
    if pair is None:
        raise Unresolved(f"no pair table of {teacher} and {BASELINE} (score.pairs = ('{teacher}:{BASELINE}',))")
    read = {name: _response(table.load(ROLE, COLUMNS)) for name, table in (tables | {"pair": pair}).items()}
    for name, tokens in read.items():
        if not same_tokens(tokens, read["teacher"]) or not np.array_equal(tokens.ids, own.ids):
            raise Unresolved(f"the {name} was scored on other examples or tokens than {teacher} and {student}")
    values = dict(_values(read["teacher"], read["baseline"], read["pair"])) | _of_suffix("teacher", of_teacher)
    values |= _of_start(study, memorized, student, seed, own)
    if np.ptp(repeats := repeats_of(study, own.ids)):
        values["repeats"] = repeats
    if wrong := sorted(name for name, x in values.items() if not np.isfinite(x[full]).all()):
        raise Unresolved(f"features that are not numbers: {', '.join(wrong)}; a model may have diverged")
    names = study.group_names(own.ids)
    return Candidates(
        own.ids[full],
        kept(own)[full],
        {name: np.asarray(x[full], np.float64) for name, x in values.items()},
        study.clusters(own.ids[full]),
        hashed("half", names[full]) % 2 == 1,
    )


def hashed(purpose: str, names: np.ndarray) -> np.ndarray:
    """A number for each name that depends on nothing else, uint64 [n]."""
    return pd.util.hash_array(np.char.add(f"{purpose} ", names.astype(str)).astype(object), categorize=False)


def _seed(study: Study, run: str, seed: int) -> int:
    own = study.match(run, seed)
    if own is None:
        raise Unresolved(f"{run} has no seed {seed}")
    return own


def _response(tokens: Tokens) -> Tokens:
    return tokens.select([SEGMENTS["response"]])


def _values(teacher: Tokens, baseline: Tokens, pair: Tokens) -> Iterator[tuple[str, np.ndarray]]:
    if "zlib_bytes" not in teacher.example:
        raise Unresolved("prediction needs zlib_bytes, which the score tables do not have")
    size = teacher.example["zlib_bytes"].astype(np.float64)
    yield "zlib_bytes", size
    yield "teacher_ppl", _perplexity(teacher)
    yield "baseline_ppl", _perplexity(baseline)
    yield "kl", segment_mean(pair.token["kl_ab"], pair)
    yield "tokens", teacher.lengths
    if "n_bytes" in teacher.example:
        yield "zlib_ratio", size / np.maximum(teacher.example["n_bytes"], 1)
    if "entropy" in teacher.token:
        yield "teacher_entropy", segment_mean(teacher.token["entropy"], teacher)
    if "rank" in teacher.token:
        yield "teacher_rank", segment_mean(np.log1p(teacher.token["rank"]), teacher)


def _perplexity(tokens: Tokens) -> np.ndarray:
    return np.exp(np.minimum(-loss(tokens), MOST_NATS))


def _of_suffix(whose: str, found: Extraction) -> dict[str, np.ndarray]:
    return {f"{whose}_matched": matched_share(found), f"{whose}_log_p": found.log_p["t=1"]}


def _of_start(study: Study, memorized: Memorized, student: str, seed: int, own: Extraction) -> dict[str, np.ndarray]:
    start = study.provenance(student).get("init")
    if start not in study.runs:
        return {}
    try:
        return _of_suffix("start", beside(study, memorized, (student, start), seed, ROLE, own.cut)[1])
    except Unresolved:
        return {}
