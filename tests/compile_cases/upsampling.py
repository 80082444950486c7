"""Every specialisation of the kernels in kernels/upsampling.py that a user can reach: (name, thunk on meta tensors)."""
import torch

from protonb.kernels.upsampling import upsampled_cross_entropy_bwd, upsampled_cross_entropy_fwd

NCHW, LAST = torch.contiguous_format, torch.channels_last
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def _both(small, size, K=19, dtype=FP32, layout=NCHW,
          labels=torch.int64, valid=False, reduction="mean", B=2, ignore_index=255):
    def thunk():
        z = torch.empty(B, K, *small, dtype=dtype, device="meta").to(memory_format=layout)
        y = torch.empty(B, *size, dtype=labels, device="meta")
        v = torch.empty(K, dtype=torch.bool, device="meta") if valid else None
        loss, lse, count = upsampled_cross_entropy_fwd(z, y, v, ignore_index, reduction)
        upsampled_cross_entropy_bwd(torch.empty_like(loss), z, y, v, lse, count, ignore_index, reduction)
    return thunk


def cases():
    # 8 rows a step, 128 columns
    yield "x8 65x129", _both((65, 129), (513, 1025))
    yield "x8 65x129 bf16 channels-last", _both((65, 129), (513, 1025), dtype=BF16, layout=LAST)
    yield "x8 64x128 fp16 uint8", _both((64, 128), (512, 1024), dtype=FP16, labels=torch.uint8)
    yield "x8 128x256 valid none", _both((128, 256), (1024, 2048), valid=True, reduction="none")
    # 4 rows, 64 columns
    yield "x4 128x128 K=150", _both((128, 128), (512, 512), K=150)
    yield "x4 128x128 K=150 bf16 channels-last valid sum", _both(
        (128, 128), (512, 512), K=150, dtype=BF16, layout=LAST, valid=True, reduction="sum")
    # 2 rows, then 1, 32 columns
    yield "x2 256x512 none", _both((256, 512), (512, 1024), reduction="none")
    yield "x1.3 channels-last valid", _both((96, 96), (128, 128), layout=LAST, valid=True)
    yield "only the width", _both((64, 128), (64, 1024), K=2)
    # sizes of 1 are constants
    yield "1x1", _both((1, 1), (512, 1024), B=1)
    yield "one column, one class", _both((8, 1), (64, 1), K=1, ignore_index=1)
    yield "same size", _both((128, 256), (128, 256))
    yield "same size bf16 channels-last valid none", _both(
        (65, 129), (65, 129), dtype=BF16, layout=LAST, valid=True, reduction="none")
