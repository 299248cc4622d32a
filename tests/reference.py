"""What fastgen promises, in float64 NumPy: written from the papers and the random-number contract, using none of its code.

Timesteps are 0-based ints or arrays of shape (B,); data is (B, *event).
"""

import mpmath
import numpy as np

MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


# ---- random numbers -------------------------------------------------------------------------------------------------


def philox4x32(counter, key):
    """Philox4x32-10 of Salmon et al., SC'11: four counter words and two key words to four random words, as uint32 arrays."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (right >> SHIFT) ^ c1 ^ k0, right & MASK, (left >> SHIFT) ^ c3 ^ k1, left & MASK
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & MASK, (k1 + np.uint64(0xBB67AE85)) & MASK
    return tuple(word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))


def words(shape, seed, offset=0):
    """The random words of every group of four elements, (B, groups, 4). `seed`: an int, or a list of B ints; `offset` too."""
    batch, event = shape[0], int(np.prod(shape[1:], dtype=np.int64))
    per_sample = not np.isscalar(seed)
    samples = np.zeros(batch, np.uint64) if per_sample else np.arange(batch, dtype=np.uint64)
    seeds = np.array([s % 2**64 for s in (seed if per_sample else [seed])], np.uint64)
    offsets = np.array([offset] if np.isscalar(offset) else offset, np.uint64)
    groups = np.arange(-(-event // 4), dtype=np.uint64)
    seeds, offsets, samples = seeds[:, None], offsets[:, None], samples[:, None]
    return np.stack(philox4x32((groups & MASK, samples, offsets & MASK, offsets >> SHIFT), (seeds & MASK, seeds >> SHIFT)), axis=-1)


def box_muller(r0, r1):
    radius = np.sqrt(-2.0 * np.log((r0.astype(np.float64) + 0.5) * 2.0**-32))
    angle = 2.0 * np.pi * (r1.astype(np.float64) * 2.0**-32)
    return radius * np.cos(angle), radius * np.sin(angle)


def normals(shape, seed, offset=0):
    r = words(shape, seed, offset)
    z = np.stack([*box_muller(r[..., 0], r[..., 1]), *box_muller(r[..., 2], r[..., 3])], axis=-1)
    return z.reshape(shape[0], -1)[:, : int(np.prod(shape[1:], dtype=np.int64))].reshape(shape)


def normals_between(begin, end, seed, offset=0, sample=0):
    """Elements begin … end-1 of one sample of a batch with a single int seed, however far into it."""
    groups = np.arange(begin // 4, -(-end // 4), dtype=np.uint64)
    key = np.uint64(seed % 2**64 & 0xFFFFFFFF), np.uint64(seed % 2**64 >> 32)
    counter = (groups & MASK, np.uint64(sample), np.uint64(offset & 0xFFFFFFFF), np.uint64(offset >> 32))
    r0, r1, r2, r3 = philox4x32(counter, key)
    z = np.stack([*box_muller(r0, r1), *box_muller(r2, r3)], axis=-1).reshape(-1)
    return z[begin % 4 :][: end - begin]


def torch_cuda_normals(count, seed, offset, multiprocessors, threads_per_multiprocessor, dtype="float32", elements=None):
    """The numbers that torch.randn(count) draws on a CUDA GPU whose generator has this seed and offset, or those of the given
    elements of them; and the offset after them. Of ATen/native/cuda/DistributionTemplates.h, calc_execution_policy and
    distribution_elementwise_grid_stride_kernel, and cuRAND's curand_uniform.h, curand_normal.h and curand_philox4x32_x.h.

    The uniform numbers are rounded to float32 as cuRAND rounds them; what is made of them is in float64."""
    numbers = 2 if dtype == "float64" else 4  # by one call of curand_normal4 or curand_normal2_double
    blocks = min(-(-count // 256), multiprocessors * (threads_per_multiprocessor // 256))
    i = np.arange(count, dtype=np.uint64) if elements is None else np.asarray(elements, np.uint64)
    stride, numbers_of = np.uint64(256 * blocks), np.uint64(numbers)
    thread, number, turn = i % stride, i // stride % numbers_of, i // (stride * numbers_of)
    counter, key = turn + np.uint64(offset // 4), np.uint64(seed % 2**64)
    words = philox4x32((counter & MASK, counter >> SHIFT, thread & MASK, thread >> SHIFT), (key & MASK, key >> SHIFT))
    after = offset + 4 * ((count - 1) // (256 * blocks * numbers) + 1) if count else offset
    if dtype == "float64":
        w0, w1, w2, w3 = (word.astype(np.uint64) for word in words)
        u = (w0 ^ w1 << np.uint64(21)).astype(np.float64) * 2.0**-53 + 2.0**-54
        angle = ((w2 ^ w3 << np.uint64(21)).astype(np.float64) * 2.0**-52 + 2.0**-53) * np.pi
    else:
        second, f = number >= 2, np.float32
        a, b = (np.where(second, words[2 + k], words[k]).astype(f).astype(np.float64) for k in range(2))
        two_pi = np.float64(f(6.2831855))
        u = (a * 2.0**-32 + 2.0**-33).astype(f).astype(np.float64)
        angle = (b * (two_pi * 2.0**-32) + two_pi * 2.0**-33).astype(f).astype(np.float64)
    return np.where(number % 2 == 0, np.sin(angle), np.cos(angle)) * np.sqrt(-2.0 * np.log(u)), after


def torch_key_normals(count, seed, offset, dtype="float32"):
    """What torch.func._random.normal gives for a key (seed, offset): `box_muller_float` and `box_muller_double` of torch 2.14's
    ATen/native/PhiloxStatelessRNG.cpp."""
    numbers = 2 if dtype == "float64" else 4
    blocks = np.arange(-(-count // numbers), dtype=np.uint64) + np.uint64(offset)
    key, zero = np.uint64(seed % 2**64), np.uint64(0)
    r = [word.astype(np.float64) for word in philox4x32((blocks & MASK, blocks >> SHIFT, zero, zero), (key & MASK, key >> SHIFT))]
    if dtype == "float64":
        pairs = [((r[0] + (r[1] + 0.5) * 2.0**-32) * 2.0**-32, (r[2] + (r[3] + 0.5) * 2.0**-32) * 2.0**-32)]
    else:
        pairs = [((r[k] + 0.5) * 2.0**-32, (r[k + 1] + 0.5) * 2.0**-32) for k in (0, 2)]
    z = [np.sqrt(-2.0 * np.log(u)) * turned(2 * np.pi * v) for u, v in pairs for turned in (np.cos, np.sin)]
    return np.stack(z, axis=-1).reshape(-1)[:count]


# ---- diffusion ------------------------------------------------------------------------------------------------------


def coefficients(betas, t, ndim):
    """β_t, ᾱ_t and ᾱ_{t−1}, each a scalar or of shape (B, 1, …, 1); ᾱ_{−1} = 1."""
    cumprod = np.array([np.prod(1.0 - np.asarray(betas[:k])) for k in range(len(betas) + 1)])
    t = np.asarray(t, np.int64)
    t = t.reshape(t.shape + (1,) * (ndim - 1)) if t.ndim else t
    return np.asarray(betas)[t], cumprod[t + 1], cumprod[t]


def to_uint8(x):
    """(x + 1)·127.5 of x clamped to −1 … 1, before it is rounded to the nearest integer; 0 of NaN."""
    return (np.clip(np.where(np.isnan(x), -1.0, x), -1.0, 1.0) + 1) * 127.5


def q_sample(x0, betas, t, noise):
    """Ho et al. 2020, equation (4)."""
    _, bar, _ = coefficients(betas, t, x0.ndim)
    return np.sqrt(bar) * x0 + np.sqrt(1.0 - bar) * noise


def q_step(x_prev, betas, t, noise):
    """Ho et al. 2020, equation (2)."""
    beta, _, _ = coefficients(betas, t, x_prev.ndim)
    return np.sqrt(1.0 - beta) * x_prev + np.sqrt(beta) * noise


def q_posterior(x0, x_t, betas, t):
    """Mean and variance of q(x_{t−1} | x_t, x_0), by Bayes' rule: N(x_{t−1}; √ᾱ_{t−1}·x0, 1−ᾱ_{t−1}) times
    N(x_t; √α_t·x_{t−1}, β_t), whose precisions α_t/β_t and 1/(1−ᾱ_{t−1}) add up."""
    beta, _, prev = coefficients(betas, t, x0.ndim)
    alpha = 1.0 - beta
    total = alpha * (1.0 - prev) + beta
    mean = (np.sqrt(prev) * beta * x0 + np.sqrt(alpha) * (1.0 - prev) * x_t) / total
    return mean, beta * (1.0 - prev) / total


def mu_theta(x_t, epsilon, betas, t):
    """Equation (4.3) of the lecture note: the mean of the reverse step."""
    beta, bar, _ = coefficients(betas, t, x_t.ndim)
    return (x_t - beta / np.sqrt(1.0 - bar) * epsilon) / np.sqrt(1.0 - beta)


def predicted_x0(x_t, m, betas, t, prediction, clip=None, threshold=None):
    """What the network's output says x_0 is: from x_t = √ᾱ·x0 + √(1−ᾱ)·ε, or v = √ᾱ·ε − √(1−ᾱ)·x0 (Salimans & Ho 2022)."""
    _, bar, _ = coefficients(betas, t, x_t.ndim)
    if prediction == "epsilon":
        x0 = (x_t - np.sqrt(1.0 - bar) * m) / np.sqrt(bar)
    elif prediction == "v_prediction":
        x0 = np.sqrt(bar) * x_t - np.sqrt(1.0 - bar) * m
    else:
        x0 = m
    if clip is not None:
        x0 = np.clip(x0, -clip, clip)
    if threshold is not None:  # dynamic thresholding, Saharia et al. 2022
        s = threshold.reshape(-1, *[1] * (x_t.ndim - 1))
        x0 = np.clip(x0, -s, s) / s
    return x0


