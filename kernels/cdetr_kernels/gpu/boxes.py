"""Boxes as centre and size, one register per coordinate: L1 distance, generalized IoU, gradient.

    GIoU = I / U - (H - U) / H      I: intersection, U = A + A' - I: union, H: hull of both boxes
    dGIoU = (1/U + I/U^2 - 1/H) dI + (1/H - I/U^2) dA - U/H^2 dH      A: area of the first box

Source: Rezatofighi et al., "Generalized Intersection over Union".
"""

import triton
import triton.language as tl


@triton.jit
def load_boxes(p_rows, step, mask):
    """Load the four coordinates of boxes that start at `p_rows`, in fp32; 1 where masked."""
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
    """Return the generalized IoU of pairs of boxes."""
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


@triton.jit
def sign(x):
    """Return the sign: -1, 0 or 1."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def _above(a, b):
    """Return the derivative of max(a, b) by a; torch too halves it where both are equal."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def generalized_iou_gradient(x, y, w, h, tx, ty, tw, th):
    """Return the derivatives of `generalized_iou` by x, y, w and h."""
    left, right, o_left, o_right = x - 0.5 * w, x + 0.5 * w, tx - 0.5 * tw, tx + 0.5 * tw
    top, bottom, o_top, o_bottom = y - 0.5 * h, y + 0.5 * h, ty - 0.5 * th, ty + 0.5 * th
    width = tl.minimum(right, o_right) - tl.maximum(left, o_left)
    height = tl.minimum(bottom, o_bottom) - tl.maximum(top, o_top)
    m_overlap = (width >= 0.0) & (height >= 0.0)
    width, height = tl.maximum(width, 0.0), tl.maximum(height, 0.0)
    intersection = width * height
    own_width, own_height = right - left, bottom - top
    union = own_width * own_height + (o_right - o_left) * (o_bottom - o_top) - intersection
    hull_width = tl.maximum(right, o_right) - tl.minimum(left, o_left)
    hull_height = tl.maximum(bottom, o_bottom) - tl.minimum(top, o_top)
    hull = hull_width * hull_height
    iou = intersection / union
    by_intersection = tl.where(m_overlap, (1.0 + iou) / union - 1.0 / hull, 0.0)
    by_area = 1.0 / hull - iou / union
    by_hull = -(union / hull) / hull
    by_left = -by_intersection * height * _above(left, o_left)
    by_left -= by_hull * hull_height * _above(o_left, left) + by_area * own_height
    by_right = by_intersection * height * _above(o_right, right)
    by_right += by_hull * hull_height * _above(right, o_right) + by_area * own_height
    by_top = -by_intersection * width * _above(top, o_top)
    by_top -= by_hull * hull_width * _above(o_top, top) + by_area * own_width
    by_bottom = by_intersection * width * _above(o_bottom, bottom)
    by_bottom += by_hull * hull_width * _above(bottom, o_bottom) + by_area * own_width
    dw, dh = 0.5 * (by_right - by_left), 0.5 * (by_bottom - by_top)
    return by_left + by_right, by_top + by_bottom, dw, dh
