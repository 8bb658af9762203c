"""What a plan cannot find out and is told: `config.plan`."""

from __future__ import annotations

import dataclasses

from kd_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Stated:
    """Keys of `config.plan`, with units. The defaults are Dolly's, by GPT-2's tokenizer and the alpaca template."""

    mfu: float = 0.4  # share of the chips' peak that training reaches, recomputation not counted
    records: int = 15_011  # where data.path is not there to be counted
    record_tokens: int = 147  # mean tokens of a record, prompt and response
    scored_tokens: int = 75  # mean tokens of its response

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"plan.mfu must lie in (0, 1], got {self.mfu}")
        if self.records < 1 or not 1 <= self.scored_tokens <= self.record_tokens:
            raise ConfigError("plan.records must be positive, plan.scored_tokens between 1 and plan.record_tokens")