def guided(m, u, g, learned=False):
    """What stands for the network's output under classifier-free guidance, Ho & Salimans 2022, equation (6) with w = g − 1. A
    learned variance stays that of m."""
    if learned:
        (m, v), (u, _) = np.split(m, 2, axis=1), np.split(u, 2, axis=1)
        return np.concatenate([guided(m, u, g), v], axis=1)
    return u + g * (m - u)


def ddpm_step(x_t, m, betas, t, z, prediction="epsilon", variance="posterior", clip=None, threshold=None):
    """(x_{t−1}, x0) of Algorithm 4.2, with σ_t² by `variance`; no noise at t = 0."""
    if variance in ("learned", "learned_range"):
        m, v = np.split(m, 2, axis=1)
    x0 = predicted_x0(x_t, m, betas, t, prediction, clip, threshold)
    mean, tilde = q_posterior(x0, x_t, betas, t)
    beta, _, _ = coefficients(betas, t, x_t.ndim)
    if variance == "posterior":
        sigma = np.sqrt(tilde)
    elif variance == "beta":
        sigma = np.sqrt(beta)
    elif variance == "learned":
        sigma = np.exp(0.5 * v)
    else:  # equation (15) of Nichol & Dhariwal 2021; β̃ at t = 0 only has to be something positive, since nothing uses it
        f = (v + 1.0) / 2.0
        sigma = np.exp(0.5 * (f * np.log(beta) + (1.0 - f) * np.log(np.where(tilde > 0, tilde, beta))))
    t = np.asarray(t, np.int64)
    last = (t == 0).reshape(t.shape + (1,) * (x_t.ndim - 1)) if t.ndim else t == 0
    return np.where(last, mean, mean + sigma * z), x0


