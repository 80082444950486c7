"""Launches of kernels/distance.py: each block size, type, layout, metric and flag that a user can reach."""
import torch

from protonb.kernels import distance as D

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _x(dtype, C=256, h=128, w=256, last=False):
    x = torch.empty(2, C, h, w, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if last else x


def _q(x, K, own=False, dtype=F32):
    return torch.empty(*((len(x),) if own else ()), K, x.shape[1], dtype=dtype, device="meta")


def _entropy(x, q, metric="cosine", valid=None, reduction="mean", need=(True, True), labels=torch.int64):
    y = torch.empty(len(x), *x.shape[2:], dtype=labels, device="meta")
    valid = None if valid is None else torch.empty(*valid, dtype=torch.bool, device="meta")
    loss, lse, count = D.cross_entropy_fwd(x, q, y, valid, metric, 20.0, 255, reduction)
    D.cross_entropy_bwd(torch.empty_like(loss), x, q, y, valid, lse, count, metric, 20.0, 255, reduction, *need)


def _logits(x, q, metric, need=(True, True)):
    z = D.logits_fwd(x, q, metric, 2.0, 1e-12)
    D.logits_bwd(z, x, q, metric, 2.0, 1e-12, *need)


def cases():
    small = dict(C=2048, h=65, w=129)  # DeepLab's maps: no row of 8385 numbers starts where a wide load may
    # cross-entropy: the narrow form (one tile of channels), the wide one, and many classes
    yield "256 float32", lambda: _entropy(_x(F32), _q(_x(F32), 19))
    yield "256 bfloat16", lambda: _entropy(_x(BF16), _q(_x(BF16), 19))
    yield "256 float16, valid", lambda: _entropy(_x(F16), _q(_x(F16), 19), valid=(19,), reduction="sum")
    yield "256 bfloat16 channels-last", lambda: _entropy(_x(BF16, last=True), _q(_x(BF16), 19))
    yield "2048 float32 65x129", lambda: _entropy(_x(F32, **small), _q(_x(F32, C=2048), 19))
    yield "2048 bfloat16 65x129", lambda: _entropy(_x(BF16, **small), _q(_x(BF16, C=2048), 19))
    yield "2048 bfloat16 channels-last", lambda: _entropy(_x(BF16, last=True, **small), _q(_x(BF16, C=2048), 19))
    yield "256 float32 K150", lambda: _entropy(_x(F32), _q(_x(F32), 150))
    yield "256 bfloat16 K150", lambda: _entropy(_x(BF16), _q(_x(BF16), 150))
    yield "64 float16 K100 channels-last", lambda: _entropy(_x(F16, C=64, last=True), _q(_x(F16, C=64), 100))
    # logits and the nearest prototype: the other metrics, prototypes in half precision and for each image, odd channels, crops
    yield "256 float32 euclidean", lambda: _logits(_x(F32), _q(_x(F32), 19), "euclidean")
    yield "130 bfloat16 sqeuclidean own", lambda: _logits(_x(BF16, C=130), _q(_x(BF16, C=130), 19, own=True, dtype=BF16), "sqeuclidean")
    yield "3 float32 dot crop", lambda: _logits(_x(F32, C=3)[..., 1:, 2:], _q(_x(F32, C=3), 2), "dot")
    yield "nearest bfloat16", lambda: D.nearest(_x(BF16), _q(_x(BF16), 19), None, "cosine")
    each = torch.empty(2, 150, dtype=torch.bool, device="meta")
    yield "nearest float32 own, valid, K150", lambda: D.nearest(_x(F32, C=130), _q(_x(F32, C=130), 150, own=True), each, "euclidean")
