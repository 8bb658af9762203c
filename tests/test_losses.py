"""Every divergence against the golden table, a float64 oracle with central differences, its identities and limits.

The oracle writes each definition out over whole rows of probabilities; `kd_jax.losses` works with log-probabilities in
float32 and with closed forms of the gradients, so the two share nothing but the definitions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.head import Loss

# distillation.md 2.6: five ids; D at T = 1, dD/dz_s at T = 1, D at T = 2 (no T^2), computed in float64 elsewhere
Z_S, Z_T = np.array([[0.5, -1, 2, 0, -0.5]]), np.array([[1, 0, 1.5, -1, 0.5]])
GOLDEN = {
    ("fkl", 0.0): (
        0.2119394594,
        [-0.1163480780, -0.0644736202, 0.2323203585, 0.0548003688, -0.1062990290],
        0.0672249098,
    ),
    ("rkl", 0.0): (
        0.1879677769,
        [-0.1142286454, -0.0421911423, 0.1590516777, 0.0669295436, -0.0695614337],
        0.0671674916,
    ),
    ("jsd", 0.5): (
        0.0485215746,
        [-0.0284099657, -0.0121388105, 0.0465818608, 0.0139804305, -0.0200135151],
        0.0166669839,
    ),
    ("jsd", 0.1): (
        0.0186263541,
        [-0.0104180750, -0.0053801440, 0.0197838523, 0.0048847246, -0.0088703579],
        0.0060324728,
    ),
    ("jsd", 0.9): (
        0.0169614557,
        [-0.0102328890, -0.0038753378, 0.0147753338, 0.0057222449, -0.0063893519],
        0.0060281143,
    ),
    ("sfkl", 0.1): (
        0.1639751345,
        [-0.0932513771, -0.0450704413, 0.1689122971, 0.0437181165, -0.0743085953],
        0.0541504467,
    ),
    ("srkl", 0.1): (
        0.1532005518,
        [-0.0917666964, -0.0356514196, 0.1371010683, 0.0490963016, -0.0587792539],
        0.0541192908,
    ),
    ("tvd", 0.0): (
        0.2871207273,
        [-0.1140546897, -0.0254490412, 0.1598312930, 0.0216308133, -0.0419583755],
        0.1729386011,
    ),
    ("akl", 0.5): (
        0.2025229244,
        [-0.1155155244, -0.0557206370, 0.2035390204, 0.0595649405, -0.0918677995],
        0.0671930875,
    ),
}
AKL_WEIGHT = {1.0: 0.6071808883, 2.0: 0.4457790156}
TOP_K = {1: (0.1134366821, 0.1094116495), 2: (0.1138417149, 0.1096486226), 3: (0.1500673772, 0.1305658701)}
TOP_K[4] = (0.2119394594, 0.1879677769)
KINDS = [*GOLDEN, ("akl", 0.2)]
kinds = pytest.mark.parametrize("kind, parameter", KINDS, ids=lambda x: str(x))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(a, b):
    return np.sum(a * (np.log(a) - np.log(b)), axis=-1)


def akl_weight(p, q, mu):
    """[N], by a stable sort: the longest prefix of ascending `p` with at most `mu` of the mass is the tail."""
    order = np.argsort(p, axis=-1, kind="stable")
    in_tail = np.cumsum(np.take_along_axis(p, order, -1), axis=-1) <= mu
    gap = np.take_along_axis(np.abs(p - q), order, -1)
    return (gap * ~in_tail).sum(-1) / gap.sum(-1)


def oracle(kind, b, p, q, w=None):
    """D [N] of probabilities [N, V] in float64; `w` fixes the weights of akl."""
    if kind == "akl":
        w = akl_weight(p, q, b) if w is None else w
        return w * kl(p, q) + (1 - w) * kl(q, p)
    return {
        "fkl": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        "jsd": lambda: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
        "sfkl": lambda: kl(p, b * p + (1 - b) * q),
        "srkl": lambda: kl(q, (1 - b) * p + b * q),
        "tvd": lambda: 0.5 * np.abs(p - q).sum(-1),
    }[kind]()


def slopes(f, z, step=1e-5):
    """df/dz [N, V] by central differences of `f: [N, V] -> [N]`."""
    bumps = step * np.eye(z.shape[1])
    return np.stack([(f(z + bump) - f(z - bump)) / (2 * step) for bump in bumps], axis=-1)


def oracle_gradient(kind, b, zs, zt, T=1.0):
    p, q = (np.exp(log_softmax(z / T)) for z in (zt, zs))
    w = akl_weight(p, q, b) if kind == "akl" else None
    return slopes(lambda z: oracle(kind, b, p, np.exp(log_softmax(z / T)), w), zs)


def ours(kind, parameter, zs, zt, T=1.0):
    """Value [N] and gradient dD/dz_s [N, V] from float32 logits."""
    logp, logq = (jax.nn.log_softmax(jnp.float32(z) / T) for z in (zt, zs))
    f = losses.divergence if kind != "akl" else jax.jit(losses.divergence, static_argnums=(0, 3))
    value, grad = f(kind, logp, logq, parameter)
    return np.asarray(value, np.float64), np.asarray(grad, np.float64) / T


def rows(seed=0, n=40, vocab=11, scale=2.0):
    zs, zt = np.random.default_rng(seed).standard_normal((2, n, vocab)).astype(np.float32).astype(np.float64) * scale
    return zs, zt


def off(got, want, size=1.0):
    """Deviation relative to the wanted numbers; near 0 absolute: 1e-5 here is relative 1e-5, absolute 1e-7 x size.

    `size` is that of the log-ratios which a gradient is a difference of: float32 cannot resolve less.
    """
    return np.max(np.abs(got - want) / (np.abs(want) + 0.01 * size))


@pytest.mark.parametrize("kind, parameter", GOLDEN)
def test_golden_values_and_gradients(kind, parameter, check):
    at_1, gradient, at_2 = GOLDEN[kind, parameter]
    for T, want in ((1.0, at_1), (2.0, at_2)):
        value, grad = ours(kind, parameter, Z_S, Z_T, T)
        check("divergences: golden values", abs(value[0] - want), 2e-7)
        want_grad = oracle_gradient(kind, parameter, Z_S, Z_T, T)
        check("divergences: golden gradients", np.abs(grad - want_grad).max(), 2e-7)
        if T == 1.0:
            check("divergences: golden gradients", np.abs(grad[0] - gradient).max(), 2e-7)


def test_adaptive_weight_golden():
    for T, want in AKL_WEIGHT.items():
        p, q = (np.exp(log_softmax(z / T)) for z in (Z_T, Z_S))
        np.testing.assert_allclose(akl_weight(p, q, 0.5), want, atol=1e-10)
        fkl, rkl, akl = (ours(kind, 0.5, Z_S, Z_T, T)[0] for kind in ("fkl", "rkl", "akl"))
        np.testing.assert_allclose(akl, want * fkl + (1 - want) * rkl, atol=1e-7)


@kinds
@pytest.mark.parametrize("scale, T", [(2.0, 1.0), (2.0, 2.0), (0.3, 0.7), (12.0, 1.0)])
def test_random_and_peaked_rows_against_float64(kind, parameter, scale, T, check):
    zs, zt = rows(scale=scale)
    assert scale < 12 or np.ptp(zs, axis=1).max() > 50, "the last case is peaked"
    p, q = (np.exp(log_softmax(z / T)) for z in (zt, zs))
    value, grad = ours(kind, parameter, zs, zt, T)
    check(f"divergences vs float64: {kind}", off(value, oracle(kind, parameter, p, q)), 3e-5)
    check(
        f"divergences, gradient vs central differences: {kind}",
        off(grad, oracle_gradient(kind, parameter, zs, zt, T), size=1 + value[:, None]),
        3e-5,
    )


@kinds
def test_bounds_and_invariances(kind, parameter):
    zs, zt = rows(1, scale=6.0)
    value, grad = ours(kind, parameter, zs, zt)
    b = parameter
    h2 = -b * np.log(b) - (1 - b) * np.log(1 - b) if b else np.inf
    bound = {"jsd": h2, "sfkl": -np.log(b or 1), "srkl": -np.log(b or 1), "tvd": 1.0}.get(kind, np.inf)
    assert np.all(value >= 0) and np.all(value <= bound * (1 + 1e-6))
    np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-5 * np.abs(grad).max())
    shifted = ours(kind, parameter, zs + 3, zt - 7)
    order = np.random.default_rng(2).permutation(zs.shape[1])
    permuted = ours(kind, parameter, zs[:, order], zt[:, order])
    np.testing.assert_allclose(shifted[0], value, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(shifted[1], grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(permuted[0], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(permuted[1], grad[:, order], rtol=1e-4, atol=1e-5)


@kinds
def test_equal_distributions_have_no_loss_and_no_gradient(kind, parameter):
    for z in (*rows(scale=1.0), *rows(scale=20.0), np.zeros((2, 5))):
        value, grad = ours(kind, parameter, z, z)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_symmetries_and_relations():
    zs, zt = rows(3)
    D = lambda kind, b=0.0, swap=False: ours(kind, b, *((zt, zs) if swap else (zs, zt)))
    close = lambda a, b, rtol=1e-5: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)
    for b in (0.1, 0.5, 0.7):
        close(D("jsd", b)[0], D("jsd", 1 - b, swap=True)[0])
        for part in (0, 1):  # values and gradients
            close(D("jsd", b)[part], b * D("sfkl", b)[part] + (1 - b) * D("srkl", 1 - b)[part])
    close(D("tvd")[0], D("tvd", swap=True)[0])
    assert np.all(D("tvd")[0] <= np.sqrt(D("fkl")[0] / 2)), "Pinsker"


def test_ends_and_limits_of_the_parameters():
    zs, zt = rows(4, scale=1.0)
    D = lambda kind, b=0.0: ours(kind, b, zs, zt)
    ends = [
        ("jsd", 0, "fkl"),
        ("jsd", 1, "rkl"),
        ("sfkl", 0, "fkl"),
        ("srkl", 0, "rkl"),
        ("akl", 0, "fkl"),
        ("akl", 1, "rkl"),
    ]
    for kind, b, plain in ends:
        for got, want in zip(D(kind, b), D(plain)):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    for part in (0, 1):
        for kind, plain in (("sfkl", "fkl"), ("srkl", "rkl")):
            np.testing.assert_allclose(D(kind, 1e-7)[part], D(plain)[part], rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(D(kind, 1.0)[part], 0, atol=1e-6)
    # jsd(b)/b -> fkl and jsd(1-b)/b -> rkl; rows that are close enough for the next order to be small
    zt = zs + 0.3 * zt
    for b, plain in ((1e-3, "fkl"), (1 - 1e-3, "rkl")):
        np.testing.assert_allclose(D("jsd", b)[0].mean() / 1e-3, D(plain)[0].mean(), rtol=2e-3)


def test_forward_kl_is_cross_entropy_without_the_teachers_entropy():
    zs, zt = rows(5)
    logp, logq = log_softmax(zt), log_softmax(zs)
    p = np.exp(logp)
    np.testing.assert_allclose(ours("fkl", 0.0, zs, zt)[0], -(p * logq).sum(-1) + (p * logp).sum(-1), rtol=1e-5)
    target = np.arange(40) % 11
    onehot = np.where(np.eye(11)[target] > 0, 0.0, -np.inf)
    value, grad = losses.divergence("fkl", jnp.float32(onehot), jnp.float32(logq))
    ce, g_ce = losses.cross_entropy(jnp.float32(logq), jnp.asarray(target))
    np.testing.assert_allclose(value, ce, rtol=1e-6)
    np.testing.assert_allclose(grad, g_ce, atol=1e-6)
    np.testing.assert_allclose(ce, -logq[np.arange(40), target], rtol=1e-6)


@pytest.mark.parametrize("kind, parameter, k", [("fkl", 0, 1), ("rkl", 0, 1), ("jsd", 0.5, 0.25), ("jsd", 0.1, 0.09)])
def test_high_temperature_compares_centred_logits(kind, parameter, k, check):
    zs, zt = rows(6)
    T = 1e4
    centred = lambda z: z - z.mean(-1, keepdims=True)
    grad = T**2 * ours(kind, parameter, zs, zt, T)[1]
    check("T^2 gradient at T = 1e4 vs its limit", np.abs(grad - k * (centred(zs) - centred(zt)) / 11).max() / k, 5e-3)


@kinds
@pytest.mark.parametrize("side", ["student", "teacher", "both", "the other's best"])
def test_banned_ids_are_dropped(kind, parameter, side):
    zs, zt = rows(7)
    banned_s, banned_t = np.zeros((2, 11), bool)
    if side in ("student", "both"):
        banned_s[[2, 5]] = True
    if side in ("teacher", "both"):
        banned_t[[2, 7]] = True
    if side == "the other's best":
        zs[:, 3], zt[:, 4] = 40.0, 40.0
        banned_s[4], banned_t[3] = True, True
    zs, zt = np.where(banned_s, -np.inf, zs), np.where(banned_t, -np.inf, zt)
    value, grad = ours(kind, parameter, zs, zt)
    assert np.isfinite(value).all() and np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[:, banned_s], 0)
    kept = ~(banned_s | banned_t)
    p, q = (np.exp(log_softmax(z)) for z in (zt, zs))
    with np.errstate(all="ignore"):
        w = np.nan_to_num(akl_weight(p * kept, q * kept, parameter), nan=0.5) if kind == "akl" else None
        share = lambda z: np.exp(log_softmax(z))[:, kept]
        np.testing.assert_allclose(value, oracle(kind, parameter, p[:, kept], q[:, kept], w), rtol=1e-4, atol=1e-6)
        finite = np.where(banned_s, -1e9, zs)
        want = slopes(lambda z: oracle(kind, parameter, p[:, kept], share(z), w), finite)
    np.testing.assert_allclose(grad, want, rtol=1e-3, atol=1e-5)


def test_adaptive_ties_stay_together():
    """A teacher with equal probabilities has no cut among them: all in the tail, or all in the head."""
    zt = np.log(np.array([[0.1, 0.2, 0.2, 0.2, 0.3]]))
    p, q = np.exp(log_softmax(zt)), np.exp(log_softmax(Z_S))
    for mu, head in ((0.5, [1, 2, 3, 4]), (0.75, [4])):
        gap = np.abs(p - q)[0]
        w = gap[head].sum() / gap.sum()
        value, _ = ours("akl", mu, Z_S, zt)
        np.testing.assert_allclose(value, w * kl(p, q) + (1 - w) * kl(q, p), rtol=1e-5)


def test_largest_threshold_is_exact():
    x = jnp.float32([0.0, 1e-30, 0.25, 0.3, 0.9])
    want = jnp.float32([1e-37, 0.25, np.nextafter(np.float32(0.3), np.float32(0)), 1e-30])
    np.testing.assert_array_equal(losses.largest(lambda t: t <= want, 4), want)
    cut = losses.largest(lambda t: jnp.sum(jnp.where(x <= t[:, None], x, 0.0), axis=-1) <= 0.55, 1)[0]
    assert (x <= cut).tolist() == [True, True, True, True, False]


# ------------------------------------------------------------------------------------------------------------ top k


def top_k(kind, parameter, zs, zt, k):
    logp, logq = (jax.nn.log_softmax(jnp.float32(z)) for z in (zt, zs))
    best, ids = jax.lax.top_k(logp, k)
    value, grad = losses.top_k_divergence(kind, ids, best, logq, parameter)
    return np.asarray(value, np.float64), np.asarray(grad, np.float64)


def coarse(p, ids):
    """Masses of the outcomes: the ids, then everything else."""
    known = np.take_along_axis(p, ids, -1)
    return np.concatenate([known, 1 - known.sum(-1, keepdims=True)], axis=-1)


@pytest.mark.parametrize("k", TOP_K)
def test_top_k_golden(k, check):
    for kind, want in zip(("fkl", "rkl"), TOP_K[k]):
        check("top-k and tail: golden values", abs(top_k(kind, 0.0, Z_S, Z_T, k)[0][0] - want), 2e-7)


@kinds
@pytest.mark.parametrize("k", [1, 4, 9])
def test_top_k_against_float64(kind, parameter, k, check):
    zs, zt = rows(8, scale=1.0)
    p = np.exp(log_softmax(zt))
    ids = np.argsort(-p, axis=-1)[:, :k]
    of_student = lambda z: coarse(np.exp(log_softmax(z)), ids)
    P = coarse(p, ids)
    w = akl_weight(P, of_student(zs), parameter) if kind == "akl" else None
    value, grad = top_k(kind, parameter, zs, zt, k)
    check("top-k and tail vs float64", off(value, oracle(kind, parameter, P, of_student(zs), w)), 1e-4)
    want = slopes(lambda z: oracle(kind, parameter, P, of_student(z), w), zs)
    check("top-k and tail, gradient vs central differences", off(grad, want), 1e-4)


@pytest.mark.parametrize("kind, parameter", [x for x in KINDS if x[0] != "akl"])
def test_top_k_grows_to_the_full_divergence(kind, parameter):
    zs, zt = rows(9, vocab=6, scale=1.0)
    full, grad = ours(kind, parameter, zs, zt)
    values = np.stack([top_k(kind, parameter, zs, zt, k)[0] for k in range(1, 7)])
    assert np.all(values >= 0) and np.all(np.diff(values, axis=0) >= -1e-5) and np.all(values <= full + 1e-5)
    for k in (5, 6):  # the rest is one id, or empty
        value, g = top_k(kind, parameter, zs, zt, k)
        np.testing.assert_allclose(value, full, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(g, grad, rtol=1e-3, atol=1e-5)


def test_top_k_of_peaked_rows_is_finite():
    zs, zt = rows(10, scale=30.0)
    for kind, parameter in KINDS:
        for k in (1, 5, 11):
            assert all(np.isfinite(x).all() for x in top_k(kind, parameter, zs, zt, k))


# ----------------------------------------------------------------------------------------------------------- policy


def test_policy_golden(check):
    """distillation.md 4.5: MiniLLM's loss of six tokens under three whitenings, with its ratios."""
    logq_roll = np.array([-1.5, -0.4, -1.0, -1.25, -0.25, -1.5])
    logq_new = np.array([-1.4, -0.45, -1.3, -1.0, -0.30, -1.9])
    w = np.array([0.8851560841, 1.0194017811, 1.1447202395, 0.7442379060, 1.0854155479, 1.1839559309])
    for advantage, want in (
        ([0.3720089092, 0.1514159315, 0.1897311002, 1.8148227379, -1.2966332026, -2.1488154028], 0.1086461560),
        ([0.3529186390, 0.1436457653, 0.1799947260, 1.7216920209, -1.2300942634, -2.0385452839], 0.1030707937),
        ([0.4139253018, 0.2399770491, 0.2701904163, 1.5516539237, -0.9018798649, -1.5738668261], -0.0265466634),
    ):
        args = [jnp.float32(x) for x in (-logq_new, advantage, logq_roll - np.log(w))]
        value, slope = losses.clipped_policy(*args, 0.2)
        check("policy loss: golden values", abs(np.mean(value) - want), 2e-7)
        ratio = [0.9782487621, 0.9696849696, 0.8480296110, 0.9556203874, 1.0324792070, 0.7936293941]
        # the last ratio is below 0.8 and its advantage negative: clipped, no gradient
        want_slope = np.multiply(advantage, ratio) * [1, 1, 1, 1, 1, 0]
        check("policy loss: golden gradients", np.abs(slope - want_slope).max(), 1e-6)


