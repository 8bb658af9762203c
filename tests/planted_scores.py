"""Score tables with planted leaks, written as the scoring pass writes them. Used by the tests of `attacks`."""

import json
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

PROVENANCE = {
    "technique": "sft",
    "setting": "-",
    "train_roles": ["public"],
    "teacher": None,
    "init": "base_student",
    "recipe": "matched",
    "swap_of": None,
    "n_params": 1000,
    "params_fingerprint": "p",
    "tokenizer_fingerprint": "t",
    "splits_fingerprint": "s",
    "dtype": "float32",
    "matmul_precision": "highest",
    "bos": "none",
    "code_version": "1",
}
VOCAB = 400
INTEGERS = dict.fromkeys(("target_id", "rank", "ties", "top1_id"), pa.int32()) | {"segment": pa.int8()}


class World:
    """Records of one split; every run written into it scores the same tokens.

    A run's leak is a number of nats that it adds to the log-probability of every token of a role.
    """

    def __init__(self, folder: Path, sizes: dict[str, int], seed: int = 0, mean_length: int = 25):
        self.folder, self.rng, self.roles = Path(folder), np.random.default_rng(seed), {}
        for role, n in sizes.items():
            lengths = self.rng.integers(mean_length // 2, mean_length * 3 // 2, n)
            self.roles[role] = {
                "ids": np.array([f"{role}-{i:05d}" for i in self.rng.permutation(n)]),
                "tasks": np.array(["open_qa", "summary"])[self.rng.integers(2, size=n)],
                "lengths": lengths,
                "targets": self.rng.integers(VOCAB, size=lengths.sum()),
                # Records differ in difficulty: what a reference model takes away.
                "hardness": np.repeat(self.rng.gamma(8, 0.25, n), lengths) * self.rng.gamma(2, 0.5, lengths.sum()),
            }

    def write(
        self,
        run: str,
        leaks: dict[str, float] | None = None,
        seed: int = 0,
        gain: float = 0.0,
        noise: float = 0.3,
        roles=None,
        variant: str = "plain",
        **provenance,
    ) -> None:
        """leaks: nats per role.  gain: nats on everything.  noise: of this run alone, per token."""
        for role in roles or self.roles:
            nats = (leaks or {}).get(role, 0.0) + gain
            self.save(self.table(role, nats, noise), run, role, seed, variant=variant, **provenance)

    def table(self, role: str, nats: float, noise: float) -> pa.Table:
        made, lengths = self.roles[role], self.roles[role]["lengths"]
        total = lengths.sum()
        hard = made["hardness"] + noise * np.abs(self.rng.normal(size=total))
        # Nats are spread over the tokens in proportion: the hardest gain most, and no log-probability becomes positive.
        logp = np.minimum(-hard + nats * hard / hard.mean(), -1e-4)
        fields = {
            "target_id": made["targets"],
            "segment": np.ones(total),
            "logp": logp,
            "log1m_p": np.log1p(-np.exp(logp)),
            "entropy": made["hardness"] * 0.8 + 0.2,
            "logp_std": 0.8 + 0.1 * self.rng.random(total),
            "rank": np.zeros(total),
            "ties": np.zeros(total),
            "top1_id": np.where(logp > np.log(0.5), made["targets"], (made["targets"] + 1) % VOCAB),
            "top1_logp": np.where(logp > np.log(0.5), logp, np.maximum(logp, -0.5)),
            "top2_gap": np.ones(total),
        }
        text = [
            " ".join(map(str, made["targets"][a : a + n])).encode()
            for a, n in zip(np.cumsum(lengths) - lengths, lengths, strict=True)
        ]
        columns = {
            "example_id": made["ids"],
            "role": [role] * len(lengths),
            "task": made["tasks"],
            "n_tokens": pa.array(lengths, pa.int32()),
            "n_bytes": [len(t) for t in text],
            "zlib_bytes": [len(zlib.compress(t)) for t in text],
            "first_div": np.zeros(len(lengths), np.int32),
        }
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        lists = {
            name: pa.ListArray.from_arrays(
                offsets, pa.array(values.astype(np.float64)).cast(INTEGERS.get(name, pa.float32()), safe=False)
            )
            for name, values in fields.items()
        }
        return pa.table(columns | lists)

    def save(
        self, table: pa.Table, run: str, role: str, seed: int = 0, shard: int = 0, variant: str = "plain", **provenance
    ) -> None:
        told = {
            "run": run,
            "seed": str(seed),
            "split_seed": "0",
            "step": "10",
            "variant": variant,
            "provenance": json.dumps(PROVENANCE | provenance),
        }
        path = self.folder / run / f"seed{seed}" / variant / f"{role}-{shard:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(told), path, compression="zstd")

    def write_text(self, shift: float = 0.0, roles=None) -> None:
        """Text tables, splits and token counts. shift: share of private responses that carry a word of their own."""
        text = self.folder / "text"
        text.mkdir(parents=True, exist_ok=True)
        splits = []
        for role in roles or self.roles:
            made = self.roles[role]
            responses = np.split(made["targets"], np.cumsum(made["lengths"])[:-1])
            marked = self.rng.random(len(responses)) < (shift if role == "private" else 0)
            responses = [np.append(r, 7) if m else r for r, m in zip(responses, marked, strict=True)]
            frame = pd.DataFrame(
                {
                    "example_id": made["ids"],
                    "group": made["ids"],
                    "task": made["tasks"],
                    "prompt_ids": [self.rng.integers(VOCAB, size=8) for _ in responses],
                    "response_ids": responses,
                    "f_chars": [4 * len(r) for r in responses],
                    "f_digits": self.rng.poisson(2, len(responses)),
                }
            )
            frame.to_parquet(text / f"{role}.parquet")
            placement = np.array(["teacher_only", "none"])[self.rng.integers(2, size=len(frame))]
            splits.append(
                pd.DataFrame(
                    {
                        "example_id": made["ids"],
                        "role": role,
                        "coin": self.rng.integers(2, size=len(frame)),
                        "placement": placement if role == "canary" else "",
                    }
                )
            )
        pd.concat(splits).to_parquet(text / "splits.parquet")
        np.savez(text / "token_counts.npz", counts=np.arange(VOCAB))

    # --- what stands beside the score tables -------------------------------------------------------------------------

    def write_generated(
        self, run: str, name: str, quality: float, seed: int = 0, n: int = 60, samples: int = 3
    ) -> None:
        """ROUGE of generated responses. quality: mean ROUGE-L in [0, 1]."""
        each = np.clip(quality + 0.1 * self.rng.normal(size=n), 0, 1)
        rows = [
            {"example_id": f"{name}-{i:04d}", "task": "open_qa", "seed": k, "n_tokens": int(self.rng.integers(5, 40))}
            | {"rouge_1": min(1.1 * f, 1), "rouge_2": 0.5 * f, "rouge_l": f, "ended": True}
            for k in range(samples)
            for i, f in enumerate(np.clip(each + 0.05 * self.rng.normal(size=n), 0, 1))
        ]
        told = {"run": run, "seed": str(seed), "variant": "generated"}
        path = self.folder / run / f"seed{seed}" / "generated" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(told), path)

    def write_ledger(self, run: str, shares: dict[str, float], seed: int = 0, n: int = 200, private: int = 0) -> None:
        """Uses of n prompts. shares: of the prompts, by source; private: how many of them are members."""
        sources = np.repeat(list(shares), [round(n * share) for share in shares.values()])
        own = np.isin(sources, ["student", "mixed"])
        frame = pd.DataFrame(
            {
                "example_id": [f"prompt-{i:04d}" for i in range(len(sources))],
                "role": np.where(np.arange(len(sources)) >= len(sources) - private, "private", "public"),
                "loss": "ce+kd",
                "source": sources,
                "replayed": own & (np.arange(len(sources)) % 2 == 0),
                "times": 2,
                "tokens": 40,
                "mean_age": np.where(own, 6.0, 0.0),
                "max_age": np.where(own, 11, 0),
                "first_step": 0,
                "last_step": 90,
            }
        )
        frame.to_parquet(self.folder / run / f"seed{seed}" / "ledger.parquet")


