"""Launches of kernels/contrast.py that users can reach: one tile or a streamed bank, whole or split, layouts, types."""
import torch

from protonb.kernels.contrast import contrast_bwd, contrast_fwd

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def rows(n, C, dtype, layout):
    """(n,C): rows in one piece, or channels in one piece (an NCHW map turned round), or a crop."""
    if layout == "transposed":
        return torch.empty(C, n, dtype=dtype, device="meta").T
    wide = torch.empty(n, C + 5, dtype=dtype, device="meta")
    return wide[:, 3:-2] if layout == "crop" else torch.empty(n, C, dtype=dtype, device="meta")


def both(N, M, C, dtype, keys=None, layout="rows", weights=None, need_q=True, backward=True, labels=torch.int64):
    q, k = rows(N, C, dtype, layout), rows(M, C, keys or dtype, layout)
    y, t = (torch.empty(n, dtype=labels, device="meta") for n in (N, M))
    w = None if weights is None else torch.empty(M, dtype=weights, device="meta")
    _, _, _, stats = contrast_fwd(q, y, k, t, w, 0.1, 255, need_q)
    if backward:
        contrast_bwd(torch.empty(N, device="meta"), q, y, k, t, w, stats, 0.1, 255)


def cases():
    for dtype, name in ((F32, "fp32"), (BF16, "bf16")):
        yield f"{name} 19 keys", lambda: both(65536, 19, 256, dtype)
        yield f"{name} 64 keys, transposed", lambda: both(16770, 64, 130, dtype, None, "transposed", labels=torch.uint8)
        yield f"{name} 3800 keys", lambda: both(65536, 3800, 256, dtype)
        yield f"{name} 3800 keys, split, weights", lambda: both(8192, 3800, 256, dtype, weights=F32)
        yield f"{name} 3800 keys, 128 channels", lambda: both(65536, 3800, 128, dtype, weights=F32)
        yield f"{name} 3800 keys, crop", lambda: both(65536, 3800, 130, dtype, layout="crop", weights=F32)
        yield f"{name} 600 keys, 16 channels", lambda: both(512, 600, 16, dtype)
    yield "bf16 50 keys, 2048 channels", lambda: both(16770, 50, 2048, BF16, weights=BF16)
    yield "bf16 3800 keys, loss alone", lambda: both(65536, 3800, 256, BF16, need_q=False, backward=False)
    yield "bf16 3800 keys, transposed", lambda: both(16770, 3800, 256, BF16, layout="transposed")
    yield "bf16 3800 keys, 1024 channels", lambda: both(8192, 3800, 1024, BF16)
    yield "bf16 3800 keys, 300 channels", lambda: both(512, 3800, 300, BF16, weights=F32)
    yield "fp16 19 keys", lambda: both(65536, 19, 256, F16)
    yield "fp16 3800 keys", lambda: both(65536, 3800, 256, F16)
    yield "bf16 queries, fp32 keys", lambda: both(65536, 3800, 128, BF16, F32)
