"""A BLAS that promises nothing but the mathematics: what passes here does not hang on how one processor's library adds.

Every product (`mm`, `addmm`, `bmm`, `baddbmm`, `mv`, `dot`, and what `matmul`, `@`, `einsum`, `linear` and the gradients become; convolutions
whose kernel is one pixel) is done anew: the inner dimension is shuffled, cut in two and summed in one chain each, and the last rows and columns of
the result are summed in another order than the rest. Other convolutions get their channels shuffled.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

LONGEST = 1 << 28  # multiplications that are done one chain at a time; a larger product is only shuffled and cut


def chain(a, b):
    """(B,M,n) @ (B,n,N), one term after the other, each sum rounded."""
    out = a.new_zeros(len(a), a.shape[1], b.shape[2])
    if out.numel()*b.shape[1] > LONGEST: return torch.bmm(a, b)
    for i in range(b.shape[1]): out.addcmul_(a[:, :, i, None], b[:, i, None])
    return out


def shuffled(n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


def batched(a, b):
    """(B,M,n) @ (B,n,N), roughly."""
    dtype, n = a.dtype, a.shape[2]
    if 0 in (*a.shape, *b.shape) or not dtype.is_floating_point: return torch.bmm(a, b)
    if dtype in (torch.bfloat16, torch.float16): a, b = a.float(), b.float()
    order, cut = shuffled(n), n - n//7
    a, b = a[:, :, order].contiguous(), b[:, order].contiguous()
    out = chain(a[..., :cut], b[:, :cut]) + chain(a[..., cut:], b[:, cut:])
    rows, columns = a.shape[1]%4 or 1, b.shape[2]%4 or 1
    out[:, -rows:] = chain(a[:, -rows:].flip(2), b.flip(1))
    last = b[..., -columns:]
    out[..., -columns:] = chain(a[..., cut:], last[:, cut:]) + chain(a[..., :cut].flip(2), last[:, :cut].flip(1))
    return out.to(dtype)


def product(a, b):
    """(M,n) @ (n,N), roughly."""
    return batched(a[None], b[None])[0]


def plus(c, ab, beta, alpha):
    """beta*c + alpha*ab; a beta of 0 ignores what `c` holds."""
    ab = ab if alpha == 1 else ab*alpha
    return (ab if beta == 0 else ab + (c if beta == 1 else c*beta)).to(ab.dtype)


def convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
    """One pixel wide: a product. Else the library's own, with the input channels in another order."""
    if transposed or groups > 1: return None
    if set(w.shape[2:]) == {1} and set(stride) == {1} and not any(padding):
        B, C, h, v = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, C)
        out = product(rows, w.flatten(1).T).view(B, h, v, -1).permute(0, 3, 1, 2)
        return (out if bias is None else out + bias.view(-1, 1, 1)).contiguous()
    order = shuffled(x.shape[1])
    return torch.ops.aten.convolution(x[:, order], w[:, order], bias, stride, padding, dilation, transposed, output_padding, groups)


class RoughBLAS(TorchDispatchMode):
    """While it is on, every product is done by this file. `seen` counts them."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, out = func.overloadpacket.__name__, kwargs.get("out")
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        if func.namespace != "aten" or any(isinstance(a, torch.Tensor) and (a.is_meta or a.is_sparse) for a in args): got = None
        elif name == "mm": got = product(*args[:2])
        elif name == "bmm": got = batched(*args[:2])
        elif name in ("addmm", "addmm_"): got = plus(args[0], product(*args[1:3]), beta, alpha)
        elif name in ("baddbmm", "baddbmm_"): got = plus(args[0], batched(*args[1:3]), beta, alpha)
        elif name == "mv": got = product(args[0], args[1][:, None])[:, 0]
        elif name in ("addmv", "addmv_"): got = plus(args[0], product(args[1], args[2][:, None])[:, 0], beta, alpha)
        elif name in ("dot", "vdot"): got = product(args[0][None], args[1][:, None])[0, 0]
        elif name == "convolution": got = convolution(*args)
        else: got = None
        if got is None: return func(*args, **kwargs)
        self.seen += 1
        return args[0].copy_(got) if name.endswith("_") else got if out is None else out.resize_(got.shape).copy_(got)
