"""Which chain is trained on which record: in/out matrices by seeded hash, kept with their hash.

A chain is a teacher and the student that it teaches. The pool is `private` and `heldout`; a record's group (a person, a
passage) is in or out as a whole. scores/shadow/design.parquet has one row per example of the pool: who it is, and for
every chain whether it was in the teacher's and in the student's training data.

full         chain 2i draws a fair coin per group, chain 2i + 1 has the complement; students never see the pool
             (arXiv:2303.03446)
cheap        two complementary teachers, taken in turn by students that differ in their seeds alone
two_by_two   quadruples of teacher's and student's half, (A, B), (A', B), (A, B'), (A', B'), where ' is the complement:
             each record is once in each of the four cells
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kd_jax import processes, storage
from kd_jax.data.records import uniform
from kd_jax.errors import ConfigError
from kd_jax.manifest import StaleWork
from kd_jax.storage import Path

CYCLES = {"full": 2, "cheap": 2, "two_by_two": 4}  # chains that balance one another
COLUMNS = ("example_id", "role", "task", "group")


@dataclasses.dataclass(frozen=True)
class Design:
    """The pool, sorted by example_id, and the half of it that every chain's teacher and student are trained on.

    teacher_in, student_in: bool [chains, n].
    """

    kind: str
    seed: int
    pool: pd.DataFrame  # COLUMNS
    teacher_in: np.ndarray
    student_in: np.ndarray

    @property
    def chains(self) -> int:
        return len(self.teacher_in)

    @property
    def pairs(self) -> np.ndarray:
        """Number of the pair (or quadruple) of each chain, int [chains]: one chain's members tell its partners'."""
        return np.arange(self.chains) // CYCLES[self.kind]

    @property
    def teachers(self) -> np.ndarray:
        """Number of the teacher of each chain, int [chains]."""
        return np.arange(self.chains) % (2 if self.kind == "cheap" else self.chains)

    @functools.cached_property
    def hash(self) -> str:
        """First 16 hex of a sha256 over kind, ids and both matrices."""
        summary = hashlib.sha256("\0".join([self.kind, *self.pool.example_id]).encode())
        for matrix in (self.teacher_in, self.student_in):
            summary.update(f"{matrix.shape}".encode() + np.packbits(matrix).tobytes())
        return summary.hexdigest()[:16]


def draw(kind: str, chains: int, records: pd.DataFrame, seed: int, limit: int = 0) -> Design:
    """Draw the halves of `chains` chains.

    Nothing depends on the order of the records, and one that is added moves no other (but out of a `limit`).

    Args:
        kind: a key of CYCLES.
        records: COLUMNS, the examples of private and heldout.
        limit: examples kept, by seeded hash of their groups; 0 = all.

    Raises:
        ConfigError: unknown design, a number of chains that it cannot balance, too few records.
    """
    if kind not in CYCLES:
        raise ConfigError(f"shadow.design is {kind!r}; known are none, {', '.join(CYCLES)}")
    if chains < 2 * CYCLES[kind] or chains % CYCLES[kind]:
        raise ConfigError(
            f"shadow.chains is {chains}; design {kind} needs a multiple of {CYCLES[kind]}, at least "
            f"{2 * CYCLES[kind]}: those that complete one another are no references for one another"
        )
    if limit < 0:
        raise ConfigError(f"shadow.records must not be negative, got {limit}")
    pool = records[list(COLUMNS)].sort_values("example_id").reset_index(drop=True)
    if limit and limit < len(pool):
        order = np.lexsort((np.arange(len(pool)), uniform(seed, "shadow pool", pool.group)))
        pool = pool.iloc[np.sort(order[:limit])].reset_index(drop=True)
    if pool.group.nunique() < 2:
        raise ConfigError("shadow.design needs at least two groups of records in private and heldout")
    coin = lambda what, number: uniform(seed, f"shadow {what} {number}", pool.group) < 0.5
    none = np.zeros(len(pool), bool)
    teachers, students = [], []
    for number in range(chains // CYCLES[kind]):
        teacher = coin("teacher", 0 if kind == "cheap" else number)
        if kind == "two_by_two":
            student = coin("student", number)
            teachers += [teacher, ~teacher, teacher, ~teacher]
            students += [student, student, ~student, ~student]
        else:
            teachers += [teacher, ~teacher]
            students += [none, none]
    return Design(kind, seed, pool, np.stack(teachers), np.stack(students))


def write(design: Design, path: Path, **metadata) -> None:
    """Keep the design once; a later start must draw the same one.

    metadata: what a reader should know of the chains, JSON values for all but strings.

    Raises StaleWork where `path` holds another design.
    """
    if processes.agree(path.exists()):
        check(design, read(path), path)
        return
    columns = {name: pa.array(design.pool[name].astype(str)) for name in COLUMNS}
    columns |= {f"{who}_in": _lists(getattr(design, f"{who}_in")) for who in ("teacher", "student")}
    known = dict(
        design=design.kind, chains=design.chains, seed=design.seed, hash=design.hash, pairs=design.pairs.tolist()
    )
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (known | metadata).items()}
    processes.once(lambda: storage.write_parquet(path, pa.table(columns), plain), "the shadow design")


def read(path: Path) -> Design:
    """The design kept in `path`. Raises StaleWork where its matrices are not those that its hash was taken of."""
    table = pq.read_table(storage.readable(path))
    metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    matrices = [
        table[f"{who}_in"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1).T
        for who in ("teacher", "student")
    ]
    pool = table.select(list(COLUMNS)).to_pandas()
    found = Design(metadata["design"], int(metadata["seed"]), pool, *(np.ascontiguousarray(m) for m in matrices))
    if found.hash != metadata["hash"]:
        raise StaleWork(f"{path} was changed after it was written: delete {path.parent} to train all chains again")
    return found


def check(design: Design, kept: Design, path: Path) -> None:
    """Raises StaleWork, naming what differs, where the config now asks for another design than the one kept."""
    if design.hash == kept.hash:
        return
    both = {
        "shadow.design": (kept.kind, design.kind),
        "shadow.chains": (kept.chains, design.chains),
        "seed": (kept.seed, design.seed),
        "examples of the pool": (len(kept.pool), len(design.pool)),
    }
    changed = "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in both.items() if old != new)
    raise StaleWork(
        f"the shadow chains in {path.parent} were drawn otherwise: {changed or 'the ids of the pool differ'}. Use "
        "another --workdir, or delete this folder to train them again."
    )


def _lists(matrix: np.ndarray) -> pa.ListArray:
    """Bool [chains, n] as one list per example."""
    chains, n = matrix.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1) * chains, pa.int32()), pa.array(matrix.T.reshape(-1)))