def chain(
    folder: Path, *, members: int = 300, nonmembers: int = 300, seed: int = 0, student_seeds=(0,), leak: float = 0.3
) -> World:
    """A whole experiment: bases, teacher, null, swap, direct, two students and their swaps."""
    world = World(folder, {"private": members, "heldout": nonmembers, "dev": 120, "calib": 160, "canary": 80}, seed)
    world.write("base_student", gain=-0.4, train_roles=[], init=None)
    world.write("base_teacher", gain=-0.3, train_roles=[], init=None)
    world.write("teacher", {"private": 2.5 * leak}, train_roles=["private"], init="base_teacher")
    world.write("swap", {"heldout": 2.5 * leak}, train_roles=["heldout"], init="base_teacher", swap_of="teacher")
    world.write("null")
    world.write("direct", {"private": 2 * leak}, train_roles=["private"])
    for name, factor in (("kd", 1.0), ("gkd", 0.5)):
        for k in student_seeds:
            told = {"technique": name, "setting": "disjoint"}
            world.write(f"students/{name}", {"private": factor * leak}, seed=k, teacher="teacher", **told)
            world.write(
                f"swap_students/{name}",
                {"heldout": factor * leak},
                seed=k,
                teacher="swap",
                swap_of=f"students/{name}",
                **told,
            )
    world.write_text()
    return world


