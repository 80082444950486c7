import math
import numpy as np, pytest, torch
from protonb import transforms
from protonb.core import InputError, rng_for
from protonb.transforms import (MEAN, STD, DIP_AUGMENT, Augment, augment, blur, normalize, pad_to, random_blur, random_crop, random_flip,
    random_rotate, random_scale, resize_label, rotate)

ndimage = pytest.importorskip('scipy.ndimage')

class Fixed:
    "Stands in for a Generator: gives the numbers it was made with, in order."
    def __init__(self, *values): self.values = list(values)
    def random(self): return self.values.pop(0)
    def uniform(self, low, high): return low + (high-low)*self.values.pop(0)
    def integers(self, low, high):
        v = self.values.pop(0)
        assert low <= v < high
        return v

def sample(H=33, W=47, seed=0):
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(ndimage.zoom(rng.uniform(0, 255, (3, 5, 6)), (1, H/5, W/6), order=1)).float()
    label = torch.from_numpy(np.kron(rng.choice([0, 3, 10, 18, 255], (H//8+1, W//8+1)), np.ones((8, 8), int))[:H, :W].copy())
    return image, label

def test_normalize():
    x = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    want = (x.double()/255 - torch.tensor(MEAN).double()[:,None,None])/torch.tensor(STD).double()[:,None,None]
    for t in (x, x.float(), x.to(memory_format=torch.channels_last)):
        got = normalize(t)
        assert got.dtype == torch.float32 and torch.allclose(got.double(), want, atol=1e-5)
    assert normalize(x[0]).shape == (3, 5, 4)
    with pytest.raises(ValueError, match='images must be'): normalize(x[:, :2])

def test_the_constants_of_normalize_are_made_once_and_serve_everywhere():
    transforms._mean_std.cache_clear()
    x = torch.randint(0, 256, (1, 3, 5, 4)).float()
    with torch.inference_mode(): first = normalize(x)                    # what is made here must not be refused there
    y = x.clone().requires_grad_()
    normalize(y).sum().backward()
    assert torch.allclose(y.grad[0, :, 0, 0], 1/(255*torch.tensor(STD))) and torch.equal(normalize(x), first)
    with torch.device('meta'): assert torch.equal(normalize(x), first)
    assert normalize(x.to('meta')).device.type == 'meta' and torch.equal(normalize(x), first)
    assert transforms._mean_std.cache_info().misses == 2

@pytest.mark.parametrize('s', [.9, .93, 1., 1.07, 1.1, .5, 2.])
def test_scale_against_plain_bilinear_and_nearest(s):
    image, label = sample()
    x, y = random_scale(image, label, Fixed((s-.5)/1.5), .5, 2.)
    h, w = round(33*s), round(47*s)
    assert x.shape == (3, h, w) and y.shape == (h, w) and x.dtype == torch.float32 and y.dtype == torch.int64
    rows, cols = ((np.arange(n)+.5)*N/n-.5 for n, N in ((h, 33), (w, 47)))
    at = np.meshgrid(rows.clip(0, 32), cols.clip(0, 46), indexing='ij')
    want = np.stack([ndimage.map_coordinates(c.numpy(), at, order=1) for c in image])
    assert np.abs(x.numpy()-want).max() < .01
    i, j = (np.floor(np.arange(n)*N/n+1e-9).astype(int) for n, N in ((h, 33), (w, 47)))
    assert (y.numpy() == label.numpy()[i[:,None], j]).all()

@pytest.mark.parametrize('a', [-10, -3.7, 0, 5, 10, 90, 133])
@pytest.mark.parametrize('H,W', [(33, 47), (24, 24), (1, 9)])
def test_rotation_against_scipy(a, H, W):
    image, label = sample(H, W)
    x, y = rotate(image, label, a)
    c, s = math.cos(math.radians(a)), math.sin(math.radians(a))
    R, centre = np.array([[c, s], [-s, c]]), np.array([H/2, W/2])          # row, column; positive = counter-clockwise
    off = centre - R@centre
    turn = lambda t, order, fill: ndimage.affine_transform(t.numpy().astype(float), R, off, order=order, mode='grid-constant', cval=fill)
    want = np.stack([turn(ch, 1, 255*m) for ch, m in zip(image, MEAN)])
    assert np.abs(x.numpy()-want).max() < .05
    want = turn(label, 0, 255)
    assert (y.numpy() == want).mean() > (.99 if a % 90 else .95)     # a tie between two pixels may go either way
    assert set(y.unique().tolist()) <= {*label.unique().tolist(), 255}

def test_rotation_draws_and_probability():
    image, label = sample()
    x, y = random_rotate(image, label, Fixed(.49, 1.))
    want = rotate(image, label, 10.)
    assert x.equal(want[0]) and y.equal(want[1])
    x, y = random_rotate(image, label, Fixed(.51, 1.))
    assert x is image and y is label

def test_blur_against_scipy():
    image, label = sample()
    g = np.exp(-np.arange(-2, 3)**2/(2*1.1**2))
    want = image.numpy().astype(float)
    for axis in (1, 2): want = ndimage.correlate1d(want, g/g.sum(), axis, mode='mirror')
    x, y = random_blur(image, label, Fixed(.2))
    assert np.abs(x.numpy()-want).max() < 1e-3 and y is label
    assert random_blur(image, label, Fixed(.7))[0] is image

@pytest.mark.parametrize('H,W', [(1, 1), (1, 7), (2, 2), (3, 1)])
def test_tiny_pictures(H, W):
    image, label = torch.rand(3, H, W)*255, torch.zeros(H, W, dtype=torch.long)
    assert blur(image).shape == (3, H, W)
    for i in range(6):
        x, y = augment(image, label, rng_for(i), Augment(crop_height=5, crop_width=4))
        assert x.shape == (3, 5, 4) and y.shape == (5, 4) and x.isfinite().all()

def test_flip():
    image, label = sample()
    x, y = random_flip(image, label, Fixed(.1))
    assert (x == image[..., range(46, -1, -1)]).all() and (y == label[:, range(46, -1, -1)]).all()
    assert random_flip(image, label, Fixed(.9))[0] is image

@pytest.mark.parametrize('h,w', [(33, 47), (34, 47), (40, 60), (20, 60), (20, 20)])
def test_pad(h, w):
    image, label = sample()
    x, y = pad_to(image, label, h, w)
    H, W = max(h, 33), max(w, 47)
    t, l = (H-33)//2, (W-47)//2
    assert x.shape == (3, H, W) and y.shape == (H, W)
    assert torch.allclose(x[:, t:t+33, l:l+47], image, atol=1e-4) and y[t:t+33, l:l+47].equal(label)
    outside = torch.ones(H, W, dtype=torch.bool)
    outside[t:t+33, l:l+47] = False
    assert (y[outside] == 255).all() and torch.allclose(x[:, outside], 255*torch.tensor(MEAN)[:,None].expand(3, int(outside.sum())))

def test_crop_is_uniform_over_all_places():
    label = torch.arange(12).view(3, 4)
    image = label.float().expand(3, 3, 4)
    seen = {random_crop(image, label, rng_for(i), 2, 2)[1][0, 0].item() for i in range(200)}
    assert seen == {0, 1, 2, 4, 5, 6}
    x, y = random_crop(image, label, Fixed(1, 2), 2, 2)
    assert y.tolist() == [[6, 7], [10, 11]] and x[0].tolist() == y.tolist()

def test_crop_retry_rule():
    label = torch.zeros(1, 100, dtype=torch.long)
    label[0, :10] = 1
    image = torch.zeros(3, 1, 100)
    rng = Fixed(*[0, 2]*3, 0, 1, 0, 50)                                 # 8 of 10 pixels is under 85 %, 9 is enough
    assert (random_crop(image, label, rng, 1, 30, 1)[1] == 1).sum() == 9 and len(rng.values) == 2
    rng = Fixed(*[0, 60]*31, 0, 45, 0, 0)                               # 31 redraws, and the last is taken though it fails
    assert (random_crop(image, label, rng, 1, 30, 1)[1] == 1).sum() == 0 and rng.values == [0, 0]
    rng = Fixed(0, 60, 0, 0)
    random_crop(image, label, rng, 1, 30, 7)                            # no such pixel: the first crop will do
    assert rng.values == [0, 0]

def test_augment_is_the_chain_and_keeps_uint8_input_alone():
    image, label = sample(60, 80)
    before = image.byte()
    copy = before.clone()
    cfg = Augment(crop_height=33, crop_width=41, crop_retry_value=3)
    for i in range(20):
        x, y = augment(before, label, rng_for(3, 'a', i), cfg)
        rng = rng_for(3, 'a', i)
        a = random_flip(*random_blur(*random_rotate(*random_scale(before.float(), label, rng), rng), rng), rng)
        a = random_crop(*a, rng, 33, 41, 3)
        assert x.equal(a[0]) and y.equal(a[1]) and x.dtype == torch.float32 and -.01 <= x.min() and x.max() <= 255.01
        assert set(y.unique().tolist()) <= {*label.unique().tolist(), 255}
    assert before.equal(copy)

def test_switching_one_step_off_leaves_the_others():
    image, label = sample(60, 80)
    cfg = dict(rotate_p=0, blur_p=0, scale_low=1, scale_high=1, crop_height=20, crop_width=20)
    for i in range(10):
        a, b = (augment(image, label, rng_for(i), Augment(**{**cfg, 'degrees': d})) for d in (10, 5))
        c = augment(image, label, rng_for(i), Augment(**{**cfg, 'blur_p': 1}))
        assert a[1].equal(b[1]) and a[1].equal(c[1])

def test_defaults_are_those_of_dip():
    assert DIP_AUGMENT == Augment(.9, 1.1, 10., .5, .5, .5, 1025, 1025, None)
    x, y = augment(torch.zeros(3, 400, 700, dtype=torch.uint8), torch.zeros(400, 700, dtype=torch.long), rng_for(0))
    assert x.shape == (3, 1025, 1025) and y.shape == (1025, 1025)

@pytest.mark.parametrize('kw', [dict(flip_p=1.1), dict(blur_p=-1), dict(scale_low=0), dict(scale_low=1.2),
    dict(crop_height=0), dict(crop_width=-3)])
def test_bad_numbers(kw):
    with pytest.raises(InputError, match=next(iter(kw))): Augment(**kw)

def test_bad_shapes():
    image, label = sample()
    for step in (random_scale, random_rotate, random_blur, random_flip):
        with pytest.raises(ValueError, match=r'expected image \(3,H,W\) and label'): step(image, label[1:], rng_for(0))
    with pytest.raises(TypeError, match='float'): random_scale(image.byte(), label, rng_for(0))

def test_resize_label_copies():
    y = torch.tensor([[0, 18], [255, 7]])
    assert resize_label(y, (4, 4)).tolist() == [[0,0,18,18]]*2 + [[255,255,7,7]]*2
    assert resize_label(y, (1, 1)).tolist() == [[0]]
    row = torch.arange(9)[None]
    assert resize_label(row, (1, 3)).tolist() == [[0, 3, 6]] and resize_label(row, (1, 3), centred=True).tolist() == [[1, 4, 7]]
