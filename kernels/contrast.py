"""Supervised InfoNCE of queries (N,C) against a bank of keys (M,C), with nothing of size N*M stored.

Formula and plain version: `protonb.contrast`. Two ways forward. A small bank (up to 64 keys: prototypes) is one tile:
a program reads its queries once, as they lie in memory, and has all their scores at hand. A larger bank is streamed, as
in flash attention. Both sides are put in class order by index: labels are sorted, vectors stay where they are and are
fetched row by row. A program keeps its queries on chip, walks over the keys with a running maximum and sums their
gradient on the way. The positives, by then one stretch of the order, are walked over once more when the sum over the
negatives is known. If the queries are few, the bank is split over programs and merged in fixed order.
Gradients of the keys, and of queries too wide for the first walk, come from one kernel that owns some rows of one side,
streams the other, as it lies in memory, and makes the scores again.
Scores are in base 2. Probabilities are rounded to the vectors' type for matrix products; for float16, which loses the
small ones, they are raised first (LIFT).
"""
import math

import torch
import triton
import triton.language as tl

from . import common
from .common import INTERPRET, exact_dot

LOG2E, LN2 = math.log2(math.e), tl.constexpr(math.log(2))
INTERPRETED = tl.constexpr(INTERPRET)
ONE_TILE = 64  # most keys of a bank that is one tile
PARTIALS = 24 << 20  # bytes that splitting a walk may cost


@triton.jit
def _rows(p, o_r, m_r, s_r, o_c, s_c, C, EVEN_C: tl.constexpr):
    """Rows `o_r` and channels `o_c` of a matrix, 0 where masked."""
    p_x = p + o_r.to(tl.int64)[:, None] * s_r + o_c.to(tl.int64)[None, :] * s_c  # [R, C]
    if EVEN_C:
        b_x = tl.load(p_x, mask=m_r[:, None], other=0.0)  # [R, C]
    else:
        b_x = tl.load(p_x, mask=m_r[:, None] & (o_c < C)[None, :], other=0.0)  # [R, C]
    return b_x


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """x in the type `dtype`; where a GPU rounds to bfloat16, the interpreter cuts off."""
    if INTERPRETED and dtype == tl.bfloat16:
        b_bits = x.to(tl.int32, bitcast=True)
        x = ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _store_rows(p, o_r, m_r, s_r, o_c, s_c, C, b_x):
    """The same way back, in the type of the matrix."""
    p_x = p + o_r.to(tl.int64)[:, None] * s_r + o_c.to(tl.int64)[None, :] * s_c  # [R, C]
    tl.store(p_x, _narrow(b_x, p.dtype.element_ty), mask=m_r[:, None] & (o_c < C)[None, :])


@triton.jit
def _store_stats(counts, stats, o_n, m_n, m_row, b_lz, b_rho):
    """Who counts; log2 Z, or inf for who takes no part in the backward pass; the mean force of a positive."""
    tl.store(counts + o_n, m_row, mask=m_n)
    tl.store(stats + o_n * 2, tl.where(m_row & (b_lz > -float("inf")), b_lz, float("inf")), mask=m_n)
    tl.store(stats + o_n * 2 + 1, tl.where(m_row, b_rho, 0.0), mask=m_n)


@triton.jit
def _log_weights(w, o_m, m_m, s_w):
    """log2 of the weights of some keys."""
    if w is None:
        b_w = tl.zeros(o_m.shape, tl.float32)  # [M]
    else:
        b_w = tl.log2(tl.load(w + o_m.to(tl.int64) * s_w, mask=m_m, other=1.0).to(tl.float32))  # [M]
    return b_w


@triton.jit
def _dot(a, b, acc, DIRECT: tl.constexpr):
    """acc + a @ b; `a` is rounded to the half type of `b` where products are made in it (DIRECT)."""
    if DIRECT and a.dtype != b.dtype:
        a = _narrow(a, b.dtype)
    if DIRECT and not INTERPRETED:
        acc = tl.dot(a, b, acc)
    else:
        acc = exact_dot(a, b, acc)
    return acc


@triton.jit
def _scores(
    a, o_a, m_a, s_an, s_ac, b, o_b, m_b, s_bn, s_bc, C,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr, DIRECT: tl.constexpr,
):
    """Products of rows of `a` and rows of `b`, some channels at a time."""
    b_s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)  # [A, B]
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_a = _rows(a, o_a, m_a, s_an, o_c, s_ac, C, EVEN_C)  # [A, C]
        b_b = _rows(b, o_b, m_b, s_bn, o_c, s_bc, C, EVEN_C)  # [B, C]
        b_s = _dot(b_a, tl.trans(b_b), b_s, DIRECT)
    return b_s


