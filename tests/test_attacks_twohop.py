"""Two-hop attacks: hand numbers, a student that copies its teacher's shift, one that does not, the null row."""

import numpy as np
import pytest
from planted_couples import with_columns
from planted_scores import QUICK, World

from attacks import audit, twohop
from attacks.scoring import load_study
from attacks.statistics import delong
from attacks.tables import Tokens

SCORES = ("two_hop_covariance", "two_hop_correlation", "two_hop_slope", "two_hop_product")


def tokens(logp, lengths) -> Tokens:
    n, offsets = len(lengths), np.concatenate([[0], np.cumsum(lengths)])
    token = {"logp": np.asarray(logp, np.float32)}
    return Tokens(np.array([f"e{i}" for i in range(n)]), np.full(n, "t"), offsets, token, {})


def test_by_hand():
    """dS = [1, 2, 3], dT = [2, 2, 5]; the second example has no variance, the third one token."""
    lengths, zero = [3, 2, 1], tokens([-9] * 6, [3, 2, 1])
    student, teacher = tokens([-8, -7, -6, -8, -8, -5], lengths), tokens([-7, -7, -4, -7, -8, -5], lengths)
    score = lambda name: getattr(twohop, name)(student, zero, teacher, zero)
    np.testing.assert_allclose(score("two_hop_covariance"), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(score("two_hop_product"), [(2 + 4 + 15) / 3, 1.5, 16])
    np.testing.assert_allclose(score("two_hop_correlation"), [1 / np.sqrt(2 / 3 * 2), -np.inf, -np.inf])
    np.testing.assert_allclose(score("two_hop_slope"), [0.5, 0, -np.inf], atol=1e-12)
    np.testing.assert_allclose(score("teacher_shift"), [3, 1.5, 4])
    pair = Tokens(student.ids, student.task, student.offsets, {"kl_ab": np.float32([1, 2, 3, 0, 1, 4])}, {})
    np.testing.assert_allclose(twohop.teacher_kl(student, pair), [-2, -0.5, -4])


def models(rng, copied: float, n=300):
    """Members, then non-members, 12 to 40 tokens. A member's teacher moves by itself; the student copies a part."""
    lengths = rng.integers(12, 40, 2 * n)
    member = np.repeat(np.arange(2 * n) < n, lengths)
    hard = -rng.gamma(2, 1, lengths.sum()) - 3
    noise = lambda size: size * rng.normal(size=len(hard))
    moved = np.where(member, rng.gamma(1, 0.6, len(hard)), 0)
    student, teacher = hard + copied * moved + noise(0.2), hard + moved + noise(0.2)
    return [tokens(x, lengths) for x in (student, hard, teacher, hard)], n


@pytest.mark.parametrize("name", SCORES)
def test_a_student_that_copies_the_shift_is_found_and_an_independent_one_is_not(name):
    found = {}
    for copied in (0.5, 0.0):
        given, n = models(np.random.default_rng(3), copied)
        scores = getattr(twohop, name)(*given)
        found[copied] = delong(scores[:n], scores[n:])
    assert found[0.5].value > 0.9
    assert found[0.0].low <= 0.5 <= found[0.0].high


def test_in_an_audit_with_the_null_in_the_students_place(tmp_path):
    """From tables: the student copies its teacher's shift on members; null and base, trained on others, do not."""
    world = World(tmp_path, {"private": 150, "heldout": 150, "dev": 20}, seed=1)
    flat = {}
    for role in world.roles:
        plain = world.table(role, 0.0, 0.0)
        logp = plain["logp"].combine_chunks().flatten().to_numpy() - 2.0
        moved = world.rng.gamma(1, 0.6, len(logp)) * (role == "private")
        other = [logp + 0.1 * world.rng.normal(size=len(logp)) for _ in range(3)]
        flat[role] = (
            plain,
            {
                "base_student": logp,
                "base_teacher": logp,
                "teacher": other[0] + moved,
                "students/kd": other[1] + 0.5 * moved,
                "null": other[2],
            },
        )
    told = {
        "base_student": {"init": None, "train_roles": []},
        "base_teacher": {"init": None, "train_roles": []},
        "teacher": {"init": "base_teacher", "train_roles": ["private"]},
        "students/kd": {"teacher": "teacher", "technique": "kd", "setting": "disjoint"},
        "null": {},
    }
    for role, (plain, columns) in flat.items():
        for run, logp in columns.items():
            world.save(with_columns(plain, logp=logp), run, role, **told[run])
    settings = audit.complete(QUICK | {"attacks": [*SCORES, "teacher_shift"]}, tmp_path)
    study = load_study(tmp_path, settings)
    auc = lambda run, attack: study.pairs(run, 0, attack, "private-heldout")[0].auc
    for attack in SCORES:
        assert auc("students/kd", attack).value > 0.9, attack
        null = auc("null", attack)
        assert abs(null.value - 0.5) < 3 * np.sqrt(null.variance()), attack
    assert auc("students/kd", "teacher_shift").value > 0.9
    assert "two_hop_slope" not in study.attacks("base_student") + study.attacks("teacher")
