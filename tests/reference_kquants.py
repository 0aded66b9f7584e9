"""ggml's block searches, one block at a time, written from their description: the oracle of the block tests.

float32 throughout; every sum runs left to right, as ``np.add.accumulate`` does. What comes out are the values that the block stands for.
"""

from __future__ import annotations

import numpy as np

F = np.float32
_MAGIC = F(12582912)


def total(values) -> np.float32:
    return np.add.accumulate(np.asarray(values, F), dtype=F)[-1]


def ni(v) -> np.ndarray:
    """Half to even by the mantissa trick, with what it does out of range."""
    return ((np.asarray(v, F) + _MAGIC).astype(F).view(np.int32) & 0x7FFFFF) - 0x400000


def half(v) -> np.float32:
    return F(np.float16(v))


def first_largest(x) -> np.float32:
    return x[np.argmax(np.abs(x))]


def sym(x, top, w):
    m = first_largest(x)
    if abs(m) < F(1e-15):
        return F(0), np.zeros(len(x), np.int64)

    def attempt(s):
        codes = np.clip(ni(s * x), -top, top - 1)
        return codes, total(w * x * codes.astype(F)), total(w * codes.astype(F) * codes.astype(F))

    codes, a, b = attempt(F(-top) / m)
    scale = a / b if b else F(0)
    best = scale * a
    for k in [*range(-9, 0), *range(1, 10)]:
        tried, a, b = attempt(-(F(top) + F(0.1) * F(k)) / m)
        if b > 0 and a * a > best * b:
            codes, scale = tried, a / b
            best = scale * a
    return scale, codes + top


def sym3(x, top):
    m = first_largest(x)
    if abs(m) < F(1e-15):
        return F(0), np.zeros(len(x), np.int64)
    w = x * x
    codes = np.clip(ni(F(-top) / m * x), -top, top - 1)
    a, b = total(w * x * codes.astype(F)), total(w * codes.astype(F) * codes.astype(F))
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            old = F(codes[i])
            a1 = a - w[i] * x[i] * old
            if not a1 > 0:
                continue
            b1 = b - w[i] * old * old
            new = int(np.clip(ni(x[i] * b1 / a1), -top, top - 1))
            if new == codes[i]:
                continue
            a1 = a1 + w[i] * x[i] * F(new)
            b1 = b1 + w[i] * F(new) * F(new)
            if b1 > 0 and a1 * a1 * b > a * a * b1:
                codes[i], a, b, changed = new, a1, b1, True
        if not changed:
            break
    return (a / b if b > 0 else F(0)), codes + top


def aff(x, w, top, first, step, steps, by_size):
    low, high = x.min(), x.max()
    sw, sx = total(w), total(w * x)
    low = min(low, F(0))
    if high <= low:
        return F(0), -low, np.zeros(len(x), np.int64)

    def error(scale, low, codes):
        off = scale * codes.astype(F) + low - x
        return total(w * (np.abs(off) if by_size else off * off))

    inverse = F(top) / (high - low)
    scale = F(1) / inverse
    codes = np.clip(ni(inverse * (x - low)), 0, top)
    best = error(scale, low, codes)
    for k in range(steps + 1):
        inverse = (F(first) + F(step) * F(k) + F(top)) / (high - low)
        tried = np.clip(ni(inverse * (x - low)), 0, top)
        l = tried.astype(F)  # noqa: E741
        s1, s2, sxl = total(w * l), total(w * l * l), total(w * l * x)
        det = sw * s2 - s1 * s1
        if not det > 0:
            continue
        ts, tm = (sw * sxl - sx * s1) / det, (s2 * sx - s1 * sxl) / det
        if tm > 0:
            ts, tm = sxl / s2, F(0)
        now = error(ts, tm, tried)
        if now < best:
            codes, best, scale, low = tried, now, ts, tm
    return scale, -low, codes


def pos(x, top, w):
    m = max(F(0), x.max())
    if m < F(1e-15):
        return F(0), np.zeros(len(x), np.int64)
    chosen = F(top) / m

    def error(t):
        off = x - F(1) / t * np.minimum(ni(t * x), top).astype(F)
        return total(w * off * off)

    best = error(chosen)
    for k in [*range(-4, 0), *range(1, 5)]:
        t = (F(0.1) * F(k) + F(top)) / m
        if (now := error(t)) < best:
            chosen, best = t, now
    codes = np.minimum(ni(chosen * x), top)
    a, b = total(w * x * codes.astype(F)), total(w * codes.astype(F) * codes.astype(F))
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            old = F(codes[i])
            a1, b1 = a - w[i] * x[i] * old, b - w[i] * old * old
            if not (a1 > 0 and b1 > 0):
                continue
            new = min(int(ni(x[i] * b1 / a1)), top)
            if new == codes[i]:
                continue
            a1, b1 = a1 + w[i] * x[i] * F(new), b1 + w[i] * F(new) * F(new)
            if a1 * a1 * b > a * a * b1:
                codes[i], a, b, changed = new, a1, b1, True
        if not changed:
            break
    return (a / b if b > 0 else F(0)), codes


