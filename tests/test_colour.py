"""Strong views and the labels that follow them, against PIL and plain formulas."""
import colorsys
import dataclasses
import pickle
import numpy as np, pytest, torch
from PIL import Image, ImageEnhance, ImageOps
from protonb.core import rng_for
from protonb.colour import (GREY, POLICIES, RANDAUGMENT_OPS, Op, Warp, apply_policy, cutout, jitter, policy_augment, rand_augment, shift_hue,
    turn, warp_batch, warp_labels, warp_maps)

POOL = {op.name: op for op in RANDAUGMENT_OPS}
MOVES = ['ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'Rotate']
SIZES = [(96, 168), (48, 84), (31, 17)]

def picture(H=48, W=84, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, H, W), dtype=np.uint8))

def pil(x): return Image.fromarray(x.permute(1, 2, 0).numpy())
def arr(x): return x.permute(1, 2, 0).numpy()
def mirror(W): return ('Hflip', None, (-1, 0, W, 0, 1, 0))

def entry(name, v, sign, size):
    value = POOL[name].value(v, sign, size)
    return (name, value, POOL[name].move(value, size))

def nearest(coordinates, ops):
    "What PIL makes of a coordinate image, change by change; -1 outside"
    p = Image.fromarray(coordinates.astype(np.int32))
    for name, value, six in ops:
        if name == 'Hflip': p = ImageOps.mirror(p)
        elif name == 'Rotate': p = p.rotate(value, Image.Resampling.NEAREST, fillcolor=-1)
        else:
            six = {'ShearX': (1, value, 0, 0, 1, 0), 'ShearY': (1, 0, 0, value, 1, 0), 'TranslateX': (1, 0, value, 0, 1, 0),
                   'TranslateY': (1, 0, 0, 0, 1, value)}[name]
            p = p.transform(p.size, Image.Transform.AFFINE, six, Image.Resampling.NEAREST, fillcolor=-1)
    return np.array(p)

def grown(mask):
    "The mask and its eight neighbours"
    return torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None].float(), 3, 1, 1)[0].bool().numpy()

def compare(ops, size):
    for c in np.mgrid[:size[0], :size[1]]:
        want, got = nearest(c, ops), warp_labels(torch.from_numpy(c), Warp(size, tuple(ops)), fill=-1).numpy()
        both = (want >= 0) & (got >= 0)
        assert both.any() and np.abs(want-got)[both].max() <= 1
        assert not ((want >= 0) & ~grown(got >= 0)).any() and not ((got >= 0) & ~grown(want >= 0)).any()

@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('name', MOVES)
def test_each_move_matches_pil_within_a_pixel(name, size):
    for v in range(1, 10):
        for sign in (-1, 1): compare([entry(name, v, sign, size)], size)

def test_translations_and_the_mirror_match_exactly():
    for c in np.mgrid[:31, :17]:
        for ops in ([entry('TranslateX', 7, -1, (31, 17))], [entry('TranslateY', 9, 1, (31, 17))], [mirror(17)],
                    [mirror(17), entry('TranslateX', 9, 1, (31, 17)), entry('TranslateX', 5, -1, (31, 17))]):
            assert (nearest(c, ops) == warp_labels(torch.from_numpy(c), Warp((31, 17), tuple(ops)), fill=-1).numpy()).all()

@pytest.mark.parametrize('flip', [False, True])
def test_composed_moves_match_pil_within_a_pixel(flip):
    rng, size = rng_for(0, 'composed'), (48, 84)
    for a in MOVES:
        for b in MOVES:
            ops = [entry(n, int(rng.integers(1, 10)), int(rng.choice((-1, 1))), size) for n in (a, b)]
            compare([mirror(84)]*flip + ops, size)

