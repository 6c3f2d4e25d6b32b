"""Boxes as centre and size, one register a coordinate: L1 distance, generalized IoU, gradient.

    GIoU = I / U - (H - U) / H      I: intersection, U = A + A' - I: union, H: hull of both boxes
    dGIoU = (1/U + I/U^2 - 1/H) dI + (1/H - I/U^2) dA - U/H^2 dH      A: area of the first box

Source: Rezatofighi et al., "Generalized Intersection over Union".
"""

import triton
import triton.language as tl


@triton.jit
def load_boxes(p_rows, step, mask):
    """The four coordinates of boxes that start at `p_rows`, in fp32; 1 where masked."""
    x = tl.load(p_rows, mask, other=1.0).to(tl.float32)
    y = tl.load(p_rows + step, mask, other=1.0).to(tl.float32)
    w = tl.load(p_rows + 2 * step, mask, other=1.0).to(tl.float32)
    h = tl.load(p_rows + 3 * step, mask, other=1.0).to(tl.float32)
    return x, y, w, h


@triton.jit
def l1_distance(x, y, w, h, tx, ty, tw, th):
    """Sum of the absolute differences of the coordinates."""
    return tl.abs(x - tx) + tl.abs(y - ty) + tl.abs(w - tw) + tl.abs(h - th)


@triton.jit
def generalized_iou(x, y, w, h, tx, ty, tw, th):
    """Generalized IoU of pairs of boxes."""
    left, right, o_left, o_right = x - 0.5 * w, x + 0.5 * w, tx - 0.5 * tw, tx + 0.5 * tw
    top, bottom, o_top, o_bottom = y - 0.5 * h, y + 0.5 * h, ty - 0.5 * th, ty + 0.5 * th
    width = tl.maximum(tl.minimum(right, o_right) - tl.maximum(left, o_left), 0.0)
    height = tl.maximum(tl.minimum(bottom, o_bottom) - tl.maximum(top, o_top), 0.0)
    intersection = width * height
    area = (right - left) * (bottom - top)
    union = area + (o_right - o_left) * (o_bottom - o_top) - intersection
    hull_width = tl.maximum(right, o_right) - tl.minimum(left, o_left)
    hull_height = tl.maximum(bottom, o_bottom) - tl.minimum(top, o_top)
    hull = hull_width * hull_height
    return intersection / union - (hull - union) / hull
