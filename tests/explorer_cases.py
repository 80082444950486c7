"""What the tests of the explorer look at: a network without weights to speak of, smooth scenes, and the page's numbers computed twice."""
import base64

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from protonb import explorer as X
from protonb.feeding import Feed, segmenter
from protonb.labels import CITYSCAPES

K = CITYSCAPES.num_classes


class Patches(nn.Module):
    """Features: the colours of a patch through a fixed random layer; logits: another one on top."""
    def __init__(self, stride=8, channels=24, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.stride, self.num_classes, self.input_range = stride, K, "unit"
        self.first, self.last = nn.Parameter(torch.randn(channels, 3, 1, 1, generator=g)), nn.Parameter(torch.randn(K, channels, 1, 1, generator=g))

    def forward(self, x, features=False):
        f = F.conv2d(F.avg_pool2d(x, self.stride, ceil_mode=True) - .5, self.first).tanh()
        return (F.conv2d(f, self.last), f) if features else F.conv2d(f, self.last)


def smooth(H, W, seed, channels=3):
    small = torch.rand(1, channels, max(2, H//40), max(2, W//40), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, (H, W), mode="bilinear")[0]


def scene(H, W, seed, truth=True):
    label = smooth(H, W, seed + 100, K).argmax(0)
    label[:1] = 255
    return f"image {seed}", (255*smooth(H, W, seed)).byte(), label if truth else None


def lens(name="a", seed=0, stride=8, rule="aligned", space=CITYSCAPES, channels=24):
    P = torch.randn(space.num_classes, channels, generator=torch.Generator().manual_seed(7 + seed))
    P[4] = 0
    return X.Lens(name, segmenter(Patches(stride, channels, seed), Feed(enlarge=rule)), P, "random")


def numbers(d, net, image, x, y):
    """(K,) as the script computes them."""
    m = d["nets"][net]["maps"][image]
    (r, h), (c, w) = ((X.cell_at(at, *m[axis]), m[axis][2]) for at, axis in ((y, "down"), (x, "across")))
    codes = np.frombuffer(base64.b64decode(m["codes"]), np.uint8).reshape(-1, h, w)
    return np.array(m["low"]) + np.array(m["step"])*codes[:, r, c]


def by_torch(lens, image, x, y, every=1):
    """(K,) cosines of the nearest kept cell, in float64 and without the library's operation."""
    (H, W), rule, f = image.shape[1:], lens.segment.feed.enlarge, lens.segment.both(image[None])[1][0].double()
    def nearest(at, size, n):                              # of two as near the later one
        far = [abs(at - (i*(size - 1)/(n - 1) if rule == "aligned" else (i + .5)*size/n - .5)) for i in range(0, n, every)]
        return every*max(j for j, v in enumerate(far) if v < min(far) + 1e-9)
    r, c = nearest(y, H, f.shape[1]), nearest(x, W, f.shape[2])
    P = lens.prototypes.double()
    return (F.normalize(P, dim=1) @ F.normalize(f[:, r, c], dim=0)).numpy()
