"""The street generator: same pixels everywhere, every class there, nearer things in front, a data set that can be trusted."""
import ast, inspect, os, pickle, subprocess, sys, time
from dataclasses import FrozenInstanceError, replace
from hashlib import sha256
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from protonb import street_parts, streets
from protonb.core import InputError, rng_for
from protonb.labels import CITYSCAPES
from protonb.streets import DOMAINS, REAL, SYNTHETIC, Lens, Scene, Streets, Thing, draw_street

GOLDEN = {'synthetic': '2611511f80800e9c281c4ed472c5e5b11dd1fbeea0c8ed3d7b27a6c55d7f2a3a',
          'real': 'bc1c1969dd3d98735afb864e3104a2a9985b2d23c453067aeee3fb8e6be49053'}
BOTH = pytest.mark.parametrize('domain', DOMAINS.values(), ids=DOMAINS)

def digest(*arrays):
    h = sha256()
    for a in arrays: h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()

@BOTH
def test_golden_pixels(domain):
    "Sizes odd and even; a change of any pixel of the generator must be made on purpose."
    drawn = [draw_street(domain, seed, size) for seed,size in ((0,(96,192)), (1,(96,192)), ((2,'a',3),(65,131)), (4,(128,256)), (5,(32,64)))]
    assert digest(*(a for pair in drawn for a in pair)) == GOLDEN[domain.name]

def test_golden_pixels_without_vector_instructions():
    "A machine with an older processor: numpy takes other code paths, the pixels stay."
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_streets as t; [t.test_golden_pixels(d) for d in t.DOMAINS.values()]; print('same')"
    off = 'X86_V4 X86_V3 AVX512_SKX AVX512_ICL AVX512_SPR AVX512F AVX2 FMA3 ASIMDHP ASIMDDP'
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=os.environ | dict(NPY_DISABLE_CPU_FEATURES=off), capture_output=True, text=True)
    assert r.stdout.strip().endswith('same'), r.stderr[-500:]

def test_global_random_state_and_call_order_do_not_matter():
    a = draw_street(REAL, 5, (48, 96))
    np.random.seed(3)
    torch.manual_seed(3)
    draw_street(SYNTHETIC, 6, (33, 70))
    b = draw_street(REAL, 5, (48, 96))
    assert all(np.array_equal(p, q) for p,q in zip(a, b))

# What numpy computes with vector instructions of the machine, adds up in an order of its own, or hands to another library
INEXACT = set('''sin cos tan arcsin arccos arctan arctan2 sinh cosh tanh exp exp2 expm1 log log2 log10 log1p power float_power cbrt hypot sum mean std var
    prod dot matmul einsum inner tensordot linalg fft interp linspace geomspace logspace average nansum convolve correlate polyval trapezoid
    normal standard_normal exponential gamma beta poisson choice shuffle permutation multivariate_normal'''.split())

@pytest.mark.parametrize('module', [streets, street_parts], ids=lambda m: m.__name__)
def test_only_exact_arithmetic(module):
    tree = ast.parse(inspect.getsource(module))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not used & INEXACT
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.BinOp) and isinstance(n.op, (ast.Pow, ast.MatMult))]