def ddim_step(x_t, m, betas, t, z, eta=0.0, prediction="epsilon", clip=None, threshold=None):
    """(x_{t−1}, x0) of Song et al. 2021, equations (12) and (16), with ε read off the clipped x0."""
    _, bar, prev = coefficients(betas, t, x_t.ndim)
    x0 = predicted_x0(x_t, m, betas, t, prediction, clip, threshold)
    epsilon = (x_t - np.sqrt(bar) * x0) / np.sqrt(1.0 - bar)
    sigma = eta * np.sqrt((1.0 - prev) / (1.0 - bar)) * np.sqrt(1.0 - bar / prev)
    direction = np.sqrt(np.maximum(1.0 - prev - sigma**2, 0.0)) * epsilon
    return np.sqrt(prev) * x0 + direction + np.where(sigma == 0, 0.0, sigma * z), x0


# ---- loss -----------------------------------------------------------------------------------------------------------


def bce_with_logits(x, y, weight=None, pos_weight=None, reduction="mean"):
    """−w·(p·y·log σ(x) + (1−y)·log(1−σ(x))), with log σ(x) = −log(e⁰ + e^{−x}) and 0·∞ = 0; equation (2.2) of the lecture note."""
    w, p = 1.0 if weight is None else weight, 1.0 if pos_weight is None else pos_weight
    with np.errstate(invalid="ignore"):
        loss = _zero_wins(w * p * y, np.logaddexp(0.0, -x)) + _zero_wins(w * (1.0 - y), np.logaddexp(0.0, x))
    return {"none": np.asarray, "mean": np.mean, "sum": np.sum}[reduction](loss)


