"""Generated continuations against the true ones: each measure by hand, and verdicts that generation settles."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attacks.cuts import Cut, Memorized
from attacks.memorization import memorization_rows
from attacks.near_verbatim import bleu_scores, longest_common_substring, near_verbatim_rows, rouge_l
from attacks.tables import TableError
from tests.planted_memorization import Planted, chosen

SUFFIX = 32


def target_of(world: Planted, role: str, name: str) -> list[int]:
    made = world.roles[role]
    starts = np.cumsum(made["lengths"] + 1) - made["lengths"] - 1
    i = made["ids"].tolist().index(name)
    return made["targets"][starts[i] : starts[i] + made["lengths"][i] + 1].tolist()


def save(world: Planted, run: str, role: str, rows: list[dict], seed: int = 0) -> None:
    world.put(pa.Table.from_pylist(rows), run, seed, role, "continued")


# --- single measures, by hand ----------------------------------------------------------------------------------------


def test_longest_common_substring():
    a = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [7, 7, 7, -2, -2]])
    b = np.array([[9, 2, 3, 4, 9], [5, 4, 3, 2, 1], [7, 7, 1, 7, -1]])
    assert longest_common_substring(a, b).tolist() == [3, 1, 2]
    rng = np.random.default_rng(0)
    x, y = rng.integers(3, size=(40, 12)), rng.integers(3, size=(40, 12))
    runs = lambda row: {tuple(row[i:j]) for i in range(12) for j in range(i + 1, 13)}
    naive = [max(map(len, runs(p) & runs(q)), default=0) for p, q in zip(x.tolist(), y.tolist(), strict=True)]
    assert longest_common_substring(x, y).tolist() == naive


def test_rouge_l_and_bleu(check):
    assert rouge_l([1, 2, 3, 4], [1, 3, 4, 9, 9, 9]) == pytest.approx(2 * 0.75 * 0.5 / (0.75 + 0.5))
    assert rouge_l([], [1]) == 0 and rouge_l([5], [6]) == 0
    true = list(range(100, 112))
    one_wrong = [*true[:11], 5]
    by_hand = np.prod([11 / 12, 10 / 11, 9 / 10, 8 / 9]) ** 0.25
    found = bleu_scores([(true, true), (one_wrong, true), (true[:6], true), ([], true), (true[::-1], true)])
    expected = [1, by_hand, np.exp(1 - 12 / 6), 0, 0]  # brevity; no 2-gram in common
    check("near-verbatim: BLEU by hand", np.abs(found - expected).max(), 1e-9)


# --- a study whose generations are known -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The teacher generates members of 64 repeats verbatim, those of 4 with one token wrong, all others wrong."""
    world = Planted(tmp_path_factory.mktemp("scores"), n=90, lengths=(34, 50))
    world.roles.pop("canary")
    world.write("teacher", luck=0.4, knows={"private": 64}, train_roles=["private"])
    for role, made in world.roles.items():
        generated, reference = {}, {}
        for name, times in zip(made["ids"], made["repeats"], strict=True):
            true = target_of(world, role, name)[:SUFFIX]
            wrong = [x + 1000 for x in true]
            said = true if times == 64 else [*true[:31], 999] if times == 4 else [*true[:5], *wrong[5:]]
            generated[name] = said if role == "private" else wrong
            reference[name] = [*generated[name][:16], *wrong[16:]]
        rows = world.continued_rows(role, generated, SUFFIX)
        save(world, "teacher", role, rows + world.continued_rows(role, reference, SUFFIX, "zhang2025"))
    study = world.study()
    return world, near_verbatim_rows(study, Memorized(study, [(0, 10), (0, 32)]))


def test_measures_of_known_generations(planted):
    _, rows = planted
    at = {"task": "all", "seed": 0}
    value = lambda name, role="private": chosen(rows, **at, measure=name, role=role)["value"]
    assert value("generated_matched@k=32") == pytest.approx((32 + 31 + 5) / 3)
    assert value("edit_distance@k=32") == pytest.approx((0 + 1 / 32 + 27 / 32) / 3)
    assert value("near_verbatim@k=32") == pytest.approx(2 / 3) and value("near_verbatim@k=32", "heldout") == 0
    assert value("longest_common_substring@k=32") == pytest.approx((32 + 31 + 5) / 3)
    assert value("rouge_l@k=32") == pytest.approx((1 + 31 / 32 + 5 / 32) / 3)
    assert value("bleu_above_0.75@k=32") == pytest.approx(2 / 3) and value("bleu@k=32", "heldout") == 0
    assert value("positional@k=32") == pytest.approx((32 + 31 + 5) / 96)
    assert value("positional_reference@k=32;zhang2025") == pytest.approx((16 + 16 + 5) / 96)
    gap = chosen(rows, **at, measure="near_verbatim@k=32", role="private-heldout")
    assert gap["ci_low"] > 0.4 and gap["n"] == 180


def test_recheck_counts_verdicts_that_generation_confirms(planted):
    _, rows = planted
    recheck = chosen(rows, measure="greedy_recheck@k=32", role="private")
    assert (recheck["value"], recheck["n"]) == (1, 90)
    assert chosen(rows, measure="greedy_recheck@k=10", role="private")["value"] == pytest.approx(2 / 3)  # 31 are right
    assert not [row for row in rows if row["measure"].startswith("near_tie_recheck")]  # no near tie
    assert not [row for row in rows if "recheck" in row["measure"] and row["role"] == "private-heldout"]