def test_order_matters_and_is_the_order_of_the_picture():
    size = (48, 84)
    a, b = entry('Rotate', 9, 1, size), entry('TranslateX', 9, 1, size)
    first, second = Warp(size, (a, b)), Warp(size, (b, a))
    assert np.abs(first.matrix - second.matrix).max() > 5
    m = [np.vstack([np.reshape(six, (2, 3)), [0, 0, 1]]) for _, _, six in (a, b)]
    assert np.allclose(first.matrix, (m[0] @ m[1])[:2]) and np.allclose(second.matrix, (m[1] @ m[0])[:2])

def test_a_pixel_that_left_in_between_does_not_come_back():
    size = (48, 84)
    w = Warp(size, (('TranslateX', 20, (1, 0, 20, 0, 1, 0)), ('TranslateX', -20, (1, 0, -20, 0, 1, 0))))
    assert np.allclose(w.matrix, np.eye(3)[:2])
    y = warp_labels(torch.zeros(size, dtype=torch.int64), w)
    assert (y[:, :20] == 255).all() and (y[:, 20:] == 0).all()

@pytest.mark.parametrize('name', MOVES)
def test_grey_in_the_picture_is_where_the_label_is_ignored(name):
    size = (48, 84)
    for v in (1, 4, 9):
        for sign in (-1, 1):
            e = entry(name, v, sign, size)
            out = np.array(POOL[name](Image.new('RGB', (84, 48), (255, 255, 255)), e[1]))
            y = warp_labels(torch.zeros(size, dtype=torch.int64), Warp(size, (e,))).numpy()
            assert ((out == 127).all(2) == (y == 255)).mean() > .999 and set(np.unique(out)) <= {127, 255}

def test_legacy_translate_x_goes_too_far_by_the_aspect():
    size = (64, 112)
    col = torch.arange(112).expand(64, 112)
    for v in (-13, -4, 8, 16):
        w = Warp(size, (('TranslateX', v, (1, 0, v, 0, 1, 0)),))
        old = dataclasses.replace(w, legacy=True)
        assert old.matrix[0, 2] - w.matrix[0, 2] == (112/64-1)*v
        a, b = warp_labels(col, w, fill=-1), warp_labels(col, old, fill=-1)
        both = (a >= 0) & (b >= 0)
        assert both.any() and ((b-a)[both] - (112/64-1)*v).abs().max() <= 1
        t = dataclasses.replace(w, ops=(('TranslateY', v, (1, 0, 0, 0, 1, v)),))
        assert np.allclose(t.matrix, dataclasses.replace(t, legacy=True).matrix)          # along y it was right

def test_legacy_order_counts_an_op_once_and_rounds_at_a_quarter():
    size = (64, 112)
    r, sx, sy = entry('Rotate', 5, 1, size), entry('ShearX', 8, 1, size), entry('ShearY', 3, -1, size)
    a, b = (Warp(size, ops, legacy=True) for ops in ((r, sx), (sx, r)))
    assert np.allclose(a.matrix, b.matrix) and np.allclose(b.matrix, Warp(size, (sx, r)).matrix)
    assert np.allclose(Warp(size, (sy, sy), legacy=True).matrix, Warp(size, (sy,)).matrix)
    row = torch.arange(16)[:, None].expand(16, 28)
    y = warp_labels(row, Warp(size, (('TranslateY', -13, (1, 0, 0, 0, 1, -13)),), legacy=True))
    assert (y[:4] == 255).all() and (y[4:, 0] == torch.arange(12)).all()                  # -13//4 = -4
    _, inside = warp_maps(torch.zeros(1, 16, 28), Warp(size, cutout=(9, 5, 30, 26), legacy=True))
    want = torch.ones(16, 28, dtype=torch.bool)
    want[5//4:26//4, 9//4:30//4] = False
    assert inside.equal(want)
    with pytest.raises(ValueError, match='no legacy order'): Warp(size, (('Zoom', 2, (2, 0, 0, 0, 2, 0)),), legacy=True).matrix

def in_turn(labels, ops, fill=250):
    """The released way: one nearest-neighbour sample for each move, zero outside, ids one up."""
    (h, w), out = labels.shape, labels.double()[None, None]+1
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float64)+.5, torch.arange(w, dtype=torch.float64)+.5, indexing='ij')
    for _, _, (a, b, c, d, e, f) in ops:
        grid = torch.stack([2*(a*x+b*y+c)/w-1, 2*(d*x+e*y+f)/h-1], -1)[None]
        out = torch.nn.functional.grid_sample(out, grid, mode='nearest', padding_mode='zeros', align_corners=False)
    return torch.where(out == 0, fill, out-1)[0, 0].long()

