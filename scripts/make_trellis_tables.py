#!/usr/bin/env python3
"""Trains the level tables of crates/kernels/src/trellis and writes tables.rs.

Needs numpy only (2.4.6 made the committed file; about three minutes on one core):

    python scripts/make_trellis_tables.py crates/kernels/src/trellis/tables.rs

The source is the unit Gaussian. For 1 to 4 bits a segment of 16 coefficients is coded by a
tail-biting trellis of four states (bitshift trellis: the code of coefficient j is the window of
bits + 2 bits that starts at bit bits * j of a circular string of 16 * bits bits). Its table is
trained like Lloyd's quantiser: code the samples optimally, move every level to the mean of the
samples that use it, repeat. Such training ends in local optima, so it starts from several orders of
the Gaussian's quantiles, and the best start is trained on more samples. The tables of 5 and 6 bits
are the optimal quantisers whose levels lie on the grid below, computed from the exact integrals.

All levels are whole multiples of one step, so that products with them are sums of bytes.

The distortions are mean squared errors on fresh samples (1 to 4 bits) or exact (5 and 6 bits).
"""

import argparse
import math
from pathlib import Path

import numpy as np

SEGMENT = 16
STATES = 4
TRELLIS_BITS = [1, 2, 3, 4]
PLAIN_BITS = [5, 6]

# 127 steps reach past the outermost level of 6 bits; smaller steps would cut it off.
STEP = 0.03

HEADER = """\
//! Levels for the unit Gaussian. Written by `scripts/make_trellis_tables.py`; do not edit.

/// What levels are multiples of.
pub const STEP: f32 = {step};

/// Mean squared error on the unit Gaussian, by bits per coefficient.
pub const DISTORTION: [f32; 7] = [{distortion}];

/// Estimate of a coefficient's squared error at a scale s, for a magnitude x that is y = min(x,
/// `REACH` s) within the table's reach: `GRAIN` s² + `SPREAD` y⁴ / s² + (x - y)².
pub(super) const GRAIN: [f32; 7] = [{grain}];

/// See [`GRAIN`]: cells grow with the magnitude.
pub(super) const SPREAD: [f32; 7] = [{spread}];

/// See [`GRAIN`].
pub(super) const REACH: [f32; 7] = [{reach}];
"""


def windows(bits):
    """Windows [state, next state, choice] that lead from a state (their low two bits) to a next
    state (their high two bits), and whether they exist: with one bit the states share a bit."""
    state = np.arange(STATES)[:, None, None]
    following = np.arange(STATES)[None, :, None]
    choice = np.arange(max(1, 1 << (bits - 2)) if bits > 1 else 1)[None, None, :]
    if bits == 1:
        return state | following << 1 | 0 * choice, (state >> 1 == (following & 1)) | (choice < 0)
    return state | choice << 2 | following << bits, (state | following | choice) >= 0


def encode(x, table, bits):
    """Optimal windows [rows, SEGMENT] of samples x [rows, SEGMENT]: for each start state, the
    cheapest path that ends in it."""
    rows = len(x)
    w, exists = windows(bits)
    cost = np.full((rows, STATES, STATES), 1e30, np.float32)  # [row, start, state]
    cost[:, np.arange(STATES), np.arange(STATES)] = 0
    back = np.empty((SEGMENT, rows, STATES, STATES), np.uint8)
    choice = np.empty((SEGMENT, rows, STATES, STATES), np.uint8)
    for j in range(SEGMENT):
        d = (x[:, j, None, None, None] - table[w]) ** 2
        d[:, ~exists] = 1e30
        choice[j] = d.argmin(-1)
        paths = cost[:, :, :, None] + d.min(-1)[:, None]  # [row, start, state, next state]
        back[j] = paths.argmin(2)
        cost = paths.min(2)
    r = np.arange(rows)
    start = cost[:, np.arange(STATES), np.arange(STATES)].argmin(1)
    state = start
    codes = np.empty((rows, SEGMENT), np.int64)
    for j in reversed(range(SEGMENT)):
        before = back[j, r, start, state]
        codes[:, j] = w[before, state, choice[j, r, before, state]]
        state = before
    return codes


def improve(x, table, bits, iterations):
    """Table after some rounds of Lloyd's iteration."""
    for _ in range(iterations):
        codes = encode(x, table, bits).ravel()
        count = np.bincount(codes, minlength=len(table))
        total = np.bincount(codes, x.ravel(), len(table))
        table = np.where(count > 0, total / np.maximum(count, 1), table).astype(np.float32)
    return table


def distortion(x, table, bits):
    return float(np.mean((x - table[encode(x, table, bits)]) ** 2, dtype=np.float64))


def gaussian_quantiles(n):
    samples = np.sort(np.random.default_rng(0).standard_normal(1 << 18))
    return samples[((np.arange(n) + 0.5) / n * len(samples)).astype(int)].astype(np.float32)


def starts(bits, num_random, seed):
    """First tables: the quantiles dealt out to the four next states in turn, then random orders."""
    quantiles = gaussian_quantiles(STATES << bits)
    w = np.arange(STATES << bits)
    reverse = np.array([0, 2, 1, 3])
    yield quantiles[(w & ((1 << bits) - 1)) * STATES + reverse[w >> bits]]
    rng = np.random.default_rng(seed)
    for _ in range(num_random):
        yield rng.permutation(quantiles)


