"""Cross-entropy of logits brought to the size of the labels, bilinear with align_corners=True, and never stored there.

The output rows between the same two rows of logits (an interval, about H/h of them) see the same numbers: a program
takes one interval and a block of output columns, loads the four logits around each column once per class (one class at
a time, along the columns, again and again from cache) and moves down the rows with one multiply-add per value.
Backward, a program adds up its interval in registers, for the logit rows above and below; a matrix product with the
bilinear weights brings the columns together, and a second kernel adds what the neighbours hold. Every pixel is visited
once per pass, without atomics. In between lie little more than two float32 copies of the logits, and two more for each
further 32 rows of an interval; nothing where the sizes are equal.
"""
import torch
import triton
import triton.language as tl

from . import common
from .common import exact_dot

CELLS = tl.constexpr(16)
INF = tl.constexpr(float("inf"))  # of columns outside: probability 0
FAR = tl.constexpr(-1e30)  # logit of a class that does not exist; not -inf, since inf-inf is nan


@triton.jit
def first_output(i, step, ratio, n_in, n_out):
    """First output at or after cell `i`: those up to first_output(i+1)-1 lie between the cells `i` and `i+1`."""
    o = (i * ratio).to(tl.int32) - 1  # at most 3 too low: rounding can move this and the position over an integer
    for _ in tl.static_range(3):
        o += (tl.minimum(o * step, n_in - 1) < i).to(tl.int32)
    return tl.minimum(tl.maximum(o, 0), n_out)


@triton.jit
def cells(o, step, n_in):
    """Cell before each output, cell after it, share of the latter; any `o` >= 0 gets cells that exist."""
    at = tl.minimum(o * step, n_in - 1)  # the product rounded in float32 first, as PyTorch's resize does
    low = at.to(tl.int32)
    return low, tl.minimum(low + 1, n_in - 1), at - low


@triton.jit
def between(p_low, p_high, share):
    """Logits between two cells of a row. A share of 0 gives the first, bit for bit."""
    low, high = tl.load(p_low).to(tl.float32), tl.load(p_high).to(tl.float32)
    return tl.fma(share, high - low, low)


