"""Compute the series of ``xr_aimz/random/coefficients.py``, when it is run.

The quantile of a distribution near the normal is a function of the signed root of its deviance
(Temme 1979, SIAM J. Math. Anal. 10; 1992, Mathematics of Computation 58; Giles 2016, ACM TOMS 42,
Algorithm 955). Leading terms are solved for here, and what is left of the exact quantile, found by
bisection, is fitted by least squares, weighted by the density: so the largest error of the
distribution function is what is printed.
"""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

import numpy as np
from numpy.polynomial import chebyshev, polynomial
from scipy import special

OUT = Path(__file__).parents[2] / "xr_aimz" / "random" / "coefficients.py"
NODES, CURVES = 56, 20


def nodes(count: int) -> np.ndarray:
    return np.cos(np.pi * (np.arange(count) + 0.5) / count)


def bisect(is_below, low, high) -> np.ndarray:
    """Find where a rising function crosses, elementwise."""
    for _ in range(100):
        middle = (low + high) / 2
        below = is_below(middle)
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def density(w: np.ndarray) -> np.ndarray:
    return np.exp(-(w**2) / 2) / np.sqrt(2 * np.pi)


class Fit:
    """Least squares in Chebyshev polynomials of ``t`` in [-1, 1] and ``u`` in [0, 1]."""

    def __init__(self, t: np.ndarray, u: np.ndarray):
        self.t, self.u = t, u

    def powers(self, degrees: tuple[int, int]) -> list[tuple[int, int]]:
        a, b = degrees
        pairs = itertools.product(range(a + 1), range(b + 1))
        return [(i, j) for i, j in pairs if i / (a + 0.5) + j / (b + 0.5) <= 1.35]

    def basis(self, degrees: tuple[int, int]) -> np.ndarray:
        in_t = chebyshev.chebvander(self.t, degrees[0])
        in_u = chebyshev.chebvander(2 * self.u - 1, degrees[1])
        return np.stack([in_t[..., i] * in_u[..., j] for i, j in self.powers(degrees)], -1)

    def solve(self, name, degrees, scales, y, weight) -> list[list[list[float]]]:
        """Fit ``y (..., m)`` by one series for each scale ``(m,)``; return their powers."""
        parts = [
            self.basis(d)[..., None, :] * s[:, None] for d, s in zip(degrees, scales, strict=True)
        ]
        a = np.concatenate(np.broadcast_arrays(*parts) if len(parts) == 1 else parts, -1)
        k = np.isfinite(y)
        found, *_ = np.linalg.lstsq(a[k] * weight[k][:, None], (y * weight)[k], rcond=None)
        print(
            f"{name}: {found.size} coefficients, {np.abs((a @ found - y) * weight)[k].max():.1e}"
        )
        stops = np.cumsum([len(self.powers(d)) for d in degrees])
        return [
            self.as_powers(d, c) for d, c in zip(degrees, np.split(found, stops[:-1]), strict=True)
        ]

    def as_powers(self, degrees, coefficients) -> list[list[float]]:
        """Convert to powers of ``t``, each a polynomial by powers of ``u``."""
        a, b = degrees
        table = np.zeros((a + 1, b + 1))
        for (i, j), c in zip(self.powers(degrees), coefficients, strict=True):
            table[i, j] = c
        by_t = np.apply_along_axis(
            lambda c: np.pad(p := chebyshev.cheb2poly(c), (0, a + 1 - len(p))), 0, table
        )
        shifted = [np.array([1.0]), np.array([-1.0, 2.0])][: b + 1]
        for _ in range(2, b + 1):
            step = polynomial.polymul([-2.0, 4.0], shifted[-1])
            shifted.append(polynomial.polysub(step, shifted[-2]))
        rows = []
        for row in by_t:
            powers = np.zeros(b + 1)
            for c, p in zip(row, shifted, strict=True):
                powers[: len(p)] += c * p
            last = np.flatnonzero(np.abs(powers) > 1e-10)
            rows.append([float(c) for c in powers[: last[-1] + 1]] if last.size else [0.0])
        return rows


