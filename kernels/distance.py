"""Distance of every pixel to every prototype: logits, the nearest one, softmax cross-entropy, and their gradients.

Forward: a program owns BLOCK_N pixels of one image and walks their channels once; the tiles (BLOCK_N, BLOCK_C) give the
products with all prototypes and the squared norms of both sides. What follows from them (logits, winner, loss) is made in
registers, so that of cross-entropy and of the nearest prototype nothing of size K is stored per pixel.

Backward: the products are computed again, d(logits) becomes e (BLOCK_N, BLOCK_K) with dx = e @ q + c*x and
dq = e^T @ x - s*q (times norms for cosine), and both are sums the tiles can give.
Narrow (all channels fit one tile): a program runs over some tiles, reads each once, writes its dx once and keeps the sums
for dq in registers; they are written once per program and added in a fixed order by a last kernel.
Wide: the program of a tile walks it twice, the second time backwards, which the L2 cache serves; e is stored, a bounded
piece at a time, for a kernel that owns BLOCK_C channels and adds up dq over a run of tiles.
No atomics: two runs on one machine agree bit for bit. Any strides are read and written in place.
"""
import torch
import triton
import triton.language as tl

from . import common
from .common import EXACT, INTERPRET, exact_dot, split_dot

METRICS = dict(cosine=0, dot=1, euclidean=2, sqeuclidean=3)
COSINE, DOT, EUCLIDEAN, SQEUCLIDEAN = (tl.constexpr(i) for i in METRICS.values())
EPS = 1e-12  # of the operations that have no such argument
VARY = ["K", "W", "T", "TILES", "S", "L", "D", "R", "first", "ignore_index"]  # not worth a compilation of their own
CLOSED = tl.constexpr(-1e30)  # logit of a class that does not exist: exp() of it is 0, and no inf-inf can come from it


@triton.jit
def _at(o_n, W, s_h, s_w, FLAT: tl.constexpr):
    """Offsets of the pixels `o_n` of a map of width W."""
    if FLAT:
        return o_n.to(tl.int64)*s_w
    else:
        return (o_n // W).to(tl.int64)*s_h + (o_n % W).to(tl.int64)*s_w


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a @ b as precise as float32, for features `a` and prototypes or coefficients `b`."""
    b_new = tl.zeros(acc.shape, tl.float32)
    if a.dtype == b.dtype and a.dtype != tl.float32:  # products of half-precision numbers are exact
        if INTERPRETED:
            b_new = tl.dot(a.to(tl.float32), b.to(tl.float32), b_new)
        else:
            b_new = tl.dot(a, b, b_new)
    elif a.dtype == tl.bfloat16:
        b_new = split_dot(a, b.to(tl.float32), b_new, INTERPRETED)
    elif a.dtype == tl.float16 and EXACT == "tf32x3":  # TF32 holds float16 exactly, only `b` is taken apart
        b_high = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        b_new = tl.dot(a.to(tl.float32), b - b_high, b_new, input_precision="tf32")
        b_new = tl.dot(a.to(tl.float32), b_high, b_new, input_precision="tf32")
    else:
        b_new = exact_dot(a, b, b_new)
    # tensor cores cut the sum off instead of rounding it, so tiles are added outside; the compiler would join a plain +
    return tl.fma(b_new, 1., acc)


@triton.jit
def _dot16(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a @ b to 16 bits of float32 `a` and `b`: enough for a result that is stored in half precision."""
    b_a, b_b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    b_c, b_d = (a - b_a.to(tl.float32)).to(tl.bfloat16), (b - b_b.to(tl.float32)).to(tl.bfloat16)
    if INTERPRETED:
        acc = tl.dot(b_a.to(tl.float32), b_d.to(tl.float32), acc)
        acc = tl.dot(b_c.to(tl.float32), b_b.to(tl.float32), acc)
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), acc)
    else:
        acc = tl.dot(b_a, b_d, acc)
        acc = tl.dot(b_c, b_b, acc)
        return tl.dot(b_a, b_b, acc)


@triton.jit
def _rows(p_q, i_c, o_c, o_k, C, K, s_qc, s_qk):
    """A tile of the prototypes from channel i_c on, channels first."""
    p_t = p_q + tl.cast(i_c, tl.int64)*s_qc + (o_c.to(tl.int64)[:, None]*s_qc + o_k.to(tl.int64)[None, :]*s_qk)
    return tl.load(p_t, mask=(o_c < C - i_c)[:, None] & (o_k < K)[None, :], other=0)                # [BLOCK_C, BLOCK_K]


@triton.jit
def _pixels(p_x, o_x, m_n, i_c, o_c, C, s_xc):
    """A tile of the features from channel i_c on."""
    p_t = p_x + tl.cast(i_c, tl.int64)*s_xc + (o_x[:, None] + o_c.to(tl.int64)[None, :]*s_xc)
    return tl.load(p_t, mask=m_n[:, None] & (o_c < C - i_c)[None, :], other=0)                      # [BLOCK_N, BLOCK_C]


