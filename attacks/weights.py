"""White-box tables, and the attacks on a model's weights that read them: gradient norms and weight noise.

SCORES/<run>/seed<k>/whitebox/<role>-00000.parquet: one row for each of the records that the weights were looked into
with, often a part of those that were scored.  The attacks take the Tokens of a role and its Whitebox table and return
one score per example [n], higher for what looks more like a member (attacks.md 7).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pyarrow import types

from attacks.parquet import TableError, read_json, read_table
from attacks.signals import CannotScore
from attacks.tables import IDENTITY, MOST_NAME, ScoreTable, Tokens

VARIANT = "whitebox"


@dataclass(frozen=True)
class Whitebox:
    """What the weights of one run say of one role, in the order of the example ids.

    ids, task: str [n].  lengths: scored tokens [n].  columns: name -> float64 [n], or [n, k] with a value for each
    block (of `lens`: for each depth, from the embedding alone to the last layer).  blocks: their names, `embedding` and
    `head` among them.  settings: draws, sigma, relative_sigma, noise_seed, base, forms.
    """

    ids: np.ndarray
    task: np.ndarray
    lengths: np.ndarray
    columns: dict[str, np.ndarray]
    blocks: tuple[str, ...]
    settings: dict

    def take(self, rows: np.ndarray) -> "Whitebox":
        """These examples (indices or a mask) in this order."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, ids=self.ids[rows], task=self.task[rows], lengths=self.lengths[rows], columns=columns)


def read_whitebox(table: ScoreTable, role: str) -> Whitebox | None:
    """What the weights of a run say of one role; None where they were not looked into.

    Raises TableError on files that are not such a table, do not fit together, or give an example twice.  A NaN is left
    where it is: the pair of members and non-members says so.
    """
    files = table.variants[VARIANT].files if VARIANT in table.variants else {}
    if role not in files:
        return None
    parts, folder = [_read(path, role) for path in files[role]], files[role][0].parent
    shapes = {(part.blocks, tuple((name, v.shape[1:]) for name, v in sorted(part.columns.items()))) for part in parts}
    if len(shapes) > 1 or any(part.settings != parts[0].settings for part in parts):
        raise TableError(f"{folder}: the files of role '{role}' come from two passes; score this run again")
    names = parts[0].columns
    ids, task, lengths = (np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "task", "lengths"))
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
    if doubled := len(ids) - len(set(ids)):
        raise TableError(f"{folder}: {doubled} duplicate example ids in role '{role}'; every record is scored once")
    whole = Whitebox(ids, task, lengths, columns, parts[0].blocks, parts[0].settings)
    return whole.take(np.argsort(ids, kind="stable"))


def _read(path: Path, role: str) -> Whitebox:
    table = read_table(path)
    told = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    absent = [name for name in (*IDENTITY, "n_tokens", "nll") if name not in table.column_names]
    absent += [f"metadata '{name}'" for name in ("blocks", "whitebox") if name not in told]
    if absent:
        raise TableError(f"{path}: no {', '.join(absent)}; it is not a white-box table, score this run again")
    blocks = tuple(map(str, read_json(told["blocks"], path, "blocks", list)))
    settings = read_json(told["whitebox"], path, "whitebox", dict)
    names = [table[name].to_pylist() for name in IDENTITY]
    if any(not isinstance(name, str) or len(name) > MOST_NAME for each in names for name in each):
        raise TableError(f"{path}: {', '.join(IDENTITY)} must be texts of at most {MOST_NAME} characters")
    ids, roles, task = (np.asarray(each, str) for each in names)
    if wrong := set(roles) - {role}:
        raise TableError(f"{path}: rows of role {', '.join(sorted(wrong))} in a file of role '{role}'")
    columns = {}
    for name in (name for name in table.column_names if name not in (*IDENTITY, "n_tokens")):
        column, width = table[name].combine_chunks(), len(blocks) - (name == "lens")
        kind = column.type.value_type if types.is_list(column.type) else column.type
        if not (types.is_floating(kind) or types.is_integer(kind)):
            raise TableError(f"{path}: {name} is {column.type}, not numbers")
        if types.is_list(column.type) and (np.diff(column.offsets.to_numpy()) != width).any():
            raise TableError(f"{path}: {name} must have {width} numbers in every row: {len(blocks)} blocks are named")
        flat = column.flatten() if types.is_list(column.type) else column
        values = flat.to_numpy(zero_copy_only=False).astype(np.float64)
        columns[name] = values.reshape(-1, width) if types.is_list(column.type) else values
    return Whitebox(ids, task, table["n_tokens"].to_numpy(), columns, blocks, settings)


# --- attacks ---------------------------------------------------------------------------------------------------------


def gradient_norm(tokens: Tokens, whitebox: Whitebox, p: float = np.inf) -> np.ndarray:
    """`-mean over parameter tensors of the p-norm` of the gradient of the example's mean NLL; p is 1, 2 or inf.

    A model has little left to learn from what it was trained on: the smaller, the more like a member.  The two public
    codes disagree in sign; tests settle it on a planted model (arXiv:2402.17012, attacks.md 7.1).
    """
    return -_column(whitebox, f"gradient_{p:g}")


def gradient_global(tokens: Tokens, whitebox: Whitebox) -> np.ndarray:
    """`-2-norm` of the gradient of the example's mean NLL over all parameters together."""
    return -_column(whitebox, "gradient_global")


def mope(tokens: Tokens, whitebox: Whitebox) -> np.ndarray:
    """`mean_i NLL(theta + sigma eps_i) - NLL(theta)`: members sit in sharper minima (MoPe, arXiv:2310.14369)."""
    return _column(whitebox, "mope")


def mope_antithetic(tokens: Tokens, whitebox: Whitebox) -> np.ndarray:
    """`mope` over +eps_i and -eps_i, so that what is linear in the noise cancels and only curvature is left."""
    return _column(whitebox, "mope_antithetic")


def _column(whitebox: Whitebox, name: str) -> np.ndarray:
    if name not in whitebox.columns:
        known = ", ".join(column for column, values in whitebox.columns.items() if values.ndim == 1)
        raise CannotScore(f"the white-box table has no column {name} (whitebox.forms); it has {known}")
    return whitebox.columns[name]
