"""Launches of kernels/density.py that users can reach: probabilities and features, whole or split, layouts, types."""
import torch

from compile_cases.contrast import rows
from protonb.kernels.density import density_fwd

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def cases():
    for dtype, name in ((F32, "fp32"), (BF16, "bf16")):
        yield f"{name} 19 classes", lambda: density_fwd(rows(16384, 19, dtype, "rows"), 0.05)
        yield f"{name} 64 channels", lambda: density_fwd(rows(16384, 64, dtype, "rows"), 0.05)
        yield f"{name} 256 channels, few rows", lambda: density_fwd(rows(2048, 256, dtype, "rows"), 0.05)
        yield f"{name} 130 channels, transposed", lambda: density_fwd(rows(16384, 130, dtype, "transposed"), 0.05)
    yield "fp16 64 channels, crop", lambda: density_fwd(rows(16384, 64, F16, "crop"), 0.05)
    yield "bf16 2048 channels", lambda: density_fwd(rows(16384, 2048, BF16, "rows"), 0.05)