# Counts: a binomial of n tries with p <= 1/2, and variance m = n p (1 - p); a Poisson has p = 0.
# P(X < x) = Phi(w), and v = w / sqrt(m). Bounds are 0.92 of where the count is 0 or n.
COUNT_LOW = (-0.92 * 1.414, -0.92 * 0.822 / 2, -0.92 * 2.12 / 4)  # by powers of u = 2 p
COUNT_HIGH = (3.0, 0.0, -0.6, 0.0, -0.22)
VARIANCES = np.array([8, 9, 10.0, 12, 15, 20, 30, 50, 100, 200, 500])


def deviance_root(r, p):
    deviance = special.xlogy(r, r / p) + special.xlogy(1 - r, (1 - r) / (1 - p))
    return np.sign(r - p) * np.sqrt(np.maximum(2 * deviance / (p * (1 - p)), 0))


def count_quantile(w, n, p):
    """Return the real ``x`` with ``P(X < x) = Phi(w)``, from the smaller tail."""
    w, n, p = np.broadcast_arrays(w, n, p)
    tail, upper = special.log_ndtr(-np.abs(w)), w > 0

    def is_below(x):
        with np.errstate(divide="ignore"):
            above = np.log(special.betainc(x, n - x + 1, p)) > tail
            return np.where(upper, above, np.log(special.betainc(n - x + 1, x, 1 - p)) < tail)

    return bisect(is_below, np.full(w.shape, 1e-9), n + 1 - 1e-9)


def fit_counts():
    u = (nodes(CURVES) + 1) / 2
    u[-1] = 1e-5  # the Poisson
    t, u = np.meshgrid(nodes(NODES), u, indexing="ij")
    p = u / 2
    low, high = polynomial.polyval(u, COUNT_LOW), polynomial.polyval(u, COUNT_HIGH)
    v = (t * (high - low) + high + low) / 2
    r = bisect(lambda r: deviance_root(r, p) < v, np.zeros_like(v), np.ones_like(v))
    w, n = v[..., None] * np.sqrt(VARIANCES), VARIANCES / (p * (1 - p))[..., None]
    x = count_quantile(np.clip(w, -30, 30), n, p[..., None])
    odds = np.log(r * (1 - p) / (p * (1 - r)))
    shift = np.log(v * np.sqrt(r / (1 - r) * p * (1 - p)) * (1 - p) / (r - p)) / odds
    far = np.abs(v) > 0.01  # nearer, the terms are differences of nearly equal numbers
    square = np.where(far, ((r - p) / (p * (1 - p)) - v) / v**2, np.nan)
    shift = np.where(far, shift, np.nan)
    rest = np.where((np.abs(w) < 12), x - n * r[..., None] - shift[..., None], np.nan)
    fit, slope = Fit(t, u), density(w) / np.sqrt(VARIANCES)
    ones = np.ones(1)
    square_weight = (w**2 * slope).max(-1, keepdims=True) + 1e-3
    return [
        *fit.solve("count, square", [(10, 6)], [ones], square[..., None], square_weight),
        *fit.solve(
            "count, shift",
            [(10, 6)],
            [ones],
            shift[..., None],
            slope.max(-1, keepdims=True) + 1e-4,
        ),
        *fit.solve(
            "count, rest",
            [(10, 5), (8, 4), (8, 4)],
            [VARIANCES**-k for k in (1.0, 2.0, 3.0)],
            rest,
            slope + 1e-5,
        ),
    ]


# Gamma of shape a >= 8: P(X < x) = Phi(w), s = w / sqrt(a), and log(x / a) is fitted.
GAMMA_LOW, GAMMA_HIGH = -3.3, 3.3
SHAPES = np.array([8, 9, 10.0, 12, 15, 20, 30, 50, 100, 200, 500])


def gamma_root(y):
    return np.sign(y) * np.sqrt(2 * (np.expm1(y) - y))


