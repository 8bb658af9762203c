"""Two-hop attacks: does a student copy its teacher's shift on the very tokens of a record (attacks.md 8.3)?

`dS_t = lp_S,t - lp_S0,t` is what training changed in the student against its base, `dT_t` the same of the teacher. The
student of the `disjoint` setting never saw the members: what its shift shares with the teacher's came through the
teacher. The null row is the same score with `null` (same data, no teacher) in the student's place.

Every function takes the Tokens of student, student's base, teacher and teacher's base, of the same examples and tokens,
and returns one score per example [n], higher for what looks more like a member; -inf abstains.  Access: auditor, since
the teacher's log-probabilities are needed.
"""

import numpy as np

from attacks.signals import segment_mean
from attacks.tables import Tokens


def two_hop_covariance(student: Tokens, base_student: Tokens, teacher: Tokens, base_teacher: Tokens) -> np.ndarray:
    """`mean_t (dS_t - mean dS)(dT_t - mean dT)`: higher where both moved on the same tokens. Access: auditor (8.3)."""
    both, *_ = _moments(student, base_student, teacher, base_teacher)
    return both


def two_hop_correlation(student: Tokens, base_student: Tokens, teacher: Tokens, base_teacher: Tokens) -> np.ndarray:
    """Pearson correlation of dS and dT over the tokens; abstains where either does not vary. Access: auditor (8.3)."""
    both, of_student, of_teacher = _moments(student, base_student, teacher, base_teacher)
    spread = np.sqrt(of_student * of_teacher)
    return np.where(spread > 0, both / np.where(spread > 0, spread, 1), -np.inf)


def two_hop_slope(student: Tokens, base_student: Tokens, teacher: Tokens, base_teacher: Tokens) -> np.ndarray:
    """`cov(dS, dT) / var(dT)`: nats of the student per nat of the teacher; abstains where dT does not vary.

    Access: auditor (8.3).
    """
    both, _, of_teacher = _moments(student, base_student, teacher, base_teacher)
    return np.where(of_teacher > 0, both / np.where(of_teacher > 0, of_teacher, 1), -np.inf)


def two_hop_product(student: Tokens, base_student: Tokens, teacher: Tokens, base_teacher: Tokens) -> np.ndarray:
    """`mean_t dS_t dT_t`, uncentred: a shift of the whole text counts as well. Access: auditor (8.3)."""
    return segment_mean(_shift(student, base_student) * _shift(teacher, base_teacher), student)


def teacher_shift(student: Tokens, base_student: Tokens, teacher: Tokens, base_teacher: Tokens) -> np.ndarray:
    """`mean_t dT_t`: the teacher's own calibrated score, what the other scores of this file build on.

    The student and its base play no part; they are taken so that all scores here are called alike. Access: auditor.
    """
    return segment_mean(_shift(teacher, base_teacher), teacher)


def teacher_kl(student: Tokens, pair: Tokens) -> np.ndarray:
    """`-mean_t KL(p_T || p_S)` of the pair table: higher where the student follows its teacher.

    Access: auditor (8.3).
    """
    return -segment_mean(pair.token["kl_ab"], pair)


def _shift(tokens: Tokens, base: Tokens) -> np.ndarray:
    return tokens.token["logp"].astype(np.float64) - base.token["logp"]


def _moments(*models: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariance of dS and dT over the tokens of each example, variance of dS, variance of dT: [n] each (divided by T).

    What is smaller than the rounding of float32 log-probabilities counts as no variance.
    """
    student, base_student, teacher, base_teacher = models

    def centred(shift: np.ndarray) -> np.ndarray:
        return shift - segment_mean(shift, student)[student.owner]

    of_student, of_teacher = centred(_shift(student, base_student)), centred(_shift(teacher, base_teacher))
    both, s, t = (
        segment_mean(a * b, student)
        for a, b in ((of_student, of_teacher), (of_student, of_student), (of_teacher, of_teacher))
    )
    return both, np.where(s > ROUNDING, s, 0), np.where(t > ROUNDING, t, 0)


ROUNDING = 1e-12  # squared nats