def test_legacy_moves_are_sampled_one_by_one_and_ties_go_to_the_even_cell():
    size, rng = (16, 32), np.random.default_rng(0)                                        # powers of two: no tie is lost to rounding
    move = lambda name, *six: (name, 1, six)
    ties = [move('Hflip', -1, 0, 32, 0, 1, 0), move('ShearX', 1, 1., 0, 0, 1, 0), move('ShearY', 1, 0, 0, -.25, 1, 0),
        move('TranslateY', 1, 0, 0, 0, 1, 3)]
    labels = torch.from_numpy(rng.integers(0, 19, size))
    for ops in (ties[:2], ties[1:], ties, [ties[1]], [ties[2]]):
        assert warp_labels(labels, Warp(size, tuple(ops), legacy=True), fill=250).equal(in_turn(labels, ops)), ops
    assert not warp_labels(labels, Warp(size, tuple(ties)), fill=250).equal(in_turn(labels, ties))          # all at once is another picture
    size, far = (48, 84), 0
    for _ in range(40):
        names = [n for n in ('ShearX', 'ShearY', 'TranslateY', 'Rotate') if rng.random() < .6]
        ops = tuple(entry(n, int(rng.integers(1, 10)), int(rng.choice([-1, 1])), size) for n in names)
        labels = torch.from_numpy(rng.integers(0, 19, size))
        far = max(far, (warp_labels(labels, Warp(size, ops, legacy=True), fill=250) != in_turn(labels, ops)).double().mean().item())
    assert far < .01, far                                                                 # ties that the reference rounds away

@pytest.mark.parametrize('grid', [(64, 112), (16, 28), (8, 14), (9, 15), (1, 1), (128, 224)], ids=str)
def test_any_resolution_reads_the_same_place(grid):
    size, (h, w) = (64, 112), grid
    for ops in ((), (mirror(112),), (entry('Rotate', 6, 1, size), entry('ShearX', 4, -1, size)), (entry('TranslateX', 9, 1, size),)):
        warp = Warp(size, ops)
        x, y = (np.arange(w)+.5)*112/w, (np.arange(h)+.5)*64/h
        m = warp.matrix
        xs, ys = (m[i, 0]*x + m[i, 1]*y[:, None] + m[i, 2] for i in (0, 1))
        for c, s, n, N in zip(np.mgrid[:h, :w], (ys, xs), grid, size):
            got = warp_labels(torch.from_numpy(c), warp, fill=-1).numpy()
            exact = s*n/N-.5
            assert np.abs(got-exact)[got >= 0].max(initial=0) <= .5+1e-9

def test_quarter_is_the_full_label_seen_from_afar():
    rng = rng_for(1, 'quarter')
    coarse = torch.from_numpy(rng.integers(0, 19, (16, 28)))
    full = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)
    for i in range(20):
        _, w = rand_augment(picture(64, 112), rng_for(2, i))
        a, b = warp_labels(coarse, w), warp_labels(full, w)
        centre = torch.stack([b[i::4, j::4] for i in (1, 2) for j in (1, 2)])          # the four pixels around a cell's centre
        agree = (centre == a).any(0)
        assert agree.float().mean() > .98

