"""What users reach of kernels/pooling.py: sizes of head and backbone, branches of `_blocks`, kinds of labels."""
import torch

from protonb.kernels.pooling import pool_bwd, pool_fwd

HEAD, BACKBONE, SMALL = (2, 256, 128, 256), (2, 2048, 65, 129), (3, 3, 17, 33)
FULL, BF, HALF = torch.float32, torch.bfloat16, torch.float16


def case(dtype, shape, K=19, layout="plain", soft=None, weights=None, y=torch.int64, per_image=False, strided=False):
    B, C, h, w = shape

    def empty(*shape, dtype): return torch.empty(shape, dtype=dtype, device="meta")

    def run():
        x = empty(*shape, dtype=dtype)
        if layout == "last": x = x.contiguous(memory_format=torch.channels_last)
        if layout == "crop": x = empty(B, C, h+1, w+2, dtype=dtype)[..., 1:, 2:]
        labels = empty(B, K, h, w, dtype=soft) if soft else empty(B, h, w, dtype=y)
        if strided: labels = empty(B, 8*h-7, 8*w-7, dtype=y)[:, ::8, ::8]
        v = None if weights is None else empty(B, h, w, dtype=weights)
        p, m = pool_fwd(x, labels, v, K, 255, per_image, 0.)
        need = True, bool(soft), v is not None
        pool_bwd(torch.empty_like(p), torch.empty_like(m), x, labels, v, p, m, 255, per_image, 0., *need)

    more = dict(soft=soft, weights=weights, strided=strided, per_image=per_image)
    name = str(dtype)[6:], "x".join(map(str, shape)), f"K{K}", layout, *(k for k, v in more.items() if v)
    return " ".join(name), run


def cases():
    yield case(BF, HEAD)
    yield case(BF, HEAD, layout="last")
    yield case(BF, BACKBONE)
    yield case(BF, BACKBONE, layout="last")
    yield case(FULL, HEAD)
    yield case(FULL, BACKBONE)
    yield case(HALF, HEAD, K=2, strided=True)
    yield case(FULL, SMALL, layout="crop", per_image=True, y=torch.uint8)
    for dtype in (BF, FULL): yield case(dtype, HEAD, K=150)
    for dtype in (BF, HALF, FULL): yield case(dtype, HEAD, weights=FULL)
    for dtype in (BF, FULL): yield case(dtype, HEAD, soft=FULL)
    yield case(BF, HEAD, K=150, soft=FULL, weights=FULL)