def train(bits, args):
    def samples(seed, rows):
        return np.random.default_rng(seed).standard_normal((rows, SEGMENT), dtype=np.float32)

    few, many = samples(args.seed, args.rows // 8), samples(args.seed + 1, args.rows)
    check = samples(args.seed + 2, args.rows)
    candidates = [improve(few, t, bits, 12) for t in starts(bits, args.starts, args.seed)]
    errors = [distortion(check, t, bits) for t in candidates]
    table = improve(many, candidates[int(np.argmin(errors))], bits, args.iterations)
    grid = on_grid(table)
    table = (grid * STEP).astype(np.float32)
    batches = [samples(args.seed + 3 + i, 20_000) for i in range(args.check_batches)]
    return grid, float(np.mean([distortion(x, table, bits) for x in batches]))


def on_grid(table):
    return np.round(table / STEP).astype(int)


def grid_quantiser(bits):
    """Levels and distortion of the optimal scalar quantiser with levels on the grid: the shortest
    path over positive levels, as it is symmetric."""
    def density(x):
        return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x):
        return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.ravel()]).reshape(x.shape)

    def error(level, low, high):
        mass = below(high) - below(low)
        first = density(low) - density(high)
        top = np.where(np.isinf(high), 0, high)
        second = mass + low * density(low) - top * density(top)
        return second - 2 * level * first + level * level * mass

    grid = np.arange(1, 128) * STEP
    low, high = np.meshgrid(grid, grid, indexing="ij")
    middle = (low + high) / 2
    between = error(low, low, middle) + error(high, middle, high)
    between[low >= high] = np.inf
    cost = error(grid, np.zeros_like(grid), grid)
    back = []
    for _ in range((1 << bits - 1) - 1):
        paths = cost[:, None] + between
        back.append(paths.argmin(0))
        cost = paths.min(0)
    cost = cost + error(grid, grid, np.full_like(grid, np.inf))
    last = int(cost.argmin())
    chosen = [last]
    for previous in reversed(back):
        chosen.append(int(previous[chosen[-1]]))
    positive = np.array(chosen[::-1]) + 1
    return np.concatenate([-positive[::-1], positive]), 2 * float(cost[last])


def nearest_distortion(x, levels):
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    return float(np.mean((x - levels[codes]) ** 2))


def fit_estimate(x, error_at):
    """(grain, spread, reach) whose estimate of the mean squared error of x is close, in relative
    terms, to error_at(s) for scales s around 1. See HEADER for their meaning."""
    x = np.abs(x.ravel().astype(np.float64))
    scales = np.array([0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6])
    errors = np.array([error_at(s) for s in scales])
    best = (np.inf,)
    for reach in np.arange(0.5, 4.0, 0.02):
        within = np.minimum(x, reach * scales[:, None])
        beyond = ((x - within) ** 2).mean(1)
        terms = np.stack([scales**2, (within**4).mean(1) / scales**2], 1) / errors[:, None]
        rest = 1 - beyond / errors
        fit = np.maximum(np.linalg.lstsq(terms, rest, rcond=None)[0], 0)
        best = min(best, (np.sum((terms @ fit - rest) ** 2), *fit, reach))
    return best[1:]


def rust_table(name, doc, levels):
    text = f"\n/// {doc}\n#[rustfmt::skip]\npub(super) const {name}: [i8; {len(levels)}] = [\n"
    for row in np.asarray(levels).reshape(-1, 8):
        numbers = ", ".join(f"{v:4d}" for v in row)
        text += f"    {numbers},\n"
    return text + "];\n"


def listed(values):
    return ", ".join(str(float(f"{v:.4g}")) for v in values)


def main():
    parser = argparse.ArgumentParser(
        description="Train the trellis tables for the unit Gaussian and write them as Rust."
    )
    parser.add_argument("out", type=Path, help="the Rust file to write")
    parser.add_argument("--rows", type=int, default=16_000, help="training segments (default 16000)")
    parser.add_argument("--iterations", type=int, default=20, help="final rounds (default 20)")
    parser.add_argument("--starts", type=int, default=30, help="random first tables (default 30)")
    parser.add_argument(
        "--check-batches", type=int, default=5, help="fresh batches of 20000 segments (default 5)"
    )
    parser.add_argument("--seed", type=int, default=1, help="first seed (default 1)")
    args = parser.parse_args()

    x = np.random.default_rng(args.seed - 1).standard_normal((5_000, SEGMENT), dtype=np.float32)
    errors, grains, spreads, reaches, body = [1.0], [0.0], [0.0], [0.0], ""
    for bits in TRELLIS_BITS + PLAIN_BITS:
        if bits in TRELLIS_BITS:
            table, error = train(bits, args)
            doc = f"Levels of {bits} bit{'s' if bits > 1 else ''}, by window of {bits + 2} bits."
            levels = (table * STEP).astype(np.float32)
            scaled = lambda s: s * s * distortion(x / s, levels, bits)
        else:
            table, error = grid_quantiser(bits)
            doc = f"Levels of {bits} bits, ascending, by code."
            levels = table * STEP
            scaled = lambda s: s * s * nearest_distortion(x / s, levels)
        estimate = fit_estimate(x, scaled)
        body += rust_table(f"LEVELS_{bits}", doc, table)
        for numbers, number in zip((errors, grains, spreads, reaches), (error, *estimate)):
            numbers.append(number)
        shown = ", ".join(f"{v:.4g}" for v in estimate)
        print(f"{bits} bits: {error:.5f} (grain, spread, reach: {shown})", flush=True)
    constants = {"distortion": errors, "grain": grains, "spread": spreads, "reach": reaches}
    header = HEADER.format(step=STEP, **{name: listed(values) for name, values in constants.items()})
    args.out.write_text(header + body)


if __name__ == "__main__":
    main()