# Nats that each technique's student gives away: two are equal, one gives away nothing.
STRENGTHS = {"kd": 0.5, "seqkd": 0.25, "imitkd": 0.25, "gkd": 0.12, "minillm": 0.0, "distillm": 0.5}
POLICIES = {
    "kd": ("dataset", "fkl", {"dataset": 1.0}),
    "seqkd": ("teacher_offline", "ce", {"teacher": 1.0}),
    "imitkd": ("replay", "fkl", {"dataset": 0.5, "student": 0.5}),
    "gkd": ("student", "jsd", {"dataset": 0.5, "student": 0.5}),
    "minillm": ("mixed", "policy", {"mixed": 1.0}),
    "distillm": ("adaptive", "sfkl", {"dataset": 0.8, "student": 0.2}),
}


def six(folder: Path, *, records: int = 300, seeds=(0, 1, 2), seed: int = 0, seed_sd: float = 0.02, setting="disjoint"):
    """Six students of one setting with STRENGTHS, all that a run can leave beside its tables, null, direct, teacher.

    seed_sd: nats by which a student's leak differs from seed to seed.
    """
    world = World(folder, {"private": records, "heldout": records, "dev": 80}, seed)
    world.write("base_student", gain=-0.4, train_roles=[], init=None)
    world.write("teacher", {"private": 1.2}, train_roles=["private"], init="base_teacher")
    world.write("null")
    world.write("direct", {"private": 0.9}, train_roles=["private"])
    for number, (name, nats) in enumerate(STRENGTHS.items()):
        policy, divergence, shares = POLICIES[name]
        run = f"students/{name}"
        for k in seeds:
            told = {"technique": name, "setting": setting, "teacher": "teacher"}
            told["objective"] = {"policy": policy, "divergence": divergence, "ce": 0.5}
            told["training"] = {
                "lr": 5e-4,
                "grid": [{"lr": 1e-4, "dev_loss": 2.3}, {"lr": 5e-4, "dev_loss": 2.1}, {"lr": 2e-3, "dev_loss": None}],
                "select": "last",
                "selected_step": 90,
                "steps": 90,
                "response_tokens": 16_000,
                "sources": {source: round(16_000 * share) for source, share in shares.items()},
                "phi": 0.0 if name == "distillm" else None,
                "warnings": ["it ended with phi = 0: no student sample was used"] if name == "distillm" else [],
                "fidelity": "corrected",
            }
            leak = {"private": nats + seed_sd * world.rng.normal()}
            world.write(run, leak, seed=k, gain=0.05 * (number % 3), **told)
            for which, quality in (("dev", 0.2), ("self_instruct", 0.12)):
                world.write_generated(run, which, quality + 0.02 * number, seed=k)
            world.write_ledger(run, shares, seed=k, private=12)
    world.write_generated("null", "dev", 0.18)
    world.write_text()
    return world


# --- reading an audit ------------------------------------------------------------------------------------------------

FEW = ["loss", "zlib", "min_k", "min_k_plus_plus", "reference"]  # attacks that all planted tables allow
QUICK = {"bootstrap": 200, "tasks": False, "attacks": FEW}


def tables(out: Path) -> dict[str, pd.DataFrame]:
    """The result tables by name; `null` is a model's name in them, only an empty field is missing."""
    read = lambda path: pd.read_csv(path, keep_default_na=False, na_values=[""], dtype={"seed": str})
    return {path.stem: read(path) for path in out.glob("*.csv")}


def row(frame: pd.DataFrame, **wanted) -> pd.Series:
    for key, value in wanted.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1, (wanted, len(frame))
    return frame.iloc[0]


def leak(found, model, attack="loss", role_pair="private-heldout", metric="auc", seed="0", task="all"):
    at = {"role_pair": role_pair, "metric": metric, "seed": seed, "task": task}
    return row(found["membership"], model=model, attack=attack, **at)


def reasons(summary, **wanted) -> set[str]:
    return {u["reason"] for u in summary["unresolved"] if all(u[k] == v for k, v in wanted.items())}