def k_quant(name: str, x: np.ndarray, q: np.ndarray | None) -> np.ndarray:
    """The 256 values of a K-quant block."""
    with np.errstate(all="ignore"):
        return (_affine_k if name in ("Q2_K", "Q4_K", "Q5_K") else _signed_k)(name, x, q)


def _importance(name, x, q):
    square = total(x * x)
    sigma2 = (square if name == "Q2_K" else F(2) * square) / F(256)
    return q * np.sqrt(sigma2 + x * x)


def _affine_k(name, x, q):
    size, top, most = {"Q2_K": (16, 3, 15), "Q4_K": (32, 15, 63), "Q5_K": (32, 31, 63)}[name]
    groups = x.reshape(-1, size)
    if q is not None:
        weights = _importance(name, x, q).reshape(-1, size)
        search = (-0.9, 0.05, 36, False)
    elif name == "Q2_K":
        weights, search = np.abs(groups), (-0.5, 0.1, 15, True)
    else:
        weights = np.stack([np.sqrt(total(g * g) / F(32)) + np.abs(g) for g in groups])
        search = (-1.0, 0.1, 20, False) if name == "Q4_K" else (-0.5, 0.1, 15, False)
    fits = [aff(g, w, top, *search) for g, w in zip(groups, weights, strict=True)]
    parts = []
    for values in (np.array([f[0] for f in fits], F), np.array([f[1] for f in fits], F)):
        if q is not None:
            factor, codes = pos(values, most, np.array([total(w) for w in weights], F))
        else:
            largest = max(F(0), values.max())
            codes = np.minimum(ni(F(most) / largest * values), most) if largest > 0 else np.zeros(len(values), int)
            factor = largest / F(most)
        parts.append((half(factor), codes))
    (d, scales), (dmin, mins) = parts
    out = []
    for g, fit, s, m in zip(groups, fits, scales, mins, strict=True):
        step, offset = d * F(s), dmin * F(m)
        codes = np.clip(ni((g + offset) / step), 0, top) if step else fit[2]
        out.append(step * codes.astype(F) - offset)
    return np.concatenate(out)


def _signed_k(name, x, q):
    top = 4 if name == "Q3_K" else 32
    groups = x.reshape(-1, 16)
    if name == "Q6_K":
        weights = groups * groups if q is None else q.reshape(-1, 16)
        fits = [sym(g, 32, w) for g, w in zip(groups, weights, strict=True)]
    elif q is None:
        fits = [sym3(g, 4) for g in groups]
    else:
        weights = _importance(name, x, q).reshape(-1, 16)
        fits = [sym(g, 4, w) for g, w in zip(groups, weights, strict=True)]
    scales = np.array([f[0] for f in fits], F)
    largest = first_largest(scales)
    if name == "Q6_K":
        if abs(largest) < F(1e-15):
            return np.zeros(256, F)
        inverse = F(-128) / largest
        d, whole = half(F(1) / inverse), np.minimum(ni(inverse * scales), 127)
    elif q is not None:
        factor, codes = sym(scales, 32, np.array([total(w) for w in weights], F))
        d, whole = half(factor), codes - 32
    elif largest == 0:
        return np.zeros(256, F)
    else:
        inverse = F(-32) / largest
        d, whole = half(F(1) / inverse), np.clip(ni(inverse * scales), -32, 31)
    out = []
    for g, fit, s in zip(groups, fits, whole, strict=True):
        step = d * F(s)
        codes = np.clip(ni(g / step), -top, top - 1) if step else fit[1] - top
        out.append(step * codes.astype(F))
    return np.concatenate(out)


def legacy_weighted(name: str, row: np.ndarray, q: np.ndarray) -> np.ndarray:
    """A row in Q4_0, Q4_1, Q5_0 or Q5_1 under importance weights."""
    with np.errstate(all="ignore"):
        weights = q * np.sqrt(total(row * row) / F(len(row)) + row * row)
        out = []
        for x, w in zip(row.reshape(-1, 32), weights.reshape(-1, 32), strict=True):
            if name.endswith("1"):
                scale, minus, codes = aff(x, w, 15 if name[1] == "4" else 31, -0.9, 0.05, 36, False)
                out.append(codes.astype(F) * half(scale) + half(-minus))
            else:
                middle = 8 if name[1] == "4" else 16
                scale, codes = sym(x, middle, w)
                out.append((codes - middle).astype(F) * half(scale))
        return np.concatenate(out)