def test_identity_record():
    y, m = torch.arange(48*84).view(48, 84) % 19, torch.randn(5, 12, 21)
    w = Warp((48, 84))
    assert not w.moves and (w.matrix == np.eye(3)[:2]).all() and w.matrix.dtype == np.float64
    assert warp_labels(y, w).equal(y)
    out, inside = warp_maps(m, w)
    assert out.equal(m) and inside.all() and inside.dtype == torch.bool
    for odd in ((1, 1), (7, 5), (97, 13)):
        y = torch.arange(odd[0]*odd[1]).view(odd)
        assert warp_labels(y, w).equal(y)
        assert warp_labels(y, dataclasses.replace(w, legacy=True)).equal(y)

def test_colour_only_changes_give_an_identity_record():
    pool = tuple(op for op in RANDAUGMENT_OPS if op.move is None)
    seen = 0
    for i in range(30):
        x, w = rand_augment(picture(), rng_for(i), pool=pool)
        if any(n == 'Hflip' for n, _, _ in w.ops): continue
        seen += 1
        assert (w.matrix == np.eye(3)[:2]).all() and not w.moves
        assert warp_labels(torch.zeros(48, 84).long(), dataclasses.replace(w, cutout=None)).eq(0).all()
    assert seen > 5

def test_rand_augment_is_pil_step_by_step_and_its_record_says_so():
    for i in range(40):
        x = picture(seed=i)
        out, w = rand_augment(x, rng_for(3, i))
        p = pil(x)
        for name, value, six in w.ops:
            if name == 'Hflip': p = ImageOps.mirror(p)
            elif name == 'Rotate': p = p.rotate(value, Image.Resampling.BILINEAR, fillcolor=GREY)
            elif six: p = p.transform(p.size, Image.Transform.AFFINE, six, Image.Resampling.BILINEAR, fillcolor=GREY)
            else: p = POOL[name](p, value)
        want = np.array(p)
        x0, y0, x1, y1 = w.cutout
        want[y0:y1+1, x0:x1+1] = 127
        assert (arr(out) == want).all() and out.is_contiguous() and out.dtype == torch.uint8
        assert w.size == (48, 84) and x.equal(picture(seed=i))

def test_rand_augment_statistics():
    ws = [rand_augment(picture(16, 28), rng_for(4, i))[1] for i in range(1500)]
    names = [n for w in ws for n, _, _ in w.ops]
    flips = names.count('Hflip')/1500
    changes = [n for n in names if n != 'Hflip']
    assert abs(flips-.5) < .06 and abs(len(changes)/1500 - 1) < .08
    assert {*changes} == {*POOL} and all(50 < changes.count(n) < 180 for n in POOL)
    assert all(w.ops[0][0] == 'Hflip' for w in ws if any(n == 'Hflip' for n, _, _ in w.ops))
    assert any(len({n for n, _, _ in w.ops[-2:]}) == 1 and len(w.ops) > 1 for w in ws)          # with replacement
    angles = {v for w in ws for n, v, _ in w.ops if n == 'Rotate'}
    assert angles <= {s*3*v for v in range(1, 10) for s in (-1, 1)} and len(angles) > 12 and min(angles) < 0 < max(angles)

@pytest.mark.parametrize('name,low,high', [('Brightness', .14, .86), ('Color', .14, .86), ('Contrast', .14, .86), ('Sharpness', .14, .86),
    ('Posterize', 4, 7), ('Solarize', 231, 26), ('Rotate', 3, 27), ('ShearX', .03, .27), ('ShearY', .03, .27), ('TranslateX', 26, 241),
    ('TranslateY', 15, 138)])
def test_magnitudes(name, low, high):
    op = POOL[name]
    assert [op.value(v, 1, (512, 896)) for v in (1, 9)] == pytest.approx([low, high])
    if op.move: assert op.value(9, -1, (512, 896)) == pytest.approx(-high)

def test_cutout_box():
    for i in range(200):
        p, (x0, y0, x1, y1) = cutout(Image.new('RGB', (84, 48)), rng_for(5, i))
        assert 0 <= x0 <= x1 <= 84 and 0 <= y0 <= y1 <= 48 and x1-x0 <= 16 and y1-y0 <= 16
        grey = (np.array(p) == 127).all(2)
        _, inside = warp_maps(torch.zeros(1, 48, 84), Warp((48, 84), cutout=(x0, y0, x1, y1)))
        assert (grey == ~inside.numpy()).all()