@triton.jit
def _softplus(x):
    """log(1 + 2**x), with all its digits also where it is small; 0 at -inf."""
    u = tl.exp2(-tl.abs(x))
    z = u / (2.0 + u)  # log(1 + u) = 2 atanh(z), z at most 1/3: seven terms of the series
    s = z * z
    p = 1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13))))))
    return tl.maximum(x, 0.0) * LN2 + 2.0 * z * p


@triton.jit
def _sigmoid(x):
    """1 / (1 + 2**-x); 0 at -inf."""
    return 1.0 / (1.0 + tl.exp2(-x))


@triton.jit
def contrast_tile_fwd_kernel(
    q, y, k, t, w, loss, counts, dq, stats,
    N, M, C, s_qn, s_qc, s_y, s_kn, s_kc, s_t, s_w, s_dn, s_dc, ignore_index, scale, scale2,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr,
    NEED_Q: tl.constexpr, LIFT: tl.constexpr, DIRECT: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M).to(tl.int64)
    b_y = tl.load(y + o_n * s_y, mask=o_n < N).to(tl.int64)  # [N]
    b_t = tl.load(t + o_m * s_t, mask=o_m < M).to(tl.int64)  # [M]
    m_n = (o_n < N) & (b_y >= 0) & (b_y != ignore_index)
    m_m = (o_m < M) & (b_t >= 0) & (b_t != ignore_index)
    b_s = _scores(q, o_n, m_n, s_qn, s_qc, k, o_m, m_m, s_kn, s_kc, C,
                  BLOCK_N, BLOCK_M, BLOCK_C, EVEN_C, DIRECT)
    b_s = b_s * scale2  # [N, M]
    m_same = (b_y[:, None] == b_t[None, :]) & m_n[:, None] & m_m[None, :]
    m_far = (b_y[:, None] != b_t[None, :]) & m_m[None, :]
    b_z = tl.where(m_far, b_s + _log_weights(w, o_m, m_m, s_w)[None, :], -float("inf"))  # [N, M]
    b_top = tl.max(b_z, 1)  # [N]
    b_e = tl.exp2(b_z - tl.where(b_top == -float("inf"), 0.0, b_top)[:, None])  # [N, M]
    b_l = tl.sum(b_e, 1)  # [N]
    b_lz = b_top + tl.log2(b_l)
    b_a = tl.where(m_same, b_lz[:, None] - b_s, -float("inf"))  # [N, M]
    b_pull = _sigmoid(b_a)
    b_n = tl.sum(m_same.to(tl.float32), 1)  # [N]
    b_mean = 1.0 / tl.maximum(b_n, 1.0)
    b_rho = tl.sum(b_pull, 1) * b_mean
    tl.store(loss + o_n, tl.sum(_softplus(b_a), 1) * b_mean, mask=o_n < N)
    _store_stats(counts, stats, o_n, o_n < N, b_n > 0, b_lz, b_rho)
    if NEED_Q:
        b_ds = b_e * (b_rho / tl.maximum(b_l, 1.0))[:, None] - b_pull * b_mean[:, None]  # [N, M]
        b_ds = b_ds * LIFT
        for i_c in range(0, C, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)
            b_k = _rows(k, o_m, m_m, s_kn, o_c, s_kc, C, EVEN_C)  # [M, C]
            b_d = _dot(b_ds, b_k, tl.zeros([BLOCK_N, BLOCK_C], tl.float32), DIRECT) * (scale / LIFT)
            _store_rows(dq, o_n, o_n < N, s_dn, o_c, s_dc, C, b_d)


@triton.jit
def _meet(
    q, b_q, b_row, m_row, k, b_key, m_key, C, s_qn, s_qc, s_kn, s_kc,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_C: tl.constexpr, EVEN_D: tl.constexpr, KEEP: tl.constexpr, LOAD: tl.constexpr, DIRECT: tl.constexpr,
):
    """Products of the queries with some keys, and these keys where asked for (LOAD)."""
    b_k = b_q
    if KEEP:
        b_k = _rows(k, b_key, m_key, s_kn, tl.arange(0, BLOCK_D), s_kc, C, EVEN_D)  # [M, D]
        b_s = _dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), DIRECT)  # [N, M]
    else:
        b_s = _scores(q, b_row, m_row, s_qn, s_qc, k, b_key, m_key, s_kn, s_kc, C,
                      BLOCK_N, BLOCK_M, BLOCK_C, EVEN_C, DIRECT)
        if LOAD:
            b_k = _rows(k, b_key, m_key, s_kn, tl.arange(0, BLOCK_D), s_kc, C, EVEN_D)
    return b_s, b_k