def _zero_wins(coefficient, softplus):
    return np.where((coefficient == 0.0) & (softplus == np.inf), 0.0, coefficient * softplus)


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def bce_with_logits_gradient(x, y, weight=None, pos_weight=None):
    """The derivative by x of each element's loss."""
    p = 1.0 if pos_weight is None else pos_weight
    gradient = (1.0 - y) * sigmoid(x) - p * y * sigmoid(-x)
    return gradient if weight is None else weight * gradient


def diffusion_target(x0, betas, t, noise, prediction):
    """What the network should say: ε (Ho et al. 2020), x0, or v = √ᾱ·ε − √(1−ᾱ)·x0 (Salimans & Ho 2022)."""
    _, bar, _ = coefficients(betas, t, x0.ndim)
    return {"epsilon": noise, "sample": x0, "v_prediction": np.sqrt(bar) * noise - np.sqrt(1.0 - bar) * x0}[prediction]


def min_snr(betas, t, ndim, prediction, gamma):
    """Hang et al. 2023: min(SNR, γ) for the error of x0, which is √(1/SNR) that of ε, and √(1/(SNR + 1)) that of v."""
    _, bar, _ = coefficients(betas, t, ndim)
    snr = bar / (1.0 - bar)
    return np.minimum(snr, gamma) / {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1.0}[prediction]


def diffusion_loss(m, target, weight=1.0, loss="mse", delta=1.0, reduction="mean"):
    """`weight` broadcasts to m; "none" is the mean of each sample."""
    r = np.abs(m - target)
    each = {"mse": r**2, "l1": r, "huber": np.where(r <= delta, 0.5 * r**2, delta * (r - 0.5 * delta))}[loss] * weight
    return {"none": lambda e: e.reshape(len(e), -1).mean(1), "mean": np.mean, "sum": np.sum}[reduction](each)


def diffusion_loss_slope(m, target, weight=1.0, loss="mse", delta=1.0):
    """The derivative of each element's loss by m."""
    r = m - target
    return weight * {"mse": 2.0 * r, "l1": np.sign(r), "huber": np.clip(r, -delta, delta)}[loss]


