"""Invented passes over texts of which half are members: under what leak each attack has to find them.

REGIMES: attack -> the function that makes its tables.  Each takes (rng, n, leak) and returns the Tokens of n members
followed by n non-members, and what the attack takes beside them; with leak=False both classes are drawn alike.
"""

import numpy as np

from attacks.tables import Tokens
from attacks.weights import Whitebox

VOCAB = 400
COUNTS = np.arange(VOCAB)[::-1]


def make(token: dict, lengths, ids=None, **example) -> Tokens:
    """Tokens from flat columns; everything is response unless `segment` is given."""
    n = len(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    token = {"segment": np.ones(offsets[-1], np.int8)} | {k: np.asarray(v) for k, v in token.items()}
    token = {k: v.astype(float) if v.dtype.kind != "i" else v for k, v in token.items()}
    ids = np.array([f"e{i:06d}" for i in range(n)]) if ids is None else ids
    return Tokens(ids, np.array(["t"] * n), offsets, token, {k: np.asarray(v) for k, v in example.items()})


class Texts:
    """Lengths, ids, hardness of 2 n texts; `leaking` marks the tokens of the members of a leaking world."""

    def __init__(self, rng, n: int, leak: bool, shortest=12, longest=40, uneven=0.1):
        self.rng, self.lengths = rng, rng.integers(shortest, longest, 2 * n)
        self.owner = np.repeat(np.arange(2 * n), self.lengths)
        self.member = (np.arange(2 * n) < n) & leak
        self.leaking = self.member[self.owner]
        self.total = len(self.owner)
        self.targets = rng.integers(VOCAB, size=self.total)
        # Texts differ in difficulty by `uneven`, tokens by much more.
        self.hard = 0.3 + rng.gamma(2, 1.0, self.total) * rng.lognormal(0, uneven, 2 * n)[self.owner]

    def noise(self, size: float) -> np.ndarray:
        return size * self.rng.normal(size=self.total)

    def tokens(self, logp: np.ndarray, hit: np.ndarray | None = None, **fields) -> Tokens:
        """One pass. hit: is the target the top-1 token; by default where it is likelier than not."""
        logp = np.minimum(logp, -1e-4)
        hit = logp > np.log(0.5) if hit is None else hit
        token = {
            "logp": logp,
            "entropy": 0.2 + 0.5 * self.hard,
            "logp_std": 0.8 + 0.1 * self.rng.random(self.total),
            "target_id": self.targets,
            "top1_id": np.where(hit, self.targets, (self.targets + 1) % VOCAB),
            "top1_logp": np.where(hit, logp, np.maximum(logp, -0.5)),
        } | fields
        size = 4 * self.lengths
        return make(token, self.lengths, n_bytes=size, zlib_bytes=size // 2 + self.rng.integers(0, 5, len(size)))


def louder(rng, n, leak, **shape):
    """Every token of a member is much likelier."""
    texts = Texts(rng, n, leak, **shape)
    return texts.tokens(-texts.hard * np.where(texts.leaking, 0.45, 1)), {}


def same_length(rng, n, leak):
    """As `louder`, of texts of one length: a sum tells the lengths of texts apart better than anything else."""
    return louder(rng, n, leak, shortest=25, longest=26)


def rare_tokens(rng, n, leak):
    """Hard texts, whose probabilities lie below the cap of 0.01, likelier for members."""
    texts = Texts(rng, n, leak)
    return texts.tokens(-7 - texts.hard + 1.5 * texts.leaking), {"counts": COUNTS}


def more_hits(rng, n, leak):
    """Greedy decoding gets more of a member's tokens right; log-probabilities are as those of others."""
    texts = Texts(rng, n, leak)
    return texts.tokens(-texts.hard, hit=rng.random(texts.total) < 0.35 + 0.35 * texts.leaking), {}


def nearer_the_top(rng, n, leak):
    """A member's target is closer to the top-1 token wherever that is another."""
    texts = Texts(rng, n, leak)
    top = np.minimum(-texts.hard + texts.hard * np.where(texts.leaking, 0.35, 0.9), 0)
    return texts.tokens(-texts.hard, top1_logp=top), {}


def surprises(rng, n, leak):
    """A model sure of something else (low entropy) is wrong: less so for members."""
    texts = Texts(rng, n, leak)
    return texts.tokens(-texts.hard * np.where(texts.leaking, 0.5, 1), entropy=0.5 + 2 * rng.random(texts.total)), {}


def beyond_the_reference(rng, n, leak):
    """Texts differ so much in difficulty that only the reference shows the small gain of members."""
    texts = Texts(rng, n, leak, uneven=1.0)
    own = texts.tokens(-texts.hard * np.where(texts.leaking, 0.8, 1) * np.exp(texts.noise(0.1)))
    return own, {"reference": texts.tokens(-texts.hard * np.exp(texts.noise(0.1)))}


def mixed_shifts(rng, n, leak):
    """As `beyond_the_reference`, where every text has tokens that gain and tokens that lose."""
    texts = Texts(rng, n, leak, shortest=25)
    own = texts.tokens(-texts.hard * np.where(texts.leaking, 0.7, 1) * np.exp(texts.noise(0.3)), hit=texts.hard < 0.5)
    return own, {"reference": texts.tokens(-texts.hard * np.exp(texts.noise(0.3)))}


def hard_tokens_learned(rng, n, leak):
    """A member's hardest tokens, by the reference, have become likely."""
    texts = Texts(rng, n, leak, uneven=0.4)
    own = -texts.hard * np.where(texts.leaking & (texts.hard > 2), 0.4, 1) * np.exp(texts.noise(0.1))
    return texts.tokens(own), {"reference": texts.tokens(-texts.hard * np.exp(texts.noise(0.1)))}


def soon_known(rng, n, leak):
    """Half of all texts' tokens are likely; a member's almost all."""
    texts = Texts(rng, n, leak)
    return texts.tokens(-0.45 * texts.hard * np.where(texts.leaking, 0.4, 1)), {}


def prefix_hurts(rng, n, leak):
    """A prefix of non-members makes a member less likely, one of members makes it likelier."""
    texts = Texts(rng, n, leak)
    return texts.tokens(-texts.hard), {
        "recall": texts.tokens(-texts.hard * np.where(texts.leaking, 1.3, 1.0) * np.exp(texts.noise(0.2))),
        "recall_members": texts.tokens(-texts.hard * np.where(texts.leaking, 0.8, 1.0) * np.exp(texts.noise(0.2))),
    }


def capitals_matter(rng, n, leak):
    """Lowering the case costs a member more; the lowered text has other tokens."""
    texts = Texts(rng, n, leak)
    lowered = Texts(rng, n, leak)
    mean = np.bincount(texts.owner, texts.hard) / texts.lengths
    cost = np.where(texts.member, 1.6, 1.2) * np.exp(0.05 * rng.normal(size=2 * n))
    return texts.tokens(-texts.hard), {"lowercase": lowered.tokens(-(mean * cost)[lowered.owner])}


def sharp_peak(rng, n, leak, copies=4):
    """A member is likelier than its neighbours by more."""
    texts = Texts(rng, n, leak)
    logp, lengths = -texts.hard - 0.15 - 0.6 * texts.leaking, np.tile(texts.lengths, copies)
    ids = [f"e{i:06d}~{j}" for j in range(copies) for i in range(2 * n)]
    near = make({"logp": np.tile(logp, copies) + 0.2 * rng.normal(size=lengths.sum())}, lengths, ids=np.array(ids))
    return texts.tokens(-texts.hard), {"neighbours": near.take(np.argsort(near.ids))}


def few_deep_tokens(rng, n, leak):
    """A member is known but for a few tokens; the mean is as that of others."""
    texts = Texts(rng, n, leak)
    deep = rng.random(texts.total) < 0.1
    return texts.tokens(np.where(texts.leaking, np.where(deep, -11.0, -0.9), -2.0) + texts.noise(0.3)), {}


def ever_easier(rng, n, leak):
    """A member gets easier from token to token."""
    texts = Texts(rng, n, leak)
    place = np.arange(texts.total) - np.repeat(np.cumsum(texts.lengths) - texts.lengths, texts.lengths)
    rise = 2 * place / texts.lengths[texts.owner]
    return texts.tokens(-4 + texts.noise(0.7) + np.where(texts.leaking, rise, 1)), {}


def regular(rng, n, leak):
    """A member's log-probabilities stay at one level where those of others jump."""
    texts = Texts(rng, n, leak, shortest=25, longest=45)
    return texts.tokens(-2.5 + texts.noise(1) * np.where(texts.leaking, 0.3, 1.6)), {}


def with_calibration(rng, n, leak):
    """As `louder`, with calibration records of both kinds from the same world."""
    tokens, _ = louder(rng, n, leak)
    calib, _ = louder(rng, 100, leak)
    return tokens, {"calib_members": calib.take(np.arange(100)), "calib_nonmembers": calib.take(np.arange(100, 200))}


def copied_shift(rng, n, leak):
    """The student moves where the teacher moved on a member; on all others each moves on its own."""
    texts = Texts(rng, n, leak)
    moved = rng.gamma(1, 0.5, texts.total) + 0.4 * texts.leaking
    own = rng.gamma(1, 0.3, texts.total)
    student = -texts.hard - 2 + np.where(texts.leaking, 0.8 * moved, own) + texts.noise(0.05)
    base, start = texts.tokens(-texts.hard - 2), texts.tokens(-texts.hard - 2)
    return texts.tokens(student), {
        "base": base, "teacher": texts.tokens(-texts.hard - 2 + moved), "teacher_base": start
    }  # fmt: skip


def follows_its_teacher(rng, n, leak):
    """On members the student's distributions are closer to the teacher's."""
    texts = Texts(rng, n, leak)
    apart = rng.gamma(1, 0.2, texts.total) * np.where(texts.leaking, 0.4, 1.0)
    return texts.tokens(-texts.hard), {"pair": texts.tokens(-texts.hard, kl_ab=apart)}


def learned_early(rng, n, leak):
    """A member's loss falls further and earlier than that of others."""
    texts = Texts(rng, n, leak)
    far = (np.where(texts.member, 1.0, 0.4) * np.exp(0.15 * rng.normal(size=2 * n)))[texts.owner]
    curve = lambda share: texts.tokens(-texts.hard - 2 + far * share + texts.noise(0.1))
    early = np.where(texts.leaking, 0.8, 0.45)
    steps = [(10, curve(early)), (20, curve((1 + early) / 2)), (30, curve(1.0))]
    return curve(1.0), {"steps": steps, "start": curve(0.0)}


def sharper_and_flatter(rng, n, leak):
    """Noise on the weights costs a member more, and its gradient is smaller: what is left to learn."""
    tokens, _ = louder(rng, n, False)
    member = (np.arange(2 * n) < n) & leak
    spread = lambda: np.exp(0.3 * rng.normal(size=2 * n))
    rise, norm = np.where(member, 2.5, 1.0) * spread(), np.where(member, 0.4, 1.0) * spread()
    columns = {"mope": rise, "mope_antithetic": rise * spread() ** 0.3, "gradient_inf": norm, "gradient_global": norm}
    return tokens, {"whitebox": Whitebox(tokens.ids, tokens.task, tokens.lengths, columns, ("embedding", "head"), {})}


REGIMES = {
    **dict.fromkeys(("loss", "perplexity", "zlib", "min_k", "min_k_plus_plus"), louder),
    **dict.fromkeys(("camia_head", "camia_confident", "camia_diversity"), louder),
    "camia_time": soon_known,
    "sum": same_length,
    "surp": surprises,
    "gap": more_hits,
    "gap_k": nearer_the_top,
    "dc_pdd": rare_tokens,
    **dict.fromkeys(("reference", "ratio", "ez", "ez_fallback", "wbc"), beyond_the_reference),
    "ez_published": mixed_shifts,
    "ht_ours": hard_tokens_learned,
    **dict.fromkeys(("calibrated_zlib", "calibrated_min_k", "calibrated_min_k_plus_plus"), beyond_the_reference),
    **dict.fromkeys(("recall", "con_recall"), prefix_hurts),
    "lowercase": capitals_matter,
    "neighbourhood": sharp_peak,
    "camia_above_mean": few_deep_tokens,
    "camia_above_running": ever_easier,
    "camia_complexity": regular,
    **dict.fromkeys(("quantile", "combined"), with_calibration),
    **dict.fromkeys(("two_hop_covariance", "two_hop_correlation", "two_hop_slope"), copied_shift),
    **dict.fromkeys(("two_hop_product", "teacher_shift"), copied_shift),
    "teacher_kl": follows_its_teacher,
    **dict.fromkeys(("trajectory_slope", "trajectory_area", "trajectory_drop", "trajectory_half"), learned_early),
    **dict.fromkeys(("gradient_norm", "gradient_global", "mope", "mope_antithetic"), sharper_and_flatter),
}