@triton.jit
def _finish(
    q, k, rows, order, loss, counts, dq, stats, b_q, b_v, b_m, b_l, o_n, b_row, m_row, b_first, b_last, lo, hi,
    N, C, s_qn, s_qc, s_kn, s_kc, s_dn, s_dc, scale, scale2,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_C: tl.constexpr,
    EVEN_D: tl.constexpr, KEEP: tl.constexpr, NEED_Q: tl.constexpr, LIFT: tl.constexpr, DIRECT: tl.constexpr,
):
    """The walk over the positives, once the sum over the negatives is known, and what is left to store."""
    b_lz = b_m + tl.log2(b_l)  # [N]
    b_mean = 1.0 / tl.maximum(b_last - b_first, 1).to(tl.float32)
    b_loss, b_rho = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for j in tl.range(lo, hi, BLOCK_P, num_stages=1):
        o_p = j + tl.arange(0, BLOCK_P)
        b_key = tl.load(order + o_p, mask=o_p < hi, other=0)  # [P]
        b_s, _ = _meet(q, b_q, b_row, m_row, k, b_key, o_p < hi, C, s_qn, s_qc, s_kn, s_kc,
                       BLOCK_N, BLOCK_P, BLOCK_C, BLOCK_D, EVEN_C, EVEN_D, KEEP, False, DIRECT)
        m_pos = (o_p[None, :] >= b_first[:, None]) & (o_p[None, :] < b_last[:, None]) & m_row[:, None]
        b_a = tl.where(m_pos, b_lz[:, None] - b_s * scale2, -float("inf"))  # [N, P]
        b_loss += tl.sum(_softplus(b_a), 1)
        b_rho += tl.sum(_sigmoid(b_a), 1)
    tl.store(loss + b_row, b_loss * b_mean, mask=o_n < N)
    _store_stats(counts, stats, b_row, o_n < N, m_row, b_lz, b_rho * b_mean)
    if NEED_Q:
        b_v = b_v * (b_rho / tl.maximum(b_l, 1.0))[:, None]  # [N, D]
        for j in tl.range(lo, hi, BLOCK_P, num_stages=1):
            o_p = j + tl.arange(0, BLOCK_P)
            b_key = tl.load(order + o_p, mask=o_p < hi, other=0)
            b_s, b_k = _meet(q, b_q, b_row, m_row, k, b_key, o_p < hi, C, s_qn, s_qc, s_kn, s_kc,
                             BLOCK_N, BLOCK_P, BLOCK_C, BLOCK_D, EVEN_C, EVEN_D, KEEP, True, DIRECT)
            m_pos = (o_p[None, :] >= b_first[:, None]) & (o_p[None, :] < b_last[:, None]) & m_row[:, None]
            b_a = tl.where(m_pos, b_lz[:, None] - b_s * scale2, -float("inf"))
            b_v = _dot(_sigmoid(b_a) * -LIFT, b_k, b_v, DIRECT)
        b_v = b_v * (b_mean * (scale / LIFT))[:, None]
        b_row = tl.load(rows + o_n, mask=o_n < N, other=0)  # again, so that it holds no registers in the loops
        _store_rows(dq, b_row, o_n < N, s_dn, tl.arange(0, BLOCK_D), s_dc, C, b_v)


@triton.jit
def _queries(rows, first, last, start, i_n, N, M, BLOCK_N: tl.constexpr):
    """A block of queries in class order: their rows, positives, who counts; and where all these positives lie."""
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_row = tl.load(rows + o_n, mask=o_n < N, other=0)  # [N]
    b_first = tl.load(first + o_n, mask=o_n < N, other=0)
    b_last = tl.load(last + o_n, mask=o_n < N, other=0)
    i_start = tl.load(start)
    m_row = (o_n < N) & (b_last > b_first) & (b_first >= i_start)  # keys before the start are ignored
    lo, hi = tl.min(tl.where(m_row, b_first, M), 0), tl.max(tl.where(m_row, b_last, 0), 0)
    return o_n, b_row, b_first, b_last, m_row, i_start, lo, hi