def fit_gamma():
    t = nodes(NODES)
    s = (t * (GAMMA_HIGH - GAMMA_LOW) + GAMMA_HIGH + GAMMA_LOW) / 2
    y = bisect(lambda y: gamma_root(y) < s, np.full_like(s, -20.0), np.full_like(s, 5.0))
    w = s[:, None] * np.sqrt(SHAPES)
    tail, upper = special.log_ndtr(-np.abs(w)), w > 0

    def is_below(z):
        x = SHAPES * np.exp(z)
        with np.errstate(divide="ignore"):
            above = np.log(special.gammaincc(SHAPES, x)) > tail
            return np.where(upper, above, np.log(special.gammainc(SHAPES, x)) < tail)

    z = bisect(is_below, np.full(w.shape, -20.0), np.full(w.shape, 5.0))
    far = np.abs(s) > 1e-3
    rest = np.where((np.abs(w) < 12), z - y[:, None], np.nan)
    fit, ones = Fit(t, np.ones_like(t)), np.ones(1)
    slope = density(w) * np.sqrt(SHAPES)
    return [
        *fit.solve(
            "gamma, slope", [(14, 0)], [ones], np.where(far, y / s, np.nan)[:, None],
            np.abs(w * density(w)).max(-1, keepdims=True) + 1e-3,
        ),
        *fit.solve(
            "gamma, rest", [(11, 0), (9, 0), (7, 0)], [SHAPES**-k for k in (1.0, 2.0, 3.0)],
            rest, slope + 1e-5,
        ),
    ]  # fmt: skip


# Normal, of the mass P of a tail (Giles 2012, "Approximating the erfinv function", GPU Computing
# Gems 2): of the depth L = -log(4 P (1 - P)) in the middle, and of its root in the tail.
NORMAL_SPLIT, NORMAL_END = 5.0, 45.0


def fit_normal():
    t, ones = nodes(400), np.ones(1)
    fit = Fit(t, np.ones_like(t))

    def of_depth(depth):
        mass = np.exp(-depth) / 2 / (1 + np.sqrt(-np.expm1(-depth)))
        return mass, -special.ndtri(mass)

    depth = (t + 1) / 2 * NORMAL_SPLIT
    root = (t + 1) / 2 * (NORMAL_END**0.5 - NORMAL_SPLIT**0.5) + NORMAL_SPLIT**0.5
    mass, z = of_depth(depth)
    center = z / (1 - 2 * mass)
    tail = of_depth(root**2)[1] / root
    return [
        *fit.solve("normal, center", [(9, 0)], [ones], center[:, None], (1 / center)[:, None]),
        *fit.solve("normal, tail", [(9, 0)], [ones], tail[:, None], (1 / tail)[:, None]),
    ]


def write(out: Path) -> None:
    tables = {
        "NORMAL_CENTER, NORMAL_TAIL": fit_normal(),
        "GAMMA": fit_gamma(),
        "COUNT": fit_counts(),
    }
    lines = [
        '"""Coefficients of quantiles, computed by ``tests/references/quantile_series.py``.',
        "",
        "A series is a tuple of the coefficients of the powers of a position from -1 to 1; each",
        "of those is a tuple of the coefficients of the powers of a second variable.",
        '"""',
        "",
        "# fmt: off",
        f"NORMAL_SPLIT, NORMAL_END = {NORMAL_SPLIT}, {NORMAL_END}",
        f"GAMMA_LOW, GAMMA_HIGH, LEAST_SHAPE = {GAMMA_LOW}, {GAMMA_HIGH}, {SHAPES[0]}",
        f"COUNT_LOW = {tuple(float(f'{c:.9g}') for c in COUNT_LOW)}",
        f"COUNT_HIGH = {COUNT_HIGH}",
        f"LEAST_VARIANCE = {VARIANCES[0]}",
    ]
    for name, series in tables.items():
        lines.append(f"{name} = (")
        for powers in series:
            lines.append("    (")
            lines.extend(
                textwrap.wrap(
                    ", ".join(as_row(row) for row in powers) + ",",
                    99,
                    initial_indent=" " * 8,
                    subsequent_indent=" " * 8,
                )
            )
            lines.append("    ),")
        lines.append(")")
    out.write_text("\n".join(lines) + "\n")


def as_row(row: list[float]) -> str:
    numbers = ", ".join(f"{c:.8g}" if "." in f"{c:.8g}" else f"{c:.8g}." for c in row)
    return f"({numbers},)" if len(row) == 1 else f"({numbers})"


if __name__ == "__main__":
    write(OUT)