def test_cutout_size_on_the_released_crop():
    boxes = [cutout(Image.new('RGB', (896, 512)), rng_for(6, i))[1] for i in range(60)]
    whole = [b for b in boxes if b[0] > 0 and b[1] > 0 and b[2] < 896 and b[3] < 512]
    assert whole and all((b[2]-b[0], b[3]-b[1]) == (170, 170) for b in whole)

@pytest.mark.parametrize('f', [policy_augment, jitter, lambda x, r: rand_augment(x, r)[0]], ids=['iapc', 'pbal', 'proda'])
def test_the_generator_decides_everything(f):
    x = picture()
    np.random.seed(0); torch.manual_seed(0)
    a = [f(x, rng_for(1, i)) for i in range(8)]
    np.random.seed(1); torch.manual_seed(1)
    b = [f(x, rng_for(1, i)) for i in range(8)]
    assert all(p.equal(q) for p, q in zip(a, b)) and any(not a[0].equal(p) for p in a[1:])
    assert all(p.shape == x.shape and p.dtype == torch.uint8 for p in a)
    one, two = rng_for(2), rng_for(2)
    f(x, one), f(picture(31, 17, 5), two)
    if f is jitter: assert one.random() == two.random()          # the picture does not decide how many numbers are drawn

@pytest.mark.parametrize('f', [policy_augment, jitter, rand_augment])
def test_bad_pictures_and_generators(f):
    with pytest.raises(TypeError, match='image must be a uint8 tensor'): f(picture().float(), rng_for(0))
    with pytest.raises(TypeError, match='image must be a uint8 tensor'): f(picture().numpy(), rng_for(0))
    for bad in (picture()[0], picture()[:2], picture()[None], picture()[:, :0]):
        with pytest.raises(ValueError, match=r'image must be \(3,H,W\)'): f(bad, rng_for(0))
    with pytest.raises(TypeError, match='rng must be'): f(picture(), 0)
    with pytest.raises(TypeError, match='rng must be'): f(picture(), None)

def test_channels_last_and_tiny_pictures():
    x = picture()
    last = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for f in (policy_augment, jitter, lambda x, r: rand_augment(x, r)[0]):
        assert f(x, rng_for(9)).equal(f(last, rng_for(9)))
        for s in ((1, 1), (2, 3)): assert f(picture(*s), rng_for(9)).shape == (3, *s)

def test_the_eighteen_policies():
    short = [[(op.name, p, m) for op, p, m in policy] for policy in POLICIES]
    assert len(short) == 18 and all(len(p) == 2 for p in short)
    assert [short[i] for i in (13, 14, 15, 16, 17)] == [short[i] for i in (3, 0, 8, 9, 1)]
    assert short[10] == [('color', .8, 8), ('solarize', .8, 7)] and short[7][0][1] == 0
    ops = {op.name: op for policy in POLICIES for op, _, _ in policy}
    assert {*ops} == {'solarize', 'autocontrast', 'equalize', 'posterize', 'invert', 'color', 'contrast', 'sharpness'}
    assert not any(op.move for op in ops.values())
    val = lambda n, m, s=1: ops[n].value(m, s, (4, 4))
    assert [val('posterize', m) for m in (5, 6, 7)] == [6, 5, 5]
    assert val('solarize', 0) == 256 and val('solarize', 9) == 0 and val('solarize', 3) == pytest.approx(512/3)
    assert (val('color', 8), val('contrast', 8, -1)) == pytest.approx((1.8, .2))