@triton.jit
def contrast_fwd_kernel(
    q, k, logw, rows, order, first, last, start, loss, counts, dq, stats, part, sums,
    N, M, C, splits, s_qn, s_qc, s_kn, s_kc, s_dn, s_dc, scale, scale2,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_C: tl.constexpr, EVEN_D: tl.constexpr, KEEP: tl.constexpr, NEED_Q: tl.constexpr, SPLIT: tl.constexpr,
    LIFT: tl.constexpr, DIRECT: tl.constexpr,
):
    i_n, i_s = tl.program_id(0) // splits, tl.program_id(0) % splits
    o_n, b_row, b_first, b_last, m_row, i_start, lo, hi = _queries(rows, first, last, start, i_n, N, M, BLOCK_N)
    b_m = tl.full([BLOCK_N], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_N], tl.float32)
    b_q, b_v = b_l, b_l
    if KEEP:
        b_q = _rows(q, b_row, m_row, s_qn, tl.arange(0, BLOCK_D), s_qc, C, EVEN_D)  # [N, D]
    if NEED_Q:
        b_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    each = tl.cdiv(M - i_start, splits * BLOCK_M) * BLOCK_M
    j0 = i_start + i_s * each
    j1 = tl.where(hi > 0, tl.minimum(j0 + each, M), j0)  # nobody counts: nothing to do
    for j in range(j0, j1, BLOCK_M):
        o_m = j + tl.arange(0, BLOCK_M)
        b_key = tl.load(order + o_m, mask=o_m < j1, other=0)  # [M]
        b_s, b_k = _meet(q, b_q, b_row, m_row, k, b_key, o_m < j1, C, s_qn, s_qc, s_kn, s_kc,
                         BLOCK_N, BLOCK_M, BLOCK_C, BLOCK_D, EVEN_C, EVEN_D, KEEP, NEED_Q, DIRECT)
        b_s = b_s * scale2
        if logw is not None:
            b_s += tl.load(logw + o_m, mask=o_m < j1, other=0.0)[None, :]
        if ((j < hi) & (j + BLOCK_M > lo)) | (j + BLOCK_M > j1):  # most blocks hold no positive of these queries
            m_far = ((o_m[None, :] < b_first[:, None]) | (o_m[None, :] >= b_last[:, None])) & (o_m < j1)[None, :]
            b_s = tl.where(m_far, b_s, -float("inf"))
        b_top = tl.maximum(b_m, tl.max(b_s, 1))  # [N]
        b_zero = tl.where(b_top == -float("inf"), 0.0, b_top)
        b_p = tl.exp2(b_s - b_zero[:, None])  # [N, M]
        b_old = tl.exp2(b_m - b_zero)
        b_l = b_l * b_old + tl.sum(b_p, 1)
        if NEED_Q:
            b_v = _dot(b_p * LIFT, b_k, b_v * b_old[:, None], DIRECT)
        b_m = b_top
    if SPLIT:
        p_part = part + (i_s.to(tl.int64) * N + o_n) * 2
        tl.store(p_part, b_m, mask=o_n < N)
        tl.store(p_part + 1, b_l, mask=o_n < N)
        if NEED_Q:
            _store_rows(sums, i_s.to(tl.int64) * N + o_n, o_n < N, C, tl.arange(0, BLOCK_D), 1, C, b_v)
    else:
        _finish(q, k, rows, order, loss, counts, dq, stats, b_q, b_v, b_m, b_l, o_n, b_row, m_row, b_first, b_last,
                lo, hi, N, C, s_qn, s_qc, s_kn, s_kc, s_dn, s_dc, scale, scale2,
                BLOCK_N, BLOCK_P, BLOCK_C, BLOCK_D, EVEN_C, EVEN_D, KEEP, NEED_Q, LIFT, DIRECT)