@BOTH
@pytest.mark.parametrize('size', [(32,64), (33,65), (97,201), (64,300), (200,64), (128,256)])
def test_any_size(domain, size):
    image,label = draw_street(domain, 8, size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert label.shape == size and label.dtype == np.uint8 and label.max() < 19
    assert image.std() > 10

@pytest.mark.parametrize('size', [(31,64), (32,63), (0,0), (64,), (3,64,64)])
def test_bad_size_is_named(size):
    with pytest.raises(InputError, match='size is'): draw_street(REAL, 0, size)

@BOTH
def test_every_factor_may_be_extreme(domain):
    "No index runs out of a table when the world is bare, crowded, bent, or foggy."
    p = domain.place
    bare = replace(domain, place=replace(p, gap=1., trees=0., people=0., parked=0., traffic=0., verge=0.))
    full = replace(domain, place=replace(p, gap=0., trees=1., people=40., parked=1., traffic=12., verge=1., curve=.02, storeys=(9,12)))
    fog = replace(domain, light=replace(domain.light, haze=(1.,2.), wet=1., dusk=1., uneven=1.), lens=Lens((.1,3.), .5, 1., 1., 80., 1., 1., 60., 16))
    low = replace(domain, place=replace(p, horizon=(.05,.95), camera=(.3,4.), focal=(.3,2.), road=(1.,12.), walk=(.5,15.)))
    for d in (bare, full, fog, low):
        for seed in range(6):
            image,label = draw_street(d, seed, (48, 96))
            assert label.max() < 19

@pytest.fixture(scope='module')
def counts():
    "Pixels of every class in 200 images, (200,19), for both domains."
    one = lambda d,i: np.bincount(draw_street(d, (0, i, d.name), (48, 96))[1].ravel(), minlength=19)
    return {n: np.stack([one(d, i) for i in range(200)]) for n,d in DOMAINS.items()}

@BOTH
def test_every_class_in_ten_of_three_hundred_images(domain, counts):
    images = (counts[domain.name] >= 12).sum(0)  # 12 of 48x96 pixels are 48 of 96x192
    assert images.min() >= 7, dict(zip(CITYSCAPES.classes, images.tolist()))

@BOTH
def test_class_frequencies_are_those_of_a_street(domain, counts):
    c = counts[domain.name]
    share = dict(zip(CITYSCAPES.classes, c.sum(0)/c.sum()))
    bounds = dict(road=(.25,.37), sidewalk=(.03,.09), building=(.15,.26), vegetation=(.09,.18), sky=(.05,.13), car=(.035,.1), terrain=(.01,.05), person=(.006,.03),
                  train=(.002,.02), rider=(.002,.012), motorcycle=(.002,.012), bicycle=(.002,.015), fence=(.005,.03), wall=(.004,.03), pole=(.01,.035))
    assert not {n: share[n] for n,(a,b) in bounds.items() if not a < share[n] < b}

def test_the_domains_look_different_and_each_is_steady():
    "The colour of a class differs between the domains by more than within one."
    mean = {}
    for n,d in DOMAINS.items():
        for part in (0, 1):
            total,area = np.zeros((19, 3)),np.zeros(19)
            for i in range(40):
                image,label = draw_street(d, (part, i, n), (48, 96))
                for c in range(19): total[c] += image[label==c].sum(0)
                area += np.bincount(label.ravel(), minlength=19)
            mean[n,part] = total/np.maximum(area, 1)[:,None]
    common = [CITYSCAPES.index(c) for c in ('road', 'sidewalk', 'building', 'vegetation', 'sky', 'terrain')]
    between = abs(mean['synthetic',0] - mean['real',0])[common].max(1)
    within = max(abs(mean[n,0] - mean[n,1])[common].max() for n in DOMAINS)
    assert between.min() > 8 and between.mean() > 2*within

def test_nearer_things_stand_in_front():
    sc = Scene(SYNTHETIC, rng_for(0), (96, 192))
    sc.bend = 0.
    for t in (Thing('person', 0., 6.), Thing('bus_rear', 0., 12.)): streets.draw_thing(sc, t)  # the nearer one is drawn first
    u,v,_ = streets.project(sc, 0., 6.)
    body = sc.label[int(v)-14:int(v)-10, int(u)]
    assert (body == CITYSCAPES.index('person')).all()
    assert (sc.label == CITYSCAPES.index('bus')).sum() > 50
    on = sc.depth < streets.FAR
    assert set(np.unique(sc.depth[on]).tolist()) == {6., 12.}

@pytest.mark.parametrize('bend', [0., .004, -.004, .008])
@pytest.mark.parametrize('x', [-9., -2., 1., 7.])
def test_column_depth_inverts_the_camera(bend, x):
    sc = Scene(REAL, rng_for(1), (64, 160))
    sc.bend = bend
    z = streets.column_depth(sc, x)
    seen = np.flatnonzero((z < 500) & (z > .5))
    assert len(seen) > 3 or x in (1., -2.) or bend*x > .05  # a wall so far to the right bends out of sight
    for u in seen: assert abs(streets.project(sc, x, float(z[u]))[0] - (u+.5)) < .05

def test_wall_is_above_the_ground_it_stands_on():
    "A front at 5 m to the right: no pixel of it below its foot line."
    sc = Scene(SYNTHETIC, rng_for(2), (96, 192))
    sc.bend = 0.
    streets.draw_row(sc, streets.make_lots(sc, 5., 0., (streets.OPEN,)))
    rows,cols = np.nonzero(sc.depth < streets.FAR)
    foot = sc.v0 + sc.f*sc.cam/streets.column_depth(sc, 5.)
    front = sc.depth[rows,cols] == streets.column_depth(sc, 5.)[cols]
    assert front.sum() > 1000
    assert (rows[front] + .5 <= foot[cols[front]] + .01).all()

def test_domains_are_frozen_hashable_and_picklable():
    with pytest.raises(FrozenInstanceError): REAL.lens.noise = 0.
    assert pickle.loads(pickle.dumps(REAL)) == REAL != SYNTHETIC
    assert len({REAL, SYNTHETIC, replace(REAL, lens=Lens())}) == 3
    assert set(REAL.matter.paint) == set(SYNTHETIC.matter.paint)

def test_no_sprite_lacks_a_paint_or_a_class():
    for s in (s for vs in street_parts.sprites().values() for s in vs):
        assert len(s.parts) < 16 and s.code.max() >> 4 <= len(s.parts)
        for c,p in s.parts:
            assert c in CITYSCAPES.classes
            for d in DOMAINS.values(): assert p in d.matter.paint

def test_streets_as_a_data_set():
    ds = Streets(REAL, 5, (48, 96), seed=3)
    image,label = ds[2]
    assert (image.shape, image.dtype, label.shape, label.dtype) == ((3,48,96), torch.uint8, (48,96), torch.int64)
    assert len(ds) == 5 and len(set(ds.names)) == 5 and ds.space is CITYSCAPES
    assert torch.equal(ds[-3][0], image) and torch.equal(ds[np.int64(2)][0], image)
    for i in (5, -6):
        with pytest.raises(IndexError): ds[i]
    assert sum(1 for _ in ds) == 5                              # iteration ends by IndexError
    with pytest.raises(InputError, match='count is 0'): Streets(REAL, 0)

def test_what_is_returned_may_be_changed():
    ds = Streets(SYNTHETIC, 1, (32, 64))
    image,label = ds[0]
    image.zero_(), label.fill_(7)
    assert ds[0][0].any() and (ds[0][1] != 7).any()

def test_cache_changes_nothing():
    a,b = Streets(REAL, 3, (32, 64), cache=True),Streets(REAL, 3, (32, 64), cache=False)
    for i in (0, 2, 0): assert torch.equal(a[i][0], b[i][0]) and torch.equal(a[i][1], b[i][1])
    assert b.drawn is None and sorted(a.drawn) == [0, 2]

def test_seeds_and_domains_share_no_image():
    seen = {digest(ds[i][1].numpy()) for d in DOMAINS.values() for seed in (0, 1) for ds in [Streets(d, 8, (48, 96), seed)] for i in range(8)}
    assert len(seen) == 32

def test_workers_draw_the_same():
    ds = Streets(REAL, 4, (32, 64), seed=1)
    alone = [ds[i][0] for i in range(4)]
    there = [image[0] for image,_ in DataLoader(Streets(REAL, 4, (32, 64), seed=1), num_workers=2)]
    assert all(torch.equal(a, b) for a,b in zip(alone, there))

def test_pickled_data_set_goes_on():
    ds = Streets(SYNTHETIC, 2, (32, 64))
    ds[0]
    again = pickle.loads(pickle.dumps(ds))
    assert torch.equal(again[0][0], ds[0][0]) and torch.equal(again[1][0], ds[1][0])

@BOTH
def test_thirty_images_a_second(domain):
    "The goal is 60 of 128x256 on one idle core; half of that is asserted, in processor time, best of three."
    draw_street(domain, 0, (128, 256))
    def rate(k):
        start = time.process_time()
        for i in range(10): draw_street(domain, (k, i), (128, 256))
        return 10/(time.process_time()-start)
    assert max(rate(k) for k in range(3)) >= 30