@triton.jit
def _products(
    p_x, p_q, o_x, m_n, C, K, s_xc, s_qc, s_qk,
    METRIC: tl.constexpr, NORMS: tl.constexpr, AHEAD: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Products of pixels and prototypes and squared norms of both, in one walk over the channels."""
    o_k = tl.arange(0, BLOCK_K)
    b_a = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    b_xx, b_qq = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    o_c = tl.arange(0, BLOCK_C)
    for i_c in range(0, C, BLOCK_C):
        b_x = _pixels(p_x, o_x, m_n, i_c, o_c, C, s_xc)
        b_q = _rows(p_q, i_c, o_c, o_k, C, K, s_qc, s_qk)
        b_a = _dot(b_x, b_q, b_a, INTERPRETED)
        if METRIC != DOT:
            b_xx += _squares(b_x, 1)
            if NORMS:
                b_qq += _squares(b_q, 0)
    return b_a, b_xx, b_qq


@triton.jit
def _store_tile(p_x, o_x, m_n, i_c, o_c, C, s_xc, b):
    """The inverse of `_pixels`."""
    p_t = p_x + tl.cast(i_c, tl.int64)*s_xc + (o_x[:, None] + o_c.to(tl.int64)[None, :]*s_xc)
    tl.store(p_t, b.to(p_x.dtype.element_ty), mask=m_n[:, None] & (o_c < C - i_c)[None, :])


@triton.jit
def _squares(b, AXIS: tl.constexpr):
    b = b.to(tl.float32)
    return tl.sum(b*b, AXIS)


@triton.jit
def _inverse_norm(b_sq, eps):
    """1/max(norm, eps), and 0 where there is no direction to speak of."""
    return tl.where(b_sq > 1e-36, tl.div_rn(tl.full(b_sq.shape, 1., tl.float32), tl.maximum(tl.sqrt_rn(b_sq), eps)), 0.)


@triton.jit
def _inverse_slope(b_sq, eps):
    """1 where the inverse norm follows the norm, 0 where it is a constant."""
    return tl.where((b_sq > 1e-36) & (tl.sqrt_rn(b_sq) >= eps), 1., 0.)


@triton.jit
def _logits(b_a, b_xx, b_qq, eps, METRIC: tl.constexpr):
    """Logits [BLOCK_N, BLOCK_K] before they are scaled; distances are negated."""
    if METRIC == COSINE:
        return b_a*_inverse_norm(b_xx, eps)[:, None]*_inverse_norm(b_qq, eps)[None, :]
    elif METRIC == DOT:
        return b_a
    else:
        b_d = b_xx[:, None] + b_qq[None, :] - 2*b_a
        b_d = tl.where(b_d < 0, 0., b_d)  # a maximum would hide nan
        return -b_d if METRIC == SQEUCLIDEAN else -tl.sqrt(b_d)


@triton.jit
def _open(p_v, o_k, K, s_vk):
    """Which of the padded classes exist and may win."""
    m_k = o_k < K
    if p_v is not None:
        m_k = m_k & (tl.load(p_v + o_k.to(tl.int64)*s_vk, mask=m_k, other=0) != 0)
    return m_k


@triton.jit
def _ids(p_y, p_v, m_n, K, ignore_index, s_vk):
    """Class ids, and -1 for pixels that count for nothing."""
    b_y = tl.load(p_y, mask=m_n, other=0).to(tl.int64)
    m = m_n & (b_y >= 0) & (b_y < K) & (b_y != ignore_index)
    if p_v is not None:
        m = m & (tl.load(p_v + tl.where(m, b_y, 0)*s_vk, mask=m, other=0) != 0)
    return tl.where(m, b_y, -1).to(tl.int32)


# ---------------------------------------------------------------------------------------------------------- logits

@triton.jit(do_not_specialize=VARY)
def logits_fwd_kernel(
    p_x, p_q, p_z,
    C, K, N, W, T, scale, eps,
    s_xb, s_xc, s_xh, s_xw, s_qb, s_qk, s_qc,
    METRIC: tl.constexpr, FLAT: tl.constexpr, AHEAD: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_b = (i_t // T).to(tl.int64)
    o_n, o_k = i_t % T*BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_n = o_n < N
    b_a, b_xx, b_qq = _products(p_x + i_b*s_xb, p_q + i_b*s_qb, _at(o_n, W, s_xh, s_xw, FLAT), m_n, C, K, s_xc, s_qc, s_qk,
                                METRIC, True, AHEAD, INTERPRETED, BLOCK_N, BLOCK_C, BLOCK_K)
    p_zt = p_z + (i_b*K + o_k)[None, :]*N + o_n[:, None]
    tl.store(p_zt, _logits(b_a, b_xx, b_qq, eps, METRIC)*scale, mask=m_n[:, None] & (o_k < K)[None, :])


def _padded(n):
    return max(16, triton.next_power_of_2(n))  # tl.dot takes no side under 16


def _walk(x, q, metric, eps):
    """What every kernel is told about features (B,C,h,w) and prototypes (K,C) or (B,K,C)."""
    (B, C, h, w), K = x.shape, q.shape[-2]
    sb, sc, sh, sw, flat = common.pixel_strides(x)
    return dict(p_x=x, p_q=q, C=C, K=K, N=h*w, W=w, eps=float(eps), s_xb=sb, s_xc=sc, s_xh=sh, s_xw=sw,
                s_qb=q.stride(0) if q.dim() == 3 else 0, s_qk=q.stride(-2), s_qc=q.stride(-1),
                METRIC=METRICS[metric], FLAT=flat, INTERPRETED=INTERPRET, BLOCK_K=_padded(K))


def _aligned(x):
    """Whether the rows of a tile begin where a wide load may; those of 65x129 maps don't."""
    sb, sc, sh, sw, flat = common.pixel_strides(x)
    rows = (sw, sh, x.shape[1]) if sc == 1 else (sc, x.shape[2]*x.shape[3]) if flat and sw == 1 else (1,)
    return all(n % 16 == 0 for n in (sb, *rows))


def _ahead(x):
    """Pairs of bytes can't be copied to shared memory in the background, they have to be asked for one tile ahead."""
    return x.element_size() == 2 and not _aligned(x)


def _blocks(x, K):
    """Tile and warps of a forward kernel, and tiles per image."""
    B, _, h, w = x.shape
    BK, ahead = _padded(K), _ahead(x)
    # Each program reads the prototypes once more: for 128 pixels and 19 classes that is a third of what it reads of bfloat16
    # features, for 64 two thirds, from L2. More than 64 KB of logits don't fit the registers of a program.
    pixels = min(64 if ahead else 128, 8192//BK)
    while pixels > 32 and B*triton.cdiv(h*w, pixels) < common.processors(x.device):
        pixels //= 2  # DeepLab's maps are small: rather every processor at work
    # rows of 128 bytes, along pixels and along channels; twice that where they can't be fetched in the background
    channels = 256 if ahead and BK <= 32 and x.dtype == torch.bfloat16 else 128 if BK <= 64 else 4096//BK
    return dict(T=triton.cdiv(h*w, pixels), AHEAD=ahead, BLOCK_N=pixels,
                BLOCK_C=max(16, min(_padded(x.shape[1]), channels//x.element_size())),
                num_warps=8 if pixels == 128 or BK > 64 or ahead else 4)


def logits_fwd(
    x,       # (B,C,h,w)
    q,       # (K,C) or (B,K,C)
    metric,  # key of METRICS
    scale,   # multiplies the logits
    eps,     # norms below it count as it
) -> torch.Tensor:  # (B,K,h,w) float32
    """How close each pixel is to each prototype."""
    B, K = x.shape[0], q.shape[-2]
    z = torch.empty(B, K, *x.shape[2:], dtype=torch.float32, device=x.device)
    blocks = _blocks(x, K)
    common.launch(logits_fwd_kernel, (B*blocks["T"],), p_z=z, scale=float(scale), **_walk(x, q, metric, eps), **blocks)
    return z


# ---------------------------------------------------------------------------------------------------------- nearest

@triton.jit(do_not_specialize=VARY)
def may_win_kernel(
    p_q, p_v, p_open,
    C, K,
    s_qb, s_qk, s_qc, s_vb, s_vk,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One program per prototype: it takes part if it is valid and repeats no earlier valid one."""
    i_b, i_k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    o_c, o_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    p_qb = p_q + i_b*s_qb
    p_own = p_qb + i_k.to(tl.int64)*s_qk
    b_unlike = tl.zeros((BLOCK_K,), tl.int32)
    for i_c in range(0, C, BLOCK_C):
        b_q = _rows(p_qb, i_c, o_c, o_k, C, K, s_qc, s_qk)                                          # [BLOCK_C, BLOCK_K]
        b_own = tl.load(p_own + (i_c + o_c).to(tl.int64)*s_qc, mask=o_c < C - i_c, other=0)
        b_unlike += tl.sum((b_q != b_own[:, None]).to(tl.int32), 0)
    p_vb = p_v if p_v is None else p_v + i_b*s_vb
    m_k = _open(p_vb, o_k, K, s_vk)
    b_again = tl.max((m_k & (o_k < i_k) & (b_unlike == 0)).to(tl.int32), 0)
    b_valid = tl.max((m_k & (o_k == i_k)).to(tl.int32), 0)
    tl.store(p_open + tl.program_id(0), (b_valid*(1 - b_again)).to(tl.uint8))


@triton.jit(do_not_specialize=VARY)
def nearest_fwd_kernel(
    p_x, p_q, p_v, p_label, p_score,
    C, K, N, W, T, eps,
    s_xb, s_xc, s_xh, s_xw, s_qb, s_qk, s_qc, s_vb, s_vk,
    METRIC: tl.constexpr, FLAT: tl.constexpr, AHEAD: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_b = (i_t // T).to(tl.int64)
    o_n, o_k = i_t % T*BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_n = o_n < N
    b_a, b_xx, b_qq = _products(p_x + i_b*s_xb, p_q + i_b*s_qb, _at(o_n, W, s_xh, s_xw, FLAT), m_n, C, K, s_xc, s_qc, s_qk,
                                METRIC, True, AHEAD, INTERPRETED, BLOCK_N, BLOCK_C, BLOCK_K)
    p_vb = p_v if p_v is None else p_v + i_b*s_vb
    b_z = tl.where(_open(p_vb, o_k, K, s_vk)[None, :], _logits(b_a, b_xx, b_qq, eps, METRIC), -float("inf"))
    # nan wins, as in PyTorch: bad features shall show in the score
    b_label = tl.argmax(tl.where(b_z == b_z, b_z, float("inf")), 1, tie_break_left=True)            # [BLOCK_N]
    b_score = tl.sum(tl.where(o_k[None, :] == b_label[:, None], b_z, 0.), 1)
    tl.store(p_label + i_b*N + o_n, b_label.to(tl.int64), mask=m_n)
    tl.store(p_score + i_b*N + o_n, b_score, mask=m_n)


def _valid(valid):
    """What kernels are told about the classes that exist: None, (K,) or (B,K) bool."""
    if valid is None:
        return dict(p_v=None, s_vb=0, s_vk=0)
    return dict(p_v=valid.view(torch.uint8), s_vb=valid.stride(0) if valid.dim() == 2 else 0, s_vk=valid.stride(-1))


def _map(t, name):
    """What kernels are told about one number per pixel, (B,h,w) or the same for all."""
    sb, sh, sw = t.stride() if t.dim() else (0, 0, 0)
    flat = not t.dim() or t.shape[1] == 1 or sh == t.shape[2]*sw
    return {f"p_{name}": t, f"s_{name}b": sb, f"s_{name}h": sh, f"s_{name}w": sw, f"FLAT_{name.upper()}": flat}


def may_win(
    q,       # (K,C) or (B,K,C)
    valid,   # None, (K,) or (B,K) bool: classes that may win
) -> torch.Tensor:  # (K,) or (B,K) bool: those without the ones that repeat an earlier one
    """Equal prototypes share one candidate, so that no rounding of a product chooses between them."""
    K, C = q.shape[-2:]
    sets = max(t.shape[0] if t is not None and t.dim() == n else 1 for t, n in ((q, 3), (valid, 2)))
    taken = torch.empty(sets, K, dtype=torch.bool, device=q.device)
    BK = _padded(K)
    common.launch(may_win_kernel, (sets*K,), p_q=q, p_open=taken.view(torch.uint8), C=C, K=K, s_qb=q.stride(0) if q.dim() == 3 else 0,
                  s_qk=q.stride(-2), s_qc=q.stride(-1), **_valid(valid), BLOCK_C=max(16, min(_padded(C), 4096//BK)), BLOCK_K=BK)
    return taken if sets > 1 else taken[0]


def nearest(
    x,       # (B,C,h,w)
    q,       # (K,C) or (B,K,C)
    valid,   # None, (K,) or (B,K) bool: classes that may win
    metric,  # key of METRICS
) -> tuple:  # labels (B,h,w) int64, score (B,h,w) float32
    """The closest prototype of each pixel and its logit; of equal prototypes, and of equal scores, the lowest index wins."""
    B, _, h, w = x.shape
    label = torch.empty(B, h, w, dtype=torch.int64, device=x.device)
    score = torch.empty(B, h, w, dtype=torch.float32, device=x.device)
    blocks, walk = _blocks(x, q.shape[-2]), _walk(x, q, metric, EPS)
    common.launch(nearest_fwd_kernel, (B*blocks["T"],), p_label=label, p_score=score, **_valid(may_win(q, valid)), **walk, **blocks)
    return label, score


# ---------------------------------------------------------------------------------------------------------- cross-entropy

@triton.jit(do_not_specialize=VARY)
def cross_entropy_fwd_kernel(
    p_x, p_q, p_y, p_v, p_loss, p_lse, p_sums, p_counts,
    C, K, N, W, T, ignore_index, scale, eps,
    s_xb, s_xc, s_xh, s_xw, s_qb, s_qk, s_qc, s_yb, s_yh, s_yw, s_vb, s_vk,
    METRIC: tl.constexpr, FLAT: tl.constexpr, FLAT_Y: tl.constexpr, AHEAD: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_b = (i_t // T).to(tl.int64)
    o_n, o_k = i_t % T*BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_n = o_n < N
    p_vb = p_v if p_v is None else p_v + i_b*s_vb
    b_y = _ids(p_y + i_b*s_yb + _at(o_n, W, s_yh, s_yw, FLAT_Y), p_vb, m_n, K, ignore_index, s_vk)
    b_a, b_xx, b_qq = _products(p_x + i_b*s_xb, p_q + i_b*s_qb, _at(o_n, W, s_xh, s_xw, FLAT), m_n, C, K, s_xc, s_qc, s_qk,
                                METRIC, True, AHEAD, INTERPRETED, BLOCK_N, BLOCK_C, BLOCK_K)
    b_z = tl.where(_open(p_vb, o_k, K, s_vk)[None, :], _logits(b_a, b_xx, b_qq, eps, METRIC)*scale, CLOSED)
    b_max = tl.max(b_z, 1)                                                                          # [BLOCK_N]
    b_z -= b_max[:, None]  # from here on relative to the largest: a small loss keeps its digits
    b_log = tl.log(tl.sum(tl.exp(b_z), 1))
    b_loss = tl.where(b_y >= 0, b_log - tl.sum(tl.where(o_k[None, :] == b_y[:, None], b_z, 0.), 1), 0.)
    tl.store(p_lse + i_b*N + o_n, b_max + b_log, mask=m_n)
    tl.store(p_counts + i_t, tl.sum((b_y >= 0).to(tl.int32), 0))
    if p_sums is None:
        tl.store(p_loss + i_b*N + o_n, b_loss, mask=m_n)
    else:
        tl.store(p_sums + i_t, tl.sum(b_loss, 0))


@triton.jit(do_not_specialize=VARY)
def cross_entropy_sum_kernel(
    p_sums, p_counts, p_loss, p_count,
    R,
    MEAN: tl.constexpr, BLOCK_R: tl.constexpr,
):
    b_loss, b_count = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.int64)
    for i_r in range(0, R, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        b_count += tl.load(p_counts + o_r, mask=o_r < R, other=0)
        if p_sums is not None:
            b_loss += tl.load(p_sums + o_r, mask=o_r < R, other=0)
    count = tl.sum(b_count, 0).to(tl.float32)
    tl.store(p_count, count)
    if p_sums is not None:
        loss = tl.sum(b_loss, 0)
        tl.store(p_loss, loss/tl.maximum(count, 1.) if MEAN else loss)


def cross_entropy_fwd(
    x,             # (B,C,h,w)
    q,             # (K,C) or (B,K,C)
    labels,        # (B,h,w), any int type
    valid,         # None, (K,) or (B,K) bool: classes that exist
    metric,        # key of METRICS
    scale,         # multiplies the logits
    ignore_index,  # label left out
    reduction,     # 'mean', 'sum' or 'none'
) -> tuple:        # loss 0-d or (B,h,w), lse (B,h,w), count 0-d, all float32
    """Cross-entropy of the logits; also log-sum-exp per pixel and the number of pixels that count."""
    B, _, h, w = x.shape
    f32 = dict(dtype=torch.float32, device=x.device)
    blocks = _blocks(x, q.shape[-2])
    R, each = B*blocks["T"], reduction == "none"
    loss, lse, count = torch.empty((B, h, w) if each else (), **f32), torch.empty(B, h, w, **f32), torch.empty((), **f32)
    sums, counts = None if each else torch.empty(R, **f32), torch.empty(R, dtype=torch.int32, device=x.device)
    common.launch(cross_entropy_fwd_kernel, (R,), p_loss=loss, p_lse=lse, p_sums=sums, p_counts=counts,
                  ignore_index=ignore_index, scale=float(scale), **_map(labels, "y"), **_valid(valid),
                  **_walk(x, q, metric, EPS), **blocks)
    # one program adds everything: 4096 at a time are 2 steps for half a million tiles of pixels... see _blocks
    common.launch(cross_entropy_sum_kernel, (1,), p_sums=sums, p_counts=counts, p_loss=loss, p_count=count, R=R,
                  MEAN=reduction == "mean", BLOCK_R=2048, num_warps=8)
    return loss, lse, count


# ---------------------------------------------------------------------------------------------------------- gradients

@triton.jit
def _upstream(
    b_z, p_g, p_y, p_v, p_lse, p_count, i_b, o_n, m_n, o_k,
    K, N, W, ignore_index, scale,
    s_gb, s_gk, s_gh, s_gw, s_yb, s_yh, s_yw, s_vb, s_vk,
    FLAT_G: tl.constexpr, FLAT_Y: tl.constexpr,
):
    """Gradient [BLOCK_N, BLOCK_K] of the logits before they are scaled: given, or that of cross-entropy."""
    p_gt = p_g + i_b*s_gb + _at(o_n, W, s_gh, s_gw, FLAT_G)
    if p_y is None:
        m = m_n[:, None] & (o_k < K)[None, :]
        return tl.load(p_gt[:, None] + o_k.to(tl.int64)[None, :]*s_gk, mask=m, other=0).to(tl.float32)*scale
    else:
        p_vb = p_v if p_v is None else p_v + i_b*s_vb
        b_y = _ids(p_y + i_b*s_yb + _at(o_n, W, s_yh, s_yw, FLAT_Y), p_vb, m_n, K, ignore_index, s_vk)
        b_lse = tl.load(p_lse + i_b*N + o_n, mask=m_n, other=0)
        b_g = tl.load(p_gt, mask=m_n, other=0).to(tl.float32)*scale
        if p_count is not None:
            b_g = b_g/tl.maximum(tl.load(p_count), 1.)
        m_k = _open(p_vb, o_k, K, s_vk)
        b_p = tl.exp(tl.where(m_k[None, :], b_z*scale, CLOSED) - b_lse[:, None])
        b_p *= 2 - tl.sum(b_p, 1)[:, None]  # 1/sum of a sum of about 1: takes out what rounding `lse` put in
        b_p -= tl.where(o_k[None, :] == b_y[:, None], 1., 0.)
        return tl.where(m_k[None, :] & (b_y >= 0)[:, None], b_p*b_g[:, None], 0.)


@triton.jit
def _coefficients(b_d, b_a, b_z, b_xx, b_qq, eps, METRIC: tl.constexpr):
    """From the gradient of the logits: e [BLOCK_N, BLOCK_K] and c [BLOCK_N], so that dx = (e*norms) @ q + c*x."""
    if METRIC == COSINE:
        b_in = _inverse_norm(b_xx, eps)
        return b_d*b_in[:, None], -_inverse_slope(b_xx, eps)*b_in*b_in*tl.sum(b_d*b_z, 1)
    elif METRIC == DOT:
        return b_d, b_xx
    else:
        if METRIC == SQEUCLIDEAN:
            b_e = tl.where(b_xx[:, None] + b_qq[None, :] - 2*b_a >= 0, 2*b_d, 0.)
        else:
            b_e = tl.where(b_z < 0, -b_d/tl.where(b_z < 0, b_z, 1.), 0.)
        return b_e, -tl.sum(b_e, 1)


@triton.jit
def _features_gradient(b_e, b_q, b_dx, HALF: tl.constexpr, INTERPRETED: tl.constexpr):
    """b_dx + e @ q for e [BLOCK_N, BLOCK_K] and q [BLOCK_C, BLOCK_K]; 16 bits will do where the result has 8 or 11."""
    if HALF:
        return _dot16(b_e, tl.trans(b_q), b_dx, INTERPRETED)
    else:
        return exact_dot(b_e, tl.trans(b_q), b_dx)


@triton.jit
def _directions(b_q, b_norms, eps, METRIC: tl.constexpr):
    """What multiplies e in the gradient of the features: the prototypes, of length 1 for cosine."""
    b_q = b_q.to(tl.float32)
    if METRIC == COSINE:
        b_q *= _inverse_norm(b_norms, eps)[None, :]
    return b_q


@triton.jit
def _store_sums(p_sums, p_dots, b_sums, b_es, b_q, i_u, i_d, o_c, o_k, C, K, METRIC: tl.constexpr):
    """Sums e^T @ x [BLOCK_C, BLOCK_K] of a run of tiles, and what multiplies the prototype: their product, or the sum of e."""
    m_k = o_k < K
    p_k = i_u.to(tl.int64)*K + o_k
    tl.store(p_sums + p_k[None, :]*C + o_c[:, None], b_sums, mask=(o_c < C)[:, None] & m_k[None, :])
    if METRIC == COSINE:
        tl.store(p_dots + i_d.to(tl.int64)*K + o_k, tl.sum(b_sums*b_q.to(tl.float32), 0), mask=m_k)
    elif METRIC != DOT:
        tl.store(p_dots + i_d.to(tl.int64)*K + o_k, b_es, mask=m_k)


@triton.jit(do_not_specialize=VARY)
def narrow_bwd_kernel(
    p_x, p_q, p_g, p_y, p_v, p_lse, p_count, p_dx, p_sums, p_dots, p_norms,
    C, K, N, W, T, TILES, S, L, ignore_index, scale, eps,
    s_xb, s_xc, s_xh, s_xw, s_qb, s_qk, s_qc, s_dxb, s_dxc, s_dxh, s_dxw,
    s_gb, s_gk, s_gh, s_gw, s_yb, s_yh, s_yw, s_vb, s_vk,
    METRIC: tl.constexpr, FLAT: tl.constexpr, ALIKE: tl.constexpr, FLAT_G: tl.constexpr, FLAT_Y: tl.constexpr,
    AHEAD: tl.constexpr, INTERPRETED: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    i_u = tl.program_id(0)  # runs of tiles: S of length L for each set of prototypes, which owns TILES tiles
    i_i = i_u // S
    first = i_u % S*L
    last = tl.minimum(first + L, TILES)
    o_k, o_c = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    p_qi = p_q + i_i.to(tl.int64)*s_qb
    b_norms = tl.zeros((BLOCK_K,), tl.float32)
    for i_c in range(0, C, BLOCK_C):
        b_norms += _squares(_rows(p_qi, i_c, o_c, o_k, C, K, s_qc, s_qk), 0)
    b_es = tl.zeros((BLOCK_K,), tl.float32)
    b_sums = ()  # one block of channels each
    for i in tl.static_range(CHUNKS):
        b_sums = b_sums + (tl.zeros((BLOCK_C, BLOCK_K), tl.float32),)
    for i_l in range(first, last):
        i_t = i_i*TILES + i_l
        i_b = (i_t // T).to(tl.int64)
        o_n = i_t % T*BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        p_xb, p_qb = p_x + i_b*s_xb, p_q + i_b*s_qb
        o_x = _at(o_n, W, s_xh, s_xw, FLAT)
        b_a, b_xx, _ = _products(p_xb, p_qb, o_x, m_n, C, K, s_xc, s_qc, s_qk,
                                 METRIC, False, AHEAD, INTERPRETED, BLOCK_N, BLOCK_W, BLOCK_K)
        b_z = _logits(b_a, b_xx, b_norms, eps, METRIC)
        b_d = _upstream(b_z, p_g, p_y, p_v, p_lse, p_count, i_b, o_n, m_n, o_k, K, N, W, ignore_index, scale,
                        s_gb, s_gk, s_gh, s_gw, s_yb, s_yh, s_yw, s_vb, s_vk, FLAT_G, FLAT_Y)
        b_e, b_c = _coefficients(b_d, b_a, b_z, b_xx, b_norms, eps, METRIC)
        b_es += tl.sum(b_e, 0)
        p_dxt = p_dx if p_dx is None else p_dx + i_b*s_dxb
        o_dx = o_x if ALIKE else _at(o_n, W, s_dxh, s_dxw, False)
        for i_c in range(0, C, BLOCK_C):
            i_d = (C - 1 - i_c) // BLOCK_C*BLOCK_C  # backwards: what was read last is nearest
            b_x = _pixels(p_xb, o_x, m_n, i_d, o_c, C, s_xc)                                        # [BLOCK_N, BLOCK_C]
            b_q = _rows(p_qb, i_d, o_c, o_k, C, K, s_qc, s_qk)                                      # [BLOCK_C, BLOCK_K]
            if p_dx is not None:
                b_dx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
                if METRIC != DOT:
                    b_dx += b_c[:, None]*b_x.to(tl.float32)
                b_dx = _features_gradient(b_e, _directions(b_q, b_norms, eps, METRIC), b_dx, b_x.dtype != tl.float32, INTERPRETED)
                _store_tile(p_dxt, o_dx, m_n, i_d, o_c, C, s_xc if ALIKE else s_dxc, b_dx)
            if p_sums is not None:  # registers can't be indexed, so the sums move up by one block at each step
                b_sums = b_sums[1:] + (_dot(tl.trans(b_x), b_e, b_sums[0], INTERPRETED),)
    if p_sums is not None:
        for i_c in range(0, C, BLOCK_C):
            i_d = (C - 1 - i_c) // BLOCK_C*BLOCK_C
            b_q = _rows(p_qi, i_d, o_c, o_k, C, K, s_qc, s_qk)
            _store_sums(p_sums, p_dots, b_sums[0], b_es, b_q, i_u, i_u*CHUNKS + i_c//BLOCK_C, i_d + o_c, o_k, C, K, METRIC)
            b_sums = b_sums[1:] + (b_sums[0],)
            b_es = tl.zeros((BLOCK_K,), tl.float32)
        if first == 0:
            tl.store(p_norms + i_i*K + o_k, b_norms, mask=o_k < K)


@triton.jit(do_not_specialize=VARY)
def wide_coefficients_kernel(
    p_x, p_q, p_g, p_y, p_v, p_lse, p_count, p_e, p_norms,
    C, K, N, W, T, TILES, S, L, first, ignore_index, scale, eps,
    s_xb, s_xc, s_xh, s_xw, s_qb, s_qk, s_qc,
    s_gb, s_gk, s_gh, s_gw, s_yb, s_yh, s_yw, s_vb, s_vk,
    METRIC: tl.constexpr, FLAT: tl.constexpr, FLAT_G: tl.constexpr, FLAT_Y: tl.constexpr,
    AHEAD: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    i_j = tl.program_id(0)
    i_u = first + i_j // L
    i_l = i_u % S*L + i_j % L
    i_i = i_u // S
    i_t = i_i*TILES + i_l
    i_b = (i_t // T).to(tl.int64)
    o_m, o_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    o_n = i_t % T*BLOCK_N + o_m
    m_n = (o_n < N) & (i_l < TILES)  # the last run of a set may be short
    b_a, b_xx, b_norms = _products(p_x + i_b*s_xb, p_q + i_b*s_qb, _at(o_n, W, s_xh, s_xw, FLAT), m_n, C, K, s_xc, s_qc, s_qk,
                                   METRIC, True, AHEAD, INTERPRETED, BLOCK_N, BLOCK_C, BLOCK_K)
    b_z = _logits(b_a, b_xx, b_norms, eps, METRIC)
    b_d = _upstream(b_z, p_g, p_y, p_v, p_lse, p_count, i_b, o_n, m_n, o_k, K, N, W, ignore_index, scale,
                    s_gb, s_gk, s_gh, s_gw, s_yb, s_yh, s_yw, s_vb, s_vk, FLAT_G, FLAT_Y)
    b_e, b_c = _coefficients(b_d, b_a, b_z, b_xx, b_norms, eps, METRIC)
    p_t = p_e + i_j.to(tl.int64)*(K + 1)*BLOCK_N + o_m
    tl.store(p_t[:, None] + o_k[None, :]*BLOCK_N, b_e, mask=(o_k < K)[None, :])
    tl.store(p_t + K*BLOCK_N, b_c)
    if i_l == 0:
        tl.store(p_norms + i_i*K + o_k, b_norms, mask=o_k < K)


@triton.jit(do_not_specialize=VARY)
def wide_bwd_kernel(
    p_x, p_q, p_e, p_norms, p_dx, p_sums, p_dots,
    C, K, N, W, T, TILES, S, L, first, CHUNKS, eps,
    s_xb, s_xc, s_xh, s_xw, s_qb, s_qk, s_qc, s_dxb, s_dxc, s_dxh, s_dxw,
    METRIC: tl.constexpr, FLAT: tl.constexpr, ALIKE: tl.constexpr, INTERPRETED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    i_c, i_j = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    i_p = i_j % PARTS  # block of classes: all of them in turn for dx, one per program for dq
    i_j = tl.num_programs(0) // CHUNKS // PARTS - 1 - i_j // PARTS  # what was read last is still in L2: start there
    i_u = first + i_j
    i_i = i_u // S
    i_d = i_c*BLOCK_C
    o_c, o_m, o_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N), i_p*BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    p_qi = p_q + i_i.to(tl.int64)*s_qb
    b_q = _rows(p_qi, i_d, o_c, o_k, C, K, s_qc, s_qk)
    b_norms = tl.load(p_norms + i_i*K + o_k, mask=m_k, other=0)
    b_sums, b_es = tl.zeros((BLOCK_C, BLOCK_K), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for i_l in range(0, tl.minimum(L, TILES - i_u % S*L)):
        i_t = i_i*TILES + i_u % S*L + i_l
        i_b = (i_t // T).to(tl.int64)
        o_n = i_t % T*BLOCK_N + o_m
        m_n = o_n < N
        o_x = _at(o_n, W, s_xh, s_xw, FLAT)
        b_x = _pixels(p_x + i_b*s_xb, o_x, m_n, i_d, o_c, C, s_xc)                                  # [BLOCK_N, BLOCK_C]
        p_t = p_e + (i_j*L + i_l).to(tl.int64)*(K + 1)*BLOCK_N + o_m
        if p_dx is None or p_sums is not None:
            b_e = tl.load(p_t[:, None] + o_k[None, :]*BLOCK_N, mask=m_n[:, None] & m_k[None, :], other=0)  # [BLOCK_N, BLOCK_K]
        if p_sums is not None:
            b_sums = _dot(tl.trans(b_x), b_e, b_sums, INTERPRETED)
            b_es += tl.sum(b_e, 0)
        if p_dx is not None:
            b_dx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            if METRIC != DOT:
                b_dx += tl.load(p_t + K*BLOCK_N, mask=m_n, other=0)[:, None]*b_x.to(tl.float32)
            if p_sums is not None:
                b_dx = _features_gradient(b_e, _directions(b_q, b_norms, eps, METRIC), b_dx, b_x.dtype != tl.float32, INTERPRETED)
            else:
                for i_k in range(0, K, BLOCK_K):
                    m_e = i_k + o_k < K
                    b_e = tl.load(p_t[:, None] + (i_k + o_k)[None, :]*BLOCK_N, mask=m_n[:, None] & m_e[None, :], other=0)
                    b_q = _rows(p_qi, i_d, o_c, i_k + o_k, C, K, s_qc, s_qk)
                    b_norms = tl.load(p_norms + i_i*K + i_k + o_k, mask=m_e, other=0)
                    b_dx = _features_gradient(b_e, _directions(b_q, b_norms, eps, METRIC), b_dx, b_x.dtype != tl.float32,
                                              INTERPRETED)
            if ALIKE:
                _store_tile(p_dx + i_b*s_dxb, o_x, m_n, i_d, o_c, C, s_xc, b_dx)
            else:
                _store_tile(p_dx + i_b*s_dxb, _at(o_n, W, s_dxh, s_dxw, False), m_n, i_d, o_c, C, s_dxc, b_dx)
    if p_sums is not None:
        if i_c > 0:
            b_es = tl.zeros((BLOCK_K,), tl.float32)  # the first channels have counted them
        _store_sums(p_sums, p_dots, b_sums, b_es, b_q, i_u, i_u*CHUNKS + i_c, i_d + o_c, o_k, C, K, METRIC)


@triton.jit(do_not_specialize=VARY)
def prototypes_bwd_kernel(
    p_q, p_sums, p_dots, p_norms, p_dq,
    C, K, S, D, CHUNKS, eps,
    s_qb, s_qk, s_qc, s_dqb, s_dqk, s_dqc,
    METRIC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    i_c, i_r = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS  # channels, prototype
    i_k, i_i = (i_r % K).to(tl.int64), (i_r // K).to(tl.int64)
    o_c, o_s = i_c*BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    m_c = o_c < C
    b_dq = tl.zeros((BLOCK_C,), tl.float32)
    for i_s in range(0, S, BLOCK_S):
        p_s = p_sums + ((i_i*S + i_s + o_s)*K + i_k)[:, None]*C + o_c[None, :]
        b_dq += tl.sum(tl.load(p_s, mask=(i_s + o_s < S)[:, None] & m_c[None, :], other=0), 0)
    if METRIC != DOT:
        b_s = tl.zeros((BLOCK_S,), tl.float32)
        for i_s in range(0, D, BLOCK_S):
            b_s += tl.load(p_dots + (i_i*D + i_s + o_s)*K + i_k, mask=i_s + o_s < D, other=0)
        s = tl.sum(b_s, 0)
        b_q = tl.load(p_q + i_i*s_qb + i_k*s_qk + o_c.to(tl.int64)*s_qc, mask=m_c, other=0).to(tl.float32)  # [BLOCK_C]
        if METRIC == COSINE:  # of q/|q|: what points along q changes only its length
            b_norm = tl.load(p_norms + i_r + tl.zeros((BLOCK_C,), tl.int32))
            b_in = _inverse_norm(b_norm, eps)
            b_dq = b_in*(b_dq - _inverse_slope(b_norm, eps)*(s*b_in*b_in)*b_q)
        else:
            b_dq -= s*b_q
    tl.store(p_dq + i_i*s_dqb + i_k*s_dqk + o_c.to(tl.int64)*s_dqc, b_dq.to(p_dq.dtype.element_ty), mask=m_c)


NARROW = 8192  # most padded classes x channels whose sums stay in registers: 32 of each of 256 threads


def _backward(x, q, metric, scale, eps, need_x, need_q, **upstream):
    """Gradients of features and prototypes; `upstream` holds what `_upstream` is told besides."""
    C, K, I = x.shape[1], q.shape[-2], q.shape[0] if q.dim() == 3 else 1
    dx, dq = torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(q) if need_q else q.new_empty(0)
    if not (need_x or need_q):
        return dx, dq
    norms = torch.empty(I, K, dtype=torch.float32, device=x.device)
    walk = dict(_walk(x, q, metric, eps), p_norms=norms)
    dxb, dxc, dxh, dxw = (dx if need_x else x).stride()
    to = dict(p_dx=dx if need_x else None, s_dxb=dxb, s_dxc=dxc, s_dxh=dxh, s_dxw=dxw, ALIKE=(dxb, dxc, dxh, dxw) == x.stride())
    upstream = dict(upstream, scale=float(scale), AHEAD=_ahead(x))
    room = x.numel()*x.element_size()//20  # extra memory: that much for the sums of the runs, and as much for e
    run = _narrow if _padded(K) <= 64 and _padded(K)*_padded(C) <= NARROW else _wide
    sums, dots = run(x, K, I, need_q, room, walk, to, upstream)
    if need_q:
        channels = min(_padded(C), 128)
        dqb, dqk, dqc = dq.stride() if dq.dim() == 3 else (0, *dq.stride())
        common.launch(prototypes_bwd_kernel, (triton.cdiv(C, channels)*K*I,), p_sums=sums, p_dots=dots, p_dq=dq,
                      S=sums.shape[1], D=dots.shape[1], CHUNKS=triton.cdiv(C, channels), s_dqb=dqb, s_dqk=dqk, s_dqc=dqc,
                      BLOCK_S=32, BLOCK_C=channels,
                      **{n: walk[n] for n in ("p_q", "p_norms", "C", "K", "eps", "s_qb", "s_qk", "s_qc", "METRIC")})
    return dx, dq


def _runs(tiles, runs):
    """Cut tiles into at most that many runs of equal length, none of them empty -> number, length."""
    length = triton.cdiv(tiles, max(1, min(tiles, runs)))
    return triton.cdiv(tiles, length), length


def _sums(x, K, I, S, chunks):
    """Memory for what the runs of each set of prototypes add up."""
    f32 = dict(dtype=torch.float32, device=x.device)
    return torch.empty(I, S, K, x.shape[1], **f32), torch.empty(I, S*chunks, K, **f32)


def _narrow(x, K, I, need_q, room, walk, to, upstream):
    """One read of the features, one write of their gradient; runs of tiles that keep the sums for the prototypes."""
    B, C, h, w = x.shape
    # one program of 8 warps fills the registers of a processor, so there are as many runs as processors
    runs = triton.cdiv(common.processors(x.device), I)
    channels, small = min(_padded(C), 64), walk["BLOCK_K"] <= 32 and _aligned(x)
    chunks, angle = triton.cdiv(C, channels), walk["METRIC"] in (METRICS["cosine"], METRICS["dot"])
    # the largest tile that registers have room for
    if x.dtype == torch.bfloat16 and small:
        pixels = 128 if B*triton.cdiv(h*w, 128) >= runs*I else 64
    else:
        pixels = 64 if small and (x.element_size() == 2 or angle and chunks > 1) else 32
    # tiles on their way: what registers have room for again
    stages = 2 if channels < 64 or not walk["FLAT"] else 3 if walk["BLOCK_K"] > 32 else 5 if pixels == 32 else 4 if angle else 3
    T = triton.cdiv(h*w, pixels)
    S, L = _runs(B//I*T, min(runs, max(2*room, 2 << 20)//(4*I*K*C)) if need_q else runs)
    sums, dots = _sums(x, K, I, S, chunks) if need_q else (None, None)
    common.launch(narrow_bwd_kernel, (I*S,), p_sums=sums, p_dots=dots, T=T, TILES=B//I*T, S=S, L=L, CHUNKS=chunks,
                  BLOCK_N=pixels, BLOCK_W=min(channels, 32), BLOCK_C=channels, num_warps=8, num_stages=stages,
                  **walk, **to, **upstream)
    return sums, dots


def _wide(x, K, I, need_q, room, walk, to, upstream):
    """Two reads of the features, one write of their gradient; e in between, for as many tiles at a time as there is room."""
    B, C, h, w = x.shape
    BK, aligned = walk["BLOCK_K"], _aligned(x)
    # what registers have room for: classes of one program, pixels of a tile, tiles on their way
    group = min(BK, 32 if BK == 64 and not aligned else 64)
    parts = triton.cdiv(K, group)
    if BK > 32:
        pixels, stages = 32, 3 if parts == 1 else 2
    else:
        pixels, stages = (32, 5) if x.element_size() > 2 else (64, 4 if aligned else 1)
    T = triton.cdiv(h*w, pixels)
    tiles, size = B//I*T, 4*(K + 1)*pixels  # per set of prototypes; bytes of e per tile
    channels = min(_padded(C), 64)
    chunks = triton.cdiv(C, channels)
    S = triton.cdiv(4*common.processors(x.device), chunks*I)
    if need_q:
        S = min(S, max(room, 2 << 20)//(4*I*K*C))
    room = max(room, 4 << 20)
    S, L = _runs(tiles, max(S, triton.cdiv(tiles*size, room)))
    piece = max(1, min(room//(L*size), I*S))  # runs
    sums, dots = _sums(x, K, I, S, chunks) if need_q else (None, None)
    e = torch.empty(piece*L, K + 1, pixels, dtype=torch.float32, device=x.device)
    dx, dq = dict(p_dx=to.pop("p_dx")), dict(p_sums=sums, p_dots=dots)
    if parts == 1:  # a program holds the sums of all classes: both gradients in one read of the features
        passes = [(1, dict(dx, **dq))]
    else:
        passes = [(parts, dict(dq, p_dx=None))]*need_q + [(1, dict(dx, p_sums=None, p_dots=None))]*(dx["p_dx"] is not None)
    runs = dict(walk, p_e=e, T=T, TILES=tiles, S=S, L=L, BLOCK_N=pixels, num_warps=8)
    for first in range(0, I*S, piece):
        count = min(piece, I*S - first)
        common.launch(wide_coefficients_kernel, (count*L,), first=first, BLOCK_C=_blocks(x, K)["BLOCK_C"],
                      num_stages=5 if pixels == 32 else 3, **runs, **upstream)
        for n, part in passes:
            common.launch(wide_bwd_kernel, (count*chunks*n,), first=first, CHUNKS=chunks, PARTS=n, BLOCK_C=channels,
                          num_stages=stages, **dict(runs, BLOCK_K=group, **to, **part))
    return sums, dots


def logits_bwd(
    g,       # (B,K,h,w) gradient of the logits, any strides
    x,       # (B,C,h,w)
    q,       # (K,C) or (B,K,C)
    metric,  # key of METRICS
    scale,   # multiplied the logits
    eps,     # norms below it count as it
    need_x,  # gradient of the features wanted?
    need_q,  # gradient of the prototypes wanted?
) -> tuple:  # dx like x, dq like q; an empty tensor for what is not wanted
    """Gradients of `logits_fwd`."""
    gb, gk, gh, gw, flat = common.pixel_strides(g)
    return _backward(x, q, metric, scale, eps, need_x, need_q, p_g=g, s_gb=gb, s_gk=gk, s_gh=gh, s_gw=gw, FLAT_G=flat,
                     p_y=None, s_yb=0, s_yh=0, s_yw=0, FLAT_Y=True, p_lse=None, p_count=None, ignore_index=0, **_valid(None))


def cross_entropy_bwd(
    g,             # 0-d, or (B,h,w) for 'none': gradient of the loss
    x,             # (B,C,h,w)
    q,             # (K,C) or (B,K,C)
    labels,        # (B,h,w), any int type
    valid,         # None, (K,) or (B,K) bool: classes that exist
    lse,           # (B,h,w) from the forward pass
    count,         # 0-d from the forward pass
    metric,        # key of METRICS
    scale,         # multiplied the logits
    ignore_index,  # label left out
    reduction,     # 'mean', 'sum' or 'none'
    need_x,        # gradient of the features wanted?
    need_q,        # gradient of the prototypes wanted?
) -> tuple:        # dx like x, dq like q; an empty tensor for what is not wanted
    """Gradients of `cross_entropy_fwd`; the logits are computed again, never stored."""
    return _backward(x, q, metric, scale, EPS, need_x, need_q, s_gk=0, p_lse=lse, p_count=count if reduction == "mean" else None,
                     ignore_index=ignore_index, **_map(g, "g"), **_map(labels, "y"), **_valid(valid))