@triton.jit
def contrast_merge_kernel(
    q, k, rows, order, first, last, start, loss, counts, dq, stats, part, sums,
    N, M, C, splits, s_qn, s_qc, s_kn, s_kc, s_dn, s_dc, scale, scale2,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_C: tl.constexpr,
    EVEN_D: tl.constexpr, KEEP: tl.constexpr, NEED_Q: tl.constexpr, LIFT: tl.constexpr, DIRECT: tl.constexpr,
):
    i_n = tl.program_id(0)
    o_n, b_row, b_first, b_last, m_row, i_start, lo, hi = _queries(rows, first, last, start, i_n, N, M, BLOCK_N)
    b_m = tl.full([BLOCK_N], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_N], tl.float32)
    b_q, b_v = b_l, b_l
    if KEEP:
        b_q = _rows(q, b_row, m_row, s_qn, tl.arange(0, BLOCK_D), s_qc, C, EVEN_D)  # [N, D]
    if NEED_Q:
        b_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [N, D]
    for i_s in range(0, splits):
        o_s = tl.full([BLOCK_N], 0, tl.int64) + i_s
        o_s = o_s * N + o_n  # [N]
        b_ms = tl.load(part + o_s * 2, mask=o_n < N, other=-float("inf"))
        b_ls = tl.load(part + o_s * 2 + 1, mask=o_n < N, other=0.0)
        b_top = tl.maximum(b_m, b_ms)
        b_zero = tl.where(b_top == -float("inf"), 0.0, b_top)
        b_old, b_new = tl.exp2(b_m - b_zero), tl.exp2(b_ms - b_zero)
        b_l = b_l * b_old + b_ls * b_new
        if NEED_Q:
            b_vs = _rows(sums, o_s, o_n < N, C, tl.arange(0, BLOCK_D), 1, C, EVEN_D)  # [N, D]
            b_v = b_v * b_old[:, None] + b_vs * b_new[:, None]
        b_m = b_top
    _finish(q, k, rows, order, loss, counts, dq, stats, b_q, b_v, b_m, b_l, o_n, b_row, m_row, b_first, b_last, lo, hi,
            N, C, s_qn, s_qc, s_kn, s_kc, s_dn, s_dc, scale, scale2,
            BLOCK_N, BLOCK_P, BLOCK_C, BLOCK_D, EVEN_C, EVEN_D, KEEP, NEED_Q, LIFT, DIRECT)


@triton.jit
def _query_side(ranks, stats, positives, g, lift, o, m, s_g):
    """Of some queries: class, log Z, the force of all negatives and that of one positive, and which take part."""
    b_y = tl.load(ranks + o, mask=m, other=-2)  # [Q]
    b_lz = tl.load(stats + o * 2, mask=m, other=float("inf"))  # inf: takes no part
    if g is None:
        b_up = tl.full(o.shape, lift, tl.float32)
    else:
        b_up = tl.load(g + o * s_g, mask=m, other=0.0).to(tl.float32) * lift
    b_push = tl.load(stats + o * 2 + 1, mask=m, other=0.0) * b_up
    b_n = tl.load(positives + o, mask=m, other=1)
    b_pull = tl.where(b_lz < float("inf"), b_up / tl.maximum(b_n, 1).to(tl.float32), 0.0)
    return b_y, b_lz, b_push, b_pull, b_lz < float("inf")


@triton.jit
def _key_side(ranks, w, o, m, s_w):
    """Of some keys: class, logarithm of the weight (-inf where ignored), and which take part."""
    b_t = tl.load(ranks + o, mask=m, other=-1)  # [K]
    return b_t, tl.where(b_t >= 0, _log_weights(w, o, b_t >= 0, s_w), -float("inf")), b_t >= 0


