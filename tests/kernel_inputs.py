"""What the kernels are tested on: numbers, labels and memory layouts as a user may bring them."""
import torch
from torch.nn.functional import pad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(*shape, K, seed=0, ignored=.2, strays=0.):
    """Labels of which some are ignored and, where `strays` asks for it, some are no class; the last class is absent where there are others."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, max(K-1, 1), shape, generator=g)
    if strays: y[torch.rand(shape, generator=g) < strays] = K+3
    return torch.where(torch.rand(shape, generator=g) < ignored, 255, y)


def laid_out(x, layout):
    """The same numbers elsewhere in memory."""
    B, C, h, w = x.shape
    if layout == "last": return x.contiguous(memory_format=torch.channels_last)
    if layout == "crop": return pad(x, (2, 3, 1, 0))[..., 1:, 2:w+2]
    if layout == "crop-last": return laid_out(pad(x, (2, 3, 1, 0)), "last")[..., 1:, 2:w+2]
    if layout == "turned": return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded": return x[:1].expand(B, -1, -1, -1)
    return x