def test_short_responses_are_judged_over_what_they_have(tmp_path):
    """Positions: over the tokens that there are, or always over 32; other measures leave short ones out."""
    world = Planted(tmp_path, n=12, lengths=(7, 8))
    world.roles = {"private": world.roles["private"]}
    world.write("teacher", luck=1.0)
    said = {name: target_of(world, "private", name) for name in world.roles["private"]["ids"]}
    rows = world.continued_rows("private", said, SUFFIX)
    save(world, "teacher", "private", rows + world.continued_rows("private", said, SUFFIX, "zhang2025"))
    study = world.study()
    found = near_verbatim_rows(study, Memorized(study, [(0, 7)]))
    assert chosen(found, measure="positional@k=32")["value"] == 1
    assert chosen(found, measure="positional_reference@k=32;zhang2025")["value"] == pytest.approx(8 / 32)
    assert not [row for row in found if row["measure"].startswith(("edit_distance", "bleu", "rouge"))]


# --- near ties -------------------------------------------------------------------------------------------------------


def tied(tmp_path, said: dict[str, bool], target_shift: int = 0):
    """Four responses that the pass calls extracted, all on a near tie; of some it is known what is generated."""
    world = Planted(tmp_path, n=4, lengths=(12, 13))
    world.roles = {"private": world.roles["private"]}
    made = world.roles["private"]
    sizes = made["lengths"] + 1
    size = sizes.sum()
    fields = {"target_id": made["targets"], "top1_id": made["targets"], "top2_gap": np.full(size, 1e-5)}
    fields |= {"segment": np.ones(size), "logp": np.full(size, -0.7), "rank": np.zeros(size), "entropy": np.ones(size)}
    fields["segment"][np.cumsum(sizes) - 1] = 2
    world.save("teacher", 0, "private", made["ids"], made["task"], sizes, fields)
    true = {name: target_of(world, "private", name)[:10] for name in said}
    generated = {name: true[name] if right else [*true[name][:3], 999] for name, right in said.items()}
    rows = world.continued_rows("private", generated, 10)
    for row in rows:
        row["target_ids"] = row["target_ids"][target_shift:]
    save(world, "teacher", "private", rows)
    return world.study()


def test_generation_settles_near_ties(tmp_path):
    study = tied(tmp_path, {"private-0000": True, "private-0001": False, "private-0002": False})
    memorized = Memorized(study, [(0, 10)])
    before, after = (each("teacher", 0, "private", Cut(0, 10)) for each in (memorized.one_pass, memorized.of))
    assert before.extracted.all() and before.near_tie.all()
    assert after.extracted.tolist() == [True, False, False, True]  # of the last nothing was generated
    assert after.matched.tolist() == [10, 3, 3, 10]
    rows = memorization_rows(study, memorized)
    assert chosen(rows, measure="extracted@k=10", task="all", role="private")["value"] == 0.5
    assert chosen(rows, measure="near_ties@k=10", task="all", role="private")["value"] == 1
    recheck = chosen(rows, measure="near_tie_recheck@k=10", role="private")
    assert (recheck["value"], recheck["n"]) == (pytest.approx(1 / 3), 3)
    (note,) = study.notes
    assert "4 verdicts" in note and "3 of them were settled" in note and "turned 2 around" in note


def test_what_is_continued_for_its_near_tie_is_in_no_even_sample(tmp_path):
    world = Planted(tmp_path, n=12, lengths=(34, 35))
    world.roles = {"private": world.roles["private"]}
    world.write("teacher", luck=1.0)
    ids = world.roles["private"]["ids"].tolist()
    said = {name: target_of(world, "private", name)[:SUFFIX] for name in ids}
    said |= {name: [999] * SUFFIX for name in ids[:4]}
    save(world, "teacher", "private", world.continued_rows("private", said, SUFFIX, close=tuple(ids[:4])))
    study = world.study()
    rows = near_verbatim_rows(study, Memorized(study, [(0, SUFFIX)]))
    for measure, value in {"greedy_recheck": 1, "generated_matched": SUFFIX, "edit_distance": 0}.items():
        found = chosen(rows, measure=f"{measure}@k={SUFFIX}", task="all", seed=0)
        assert (found["value"], found["n"]) == (value, 8)


def test_verdicts_without_a_near_tie_are_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("attacks.cuts.NEAR_TIE", 1e-9)
    memorized = Memorized(tied(tmp_path, {"private-0000": False}), [(0, 10)])
    assert memorized.of("teacher", 0, "private", Cut(0, 10)).extracted.all()


def test_continuations_of_other_tokens_are_refused(tmp_path):
    memorized = Memorized(tied(tmp_path, {"private-0000": True}, target_shift=2), [(0, 10)])
    with pytest.raises(TableError, match="other true tokens"):
        memorized.of("teacher", 0, "private", Cut(0, 10))


def test_tables_that_cannot_be_read(tmp_path):
    study = tied(tmp_path, {"private-0000": True})
    folder = tmp_path / "teacher" / "seed0" / "continued"
    (folder / "begun").touch()
    with pytest.raises(TableError, match="not finished"):
        near_verbatim_rows(study, Memorized(study, [(0, 10)]))
    (folder / "begun").unlink()
    path = folder / "private-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table]), path)
    with pytest.raises(TableError, match="twice"):
        near_verbatim_rows(study, Memorized(study, [(0, 10)]))
    pq.write_table(table.drop_columns(["generated_ids"]), path)
    with pytest.raises(TableError, match="generated_ids"):
        near_verbatim_rows(study, Memorized(study, [(0, 10)]))