@triton.jit
def contrast_bwd_kernel(
    own, other, own_ranks, other_ranks, stats, positives, g, unit, w, out,
    A, B, C, splits, s_an, s_ac, s_bn, s_bc, s_g, s_w, s_os, s_on, s_oc, scale, scale2,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_C: tl.constexpr,
    EVEN_D: tl.constexpr, KEEP: tl.constexpr, OWN_KEYS: tl.constexpr, LIFT: tl.constexpr, DIRECT: tl.constexpr,
):
    i_s, i = tl.program_id(0) % splits, tl.program_id(0) // splits
    chunks = tl.cdiv(C, BLOCK_D)
    o_a = (i // chunks).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    o_d = (i % chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
    lift = LIFT
    if g is not None:
        lift = LIFT / tl.load(unit)
    if OWN_KEYS:
        b_al, b_aw, m_a = _key_side(own_ranks, w, o_a, o_a < A, s_w)
    else:
        b_al, b_alz, b_apush, b_apull, m_a = _query_side(own_ranks, stats, positives, g, lift, o_a, o_a < A, s_g)
    if KEEP:
        b_a = _rows(own, o_a, m_a, s_an, o_d, s_ac, C, EVEN_D)  # [A, D]
    b_sum = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)  # [A, D]
    each = tl.cdiv(B, splits * BLOCK_B) * BLOCK_B
    for j in range(i_s * each, tl.minimum((i_s + 1) * each, B), BLOCK_B):
        o_b = tl.arange(0, BLOCK_B).to(tl.int64) + j
        if OWN_KEYS:
            b_bl, b_blz, b_bpush, b_bpull, m_b = _query_side(
                other_ranks, stats, positives, g, lift, o_b, o_b < B, s_g)
        else:
            b_bl, b_bw, m_b = _key_side(other_ranks, w, o_b, o_b < B, s_w)
        if KEEP:
            b_b = _rows(other, o_b, m_b, s_bn, o_d, s_bc, C, EVEN_D)  # [B, D]
            b_s = _dot(b_a, tl.trans(b_b), tl.zeros([BLOCK_A, BLOCK_B], tl.float32), DIRECT)  # [A, B]
        else:
            b_s = _scores(own, o_a, m_a, s_an, s_ac, other, o_b, m_b, s_bn, s_bc, C,
                          BLOCK_A, BLOCK_B, BLOCK_C, EVEN_C, DIRECT)
            b_b = _rows(other, o_b, m_b, s_bn, o_d, s_bc, C, EVEN_D)
        m_same = b_al[:, None] == b_bl[None, :]
        if OWN_KEYS:
            b_x = b_s * scale2 - b_blz[None, :]  # [A, B]
            b_e = tl.exp2(tl.where(m_same, b_x, b_x + b_aw[:, None]))
            b_ds = tl.where(m_same, -b_bpull[None, :] / (1.0 + b_e), b_bpush[None, :] * b_e)
        else:
            b_x = b_s * scale2 - b_alz[:, None]
            b_e = tl.exp2(tl.where(m_same, b_x, b_x + b_bw[None, :]))
            b_ds = tl.where(m_same, -b_apull[:, None] / (1.0 + b_e), b_apush[:, None] * b_e)
        b_sum = _dot(b_ds, b_b, b_sum, DIRECT)
    b_sum = tl.where(m_a[:, None], b_sum * (scale / lift), 0.0)
    _store_rows(out + i_s.to(tl.int64) * s_os, o_a, o_a < A, s_on, o_d, s_oc, C, b_sum)


@triton.jit
def contrast_sum_kernel(part, out, A, C, splits, s_on, s_oc, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr):
    o_a = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_A, BLOCK_C], tl.float32)  # [A, C]
    for i_s in range(0, splits):
        b_sum += _rows(part, o_a + tl.full([BLOCK_A], 1, tl.int64) * A * i_s, o_a < A, C, o_c, 1, C, False)
    _store_rows(out, o_a, o_a < A, s_on, o_c, s_oc, C, b_sum)


def _direct(q, k):
    """Whether products are made in the vectors' own type: 16 bits, the same on both sides."""
    return q.dtype == k.dtype and q.element_size() == 2


def _lift(x):
    """What probabilities are multiplied by before they are rounded; float16 holds up to 65504."""
    return 2.0**14 if x.dtype == torch.float16 else 1.0


def _tile_blocks(direct, M):
    """(queries, keys, channels at a time, warps, stages) where the bank is one tile.

    Bound by memory: small blocks, so that several programs share a processor and one loads while another computes.
    """
    return 64, max(16, triton.next_power_of_2(M)), 64 if direct else 32, 4 if M <= 32 else 8, 3


def _widest(direct):
    """Channels that the sums of a block of rows may have in registers; wider ones are summed in walks of their own."""
    return 256 if direct else 128


def _blocks(direct, easy, C, forward, sums):
    """Block sizes of a walk that keeps `rows` and streams the others.

    128 rows by 256 channels of sums are what the registers of a processor hold. Where the rows fit beside three blocks
    of 64 streamed ones (161 kB; an sm_80 has 163), they stay on chip: each row of the bank that comes from L2 meets 128
    queries; with fewer, L2 would set the pace (anchors C.3). Five stages: indices are fetched two blocks ahead of rows,
    and rows two ahead of their use. A float32 product is three TF32 ones and takes its operands twice more: half the
    rows and channels, and scores some channels at a time. Rows that can't be read 16 bytes at a time cost a pointer for
    each number, so they come in smaller pieces too.
    """
    wide = max(16, triton.next_power_of_2(min(C, _widest(direct))))
    step = min(wide, 64 if direct and easy else 32 if direct or easy else 16)
    shape = dict(BLOCK_P=32, BLOCK_C=step, BLOCK_D=wide, KEEP=False, num_warps=8)
    if direct and easy and C <= wide:
        return 128, 64 if forward else 32, dict(shape, BLOCK_C=wide, KEEP=True, num_stages=5 if forward else 3)
    if not sums:
        return 128, 64, dict(shape, num_stages=3)
    return (128, 32, dict(shape, num_stages=3)) if direct and easy else (64, 32, dict(shape, num_stages=2))