def test_policy_clips_one_sided(check):
    advantage, ratio = (x.ravel() for x in np.meshgrid([-1.5, -0.1, 0.0, 0.7], [0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 4.0]))
    naive = lambda lr: np.maximum(-advantage * np.exp(lr), -advantage * np.clip(np.exp(lr), 0.8, 1.2))
    ce = 3.0
    value, slope = losses.clipped_policy(
        *(jnp.float32(x) for x in (ce + 0 * ratio, advantage, -ce - np.log(ratio))), 0.2
    )
    check("policy loss vs float64", np.abs(value - naive(np.log(ratio))).max(), 5e-6)
    numeric = -(naive(np.log(ratio) + 1e-6) - naive(np.log(ratio) - 1e-6)) / 2e-6
    check("policy loss vs float64", np.abs(slope - numeric).max(), 5e-6)


# --------------------------------------------------------------------------------------------------------- settings


def test_the_parameter_belongs_to_the_divergence():
    settings = dict(beta=0.3, alpha=0.2, mu=0.7)
    want = dict(fkl=0, rkl=0, tvd=0, jsd=0.3, sfkl=0.2, srkl=0.2, akl=0.7)
    assert {kind: Loss(5, kind, **settings).parameter for kind in losses.DIVERGENCES} == want


@pytest.mark.parametrize("name", ["beta", "alpha", "mu"])
def test_parameters_outside_their_range_are_refused(name):
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            Loss(5, "fkl", **{name: value})
