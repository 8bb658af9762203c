"""Shadow chains: teachers trained on random halves of a pool, their students, and what all of them say of every record.

SCORES/shadow/design.parquet                                     who was in which chain's data, with seed and hash
SCORES/shadow/chain003/{teacher,student}/<role>-00000.parquet    score tables of the pool and of `population`
SCORES/shadow/chain003/manifest.json                             written last: the chain is finished

A chain's tables are read once, one after the other, and reduced to one number per record and statistic: in memory are
[chains, records] arrays and one model's tokens of one role.

Legend: c chains, n records of the pool (in the order of their ids), z records of the population.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from attacks import signals
from attacks.parquet import read_json, read_metadata, read_table
from attacks.study import Unresolved
from attacks.tables import SEGMENTS, ScoreTable, TableError, Tokens

MODELS = ("teacher", "student")
POPULATION = "population"  # of no chain's data
PRECISION = ("dtype", "matmul_precision", "tokenizer_fingerprint")  # what all tables must share


class Statistic(NamedTuple):
    """A number per record [n] of its Tokens, and the columns that it reads."""

    function: Callable[[Tokens], np.ndarray]
    needs: tuple[str, ...]


def logit(tokens: Tokens) -> np.ndarray:
    """`mean_t (log p_t - log (1 - p_t))`, finite where p rounds to 1 (attacks.md 6.1; Carlini et al. 2022)."""
    gap = tokens.token["logp"].astype(np.float64) - tokens.token["log1m_p"]
    return signals.segment_mean(gap, tokens)


def hinge(tokens: Tokens) -> np.ndarray:
    """`mean_t` of the target's logit less that of the best other token (attacks.md 6.1)."""
    hit = tokens.token["top1_id"] == tokens.token["target_id"]
    behind = tokens.token["logp"].astype(np.float64) - tokens.token["top1_logp"]
    return signals.segment_mean(np.where(hit, tokens.token["top2_gap"], behind), tokens)


def prob(tokens: Tokens) -> np.ndarray:
    """`exp(mean_t log p_t)`: the geometric mean of the tokens' probabilities, RMIA's signal."""
    return np.exp(signals.loss(tokens))


_HIT = ("top1_id", "target_id")
STATISTICS = {
    "LL": Statistic(signals.loss, ("logp",)),
    "logit": Statistic(logit, ("logp", "log1m_p")),
    "prob": Statistic(prob, ("logp",)),
    "hinge": Statistic(hinge, ("logp", "top1_logp", "top2_gap", *_HIT)),
    "accuracy": Statistic(signals.gap, _HIT),
    # The cheap attacks: what they say without any other model.
    "loss": Statistic(signals.loss, ("logp",)),
    "zlib": Statistic(signals.zlib_ratio, ("logp", "zlib_bytes")),
    "min_k": Statistic(signals.min_k, ("logp",)),
    "min_k_plus_plus": Statistic(signals.min_k_plus_plus, ("logp", "entropy", "logp_std")),
}