def test_policy_against_pil_and_its_probabilities():
    x = picture()
    run = lambda policy, i=0: arr(apply_policy(x, policy, rng_for(0, i)))
    by = {op.name: op for policy in POLICIES for op, _, _ in policy}
    assert (run([(by['invert'], 1., 0)]) == 255-arr(x)).all()
    assert (run([(by['solarize'], 1., 5)]) == np.where(arr(x) >= 256*4/9, 255-arr(x), arr(x))).all()
    assert (run([(by['posterize'], 1., 7)]) == (arr(x) & 0b11111000)).all()
    assert (run([(by['equalize'], 0., 0)]) == arr(x)).all()
    two = ImageEnhance.Contrast(ImageEnhance.Color(pil(x)).enhance(1)).enhance
    got = {arr(apply_policy(x, [(by['color'], 1., 0), (by['contrast'], 1., 8)], rng_for(0, i))).tobytes() for i in range(12)}
    assert got == {np.array(two(f)).tobytes() for f in (.2, 1.8)}
    share = np.mean([not apply_policy(x, [(by['invert'], .6, 0)], rng_for(7, i)).equal(x) for i in range(400)])
    assert abs(share-.6) < .08

def test_hue_is_the_colour_wheel():
    rng = np.random.default_rng(0)
    for rgb in rng.integers(0, 256, (60, 3)):
        for t in (-.2, -.07, .1, .2):
            got = shift_hue(Image.new('RGB', (1, 1), tuple(map(int, rgb))), t).getpixel((0, 0))
            h, s, v = colorsys.rgb_to_hsv(*rgb/255)
            want = 255*np.array(colorsys.hsv_to_rgb((h + t) % 1, s, v))
            assert np.abs(want-got).max() <= 14                                            # 8 bits of hue: up to 6 levels per step
    h = np.array(Image.fromarray(picture().permute(1, 2, 0).numpy()).convert('HSV'))
    for t, by in ((.2, 51), (-.2, 205), (-.1, 231), (.003, 0)):
        hsv = h.copy(); hsv[..., 0] += np.uint8(by)
        want = Image.merge('HSV', [Image.fromarray(np.ascontiguousarray(hsv[..., i])) for i in range(3)]).convert('RGB')
        want = np.array(want)
        assert (np.array(shift_hue(pil(picture()), t)) == want).all()

def test_jitter_is_four_steps_in_order():
    x, rng = picture(), rng_for(8)
    hue, b, c, s = rng.uniform(-.2, .2), *(rng.uniform(.5, 1.5) for _ in range(3))
    p = shift_hue(pil(x), hue)
    for kind, f in ((ImageEnhance.Brightness, b), (ImageEnhance.Contrast, c), (ImageEnhance.Color, s)): p = kind(p).enhance(f)
    assert (arr(jitter(x, rng_for(8))) == np.array(p)).all()
    for name in ('brightness', 'contrast', 'saturation'):
        with pytest.raises(ValueError, match=name): jitter(x, rng_for(0), **{name: -.1})
    with pytest.raises(ValueError, match='hue'): jitter(x, rng_for(0), hue=float('nan'))

def test_batch_is_its_images_and_passes_the_gradient():
    records = [rand_augment(picture(64, 112), rng_for(11, i), ops=k)[1] for i, k in enumerate((0, 1, 2, 4))]
    maps = torch.randn(4, 7, 16, 28, dtype=torch.float64, requires_grad=True)
    out, inside = warp_batch(maps, records)
    for b, w in enumerate(records):
        one, here = warp_maps(maps[b], w)
        assert one.equal(out[b]) and here.equal(inside[b])
    g = torch.randn_like(out)
    out.backward(g)
    assert torch.allclose(maps.grad.sum((2, 3)), g.sum((2, 3)))
    index = torch.arange(16*28).view(1, 1, 16, 28).expand(4, 1, -1, -1)
    src, _ = warp_batch(index, records)
    want = torch.zeros(4, 7, 448, dtype=torch.float64).scatter_add_(2, src.flatten(2).expand(-1, 7, -1), g.flatten(2))
    assert torch.allclose(maps.grad.flatten(2), want)
    filled, _ = warp_batch(maps, records, fill=-1.)
    here = inside[:, None]
    assert (filled.masked_select(~here) == -1).all() and filled.masked_select(here).equal(out.masked_select(here))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.bool], ids=str)
