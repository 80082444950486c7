"""How spread out the neighbours of each row of a matrix (N,C) are, with nothing of size N*N stored.

Formula and plain version: `protonb.density`. A program owns a block of rows and streams all rows past it, as the forward
walk of `contrast.py` does, and with its helpers. Beside the running maximum m and the sum l of 2^(s-m) it keeps
u, the sum of 2^(s-m) (s-m); the entropy is log l - u/l. When a larger maximum comes, with d = m_old - m_new at most 0,
l becomes 2^d l and u becomes 2^d (u + d l). A row is no neighbour of itself. If the rows are few, the walk is split over
programs, and the parts are merged in fixed order by the same two lines. Scores are in base 2.
"""
import math

import torch
import triton
import triton.language as tl

from . import common
from .contrast import LOG2E, _blocks, _direct, _easy, _meet, _rows, _splits

LOWEST = tl.constexpr(-1e30)  # a finite floor: 2^-inf times -inf would be nan


@triton.jit
def density_kernel(
    x, part, N, C, splits, s_n, s_c, scale2,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_C: tl.constexpr, EVEN_D: tl.constexpr, KEEP: tl.constexpr, DIRECT: tl.constexpr,
):
    i_n, i_s = tl.program_id(0) // splits, tl.program_id(0) % splits
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_m = tl.full([BLOCK_N], LOWEST, tl.float32)  # [N]
    b_l, b_u = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    b_x = b_l
    if KEEP:
        b_x = _rows(x, o_n, o_n < N, s_n, tl.arange(0, BLOCK_D), s_c, C, EVEN_D)  # [N, D]
    each = tl.cdiv(N, splits * BLOCK_M) * BLOCK_M
    j1 = tl.minimum((i_s + 1) * each, N)
    for j in range(i_s * each, j1, BLOCK_M):
        o_m = tl.arange(0, BLOCK_M).to(tl.int64) + j  # [M]
        b_s, _ = _meet(x, b_x, o_n, o_n < N, x, o_m, o_m < j1, C, s_n, s_c, s_n, s_c,
                       BLOCK_N, BLOCK_M, BLOCK_C, BLOCK_D, EVEN_C, EVEN_D, KEEP, False, DIRECT)
        b_s = b_s * scale2  # [N, M]
        if ((j < (i_n + 1) * BLOCK_N) & (j + BLOCK_M > i_n * BLOCK_N)) | (j + BLOCK_M > j1):  # most blocks need no mask
            b_s = tl.where((o_m[None, :] != o_n[:, None]) & (o_m < j1)[None, :], b_s, LOWEST)
        b_top = tl.maximum(b_m, tl.max(b_s, 1))  # [N]
        b_d = b_s - b_top[:, None]  # [N, M]
        b_p = tl.exp2(b_d)
        b_fall = b_m - b_top  # [N]
        b_old = tl.exp2(b_fall)
        b_u = b_old * (b_u + b_fall * b_l) + tl.sum(b_p * b_d, 1)
        b_l = b_old * b_l + tl.sum(b_p, 1)
        b_m = b_top
    p_part = part + (i_s.to(tl.int64) * N + o_n) * 3
    tl.store(p_part, b_m, mask=o_n < N)
    tl.store(p_part + 1, b_l, mask=o_n < N)
    tl.store(p_part + 2, b_u, mask=o_n < N)


def density_fwd(
    x,  # (N,C) features
    temperature,  # divides the products
):  # (N,) fp32
    """Entropy of each row's softmax over all other rows; 0 where there is no other row."""
    (N, C), direct = x.shape, _direct(x, x)
    if N < 2:
        return torch.zeros(N, dtype=torch.float32, device=x.device)
    BN, BM, shape = _blocks(direct, _easy(x), C, True, False)
    del shape["BLOCK_P"]
    shape["num_stages"] = min(shape["num_stages"], 3)  # rows are not fetched by index: nothing to fetch further ahead
    blocks = triton.cdiv(N, BN)
    splits = _splits(blocks, N, BM, x.device, N * 12, 0.01)
    part = torch.empty(splits, N, 3, dtype=torch.float32, device=x.device)
    common.launch(density_kernel, (blocks * splits,), x=x, part=part, N=N, C=C, splits=splits, s_n=x.stride(0),
                  s_c=x.stride(1), scale2=LOG2E / temperature, BLOCK_N=BN, BLOCK_M=BM,
                  EVEN_C=C % shape["BLOCK_C"] == 0, EVEN_D=C % shape["BLOCK_D"] == 0, DIRECT=direct, **shape)
    m, l, u = part.unbind(2)  # (splits,N) each
    fall = m - m.amax(0)
    old = fall.exp2()
    u, l = (old * (u + fall * l)).sum(0), (old * l).sum(0)
    return l.log() - math.log(2) * u / l