def gan_loss(real, fake, smoothing=0.0, reduction="mean"):
    """Σ of bce over lists of arrays: targets 1 − smoothing for those of `real`, 0 for those of `fake`."""
    losses = [bce_with_logits(x, 1.0 - smoothing, reduction=reduction) for x in real]
    return sum(losses + [bce_with_logits(x, 0.0, reduction=reduction) for x in fake])


def gan_monitors(real, fake):
    """Mean D(x), mean D(G(z)), accuracy, V(D, G) of equation (2.5), each the mean over the arrays of a list."""
    mean = lambda values: np.mean([np.mean(v) for v in values]) if values else 0.0  # noqa: E731
    right = [mean([0.5 + 0.5 * np.sign(x) for x in real]), mean([0.5 - 0.5 * np.sign(x) for x in fake])]
    accuracy = np.mean(right) if real else right[1]
    value = mean([-np.logaddexp(0.0, -x) for x in real]) + mean([-np.logaddexp(0.0, x) for x in fake])
    return mean([sigmoid(x) for x in real]), mean([sigmoid(x) for x in fake]), accuracy, value


def vlb_variances(betas, t, ndim, variance, v=None):
    """log β̃_t and log σ_t², with β̃_1 in the place of β̃_0 and, where the variance is not learned, of β_0; β_0 if it is alone."""
    betas = np.asarray(betas)
    cumprod = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    low = np.log(betas[1:] * (1.0 - cumprod[1:-1]) / (1.0 - cumprod[2:]))
    low = np.concatenate([low[:1] if len(low) else np.log(betas), low])
    high = np.log(betas)
    t = np.asarray(t, np.int64)
    shaped = lambda a: a[t].reshape(t.shape + (1,) * (ndim - t.ndim if t.ndim else 0))  # noqa: E731
    if variance == "learned":
        return shaped(low), v
    if variance == "learned_range":
        return shaped(low), 0.5 * (v + 1.0) * shaped(high) + 0.5 * (1.0 - v) * shaped(low)
    return shaped(low), shaped(low if variance == "posterior" else np.concatenate([low[:1], high[1:]]))


def gaussian_kl(mean, log_variance, other_mean, other_log_variance):
    """Of N(mean, e^log_variance) from the other, for each element."""
    difference = other_log_variance - log_variance
    return 0.5 * (difference - 1.0 + np.exp(-difference) + (mean - other_mean) ** 2 * np.exp(-other_log_variance))


def reparameterize(mean, log_variance, noise):
    """Kingma & Welling 2014, section 2.4."""
    return mean + np.exp(0.5 * log_variance) * noise


def log_bin(x0, mean, sigma):
    """The discretised decoder of Ho et al. 2020, equation (13), for numbers: as a difference of tails, each with 80 digits."""
    with mpmath.workdps(80):
        middle, half = (mpmath.mpf(x0) - mean) / sigma, mpmath.mpf(1) / 255 / sigma
        below, above = middle - half, middle + half
        if x0 < -0.999:
            below = -mpmath.inf
        if x0 > 0.999:
            above = mpmath.inf
        if below + above < 0:  # the same by symmetry, so that what is subtracted is small
            below, above = -above, -below
        tail = lambda x: mpmath.erfc(x / mpmath.sqrt(2)) / 2  # noqa: E731
        return float(mpmath.log(tail(below) - tail(above)))


def clamped_log_bin(x0, mean, sigma, floor):
    """The decoder of guided-diffusion and denoising-diffusion-pytorch, with their approximation of Φ, and their least value."""
    cdf = lambda x: 0.5 * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    above, below = cdf((x0 - mean + 1 / 255) / sigma), cdf((x0 - mean - 1 / 255) / sigma)
    inside = np.where(x0 < -0.999, above, np.where(x0 > 0.999, 1.0 - below, above - below))
    return np.log(np.maximum(inside, floor))


