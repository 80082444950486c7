"""Masked average pooling: one mean feature per class, and its gradients.

Forward: a program owns BLOCK_C channels and a run of pixel tiles. It reads each tile of features once, makes in
registers how much the tile's pixels count for each class, and adds their product to its sums with tensor cores. The
sums of all programs are written once; a second small kernel adds them in a fixed order and divides. No atomics: two
runs on one machine agree bit for bit. Backward: a pure write for the features, one more read of them for soft masks and weights.
Features are met where they are, along pixels (NCHW) or along channels (channels-last), crops too: a tile is
BLOCK_C x BLOCK_N either way.
"""
import torch
import triton
import triton.language as tl

from . import common
from .common import INTERPRET, exact_dot, split_dot

PARTIAL_BYTES = 2 << 20  # of sums per program that lie between the two kernels of the forward pass


@triton.jit
def _pixels(i_n, W, s_h, s_w, FLAT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile begins in a map of width W, and how far from there its pixels lie."""
    o_n = tl.arange(0, BLOCK_N)
    if FLAT:
        return i_n.to(tl.int64)*s_w, o_n.to(tl.int64)*s_w
    else:
        o_n += i_n
        return i_n.to(tl.int64)*0, (o_n // W).to(tl.int64)*s_h + (o_n % W).to(tl.int64)*s_w


@triton.jit
def _features(p_x, i_b, i_n, o_c, C, N, W, s_xb, s_xc, s_xh, s_xw, FLAT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Addresses and mask of a tile of features."""
    i_x, o_x = _pixels(i_n, W, s_xh, s_xw, FLAT, BLOCK_N)
    p_row = p_x + i_b*s_xb + i_x + o_c.to(tl.int64)*s_xc
    m_n = i_n + tl.arange(0, BLOCK_N) < N
    return p_row[:, None] + o_x[None, :], (o_c < C)[:, None] & m_n[None, :]                 # [BLOCK_C, BLOCK_N]


@triton.jit
def _ids(y, i_b, i_n, FLAT_Y: tl.constexpr, BLOCK_N: tl.constexpr):
    """Class ids of a tile, and -1 for a pixel that counts for no class."""
    p_y, p_w, K, N, W, ignore_index, s_yb, s_yk, s_yh, s_yw, s_wb, s_wh, s_ww = y
    m_n = i_n + tl.arange(0, BLOCK_N) < N
    i_y, o_y = _pixels(i_n, W, s_yh, s_yw, FLAT_Y, BLOCK_N)
    b_y = tl.load(p_y + i_b*s_yb + i_y + o_y, mask=m_n, other=0).to(tl.int64)
    b_y = tl.where(m_n & (b_y.to(tl.uint64) < K), b_y.to(tl.int32), -1)  # as unsigned numbers, negative ones are large
    return tl.where(b_y != ignore_index, b_y, -1)


@triton.jit
def _scale(y, i_b, i_n, FLAT_Y: tl.constexpr, BLOCK_N: tl.constexpr):
    """Weights of a tile's pixels in float32."""
    p_y, p_w, K, N, W, ignore_index, s_yb, s_yk, s_yh, s_yw, s_wb, s_wh, s_ww = y
    i_w, o_w = _pixels(i_n, W, s_wh, s_ww, FLAT_Y, BLOCK_N)
    p_wt = p_w + i_b*s_wb + i_w + o_w
    return tl.load(p_wt, mask=i_n + tl.arange(0, BLOCK_N) < N, other=0).to(tl.float32)


@triton.jit
def _counts(
    y, i_b, i_n, o_k,
    SOFT: tl.constexpr, WEIGHTED: tl.constexpr, FLAT_Y: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """How much the pixels of a tile count for the classes `o_k`, in float32."""
    p_y, p_w, K, N, W, ignore_index, s_yb, s_yk, s_yh, s_yw, s_wb, s_wh, s_ww = y
    if SOFT:
        i_y, o_y = _pixels(i_n, W, s_yh, s_yw, FLAT_Y, BLOCK_N)
        m = (o_k < K)[:, None] & (i_n + tl.arange(0, BLOCK_N) < N)[None, :]
        p_yt = (p_y + i_b*s_yb + i_y + o_k.to(tl.int64)*s_yk)[:, None] + o_y[None, :]
        b_w = tl.load(p_yt, mask=m, other=0).to(tl.float32)                                 # [BLOCK_K, BLOCK_N]
    else:
        b_w = tl.where(o_k[:, None] == _ids(y, i_b, i_n, FLAT_Y, BLOCK_N)[None, :], 1., 0.)
    if WEIGHTED:
        b_v = _scale(y, i_b, i_n, FLAT_Y, BLOCK_N)[None, :]
        b_w = b_w*b_v if SOFT else tl.where(b_w > 0, b_v, 0.)  # an ignored pixel may weigh whatever it likes, NaN too
    return b_w


@triton.jit
def _head(a):
    """The bits of a float32 that fit in a bfloat16."""
    return (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _dot_hot(a, b_hot, acc, INTERPRETED: tl.constexpr):
    """acc + a @ b_hot for float32 `a`, exact for zeros and ones: three bfloat16 terms hold the 24 bits of a float32."""
    if INTERPRETED:  # the interpreter gets bfloat16 products wrong
        return tl.dot(a, b_hot, acc, input_precision="ieee")
    else:
        b_hot = b_hot.to(tl.bfloat16)
        b_high = _head(a)
        b_rest = a - b_high
        b_middle = _head(b_rest)
        acc = tl.dot((b_rest - b_middle).to(tl.bfloat16), b_hot, acc)
        acc = tl.dot(b_middle.to(tl.bfloat16), b_hot, acc)
        return tl.dot(b_high.to(tl.bfloat16), b_hot, acc)


@triton.jit
def pool_fwd_kernel(
    p_x, p_y, p_w, p_sums, p_masses,
    C, K, N, W, T, R, G, STEPS, KS, ignore_index,
    s_xb, s_xc, s_xh, s_xw, s_yb, s_yk, s_yh, s_yw, s_wb, s_wh, s_ww,
    SOFT: tl.constexpr, WEIGHTED: tl.constexpr, FLAT: tl.constexpr, FLAT_Y: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):
    y = p_y, p_w, K, N, W, ignore_index, s_yb, s_yk, s_yh, s_yw, s_wb, s_wh, s_ww
    # T tiles per image; the G that are pooled together (of an image or of all) go to R programs, STEPS to each
    i_c, i_k, i_r = tl.program_id(0) // KS, tl.program_id(0) % KS, tl.program_id(1)
    first = i_r // R*G + i_r % R*STEPS
    last = min(first + STEPS, (i_r // R + 1)*G)
    o_c, o_k = i_c*BLOCK_C + tl.arange(0, BLOCK_C), i_k*BLOCK_K + tl.arange(0, BLOCK_K)
    p_k = i_r.to(tl.int64)*K + o_k
    if i_c*BLOCK_C >= C:  # past the last channel: a program of its own for the masses keeps them out of the other loop
        b_mass = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        for i_t in tl.range(first, last, num_stages=3):
            i_b, i_n = (i_t // T).to(tl.int64), i_t % T*BLOCK_N
            b_mass += _counts(y, i_b, i_n, o_k, SOFT, WEIGHTED, FLAT_Y, BLOCK_N)
        tl.store(p_masses + p_k, tl.sum(b_mass, 1), mask=o_k < K)
    else:
        b_sums = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
        for i_t in range(first, last):
            i_b, i_n = (i_t // T).to(tl.int64), i_t % T*BLOCK_N
            p_xt, m_xt = _features(p_x, i_b, i_n, o_c, C, N, W, s_xb, s_xc, s_xh, s_xw, FLAT, BLOCK_N)
            b_x = tl.load(p_xt, mask=m_xt, other=0)                                         # [BLOCK_C, BLOCK_N]
            # weights of hard labels join the labels for bfloat16, the features otherwise: this takes fewest registers
            JOINED: tl.constexpr = SOFT or (WEIGHTED and b_x.dtype == tl.bfloat16)
            b_w = _counts(y, i_b, i_n, o_k, SOFT, WEIGHTED and JOINED, FLAT_Y, BLOCK_N)     # [BLOCK_K, BLOCK_N]
            b_new = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
            if JOINED and b_x.dtype == tl.bfloat16:
                b_new = split_dot(b_x, tl.trans(b_w), b_new, INTERPRETED)
            elif JOINED:
                b_new = exact_dot(b_x, tl.trans(b_w), b_new)
            elif WEIGHTED:
                m_n = _ids(y, i_b, i_n, FLAT_Y, BLOCK_N) >= 0
                b_v = tl.where(m_n, _scale(y, i_b, i_n, FLAT_Y, BLOCK_N), 0.)
                b_new = _dot_hot(b_x.to(tl.float32)*b_v[None, :], tl.trans(b_w), b_new, INTERPRETED)
            elif b_x.dtype == tl.float32 or INTERPRETED:
                b_new = _dot_hot(b_x.to(tl.float32), tl.trans(b_w), b_new, INTERPRETED)
            else:
                b_new = tl.dot(b_x, tl.trans(b_w.to(b_x.dtype)), b_new)
            # tensor cores cut their sums off instead of rounding them, so tiles are added outside, and by fma: the
            # compiler would put a plain + back into the product
            b_sums = tl.fma(b_new, 1., b_sums)
        tl.store(p_sums + p_k[None, :]*C + o_c[:, None], b_sums, mask=(o_c < C)[:, None] & (o_k < K)[None, :])


@triton.jit
def pool_sum_kernel(
    p_sums, p_masses, p_prototypes, p_mass,
    C, K, E, R, eps,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):
    i_g = tl.program_id(1).to(tl.int64)
    o_e = tl.program_id(0)*BLOCK_E + tl.arange(0, BLOCK_E)  # of the E elements of a matrix (K,C)
    m_e, o_k = o_e < E, o_e // C
    b_sum, b_mass = tl.zeros((BLOCK_E,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    for i_r in range(0, R, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        p_r = (i_g*R + o_r)[:, None]
        m = (o_r < R)[:, None] & m_e[None, :]
        b_sum += tl.sum(tl.load(p_sums + p_r*E + o_e[None, :], mask=m, other=0), 0)         # [BLOCK_E]
        b_mass += tl.sum(tl.load(p_masses + p_r*K + o_k[None, :], mask=m, other=0), 0)
    b_all = b_mass + eps
    b_p = tl.where(b_all > 0, b_sum/tl.where(b_all > 0, b_all, 1.), 0.)
    tl.store(p_prototypes + i_g*E + o_e, b_p, mask=m_e)
    tl.store(p_mass + i_g*K + o_k, b_mass, mask=m_e & (o_e % C == 0))


@triton.jit
def _table(p_g, p_mass, i_g, o_c, o_k, C, K, s_gb, s_gk, s_gc, s_mb, eps):
    """Gradient of the sums: that of the prototypes over mass+eps, and 0 for a class without mass."""
    b_all = tl.load(p_mass + i_g*s_mb + o_k, mask=o_k < K, other=0) + eps
    m_k = (o_k < K) & (b_all > 0)
    p_gt = p_g + i_g*s_gb + o_c.to(tl.int64)[:, None]*s_gc + o_k.to(tl.int64)[None, :]*s_gk
    b_g = tl.load(p_gt, mask=(o_c < C)[:, None] & m_k[None, :], other=0)                    # [BLOCK_C, BLOCK_K]
    return b_g/tl.where(m_k, b_all, 1.)[None, :]


@triton.jit
def _spread(
    b_g, acc, y, i_b, i_n, o_k,
    SOFT: tl.constexpr, WEIGHTED: tl.constexpr, FLAT_Y: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """acc + the gradients `b_g` of some classes' sums, times how much each pixel counts for these."""
    if SOFT:
        return exact_dot(b_g, _counts(y, i_b, i_n, o_k, True, WEIGHTED, FLAT_Y, BLOCK_N), acc)
    else:
        return _dot_hot(b_g, _counts(y, i_b, i_n, o_k, False, False, FLAT_Y, BLOCK_N), acc, INTERPRETED)


@triton.jit
def pool_bwd_x_kernel(
    p_g, p_mass, p_y, p_w, p_x,
    C, K, N, W, T, R, G, STEPS, ignore_index, eps,
    s_gb, s_gk, s_gc, s_mb, s_xb, s_xc, s_xh, s_xw, s_yb, s_yk, s_yh, s_yw, s_wb, s_wh, s_ww,
    SOFT: tl.constexpr, WEIGHTED: tl.constexpr, FLAT: tl.constexpr, FLAT_Y: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, ALL: tl.constexpr,
):
    y = p_y, p_w, K, N, W, ignore_index, s_yb, s_yk, s_yh, s_yw, s_wb, s_wh, s_ww
    i_c, i_r = tl.program_id(0), tl.program_id(1)
    i_g = (i_r // R).to(tl.int64)
    first = i_r // R*G + i_r % R*STEPS
    last = min(first + STEPS, (i_r // R + 1)*G)
    o_c, o_k = i_c*BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    if ALL:  # of the classes fit into one block, which is then read once and not for each tile
        b_g = _table(p_g, p_mass, i_g, o_c, o_k, C, K, s_gb, s_gk, s_gc, s_mb, eps)         # [BLOCK_C, BLOCK_K]
    for i_t in range(first, last):
        i_b, i_n = (i_t // T).to(tl.int64), i_t % T*BLOCK_N
        b_dx = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        if ALL:
            b_dx = _spread(b_g, b_dx, y, i_b, i_n, o_k, SOFT, WEIGHTED, FLAT_Y, INTERPRETED, BLOCK_N)
        else:
            for i_k in range(0, K, BLOCK_K):
                b_gk = _table(p_g, p_mass, i_g, o_c, i_k + o_k, C, K, s_gb, s_gk, s_gc, s_mb, eps)
                b_dx = _spread(b_gk, b_dx, y, i_b, i_n, i_k + o_k, SOFT, WEIGHTED, FLAT_Y, INTERPRETED, BLOCK_N)
        if WEIGHTED and not SOFT:  # weights of hard labels come after the product, which stays exact
            m_n = _ids(y, i_b, i_n, FLAT_Y, BLOCK_N) >= 0
            b_dx *= tl.where(m_n, _scale(y, i_b, i_n, FLAT_Y, BLOCK_N), 0.)[None, :]
        p_xt, m_xt = _features(p_x, i_b, i_n, o_c, C, N, W, s_xb, s_xc, s_xh, s_xw, FLAT, BLOCK_N)
        tl.store(p_xt, b_dx, mask=m_xt)


@triton.jit
def pool_bwd_weights_kernel(
    p_g, p_gp, p_gm, p_mass, p_x, p_y, p_w, p_dy, p_dw,
    C, K, N, W, T, ignore_index, eps,
    s_gb, s_gk, s_gc, s_mb, s_xb, s_xc, s_xh, s_xw, s_yb, s_yk, s_yh, s_yw, s_wb, s_wh, s_ww,
    s_dyb, s_dyk, s_dyh, s_dyw, s_dwb, s_dwh, s_dww,
    SOFT: tl.constexpr, WEIGHTED: tl.constexpr, FLAT: tl.constexpr, FLAT_Y: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):
    y = p_y, p_w, K, N, W, ignore_index, s_yb, s_yk, s_yh, s_yw, s_wb, s_wh, s_ww
    i_b, i_n = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T*BLOCK_N
    m_n = i_n + tl.arange(0, BLOCK_N) < N
    b_dw = tl.zeros((BLOCK_N,), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_d = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for i_c in range(0, C, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)
            p_xt, m_xt = _features(p_x, i_b, i_n, o_c, C, N, W, s_xb, s_xc, s_xh, s_xw, FLAT, BLOCK_N)
            b_x = tl.trans(tl.load(p_xt, mask=m_xt, other=0))                               # [BLOCK_N, BLOCK_C]
            b_g = _table(p_g, p_mass, i_b, o_c, o_k, C, K, s_gb, s_gk, s_gc, s_mb, eps)     # [BLOCK_C, BLOCK_K]
            b_new = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            if b_x.dtype == tl.bfloat16:
                b_new = split_dot(b_x, b_g, b_new, INTERPRETED)
            else:
                b_new = exact_dot(b_x, b_g, b_new)
            b_d = tl.fma(b_new, 1., b_d)
        # one unit more of a class moves its prototype by (x - prototype)/(mass+eps) and its mass by 1
        b_all = tl.load(p_mass + i_b*s_mb + o_k, mask=m_k, other=0) + eps
        b_gm = -tl.load(p_gp + i_b*s_mb + o_k, mask=m_k & (b_all > 0), other=0)/tl.where(b_all > 0, b_all, 1.)
        if p_gm is not None:
            b_gm += tl.load(p_gm + i_b*s_mb + o_k, mask=m_k, other=0)
        b_d = tl.trans(b_d) + b_gm[:, None]                                                 # [BLOCK_K, BLOCK_N]
        if p_dw is not None:
            b_dw += tl.sum(_counts(y, i_b, i_n, o_k, SOFT, False, FLAT_Y, BLOCK_N)*b_d, 0)
        if p_dy is not None:
            if WEIGHTED:
                b_d *= _scale(y, i_b, i_n, FLAT_Y, BLOCK_N)[None, :]
            i_y, o_y = _pixels(i_n, W, s_dyh, s_dyw, FLAT_Y, BLOCK_N)
            p_dyt = (p_dy + i_b*s_dyb + i_y + o_k.to(tl.int64)*s_dyk)[:, None] + o_y[None, :]
            tl.store(p_dyt, b_d, mask=m_k[:, None] & m_n[None, :])
    if p_dw is not None:
        i_w, o_w = _pixels(i_n, W, s_dwh, s_dww, FLAT_Y, BLOCK_N)
        tl.store(p_dw + i_b*s_dwb + i_w + o_w, b_dw, mask=m_n)


def _maps(x, labels, weights, ignore_index, dmasks=None, dweights=None):
    """What the kernels are told of the features (or of their gradient), of labels or soft masks and of weights."""
    s_xb, s_xc, s_xh, s_xw, flat = common.pixel_strides(x)
    soft = labels.is_floating_point()
    s_yb, s_yk, s_yh, s_yw = labels.stride() if soft else (labels.stride(0), 0, *labels.stride()[1:])
    s_wb, s_wh, s_ww = (0, 0, 0) if weights is None else weights.stride()
    maps = [t for t in (labels, weights, dmasks, dweights) if t is not None]
    flat_y = all(t.shape[-2] == 1 or t.stride(-2) == t.shape[-1]*t.stride(-1) for t in maps)
    return dict(p_x=x, p_y=labels, p_w=weights, C=x.shape[1], N=x.shape[2]*x.shape[3], W=x.shape[3],
                ignore_index=ignore_index, s_xb=s_xb, s_xc=s_xc, s_xh=s_xh, s_xw=s_xw,
                s_yb=s_yb, s_yk=s_yk, s_yh=s_yh, s_yw=s_yw, s_wb=s_wb, s_wh=s_wh, s_ww=s_ww,
                SOFT=soft, WEIGHTED=weights is not None, FLAT=flat, FLAT_Y=flat_y, INTERPRETED=INTERPRET)


def _pow2(n, most):
    """Size of a block that covers n if it may; tl.dot takes no side under 16."""
    return min(max(16, triton.next_power_of_2(n)), most)


def _blocks(x, K, hard, most=64):
    """Channels, classes and pixels of a tile.

    Tiles of 8 to 16 kB, two on their way while one is worked on, and three programs on a processor keep the memory
    busy. 64 channels are a whole line of 128 B in channels-last and leave partial sums of less than 2 MB for 19
    classes. 128 pixels spread the making of class weights widest. Where an address or a stride is odd, or rows have
    gaps, numbers pass through registers one at a time instead of being copied in vectors: smaller tiles then keep three
    programs on a processor. So do 64 pixels and 32 classes for products with soft masks and weights.
    """
    s_xb, s_xc, s_xh, s_xw, flat = common.pixel_strides(x)
    steps = s_xb, s_xc, s_xw if flat else s_xh
    even = x.storage_offset()*x.element_size() % 16 == 0 and all(s == 1 or s % 16 == 0 for s in steps)
    vectors, half = even and (flat or s_xc == 1), x.element_size() == 2
    return dict(BLOCK_C=_pow2(x.shape[1], most), BLOCK_K=_pow2(K, 64 if hard else 32),
                BLOCK_N=128 if hard and vectors and half and K <= 32 else 64 if vectors or half else 32,
                num_warps=4, num_stages=3)


def _runs(x, per_image, most, BLOCK_N):
    """Share the tiles out to at most `most` programs, if each image need not have its own -> number of runs, sizes."""
    B, T = x.shape[0], triton.cdiv(x.shape[2]*x.shape[3], BLOCK_N)
    groups, G = (B, T) if per_image else (1, B*T)
    STEPS = triton.cdiv(G, max(1, most//groups))
    R = triton.cdiv(G, STEPS)
    return groups*R, dict(T=T, R=R, G=G, STEPS=STEPS)


def pool_fwd(x, labels, weights, num_classes, ignore_index, per_image, eps):
    """x (B,C,h,w); labels (B,h,w) or soft masks (B,K,h,w); weights (B,h,w) or None
    -> prototypes (K,C) or (B,K,C), mass (K,) or (B,K)."""
    (B, C), K = x.shape[:2], num_classes
    blocks = _blocks(x, K, weights is None and not labels.is_floating_point())
    KS = triton.cdiv(K, blocks["BLOCK_K"])
    programs = (triton.cdiv(C, blocks["BLOCK_C"]) + 1)*KS  # for one run of tiles
    sms = common.processors(x.device)
    most = min(3*sms//programs, max(sms//programs, PARTIAL_BYTES//(4*K*C)))
    n, runs = _runs(x, per_image, most, blocks["BLOCK_N"])
    sums, masses = torch.empty(n, K, C, device=x.device), torch.empty(n, K, device=x.device)
    common.launch(pool_fwd_kernel, (programs, n), p_sums=sums, p_masses=masses, K=K, KS=KS, **runs,
                  **_maps(x, labels, weights, ignore_index), **blocks)
    images = (B,) if per_image else ()
    prototypes, mass = torch.empty(*images, K, C, device=x.device), torch.empty(*images, K, device=x.device)
    BLOCK_R = min(128, max(16, triton.next_power_of_2(runs["R"])))  # all reads of a block are on their way at once
    BLOCK_E = 4096//BLOCK_R
    common.launch(pool_sum_kernel, (triton.cdiv(K*C, BLOCK_E), n//runs["R"]), p_sums=sums, p_masses=masses,
                  p_prototypes=prototypes, p_mass=mass, C=C, K=K, E=K*C, R=runs["R"], eps=eps,
                  BLOCK_R=BLOCK_R, BLOCK_E=BLOCK_E, num_warps=4, num_stages=3)
    return prototypes, mass


def pool_bwd(g_prototypes, g_mass, x, labels, weights, prototypes, mass, ignore_index, per_image, eps,
             need_x, need_masks, need_weights):
    """g_prototypes (K,C) or (B,K,C); g_mass (K,) or (B,K) or None
    -> gradients like x, like the soft masks and like weights, new_empty(0) for one that is not needed."""
    K = g_prototypes.shape[-2]
    s_gb, s_gk, s_gc = g_prototypes.stride() if per_image else (0, *g_prototypes.stride())
    given = dict(p_g=g_prototypes, p_mass=mass, K=K, eps=eps,
                 s_gb=s_gb, s_gk=s_gk, s_gc=s_gc, s_mb=K if per_image else 0)
    needs = (x, need_x), (labels, need_masks), (weights, need_weights)
    dx, dmasks, dweights = (torch.empty_like(t) if need else None for t, need in needs)
    if need_x:
        # many classes pass in blocks, which takes registers as soft masks do
        blocks = _blocks(dx, K, K <= 64 and not labels.is_floating_point())
        chunks = triton.cdiv(x.shape[1], blocks["BLOCK_C"])
        n, runs = _runs(x, per_image, 3*common.processors(x.device)//chunks, blocks["BLOCK_N"])
        common.launch(pool_bwd_x_kernel, (chunks, n), **given, **runs, **_maps(dx, labels, weights, ignore_index),
                      **blocks, ALL=K <= blocks["BLOCK_K"])
    if need_masks or need_weights:
        blocks = _blocks(x, K, False, 128//x.element_size())  # both factors are taken apart in registers
        T = triton.cdiv(x.shape[2]*x.shape[3], blocks["BLOCK_N"])
        s_dyb, s_dyk, s_dyh, s_dyw = dmasks.stride() if need_masks else (0, 0, 0, 0)
        s_dwb, s_dwh, s_dww = dweights.stride() if need_weights else (0, 0, 0)
        common.launch(pool_bwd_weights_kernel, (x.shape[0]*T,), **given, T=T,
                      p_gp=(g_prototypes*prototypes).sum(-1).contiguous(),
                      p_gm=None if g_mass is None else g_mass.contiguous(), p_dy=dmasks, p_dw=dweights,
                      s_dyb=s_dyb, s_dyk=s_dyk, s_dyh=s_dyh, s_dyw=s_dyw, s_dwb=s_dwb, s_dwh=s_dwh, s_dww=s_dww,
                      **_maps(x, labels, weights, ignore_index, dmasks, dweights), **blocks)
    return tuple(x.new_empty(0) if d is None else d for d in (dx, dmasks, dweights))
