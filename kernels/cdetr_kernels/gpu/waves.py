"""Sines, cosines and wavelengths for the position codes, in fp32 and to the last bits.

`tl.sin` and `tl.exp2` become the hardware's approximations (2^-21 absolute, 2^-22 relative), which
are coarser than what torch computes; the library's sine has a path through local memory. These are
polynomials after an exact reduction of the argument, the same on every architecture and in the
interpreter.

Source: Cephes, sinf.c and exp2f.c (reduction in parts, coefficients).
"""

import math

import triton
import triton.language as tl

from cdetr_kernels.gpu.tiles import Tile

# A sine and a cosine each, so this is 128 features at a time.
PAIRS = 64
# Pi/2 in three parts: the first two have so few bits that multiples up to 2^13 of them are exact.
_PI_2_HIGH = tl.constexpr(1.5703125)
_PI_2_MIDDLE = tl.constexpr(4.837512969970703125e-4)
_PI_2_LOW = tl.constexpr(7.54978995489188e-8)
_STEP_BITS = 12
_FREQUENCIES = 2**12


def frequency_step(temperature: float, features: int) -> tuple[float, float]:
    """Return s so that frequency i is 2^(i s), in two parts: i times the first one is exact.

    Raises:
        ValueError: `temperature` is not a positive number of ordinary size, or there are too many
            features.
    """
    if not 2.0**-100 <= temperature <= 2.0**100:
        raise ValueError(
            f"temperature: expected a positive number (2^-100 to 2^100), got {temperature}"
        )
    if features > 2 * _FREQUENCIES:
        raise ValueError(
            f"channels: expected at most {2 * _FREQUENCIES} for each coordinate, got {features}"
        )
    step = -2.0 * math.log2(temperature) / features
    mantissa, exponent = math.frexp(step)
    high = math.ldexp(round(math.ldexp(mantissa, _STEP_BITS)), exponent - _STEP_BITS)
    return high, step - high


def tile(rows: int, pairs: int, registers: int) -> Tile:
    """Return a tile of rows and pairs: 16 features per thread, or 8 where warps have 64."""
    pairs = min(PAIRS, triton.next_power_of_2(pairs))
    return Tile(rows, pairs, max(1, rows * pairs // 256), 1, registers, shared=1)


@triton.jit
def frequencies(o_i, step_high, step_low):
    """Return 2^(i s): the reciprocals of the wavelengths."""
    i = o_i.to(tl.float32)
    whole = tl.floor(i * step_high + 0.5)
    x = (i * step_high - whole) + i * step_low  # -0.5 to 0.5
    p = 1.535336188319500e-4 * x + 1.339887440266574e-3
    p = p * x + 9.618437357674640e-3
    p = p * x + 5.550332471162809e-2
    p = p * x + 2.402264791363012e-1
    p = p * x + 6.931472028550421e-1
    power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (p * x + 1.0) * power


@triton.jit
def sine_and_cosine(x):
    """Return both, within two units of the last place of 1 for angles up to 12,000."""
    quarters = tl.floor(x * 0.6366197723675814 + 0.5)
    r = ((x - quarters * _PI_2_HIGH) - quarters * _PI_2_MIDDLE) - quarters * _PI_2_LOW
    z = r * r
    sine = -1.9515295891e-4 * z + 8.3321608736e-3
    sine = ((sine * z - 1.6666654611e-1) * z) * r + r
    cosine = 2.443315711809948e-5 * z - 1.388731625493765e-3
    cosine = (cosine * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quadrant = quarters.to(tl.int32)
    swapped = (quadrant & 1) != 0
    first = tl.where(swapped, cosine, sine)
    second = tl.where(swapped, sine, cosine)
    first = tl.where((quadrant & 2) != 0, -first, first)
    second = tl.where(((quadrant + 1) & 2) != 0, -second, second)
    return first, second
