"""What a run is trained on and with which loss: a technique is a policy times a divergence, plus schedules.

`policy` says where a step's response tokens come from, `divergence` how student and teacher are compared on them; the
two know nothing of each other. MiniLLM's policy gradient is the one exception. `PRESETS` holds the techniques and the
papers' variants of them; all keys stand in the saved config, and any can be overridden there.
"""

from __future__ import annotations

import dataclasses
import math

from kd_jax.errors import ConfigError
from kd_jax.generate import Sampling
from kd_jax.head import Loss

TECHNIQUES = ("kd", "seqkd", "imitkd", "gkd", "minillm", "distillm")

POLICIES = {
    "dataset": "the records' own responses",
    "teacher": "text that the teacher generated once, before training",
    "mix": "with probability lmbda fresh student samples, else the data",
    "mix_replay": "with probability lmbda sample, store, and train on a draw of the store; else the data",
    "adaptive": "student samples, replayed ones or the data, by a threshold that rises while dev loss does",
    "mixed_rollouts": "samples of student and teacher mixed per token, several passes over each set of them",
}
ON_POLICY = ("mix", "mix_replay", "adaptive", "mixed_rollouts")
FIDELITIES = ("corrected", "paper", "reference")
REPLAY_SHARES = ("decreasing", "constant", "increasing")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Everything that makes a technique, with units; formulas and sources in the modules that read the keys."""

    technique: str
    policy: str = "dataset"  # a key of POLICIES
    fidelity: str = "corrected"  # corrected | paper (objective as printed) | reference (a published code's deviation)

    # Divergence and mixture
    divergence: str = "fkl"  # a key of kd_jax.losses.DIVERGENCES
    beta: float = 0.5  # jsd: weight of the TEACHER, in the mixture and in front of KL(p || m)
    alpha: float = 0.1  # sfkl, srkl: weight of the distribution on the left of the KL
    mu: float = 0.5  # akl: teacher mass of the tail
    student_T: float = 1.0
    teacher_T: float = 1.0
    t_squared: bool = True  # multiply the divergence by student_T ** 2
    kd_ratio: float = 1.0  # weight of the divergence; 1 - kd_ratio weighs the cross entropy on data or teacher text
    lm_coef: float = 0.0  # weight of a language-model loss on plain text (data.lm)
    lm_kd_ratio: float = 0.0  # share of forward KL in that loss

    # Sampling
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1  # teacher text by beam search of this width
    max_new_tokens: int = 0  # 0 = up to data.max_length
    prefix: int = 0  # plain text has no prompt: the teacher continues this many of its first tokens

    # Student samples
    lmbda: float = 0.5  # mix, mix_replay: probability that a step uses student samples
    capacity: int = 1000  # sequences that the replay buffer keeps
    replay: str = "decreasing"  # adaptive: how the share of fresh samples moves over the run
    phi: float = 0.0  # adaptive: first threshold
    phi_eps: float = 0.1  # rise of the dev loss, in nats, that raises the threshold
    phi_step: float = 0.1
    phi_update: str = "on_increase"  # on_increase: the loss compared with moves only when phi does | always

    # MiniLLM
    rollouts: int = 256  # samples per outer iteration
    passes: int = 4  # over each set of them
    mix_alpha: float = 0.2  # share of the teacher in every token's distribution
    gamma: float = 0.95  # discount per token
    reward_scale: float = 0.5
    reward_clip: float = 100.0  # 0 = none
    length_norm: bool = True  # divide a return by the response tokens that remain
    return_from: str = "k"  # k: the return of token k begins with its own reward | next: with its successor's
    whiten: str = "masked"  # masked | reference (padding counted) | none
    ppo_clip: float = 0.2  # 0 = none
    single_step: bool = True  # add the exact reverse KL of every rollout token
    single_step_weighted: bool = False  # weigh it with the importance weight, as printed in the paper

    def __post_init__(self) -> None:
        shares = ("beta", "alpha", "mu", "kd_ratio", "lm_kd_ratio", "lmbda", "phi", "mix_alpha", "gamma")
        positive = ("capacity", "rollouts", "passes", "reward_scale", "student_T", "teacher_T", "beams")
        chosen = {
            "policy": tuple(POLICIES),
            "fidelity": FIDELITIES,
            "replay": REPLAY_SHARES,
            "phi_update": ("on_increase", "always"),
            "whiten": ("masked", "reference", "none"),
            "return_from": ("k", "next"),
            "technique": ("sft", *TECHNIQUES),
        }
        checks = [(0.0 <= getattr(self, k) <= 1.0, f"{k} must lie in [0, 1], got {getattr(self, k)}") for k in shares]
        checks += [(getattr(self, k) > 0, f"{k} must be positive, got {getattr(self, k)}") for k in positive]
        checks += [
            (getattr(self, k) in known, f"{k} {getattr(self, k)!r} is not one of {', '.join(known)}")
            for k, known in chosen.items()
        ]
        checks += [
            (self.mix_alpha < 1, "mix_alpha must be below 1: an importance weight divides by the student's share"),
            (self.lm_coef >= 0, f"lm_coef must not be negative, got {self.lm_coef}"),
            (
                self.beams == 1 or (self.policy == "teacher" and self.temperature == 0),
                "beams need policy 'teacher' and temperature 0",
            ),
            (
                self.whiten != "reference" or (self.max_new_tokens > 0 and self.fidelity == "reference"),
                "whiten 'reference' counts padding up to max_new_tokens: set it, and fidelity to 'reference'",
            ),
            (
                not self.policy_gradient or (self.temperature, self.top_k, self.top_p) == (1.0, 0, 1.0),
                "the policy gradient's weights hold for samples at temperature 1 without top_k and top_p",
            ),
            (
                not self.on_policy or self.kd_ratio > 0,
                "kd_ratio 0 leaves nothing to train on: cross entropy never meets a student's own samples",
            ),
            (
                (self.technique == "minillm") == (self.policy == "mixed_rollouts"),
                "the policy gradient (minillm) and policy 'mixed_rollouts' go together",
            ),
            (self.prefix == 0 or self.policy == "teacher", "prefix is for policy 'teacher' on plain text"),
        ]
        for good, message in checks:
            if not good:
                raise ConfigError(f"objectives.{self.technique}: {message}")
        try:
            self.loss(1), self.sampling(1)
        except ConfigError as error:
            raise ConfigError(f"objectives.{self.technique}: {error}") from error

    @property
    def on_policy(self) -> bool:
        return self.policy in ON_POLICY

    @property
    def policy_gradient(self) -> bool:
        return self.policy == "mixed_rollouts"

    def distinctive(self) -> dict[str, object]:
        """Policy and divergence, and every other key that is not at its default: what a reader needs to be told."""
        usual = {f.name: f.default for f in dataclasses.fields(self)} | {"technique": self.technique}
        own = dataclasses.asdict(self)
        return {k: v for k, v in own.items() if k in ("policy", "divergence") or v != usual[k]}

    def loss(self, vocab: int, teacher: bool = True, chunk: int = 0) -> Loss:
        """The head's loss for an effective vocabulary; without a teacher, the cross entropy alone."""
        return Loss(
            vocab,
            divergence=self.divergence if teacher else None,
            student_T=self.student_T,
            teacher_T=self.teacher_T,
            t_squared=self.t_squared,
            beta=self.beta,
            alpha=self.alpha,
            mu=self.mu,
            clip=self.ppo_clip or math.inf,
            chunk=chunk,
        )

    def sampling(self, max_length: int) -> Sampling:
        """How this objective's samples are drawn; `max_length` tokens of prompt and response fit a record."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens or max_length,
            mix_alpha=self.mix_alpha if self.policy_gradient else 0.0,
            beams=self.beams,
        )


# Techniques under their names, and the papers' variants of them (reference: distillation tables of each paper's code).
PRESETS: dict[str, Objective] = {
    "sft": Objective("sft", kd_ratio=0.0),
    "kd": Objective("kd"),
    "seqkd": Objective("seqkd", policy="teacher"),  # soft targets on teacher text (seqkd_fkl)
    "imitkd": Objective("imitkd", policy="mix_replay", lmbda=1.0),
    "gkd": Objective("gkd", policy="mix", divergence="jsd"),
    "minillm": Objective("minillm", policy="mixed_rollouts", divergence="rkl", lm_kd_ratio=0.5),
    "distillm": Objective("distillm", policy="adaptive", divergence="srkl"),
    # SeqKD's other forms: cross entropy alone (Kim and Rush 2016), half and half (MiniLLM's code), beams (singh2025)
    "seqkd_ce": Objective("seqkd", policy="teacher", kd_ratio=0.0),
    "seqkd_mix": Objective("seqkd", policy="teacher", kd_ratio=0.5),
    "singh_seqkd": Objective("seqkd", policy="teacher", kd_ratio=0.0, temperature=0.0, beams=4),
    "singh_kd": Objective("kd", kd_ratio=0.5),
    "singh_rkld": Objective("minillm", policy="mixed_rollouts", divergence="rkl", lm_coef=1.0, lm_kd_ratio=0.5),
    "kd_rkl": Objective("kd", divergence="rkl"),  # exact reverse KL on the data, without sampling
    # zhang2025: replayed GKD whose 0.9 weighs the student
    "zhang_gkd": Objective("gkd", policy="mix_replay", divergence="jsd", beta=0.1),
    "distillm_sfkl": Objective("distillm", policy="adaptive", divergence="sfkl"),
    "minillm_paper": Objective(
        "minillm",
        policy="mixed_rollouts",
        fidelity="paper",
        divergence="rkl",
        gamma=1.0,
        reward_scale=1.0,
        return_from="next",
        whiten="none",
        single_step_weighted=True,
    ),
    "minillm_reference": Objective(
        "minillm",
        policy="mixed_rollouts",
        fidelity="reference",
        divergence="rkl",
        whiten="reference",
        lm_kd_ratio=0.5,
        max_new_tokens=256,
    ),
    # borkar2026 (plain text): soft targets at T = 2; greedy continuations of 50-token prefixes
    "borkar_soft": Objective("kd", student_T=2.0, teacher_T=2.0),
    "borkar_hard": Objective("seqkd", policy="teacher", kd_ratio=0.0, temperature=0.0, prefix=50),
    "cui": Objective("kd", kd_ratio=0.5, student_T=2.0, teacher_T=2.0),
}