@dataclass(frozen=True)
class Chains:
    """All chains of one design.

    ids, role, task, group: str [n].  teacher_in, student_in: bool [c, n].  pairs: int [c], chains that complete one
    another share a number.  sizes: of teacher and student, in words.  kept: what was read of the tables.
    """

    design: str
    ids: np.ndarray
    role: np.ndarray
    task: np.ndarray
    group: np.ndarray
    teacher_in: np.ndarray
    student_in: np.ndarray
    pairs: np.ndarray
    technique: str
    setting: str
    sizes: dict[str, str]
    seed: int
    hash: str
    folder: Path
    kept: dict = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def size(self) -> str:
        """Both models' sizes in words."""
        return "; ".join(f"{model} {self.sizes[model]}" for model in MODELS)

    def statistic(self, model: str, name: str) -> np.ndarray:
        """One of STATISTICS of every record under the `teacher` or `student` of every chain [c, n].

        NaN for a record without response tokens.  Raises Unresolved where the tables lack a column, TableError where
        they do not fit together.
        """
        return self._read(model, name)[0]

    def population(self, model: str, name: str) -> np.ndarray:
        """The same of the records that no chain was trained on [c, z]; z = 0 without a table of them."""
        return self._read(model, name)[1]

    def comparable(self, target: int, model: str) -> np.ndarray:
        """Which chains may be a record's reference when this one's teacher or student is attacked, bool [c, n].

        Never the target's own pair: what is in the one is out of the other, so that the partner's membership would
        carry the answer.  Of students whose own data varies too, only those that agree with the target on the record:
        what is asked is whether it was in the teacher's.
        """
        others = np.broadcast_to((self.pairs != self.pairs[target])[:, None], self.teacher_in.shape)
        return others & (self.student_in == self.student_in[target]) if model == "student" else others

    def _read(self, model: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        if model not in self.kept:
            self.kept[model] = _reduce(self, model)
        if name not in self.kept[model]:
            columns = ", ".join(STATISTICS[name].needs)
            raise Unresolved(f"the chains' {model} tables lack a column that {name} needs ({columns}); score.fields")
        return self.kept[model][name]


# --- reading ---------------------------------------------------------------------------------------------------------


def chain_folder(folder: Path, number: int) -> Path:
    """Where one chain of SCORES/shadow keeps its tables."""
    return folder / f"chain{number:03d}"


def read_chains(scores_dir: str | Path) -> Chains | None:
    """The chains under `scores_dir`/shadow, or None where there are none.  The tables are read when asked for.

    Raises TableError on a design that cannot be read, and on a chain that is missing or not finished: a smaller average
    would look like the same attack.
    """
    folder = Path(scores_dir) / "shadow"
    if not folder.exists():
        return None
    path = folder / "design.parquet"
    if not path.exists():
        raise TableError(f"{folder}: no design.parquet, so that nobody knows who was in; run the shadow stage again")
    chains = _design(path)
    for number in range(len(chains)):
        own = chain_folder(folder, number)
        if not (own / "manifest.json").exists():
            raise TableError(f"{own}: chain {number} of {len(chains)} is not finished; run the shadow stage again")
        for model in MODELS:
            for role in np.unique(chains.role):
                if not _files(own / model, role):
                    raise TableError(f"{own / model}: no score table of role '{role}'; score this chain again")
    return chains


def _design(path: Path) -> Chains:
    table, told = read_table(path), read_metadata(path)
    texts, matrices = ("example_id", "role", "task", "group"), ("teacher_in", "student_in")
    absent = [name for name in (*texts, *matrices) if name not in table.column_names]
    absent += [f"metadata '{key}'" for key in ("design", "pairs", "seed", "hash") if key not in told]
    if absent:
        raise TableError(f"{path}: no {', '.join(absent)}; the shadow stage writes them")
    pairs = read_json(told["pairs"], path, "pairs", list)
    if not pairs or not all(type(number) is int for number in pairs) or not told["seed"].isdigit() or not len(table):
        raise TableError(f"{path}: its metadata has no pair of every chain, or no seed; run the shadow stage again")
    text = {name: np.asarray(table[name].to_pylist(), str) for name in texts}
    order = np.argsort(text["example_id"], kind="stable")
    if (doubled := text["example_id"][order][1:] == text["example_id"][order][:-1]).any():
        raise TableError(f"{path}: {doubled.sum()} duplicate example ids; one row a record is needed")
    inside = [np.ascontiguousarray(_matrix(path, table, name, len(pairs))[order].T) for name in matrices]
    return Chains(
        told["design"],
        *(text[name][order] for name in texts),
        *inside,
        np.asarray(pairs, np.int64),
        told.get("technique", "-"),
        told.get("setting", "-"),
        {model: told.get(f"{model}_size", "size not told") for model in MODELS},
        int(told["seed"]),
        told["hash"],
        path.parent,
    )


def _matrix(path: Path, table: pa.Table, name: str, chains: int) -> np.ndarray:
    """A column of lists as bool [n, c]."""
    column = table[name].combine_chunks()
    whole = pa.types.is_list(column.type) and pa.types.is_boolean(column.type.value_type) and not column.null_count
    flat = column.flatten() if whole else column
    if not whole or flat.null_count or (np.diff(column.offsets) != chains).any():
        raise TableError(f"{path}: {name} does not say yes or no for {chains} chains in every row")
    return flat.to_numpy(zero_copy_only=False).reshape(len(table), chains)


def _files(folder: Path, role: str) -> list[Path]:
    return sorted(folder.glob(f"{role}-[0-9]*.parquet"))


def _reduce(chains: Chains, model: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By statistic, its values on the pool [c, n] and on the population [c, z]: as many as the columns allow."""
    roles = np.unique(chains.role)
    found: dict[str, tuple[list, list]] = {}
    first = None
    for number in range(len(chains)):
        table, where = _table(chains, model, number), chain_folder(chains.folder, number) / model
        parts = {role: _pick(chains, table, number, role) for role in roles}
        if table.files.get(POPULATION):
            parts[POPULATION] = _load(table, POPULATION)
        told = {key: table.provenance.get(key) for key in PRECISION}
        told |= {role: (part.ids.tobytes(), part.lengths.tobytes()) for role, part in parts.items()}
        first = first or told
        if differing := sorted(key for key in first | told if first.get(key) != told.get(key)):
            raise TableError(
                f"{where}: not scored as chain 0 was ({', '.join(differing)} differ); score all chains alike"
            )
        columns = set.intersection(*({*part.token, *part.example} for part in parts.values()))
        population = parts.pop(POPULATION, None)
        for name in (name for name, statistic in STATISTICS.items() if columns >= set(statistic.needs)):
            values, beyond = found.setdefault(name, ([], []))
            values.append(_whole(chains, {role: _values(name, part, where) for role, part in parts.items()}))
            beyond.append(np.zeros(0) if population is None else _values(name, population, where))
    # A column that one chain lacks is none: no attack rests on some of the chains.
    return {k: (np.stack(a), np.stack(b)) for k, (a, b) in found.items() if len(a) == len(chains)}


def _table(chains: Chains, model: str, number: int) -> ScoreTable:
    folder = chain_folder(chains.folder, number) / model
    files = {role: _files(folder, role) for role in (*np.unique(chains.role), POPULATION)}
    first = next(path for paths in files.values() for path in paths)
    told = read_metadata(first)
    owner = told.get("run", f"shadow/{model}"), told.get("chain", str(number)), told.get("design_hash", chains.hash)
    scored = number % 2 if chains.design == "cheap" and model == "teacher" else number  # two teachers, and their copies
    if owner != (f"shadow/{model}", str(scored), chains.hash):
        raise TableError(
            f"{folder}: its tables say that they belong to {owner[0]} of chain {owner[1]}, design {owner[2]}, not to "
            f"shadow/{model} of chain {number}, design {chains.hash}; score this chain again"
        )
    provenance = read_json(told.get("provenance", "{}"), first, "provenance", dict)
    return ScoreTable(f"shadow/{model}", chains.seed, "", provenance, files)


def _load(table: ScoreTable, role: str) -> Tokens:
    fields = {column for statistic in STATISTICS.values() for column in statistic.needs}
    return table.load(role, fields).select([SEGMENTS["response"]])


def _pick(chains: Chains, table: ScoreTable, number: int, role: str) -> Tokens:
    """The records of the pool that have this role, in the order of their ids."""
    tokens, wanted = _load(table, role), chains.ids[chains.role == role]
    if lost := sorted(set(wanted) - set(tokens.ids)):
        raise TableError(
            f"{chain_folder(chains.folder, number)}: {table.run} lacks {len(lost)} records of role '{role}', the first "
            f"is {lost[0]}; score this chain again"
        )
    return tokens if len(tokens.ids) == len(wanted) else tokens.take(np.isin(tokens.ids, wanted))


def _values(name: str, tokens: Tokens, where: Path) -> np.ndarray:
    """NaN for a record without tokens. Raises TableError where a model left something that is no number."""
    values = np.asarray(STATISTICS[name].function(tokens), np.float64)
    broken = ~np.isfinite(values) & (tokens.lengths > 0)
    if broken.any():
        raise TableError(
            f"{where}: {broken.sum()} records have a {name} that is not a number, the first is "
            f"{tokens.ids[broken][0]}; the model may have diverged: delete this chain and run the shadow stage again"
        )
    return np.where(tokens.lengths > 0, values, np.nan)


def _whole(chains: Chains, values: dict[str, np.ndarray]) -> np.ndarray:
    whole = np.zeros(len(chains.ids))
    for role, part in values.items():
        whole[chains.role == role] = part
    return whole