def vlb_terms(m, x0, x_t, betas, t, prediction, variance, clip=None, decoder="discretized"):
    """(B,), in nats."""
    v = None
    if variance in ("learned", "learned_range"):
        m, v = np.split(m, 2, axis=1)
    ndim = x0.ndim
    found = predicted_x0(x_t, m, betas, t, prediction, clip)
    low, log_variance = vlb_variances(betas, t, ndim, variance, v)
    log_variance = np.broadcast_to(log_variance, x0.shape)
    exact, _ = q_posterior(x0, x_t, betas, t)
    mean, _ = q_posterior(found, x_t, betas, t)
    kl = gaussian_kl(exact, low, mean, log_variance)
    if decoder == "gaussian":
        last = 0.5 * (np.log(2 * np.pi) + log_variance + (x0 - found) ** 2 * np.exp(-log_variance))
    else:
        first = np.broadcast_to(np.asarray(t).reshape(-1, *[1] * (ndim - 1)) == 0, x0.shape)
        last = np.zeros(x0.shape)
        for place in zip(*np.nonzero(first), strict=True):
            last[place] = -log_bin(x0[place], found[place], np.exp(0.5 * log_variance[place]))
    first = np.asarray(t).reshape(-1, *[1] * (ndim - 1)) == 0
    return np.where(first, last, kl).sum(tuple(range(1, ndim)))


def prior_kl(x0, betas):
    """(B,), in nats: the divergence of N(√ᾱ·x0, 1 − ᾱ) from N(0, 1), with the digits that its terms cancel."""
    with mpmath.workdps(80):
        bar = mpmath.mpf(float(np.prod(1.0 - np.asarray(betas))))  # ᾱ is what a schedule has, in float64
        constant = (-bar - mpmath.log(1 - bar)) / 2
    each = 0.5 * float(bar) * x0**2 + float(constant)
    return each.sum(tuple(range(1, x0.ndim)))


def step_log_prob(x_prev, x_t, m, betas, t, step=ddpm_step, **options):
    """(B,): log N(x_{t−1}; μ, σ²), with the mean of a step without noise, and the deviation of one from 0 whose noise is 1."""
    zero = np.zeros_like(x_t)
    learned = options.get("variance") in ("learned", "learned_range")
    still = np.concatenate([zero, np.split(m, 2, axis=1)[1]], axis=1) if learned else zero
    mean, _ = step(x_t, m, betas, t, zero, **options)
    sigma, _ = step(zero, still, betas, t, zero + 1.0, **options)
    each = -0.5 * (((x_prev - mean) / sigma) ** 2 + 2.0 * np.log(sigma) + np.log(2.0 * np.pi))
    return each.sum(tuple(range(1, x_t.ndim)))


def normal_log_density(x, mean, variance):
    """Of each element."""
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2.0 * np.pi * variance))


def step_log_weight(x_prev, x_t, m, betas, t, prediction="epsilon", variance="posterior", clip=None, decoder="gaussian"):
    """(B,): step t of the logarithm in equation (4.8), log p(x_{t−1} | x_t)/q(x_t | x_{t−1}); with the last one log p(x_T) too."""
    ndim, v, t = x_t.ndim, None, np.asarray(t, np.int64)
    if variance in ("learned", "learned_range"):
        m, v = np.split(m, 2, axis=1)
    beta, _, _ = coefficients(betas, t, ndim)
    mean, _ = q_posterior(predicted_x0(x_t, m, betas, t, prediction, clip), x_t, betas, t)
    _, log_variance = vlb_variances(betas, t, ndim, variance, v)
    each = normal_log_density(x_prev, mean, np.exp(log_variance)) if decoder == "gaussian" else 0.0
    each = each - normal_log_density(x_t, np.sqrt(1.0 - beta) * x_prev, beta)
    last = (t == len(betas) - 1).reshape(t.shape + (1,) * (ndim - 1 if t.ndim else 0))
    each = each + np.where(last, normal_log_density(x_t, 0.0, 1.0), 0.0)
    return each.sum(tuple(range(1, ndim)))
