"""Dropout masks from a counter-based generator: a function of (seed, b, n, i, j) and nothing else.

Each attention row (b, n, i) is a SplitMix stream: Philox turns the seed and the row's number into a
start and an odd step, and element j is the mixed value of `start + step * j`. So forward and
backward find the same mask whatever their tiles are, and an element costs about ten integer
instructions, where Philox itself would cost about eighty, more than the attention around it.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014 (streams with a
step each); the mixing function is the finalizer of MurmurHash3; Salmon et al., 2011 (Philox).
"""

import triton
import triton.language as tl


def threshold(dropout_p: float) -> int:
    """Return what `keep` compares 31 random bits with."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


@triton.jit
def row_streams(p_seed, i_row, o_q):
    """Start and step of the rows `o_q` of head `i_row` (image times heads plus head)."""
    zero = o_q * 0
    start, step, _, _ = tl.philox(tl.load(p_seed), o_q, zero + i_row, zero, zero)
    return start, step | 1


@triton.jit
def keep(start, step, o_s, threshold):
    """Return where a weight stays; `start` and `step` broadcast against the keys `o_s`."""
    x = start + step * o_s.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    x = x ^ (x >> 16)
    return (x >> 1).to(tl.int32) >= threshold
