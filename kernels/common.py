"""What the kernel files share: the launch, products that keep full precision, the size of a device."""
import os

import torch
import triton
import triton.language as tl

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides on it when it is imported, and so do we
MAX_CLASSES = 256  # the classes of one pixel stay in registers
# Three TF32 products carry the 24 bits of a float32; AMD's compilers have no such mode, but fast IEEE products
EXACT = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


def launch(kernel, grid, num_warps=4, num_stages=3, **arguments):
    """Start `kernel` over `grid`. The compile tests replace this function to see what would be started."""
    kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def processors(
    device,  # torch.device
) -> int:
    """Streaming multiprocessors of a GPU; an H100's 132 where there is no GPU to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def pixel_strides(
    x,  # (B,C,h,w), any strides
) -> tuple:  # stride of image, channel, row, column, and whether row and column are one axis
    """How to reach a pixel without a copy: NCHW, channels-last and crops alike."""
    sb, sc, sh, sw = x.stride()
    h, w = x.shape[2:]
    return sb, sc, sh, sw, h == 1 or sh == w * sw


@triton.jit
def exact_dot(a, b, acc):
    """acc + a @ b for operands of any float type, as precise as float32."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=EXACT)


@triton.jit
def split_dot(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a @ b for bfloat16 `a` and float32 `b`, as precise as float32: `b` is taken apart into three bfloat16 terms."""
    high = b.to(tl.bfloat16)
    rest = b - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    if INTERPRETED:  # the interpreter gets bfloat16 products wrong
        a32 = a.to(tl.float32)
        acc = tl.dot(a32, low.to(tl.float32), acc, input_precision="ieee")
        acc = tl.dot(a32, middle.to(tl.float32), acc, input_precision="ieee")
        return tl.dot(a32, high.to(tl.float32), acc, input_precision="ieee")
    acc = tl.dot(a, low, acc)
    acc = tl.dot(a, middle, acc)
    return tl.dot(a, high, acc)