def _stride(x):
    return 0 if x is None else x.stride(0)


def _easy(x):
    """Whether rows can be read 16 bytes at a time."""
    step, start = x.stride(0) * x.element_size(), x.storage_offset() * x.element_size()
    return x.shape[1] % 16 == 0 and x.stride(1) == 1 and step % 16 == 0 and start % 16 == 0


def _splits(blocks, streamed, block, device, partial, merge):
    """How many programs share a walk over `streamed` rows, so that the fewest blocks come one after the other.

    A share stores `partial` bytes, and merging it takes as long as `merge` blocks.
    """
    n, steps = common.processors(device), triton.cdiv(streamed, block)
    most = max(1, min(n, steps // 4, PARTIALS // partial))
    return min(range(1, most + 1), key=lambda s: triton.cdiv(blocks * s, n) * triton.cdiv(steps, s) + s * merge)


def _labels(y, t, ignore_index):
    """Labels of one type, -1 for those that take no part; smaller integers sort faster."""
    dtype = torch.int64 if max(y.element_size(), t.element_size()) == 8 else torch.int32
    y, t = y.long(), t.long()  # a small type can't be compared with an `ignore_index` outside of it
    return y.masked_fill(y == ignore_index, -1).to(dtype), t.masked_fill(t == ignore_index, -1).to(dtype)


def contrast_fwd(
    q,  # (N,C) queries
    y,  # (N,) their labels, any int type
    k,  # (M,C) keys
    t,  # (M,) their labels
    key_weights,  # (M,) float or None
    temperature,
    ignore_index,
    need_q,  # gradient of the queries wanted?
) -> tuple:  # loss (N,) fp32, counts (N,) bool, gradient of loss[i] by q[i] (N,C) like q or (0,), stats (N,2) fp32
    """Loss of each query, and its gradient in the same walk; stats are log2 Z and the mean force of a positive."""
    (N, C), M, direct = q.shape, len(k), _direct(q, k)
    loss, stats = (torch.empty(shape, dtype=torch.float32, device=q.device) for shape in (N, (N, 2)))
    counts = torch.empty(N, dtype=torch.bool, device=q.device)
    dq = torch.empty_like(q) if need_q else q.new_empty(0)
    if 0 in (N, M):
        return loss.zero_(), counts.zero_(), dq.zero_(), stats.fill_(math.inf)
    arguments = dict(q=q, k=k, loss=loss, counts=counts, dq=dq, stats=stats, N=N, M=M, C=C, s_qn=q.stride(0),
                     s_qc=q.stride(1), s_kn=k.stride(0), s_kc=k.stride(1), s_dn=dq.stride(0), s_dc=dq.stride(-1),
                     scale=1 / temperature, scale2=LOG2E / temperature, LIFT=_lift(q), DIRECT=direct)
    if M <= ONE_TILE:
        BN, BM, BC, warps, stages = _tile_blocks(direct, M)
        common.launch(contrast_tile_fwd_kernel, (triton.cdiv(N, BN),), **arguments, y=y, t=t, w=key_weights,
                      s_y=y.stride(0), s_t=t.stride(0), s_w=_stride(key_weights), ignore_index=ignore_index,
                      BLOCK_N=BN, BLOCK_M=BM, BLOCK_C=BC, EVEN_C=C % BC == 0, NEED_Q=need_q, num_warps=warps,
                      num_stages=stages)
    else:
        wide = C > _widest(direct)
        _streamed_fwd(arguments, *_labels(y, t, ignore_index), key_weights, need_q and not wide)
        if need_q and wide:
            _gradient(dq, q, k, y, t, None, stats, key_weights, temperature, ignore_index, False)
    return loss, counts, dq, stats


def _streamed_fwd(a, y, t, key_weights, need_q):
    """Forward over a bank of more than one tile; `a`: arguments of the kernels."""
    q, k, N, M, C = (a[name] for name in "qkNMC")
    (names, order), (mine, rows) = torch.sort(t, stable=True), torch.sort(y, stable=True)
    first, last = (torch.searchsorted(names, mine, right=right, out_int32=True) for right in (False, True))
    start = torch.searchsorted(names, torch.zeros_like(names[:1]), out_int32=True)  # keys before it are ignored
    BN, BM, shape = _blocks(a["DIRECT"], _easy(q) and _easy(k), C, True, need_q)
    blocks = triton.cdiv(N, BN)
    splits = _splits(blocks, M, BM, q.device, N * (8 + 4 * C * need_q), 0.5 if need_q else 0.01)
    part = torch.empty((splits, N, 2) if splits > 1 else 0, dtype=torch.float32, device=q.device)
    sums = torch.empty((splits, N, C) if splits > 1 and need_q else 0, dtype=torch.float32, device=q.device)
    a.update(rows=rows, order=order.int(), first=first, last=last, start=start, part=part, sums=sums, splits=splits,
             EVEN_C=C % shape["BLOCK_C"] == 0, EVEN_D=C % shape["BLOCK_D"] == 0, NEED_Q=need_q, **shape)
    logw = None if key_weights is None else key_weights[order].float().log2()
    common.launch(contrast_fwd_kernel, (blocks * splits,), **a, logw=logw, BLOCK_N=BN, BLOCK_M=BM, SPLIT=splits > 1)
    if splits > 1:  # the walk over the positives is short: half the rows, to keep more processors busy
        common.launch(contrast_merge_kernel, (triton.cdiv(N, BN // 2),), **a, BLOCK_N=BN // 2)


def _gradient(out, q, k, y, t, g, stats, key_weights, temperature, ignore_index, own_keys):
    """Into `out`: gradient of the keys, or of the queries."""
    direct, C = _direct(q, k), q.shape[1]
    mine, names = _labels(y, t, ignore_index)
    known = torch.sort(names)[0]
    low, high = (torch.searchsorted(known, mine, right=right, out_int32=True) for right in (False, True))
    ranks = torch.searchsorted(known, names, out_int32=True).masked_fill_(names < 0, -1)
    unit = None if g is None else g.abs().amax().float().clamp(min=1e-30)  # float16 holds numbers near 1 best
    own, other, own_ranks, other_ranks = (k, q, ranks, low) if own_keys else (q, k, low, ranks)
    A, B = len(own), len(other)
    BA, BB, shape = _blocks(direct, _easy(q) and _easy(k), C, False, True)
    BA = min(BA, max(16, triton.next_power_of_2(A)))
    del shape["BLOCK_P"]
    blocks = triton.cdiv(A, BA) * triton.cdiv(C, shape["BLOCK_D"])
    splits = _splits(blocks, B, BB, q.device, A * C * 4, 0.1)
    part = out if splits == 1 else torch.empty(splits, A, C, dtype=torch.float32, device=q.device)
    common.launch(contrast_bwd_kernel, (blocks * splits,), own=own, other=other, own_ranks=own_ranks,
                  other_ranks=other_ranks, stats=stats, positives=high - low, g=g, unit=unit, w=key_weights, out=part,
                  A=A, B=B, C=C, splits=splits, s_an=own.stride(0), s_ac=own.stride(1), s_bn=other.stride(0),
                  s_bc=other.stride(1), s_g=_stride(g), s_w=_stride(key_weights), s_os=A * C if splits > 1 else 0,
                  s_on=part.stride(-2), s_oc=part.stride(-1), scale=1 / temperature, scale2=LOG2E / temperature,
                  BLOCK_A=BA, BLOCK_B=BB, EVEN_C=C % shape["BLOCK_C"] == 0, EVEN_D=C % shape["BLOCK_D"] == 0,
                  OWN_KEYS=own_keys, LIFT=_lift(q), DIRECT=direct, **shape)
    if splits > 1:
        common.launch(contrast_sum_kernel, (triton.cdiv(A, 16), triton.cdiv(C, 64)), part=part, out=out, A=A, C=C,
                      splits=splits, s_on=out.stride(0), s_oc=out.stride(1), BLOCK_A=16, BLOCK_C=64)


def contrast_bwd(
    g,  # (N,) gradient of each loss
    q,  # (N,C) queries
    y,  # (N,) their labels
    k,  # (M,C) keys
    t,  # (M,) their labels
    key_weights,  # (M,) float or None
    stats,  # (N,2) from `contrast_fwd`
    temperature,
    ignore_index,
):  # (M,C) like k
    """Gradient of the keys."""
    dk = torch.empty_like(k)
    if 0 in (len(q), len(k)):
        return dk.zero_()
    _gradient(dk, q, k, y, t, g, stats, key_weights, temperature, ignore_index, True)
    return dk
