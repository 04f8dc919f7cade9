//! Levels for the unit Gaussian. Written by `scripts/make_trellis_tables.py`; do not edit.

/// What levels are multiples of.
pub const STEP: f32 = 0.03;

/// Mean squared error on the unit Gaussian, by bits per coefficient.
pub const DISTORTION: [f32; 7] = [1.0, 0.3159, 0.09418, 0.02565, 0.007051, 0.002532, 0.0006693];

/// Estimate of a coefficient's squared error at a scale s, for a magnitude x that is y = min(x,
/// `REACH` s) within the table's reach: `GRAIN` s² + `SPREAD` y⁴ / s² + (x - y)².
pub(super) const GRAIN: [f32; 7] = [0.0, 0.1614, 0.05042, 0.01372, 0.002952, 0.001593, 0.000386];

/// See [`GRAIN`]: cells grow with the magnitude.
pub(super) const SPREAD: [f32; 7] =
    [0.0, 0.01222, 0.01392, 0.003557, 0.001249, 0.0002626, 9.019e-05];

/// See [`GRAIN`].
pub(super) const REACH: [f32; 7] = [0.0, 1.0, 1.82, 2.48, 2.92, 3.26, 3.76];

/// Levels of 1 bit, by window of 3 bits.
#[rustfmt::skip]
pub(super) const LEVELS_1: [i8; 8] = [
     -38,   12,   39,  -12,   12,  -40,  -12,   39,
];

/// Levels of 2 bits, by window of 4 bits.
#[rustfmt::skip]
pub(super) const LEVELS_2: [i8; 16] = [
      71,  -28,    2,   32,  -29,   25,  -70,   -5,
     -15,  -49,   52,   15,   14,   -7,   43,  -38,
];

/// Levels of 3 bits, by window of 5 bits.
#[rustfmt::skip]
pub(super) const LEVELS_3: [i8; 32] = [
       4,  -27,   68,  -10,   41,  -68,   16,   24,
      -6,   58,   89,  -53,  -36,   31,  -18,    9,
     -20,  -41,  -60,   31,   15,   -1,   48,  -89,
      26,   13,    1,  -44,  -19,  -10,  -30,   46,
];

/// Levels of 4 bits, by window of 6 bits.
#[rustfmt::skip]
pub(super) const LEVELS_4: [i8; 64] = [
      -4,  -42,  100,  -11,   62,   -7,  -13,   24,
     -53,  -30,   17,    2,   35,  -18,    9,  -24,
     -64, -100,    2,   -4,   19,   12,  -36,   38,
      46,   80,  -26,    8,  -12,   29,   54,  -19,
      26,    6,   -8,   49,  -22,   58,   31,  -37,
     -31,  -71,  -47,  -15,  -82,   22,   40,   14,
      12,  -50,  -19,  -29,  -41,    1,   23,   31,
       5,   17,  -59,   -9,   -2,   43,   -3,   70,
];

/// Levels of 5 bits, ascending, by code.
#[rustfmt::skip]
pub(super) const LEVELS_5: [i8; 32] = [
    -108,  -89,  -77,  -67,  -59,  -52,  -46,  -40,
     -35,  -30,  -25,  -20,  -15,  -10,   -6,   -2,
       2,    6,   10,   15,   20,   25,   30,   35,
      40,   46,   52,   59,   67,   77,   89,  108,
];

/// Levels of 6 bits, ascending, by code.
#[rustfmt::skip]
pub(super) const LEVELS_6: [i8; 64] = [
    -125, -108,  -97,  -89,  -82,  -76,  -71,  -66,
     -62,  -58,  -54,  -51,  -48,  -45,  -42,  -39,
     -36,  -33,  -30,  -27,  -24,  -21,  -19,  -17,
     -15,  -13,  -11,   -9,   -7,   -5,   -3,   -1,
       1,    3,    5,    7,    9,   11,   13,   15,
      17,   19,   21,   24,   27,   30,   33,   36,
      39,   42,   45,   48,   51,   54,   58,   62,
      66,   71,   76,   82,   89,   97,  108,  125,
];
