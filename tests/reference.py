"""The oracle: objectives as slow float64 loops straight from the formulas. No code shared with the package."""

from __future__ import annotations

import math


def log_sum(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def unit(rows):
    """Rows, or K rows per example, scaled to length 1."""
    if isinstance(rows[0][0], list):
        return [unit(several) for several in rows]
    return [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]


def squared_distance(a, b):
    return sum((v - w) ** 2 for v, w in zip(a, b, strict=True))


def inner(a, b):
    return sum(v * w for v, w in zip(a, b, strict=True))


def negative_pairs(x, y, hard, negatives, ids=None):
    """(i, candidate) for every negative, ids [N][V] telling which texts are equal; hard [N][D] or [N][K][D]."""
    n = len(x)
    hard = None if hard is None else [row if isinstance(row[0], list) else [row] for row in hard]
    ids = ids or [
        [(i, "own"), (i, "own"), *((i, f"hard {k}") for k in range(len(hard[0]) if hard else 0))] for i in range(n)
    ]
    pairs = []
    for i in range(n):
        for j in range(n):
            if not set(map(str, ids[i][:2])) & set(map(str, ids[j][:2])):
                if negatives in ("same_view", "both"):
                    pairs.append((i, x[j]))
                if negatives in ("cross_view", "both"):
                    pairs.append((i, y[j]))
            for k, candidate in enumerate(hard[j] if hard else ()):
                if str(ids[j][2 + k]) not in set(map(str, ids[i][:2])):
                    pairs.append((i, candidate))
    return pairs


# f and f' as printed in textbooks, un-normalized; f(1) = 0
GENERATORS = {
    "kl": (lambda u: u * math.log(u), lambda u: math.log(u) + 1),
    "js": (lambda u: u * math.log(u) - (1 + u) * math.log((1 + u) / 2), lambda u: math.log(2 * u / (1 + u))),
    "pearson": (lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1)),
    "sh": (lambda u: (math.sqrt(u) - 1) ** 2, lambda u: 1 - 1 / math.sqrt(u)),
    "tsallis": (lambda u: (u**3 - 1) / 2, lambda u: 1.5 * u**2),
    "vlc": (lambda u: (u - 1) ** 2 / (u + 1), lambda u: (u - 1) * (u + 3) / (u + 1) ** 2),
    "jeffrey": (lambda u: (u - 1) * math.log(u), lambda u: math.log(u) + 1 - 1 / u),
    "rkl": (lambda u: -math.log(u), lambda u: -1 / u),
    "neyman": (lambda u: (1 - u) ** 2 / u, lambda u: 1 - 1 / u**2),
}


AT_ZERO = {"kl": 0.0, "js": math.log(2), "pearson": 1.0, "sh": 1.0, "tsallis": -0.5, "vlc": 1.0}  # f(0), if finite


def fmicl(x, y, name, gamma, alpha, negatives="same_view", hard=None, ids=None):
    """The paper's objective up to a constant: with f'(1) = 0, and the conjugate 0 at u = 0 (at u = 1 if f(0) = inf)."""
    f, slope = GENERATORS[name]
    x, y = unit(x), unit(y)
    hard = None if hard is None else unit(hard)

    def u(a, b):
        return math.exp(-gamma * squared_distance(a, b))

    positive = sum(slope(u(a, b)) - slope(1) for a, b in zip(x, y, strict=True)) / len(x)
    pairs = negative_pairs(x, y, hard, negatives, ids)
    conjugates = [(v := u(x[i], c)) * slope(v) - f(v) + AT_ZERO.get(name, -slope(1)) for i, c in pairs]
    return -positive + alpha * sum(conjugates) / len(pairs)


def infonce(x, y, temperature, negatives="cross_view", hard=None, ids=None):
    x, y = unit(x), unit(y)
    hard = None if hard is None else unit(hard)
    pairs = negative_pairs(x, y, hard, negatives, ids)
    total = 0.0
    for i in range(len(x)):
        own = inner(x[i], y[i]) / temperature
        logits = [own, *(inner(x[i], c) / temperature for k, c in pairs if k == i)]
        total += log_sum(logits) - own
    return total / len(x)


def align_uniform(x, y, gamma, alpha, negatives="same_view", hard=None, ids=None):
    x, y = unit(x), unit(y)
    hard = None if hard is None else unit(hard)
    align = sum(squared_distance(a, b) for a, b in zip(x, y, strict=True)) / len(x)
    pairs = negative_pairs(x, y, hard, negatives, ids)
    return align + alpha * math.log(sum(math.exp(-gamma * squared_distance(x[i], c)) for i, c in pairs) / len(pairs))


def spectral(x, y, alpha, negatives="cross_view", hard=None, ids=None):
    x, y = unit(x), unit(y)
    hard = None if hard is None else unit(hard)
    pairs = negative_pairs(x, y, hard, negatives, ids)
    attraction = sum(inner(a, b) for a, b in zip(x, y, strict=True)) / len(x)
    return -2 * attraction + alpha * sum(inner(x[i], c) ** 2 for i, c in pairs) / len(pairs)