@triton.jit
def exp(x):
    """As `tl.exp` without its care for results below 1e-38, three instructions of five."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def targets(p_y, p_v, s_vk, K, ignore_index, m_y, VALID: tl.constexpr):
    """Class of each pixel, 0 where it does not count, and whether it counts."""
    b_y = tl.load(p_y, mask=m_y, other=0).to(tl.int64)
    m_y &= (b_y >= 0) & (b_y < K) & (b_y != ignore_index)
    b_y = tl.where(m_y, b_y, 0)
    if VALID:
        m_y &= tl.load(p_v + b_y * s_vk, mask=m_y, other=0) != 0
    return b_y, m_y


@triton.jit
def upsampled_cross_entropy_fwd_kernel(
    z, y, valid, loss, lse, sums,
    K, h, w, H, W, step_h, step_w, ratio_h, ignore_index, CHUNKS,
    s_zb, s_zk, s_zh, s_zw, s_yb, s_yh, s_yw, s_vb, s_vk,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLEND: tl.constexpr, VALID: tl.constexpr, EACH: tl.constexpr,
):
    i_w, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_h = i_c // CHUNKS                                                              # CHUNKS programs to an interval
    first = first_output(i_h, step_h, ratio_h, h, H)
    last = first_output(i_h + 1, step_h, ratio_h, h, H)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)                                      # [BLOCK_W]
    o_low, o_high, b_fw = cells(o_w, step_w, w)                                      # [BLOCK_W]
    o_low, o_high = o_low.to(tl.int64) * s_zw, o_high.to(tl.int64) * s_zw
    p_z, p_v = z + i_b * s_zb, valid + i_b * s_vb
    p_top, p_bottom = p_z + i_h.to(tl.int64) * s_zh, p_z + tl.minimum(i_h + 1, h - 1).to(tl.int64) * s_zh
    b_loss, b_count = 0.0, 0.0
    for o_first in range(first + (i_c % CHUNKS) * ROWS, last, CHUNKS * ROWS):
        o_h = o_first + tl.arange(0, ROWS)                                           # [ROWS]
        m_o = (o_h < last)[:, None] & (o_w < W)[None, :]                             # [ROWS, BLOCK_W]
        b_fh = tl.minimum(o_h * step_h, h - 1) - i_h                                 # [ROWS]
        b_max = tl.full([ROWS, BLOCK_W], FAR, tl.float32)
        b_sum = tl.zeros([ROWS, BLOCK_W], tl.float32)
        p_tl, p_th, p_bl, p_bh, p_vk = p_top + o_low, p_top + o_high, p_bottom + o_low, p_bottom + o_high, p_v
        for _ in range(K):
            if BLEND:
                b_top = between(p_tl, p_th, b_fw)                                    # [BLOCK_W]
                b_step = between(p_bl, p_bh, b_fw) - b_top                           # [BLOCK_W]
                b_z = tl.fma(b_fh[:, None], b_step[None, :], b_top[None, :])         # [ROWS, BLOCK_W]
            else:
                b_z = tl.load(p_tl).to(tl.float32)[None, :]                          # [1, BLOCK_W]
            if VALID:
                b_z = tl.where(tl.load(p_vk) != 0, b_z, FAR)
                p_vk += s_vk
            # one exponential: either the new logit is the largest and scales the sum, or it is added to it
            b_d = b_z - b_max
            b_e = exp(-tl.abs(b_d))
            b_sum = tl.where(b_d > 0, b_sum * b_e + 1, b_sum + b_e)
            b_max = tl.maximum(b_max, b_z)
            p_tl += s_zk
            p_th += s_zk
            p_bl += s_zk
            p_bh += s_zk
        # the label's logit is fetched again: the search in the loop would move every logit to the labels' layout
        p_y = y + i_b * s_yb + o_h.to(tl.int64)[:, None] * s_yh + o_w.to(tl.int64)[None, :] * s_yw
        b_y, m_y = targets(p_y, p_v, s_vk, K, ignore_index, m_o, VALID)              # [ROWS, BLOCK_W]
        o_zl, o_zh = o_low[None, :] + b_y * s_zk, o_high[None, :] + b_y * s_zk       # [ROWS, BLOCK_W]
        if BLEND:
            b_top = between(p_top + o_zl, p_top + o_zh, b_fw[None, :])
            b_step = between(p_bottom + o_zl, p_bottom + o_zh, b_fw[None, :]) - b_top
            b_own = tl.fma(b_fh[:, None], b_step, b_top)
        else:
            b_own = tl.load(p_top + o_zl).to(tl.float32)                             # [ROWS, BLOCK_W]
        b_log = tl.log(b_sum)
        b_nll = tl.where(m_y, b_max - b_own + b_log, 0)                              # [ROWS, BLOCK_W]
        o_o = (i_b * H + o_h[:, None]) * W + o_w[None, :]
        tl.store(lse + o_o, b_max + b_log, mask=m_o)
        if EACH:
            tl.store(loss + o_o, b_nll, mask=m_o)
        b_loss += tl.sum(b_nll)
        b_count += tl.sum(m_y.to(tl.float32))
    n_w, n_c = tl.num_programs(0), tl.num_programs(1)
    i_p, n_p = (i_b * n_c + i_c) * n_w + i_w, n_w * n_c * tl.num_programs(2)
    tl.store(sums + i_p, b_loss)
    tl.store(sums + n_p + i_p, b_count)


@triton.jit
def upsampled_cross_entropy_sum_kernel(
    sums, loss, count, P,
    EACH: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):
    b_loss, b_count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(0, P, BLOCK):
        o_p = i + tl.arange(0, BLOCK)
        b_loss += tl.load(sums + o_p, mask=o_p < P, other=0)
        b_count += tl.load(sums + P + o_p, mask=o_p < P, other=0)
    n = tl.sum(b_count)
    tl.store(count, n)
    if not EACH:
        total = tl.sum(b_loss)
        tl.store(loss, total / tl.maximum(n, 1.0) if MEAN else total)


@triton.jit
def upsampled_cross_entropy_bwd_kernel(
    g, z, y, valid, lse, count, parts,
    K, h, w, H, W, step_h, step_w, ratio_h, ratio_w, ignore_index, CHUNKS, SPAN,
    s_gb, s_gh, s_gw, s_zb, s_zk, s_zh, s_zw, s_yb, s_yh, s_yw, s_vb, s_vk,
    BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    VALID: tl.constexpr, EACH: tl.constexpr, MEAN: tl.constexpr,
):
    PIECES: tl.constexpr = BLOCK_W // 32                                             # one for each warp
    i_w, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_h, i_s = i_c // CHUNKS, i_c % CHUNKS
    first = first_output(i_h, step_h, ratio_h, h, H)
    last = first_output(i_h + 1, step_h, ratio_h, h, H)
    left = first_output(i_w * SPAN, step_w, ratio_w, w, W)                           # SPAN intervals, SPAN+1 cells
    right = first_output(tl.minimum((i_w + 1) * SPAN, w), step_w, ratio_w, w, W)
    o_c = i_w * SPAN + tl.arange(0, CELLS)                                           # [CELLS]
    p_z, p_v = z + i_b * s_zb, valid + i_b * s_vb
    p_top, p_bottom = p_z + i_h.to(tl.int64) * s_zh, p_z + tl.minimum(i_h + 1, h - 1).to(tl.int64) * s_zh
    if not EACH:
        scale = tl.load(g).to(tl.float32)
        if MEAN:
            scale /= tl.maximum(tl.load(count), 1.0)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)                                              # [BLOCK_K]
        m_k = o_k < K
        o_zk = tl.minimum(o_k, K - 1).to(tl.int64)[:, None] * s_zk                   # [BLOCK_K, 1]
        if VALID:
            m_v = m_k & (tl.load(p_v + o_k * s_vk, mask=m_k, other=0) != 0)
        else:
            m_v = m_k
        b_d = tl.zeros([PIECES, 2 * BLOCK_K, CELLS], tl.float32)
        for c in range(left, right, BLOCK_W):
            o_w = c + tl.arange(0, BLOCK_W)                                          # [BLOCK_W]
            m_w = o_w < right
            o_low, o_high, b_fw = cells(o_w, step_w, w)                              # [BLOCK_W]
            o_low, o_high = o_low.to(tl.int64)[None, :] * s_zw, o_high.to(tl.int64)[None, :] * s_zw
            b_top = between(p_top + o_low + o_zk, p_top + o_high + o_zk, b_fw[None, :])  # [BLOCK_K, BLOCK_W]
            b_step = between(p_bottom + o_low + o_zk, p_bottom + o_high + o_zk, b_fw[None, :]) - b_top
            b_top = tl.where(m_v[:, None], b_top, FAR)                               # probability 0 in every row
            b_step = tl.where(m_v[:, None], b_step, 0)
            b_above = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)                       # for the logit row above
            b_below = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
            for i in range(first + i_s, last, CHUNKS):
                i_r = tl.cast(i, tl.int64)
                f_h = tl.minimum(i_r.to(tl.float32) * step_h, h - 1) - i_h
                p_y = y + i_b * s_yb + i_r * s_yh + o_w.to(tl.int64) * s_yw
                b_y, m_y = targets(p_y, p_v, s_vk, K, ignore_index, m_w, VALID)      # [BLOCK_W]
                b_lse = tl.load(lse + (i_b * H + i_r) * W + o_w, mask=m_w, other=INF)  # [BLOCK_W]
                if EACH:
                    p_g = g + i_b * s_gb + i_r * s_gh + o_w.to(tl.int64) * s_gw
                    scale = tl.load(p_g, mask=m_w, other=0).to(tl.float32)
                b_g = tl.where(m_y, scale, 0)                                        # [BLOCK_W]
                b_p = exp(tl.fma(f_h, b_step, b_top) - b_lse[None, :])               # [BLOCK_K, BLOCK_W]
                b_p = tl.where(o_k[:, None] == b_y.to(tl.int32)[None, :], b_p - 1, b_p)
                b_above += b_p * (b_g * (1 - f_h))[None, :]
                b_below += b_p * (b_g * f_h)[None, :]
            # one product for each 32 columns, that is for each warp, of (class, above or below) with (column, cell)
            b_a = tl.reshape(tl.join(b_above, b_below), (BLOCK_K, PIECES, 32, 2))
            b_a = tl.reshape(tl.permute(b_a, (1, 0, 3, 2)), (PIECES, 2 * BLOCK_K, 32))
            o_x = c + tl.arange(0, PIECES)[:, None] * 32 + tl.arange(0, 32)[None, :]  # [PIECES, 32]
            b_x = tl.minimum(o_x * step_w, w - 1)[:, :, None] - o_c[None, None, :]
            b_x = tl.maximum(1 - tl.abs(b_x), 0)                                     # [PIECES, 32, CELLS]
            b_d = exact_dot(b_a, b_x, b_d)                                           # [PIECES, 2*BLOCK_K, CELLS]
        # parts: (B, CHUNKS, K, above or below, h, blocks of SPAN+1 cells)
        o_a = 2 * k + tl.arange(0, 2 * BLOCK_K)                                      # [2*BLOCK_K]
        o_e = tl.arange(0, CELLS)
        o_p = ((i_b * CHUNKS + i_s) * 2 * K + o_a[:, None]) * h + i_h                # [2*BLOCK_K, 1]
        o_p = (o_p * tl.num_programs(0) + i_w) * (SPAN + 1) + o_e[None, :]
        tl.store(parts + o_p, tl.sum(b_d, 0), mask=(o_a < 2 * K)[:, None] & (o_e <= SPAN)[None, :])


@triton.jit
def upsampled_cross_entropy_gather_kernel(
    parts, dz,
    K, h, w, WIDTH, CHUNKS, SPAN,
    s_db, s_dk, s_dh, s_dw,
    BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):
    i_w, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)                                      # [BLOCK_W]
    o_p = o_w + o_w // SPAN                                                          # a block has a cell more than
    m_two = (o_w % SPAN == 0) & (o_w > 0)                                            # SPAN: the first of the next
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)                                              # [BLOCK_K]
        m_d = (o_k < K)[:, None] & (o_w < w)[None, :]                                # [BLOCK_K, BLOCK_W]
        b_d = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
        for s in range(CHUNKS):
            p_a = parts + (((i_b * CHUNKS + s) * K + o_k[:, None]) * 2 * h + i_h) * WIDTH + o_p[None, :]
            p_b = p_a + (h - 1) * WIDTH                                              # what the interval above holds
            b_d += tl.load(p_a, mask=m_d, other=0) + tl.load(p_a - 1, mask=m_d & m_two[None, :], other=0)
            m_b = m_d & (i_h > 0)
            b_d += tl.load(p_b, mask=m_b, other=0) + tl.load(p_b - 1, mask=m_b & m_two[None, :], other=0)
        p_d = dz + i_b * s_db + i_h * s_dh + o_k.to(tl.int64)[:, None] * s_dk + o_w.to(tl.int64)[None, :] * s_dw
        tl.store(p_d, b_d.to(dz.dtype.element_ty), mask=m_d)


@triton.jit
def same_size_cross_entropy_bwd_kernel(
    g, z, y, valid, lse, count, dz,
    K, H, W, ignore_index,
    s_gb, s_gh, s_gw, s_zb, s_zk, s_zh, s_zw, s_yb, s_yh, s_yw, s_vb, s_vk, s_db, s_dk, s_dh, s_dw,
    BLOCK_W: tl.constexpr, VALID: tl.constexpr, EACH: tl.constexpr, MEAN: tl.constexpr,
):
    i_w, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_w = i_w.to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)                         # [BLOCK_W]
    m_w = o_w < W
    p_v = valid + i_b * s_vb
    b_y, m_y = targets(y + i_b * s_yb + i_h * s_yh + o_w * s_yw, p_v, s_vk, K, ignore_index, m_w, VALID)
    b_lse = tl.load(lse + (i_b * H + i_h) * W + o_w, mask=m_w, other=INF)            # [BLOCK_W]
    if EACH:
        b_g = tl.load(g + i_b * s_gb + i_h * s_gh + o_w * s_gw, mask=m_w, other=0).to(tl.float32)
    else:
        b_g = tl.load(g).to(tl.float32)
        if MEAN:
            b_g /= tl.maximum(tl.load(count), 1.0)
    b_g = tl.where(m_y, b_g, 0)                                                      # [BLOCK_W]
    p_z, p_d = z + i_b * s_zb + i_h * s_zh + o_w * s_zw, dz + i_b * s_db + i_h * s_dh + o_w * s_dw
    for k in range(K):
        b_z = tl.load(p_z, mask=m_w, other=0).to(tl.float32)
        if VALID:
            b_z = tl.where(tl.load(p_v) != 0, b_z, FAR)
            p_v += s_vk
        b_p = exp(b_z - b_lse)
        b_p = tl.where(b_y == k, b_p - 1, b_p)
        tl.store(p_d, (b_p * b_g).to(dz.dtype.element_ty), mask=m_w)
        p_z += s_zk
        p_d += s_dk


def _axis(n_in, n_out):
    """(inputs per output, outputs per input) of one axis; the first is rounded to float32 as PyTorch rounds it."""
    return (n_in - 1) / max(n_out - 1, 1), (n_out - 1) / max(n_in - 1, 1)


def _blocks(ratio_h, ratio_w):
    """Forward: rows per step, programs per interval. Backward: programs per interval, intervals and columns of each."""
    n, part = divmod(max(ratio_h, 1), 1)  # an interval has n rows, or one more

    def cost(r):
        return ((1 - part) * -(-n // r) + part * -(-(n + 1) // r)) * (r + 1.5)

    # up to 8 rows share the loads and the blend along the columns, worth 1.5 rows, but a step must not be mostly empty
    rows = min((1, 2, 4, 8), key=cost)
    # 16 cells, the least a product takes, of which all but the last begin an interval: as many as fit the columns.
    # 128 columns are one per thread; 8 classes of them (above, below and the two logits) take 32 registers
    columns = 128 if ratio_w >= 7.5 else 64 if ratio_w >= 3.75 else 32
    span = max(1, min(15, int(columns // max(ratio_w, 1))))
    return rows, -(-round(ratio_h) // rows) or 1, -(-int(n) // 32), span, columns


def _valid(valid, z):
    """Class mask as bytes, with its strides; something harmless where there is none."""
    if valid is None:
        return dict(valid=z, s_vb=0, s_vk=0, VALID=False)
    v = valid.expand(z.shape[:2]).view(torch.uint8)
    return dict(valid=v, s_vb=v.stride(0), s_vk=v.stride(1), VALID=True)


def _strides(**tensors):
    """s_<name><axis> of each tensor, the axes named by its number of dimensions."""
    axes = {3: "bhw", 4: "bkhw"}
    return {f"s_{n}{a}": s for n, t in tensors.items() for a, s in zip(axes[t.dim()], t.stride())}


def upsampled_cross_entropy_fwd(z, labels, valid, ignore_index, reduction):
    """z (B,K,h,w), labels (B,H,W), valid (K,) | (B,K) | None -> loss 0-d | (B,H,W), lse (B,H,W), count 0-d."""
    (B, K, h, w), (H, W) = z.shape, labels.shape[1:]
    (step_h, ratio_h), (step_w, ratio_w) = _axis(h, H), _axis(w, W)
    rows, chunks = _blocks(ratio_h, ratio_w)[:2]
    each = reduction == "none"
    grid = triton.cdiv(W, 128), h * chunks, B
    P = grid[0] * grid[1] * grid[2]
    lse, sums = z.new_empty(B, H, W, dtype=torch.float32), z.new_empty(2, P, dtype=torch.float32)
    loss, count = z.new_empty((B, H, W) if each else (), dtype=torch.float32), z.new_empty((), dtype=torch.float32)
    common.launch(
        upsampled_cross_entropy_fwd_kernel, grid, z=z, y=labels, loss=loss, lse=lse, sums=sums, K=K, h=h, w=w, H=H, W=W,
        step_h=step_h, step_w=step_w, ratio_h=ratio_h, ignore_index=ignore_index, CHUNKS=chunks,
        **_strides(z=z, y=labels), **_valid(valid, z), ROWS=rows, BLOCK_W=128, BLEND=(h, w) != (H, W), EACH=each,
        num_warps=4, num_stages=1)
    common.launch(
        upsampled_cross_entropy_sum_kernel, (1,), sums=sums, loss=loss, count=count, P=P, EACH=each,
        MEAN=reduction == "mean", BLOCK=4096, num_warps=8, num_stages=1)
    return loss, lse, count


def upsampled_cross_entropy_bwd(g, z, labels, valid, lse, count, ignore_index, reduction):
    """g 0-d | (B,H,W), z (B,K,h,w), labels, lse (B,H,W), valid (K,) | (B,K) | None, count 0-d -> dz like z."""
    (B, K, h, w), (H, W) = z.shape, labels.shape[1:]
    each, dz = reduction == "none", torch.empty_like(z)
    inputs = dict(
        g=g, z=z, y=labels, lse=lse, count=count, K=K, H=H, W=W, ignore_index=ignore_index, **_valid(valid, z),
        **_strides(g=g if each else g.expand(1, 1, 1), z=z, y=labels), EACH=each, MEAN=reduction == "mean")
    if (h, w) == (H, W):
        common.launch(
            same_size_cross_entropy_bwd_kernel, (triton.cdiv(W, 128), H, B), **inputs, dz=dz, **_strides(d=dz),
            BLOCK_W=128, num_warps=4, num_stages=1)
        return dz
    (step_h, ratio_h), (step_w, ratio_w) = _axis(h, H), _axis(w, W)
    chunks, span, columns = _blocks(ratio_h, ratio_w)[2:]
    blocks = triton.cdiv(w, span)
    parts = z.new_empty(B, chunks, K, 2, h, blocks * (span + 1), dtype=torch.float32)
    common.launch(
        upsampled_cross_entropy_bwd_kernel, (blocks, h * chunks, B), **inputs, parts=parts, h=h, w=w,
        step_h=step_h, step_w=step_w, ratio_h=ratio_h, ratio_w=ratio_w, CHUNKS=chunks, SPAN=span,
        BLOCK_K=8, BLOCK_W=columns, num_warps=columns // 32, num_stages=1)
    common.launch(
        upsampled_cross_entropy_gather_kernel, (triton.cdiv(w, 64), h, B), parts=parts, dz=dz, K=K, h=h, w=w,
        WIDTH=parts.shape[-1], CHUNKS=chunks, SPAN=span, **_strides(d=dz), BLOCK_K=16, BLOCK_W=64,
        num_warps=4, num_stages=1)
    return dz