def test_batch_copies_any_dtype_and_layout(dtype):
    w = [rand_augment(picture(64, 112), rng_for(12, i))[1] for i in range(2)]
    maps = (torch.rand(2, 5, 17, 29)*9).to(dtype)
    a, _ = warp_batch(maps, w)
    b, _ = warp_batch(maps.contiguous(memory_format=torch.channels_last), w)
    assert a.dtype == dtype and a.equal(b)

def test_nothing_outside_is_made_up():
    w = Warp((16, 28), (('TranslateX', 100, (1, 0, 100, 0, 1, 0)),))
    assert (warp_labels(torch.zeros(16, 28).long(), w) == 255).all()
    out, inside = warp_maps(torch.full((3, 4, 7), .5), w)
    assert not inside.any() and (out == .5).all()
    assert (warp_maps(torch.full((3, 4, 7), .5), w, fill=0)[0] == 0).all()

def test_records_can_be_compared_sent_and_read():
    for i in range(5):
        w = rand_augment(picture(), rng_for(i))[1]
        assert pickle.loads(pickle.dumps(w)) == w and hash(w) == hash(dataclasses.replace(w))
        with pytest.raises(dataclasses.FrozenInstanceError): w.size = (1, 1)
    a, b = (rand_augment(picture(), rng_for(3), legacy=k) for k in (False, True))
    assert a[0].equal(b[0]) and b[1] == dataclasses.replace(a[1], legacy=True)

def test_bad_records_and_maps():
    w = Warp((8, 8))
    with pytest.raises(ValueError, match='size'): Warp((0, 8))
    with pytest.raises(ValueError, match='size'): Warp((8,))
    with pytest.raises(ValueError, match='ops'): Warp((8, 8), (('Rotate', 3, (1, 2, 3)),))
    with pytest.raises(ValueError, match='ops'): Warp((8, 8), (('Rotate', 3, (1, 0, float('nan'), 0, 1, 0)),))
    with pytest.raises(ValueError, match='cutout'): Warp((8, 8), cutout=(1, 2))
    for bad in (torch.zeros(8, 8), torch.zeros(8, 8).bool(), np.zeros((8, 8), int)):
        with pytest.raises(TypeError, match='labels must be an integer tensor'): warp_labels(bad, w)
    with pytest.raises(ValueError, match='labels'): warp_labels(torch.zeros(1, 8, 8).long(), w)
    with pytest.raises(TypeError, match='maps must be a float tensor'): warp_maps(torch.zeros(1, 8, 8).long(), w)
    with pytest.raises(ValueError, match='maps'): warp_maps(torch.zeros(8, 8), w)
    with pytest.raises(TypeError, match='warps must be a list'): warp_labels(torch.zeros(8, 8).long(), np.eye(3))
    with pytest.raises(TypeError, match='maps'): warp_batch(np.zeros((1, 1, 8, 8)), [w])
    with pytest.raises(ValueError, match='maps'): warp_batch(torch.zeros(1, 1, 0, 8), [w])
    with pytest.raises(ValueError, match='warps must be 2 records'): warp_batch(torch.zeros(2, 1, 8, 8), [w])
    with pytest.raises(TypeError, match='warps'): warp_batch(torch.zeros(1, 1, 8, 8), w)

def test_turn_is_pils():
    for size in SIZES:
        p = pil(picture(*size))
        for a in (-27, -3, 6, 24):
            got = p.transform(p.size, Image.Transform.AFFINE, turn(a, size), Image.Resampling.BILINEAR, fillcolor=GREY)
            assert (np.array(got) == np.array(p.rotate(a, Image.Resampling.BILINEAR, fillcolor=GREY))).all()
    assert Op('t', lambda m, s, z: 3*m*s, move=turn)(pil(picture()), 0).size == (84, 48)
