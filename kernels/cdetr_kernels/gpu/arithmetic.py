"""Dots and roundings, with two workarounds for bf16 in triton's interpreter (3.6 to 3.9).

There `tl.dot` multiplies the integers that hold the bits of bf16, and a cast to bf16 truncates.
`PRECISION` is "ieee" or "tf32" in compiled kernels; "interpreted_bf16" does both things right.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, acc=None):
    """Return a times b, plus acc, in fp32."""
    if PRECISION == "interpreted_bf16":
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32" if PRECISION == "tf32" else "ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return the fp32 tensor x in dtype, rounded to nearest, ties to even."""
    if PRECISION == "interpreted_bf16" and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def power(x, exponent, SQUARE: tl.constexpr):
    """Return the tensor x >= 0 to a power >= 0, which is 2 if SQUARE."""
    if SQUARE:
        return x * x
    # The logarithm of 0 is -inf, and 0 times that would be NaN.
    return tl.where(exponent == 0.0, 1.0, tl.exp2(exponent * tl.log2(x)))


@triton.jit
def log1p(x):
    """Return log(1 + x) for 0 <= x <= 1, to 2e-8 relative: 2 atanh(x / (2 + x)) as a series.

    `tl.log(1 + x)` has lost the digits of a small x.
    """
    t = x / (2.0 + x)
    z = t * t
    series = z * (1.0 / 13.0) + 1.0 / 11.0
    series = series * z + 1.0 / 9.0
    series = series * z + 1.0 / 7.0
    series = series * z + 1.0 / 5.0
    series = series * z + 1.0 / 3.0
    return 2.0 * (t + t * z * series)
