"""Feeding: every network and feed against a plain loop, against the segmenters the methods brought along, and against people."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from protonb.core import InputError
from protonb.deeplab import iapc_small, pbal_small, proda_small
from protonb.deeplabv2 import pixda_small, wdass_small
from protonb.dip_net import dip_small
from protonb.evaluation import argmax_upsampled, evaluate, label_map
from protonb.feeding import Feed, TestTime, at_test_time, enlarged, feed_of_old, network_input, resampled, segmenter, window_places
from protonb.labels import ClassSpace
from protonb.ops import prototype_logits
from protonb.prototypes import Prototypes
from protonb.transforms import normalize

K = 5
FIVE = ClassSpace('five', tuple('abcde'), tuple((i, i, i) for i in range(K)), (('5', tuple(range(K))),))
NETS = dict(source_only=(dip_small, Feed()), dip=(dip_small, Feed(scale=8.)), iapc=(iapc_small, Feed(40)), pbal=(pbal_small, Feed()),
            proda=(proda_small, Feed(input='unit')), wdass=(wdass_small, Feed(enlarge='centred')), pixda=(pixda_small, Feed(48)))

def gen(seed=0): return torch.Generator().manual_seed(seed)
def photos(*size, n=2, seed=0): return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=gen(seed))

@pytest.fixture(scope='module')
def made():
    "Networks with logits worth averaging, their feeds, DIP's prototypes: two classes lack one."
    found = {}
    for name,(make,feed) in NETS.items():
        torch.manual_seed(1)
        net = make(num_classes=None if name == 'dip' else K)
        for p in net.parameters():   # the small networks start with a classifier near 0
            if p.ndim == 4 and len(p) == K: p.data.normal_(0, .2, generator=gen(2))
        bank = None
        if name == 'dip':
            matrix,counts = torch.randn(K, net.channels, generator=gen(3)),torch.tensor([3, 0, 1, 2, 0])
            bank = Prototypes(matrix*(counts > 0)[:, None], counts, tuple('abcde'), {})
        found[name] = net,feed,bank
    return found

# the plain loop

def frozen_input(images, feed): return images.float()/255 if feed.input == 'unit' else normalize(images)

def grid(net, feed, bank, images):
    z = net(frozen_input(images, feed)).float()
    if bank is None: return z
    z = feed.scale*torch.einsum('bchw,kc->bkhw', F.normalize(z, dim=1), F.normalize(bank.matrix, dim=1))
    return torch.where((bank.counts > 0)[:, None, None], z, -1e30)

def plain_places(n, window, step):
    "Starts along one axis, written without cleverness."
    if n <= window: return [0]
    starts,i = [],0
    while i + window < n: starts.append(i); i += step
    return starts + [n - window]

@torch.no_grad()
def plain_loop(net, feed, bank, images, options):
    (B,_,H,W),votes,soft = images.shape,[],options.average == 'probabilities'
    up = lambda z, size: F.interpolate(z, size, mode='bilinear', align_corners=feed.enlarge == 'aligned')
    base = (feed.height, round(W*feed.height/H)) if feed.height else (H, W)
    for s in options.scales:
        h,w = round(s*base[0]),round(s*base[1])
        view = images.float() if (h, w) == (H, W) else F.interpolate(images.float(), (h, w), mode='bicubic', antialias=True).clamp(0, 255)
        for back in (False, True) if options.flip else (False,):
            seen = view.flip(3) if back else view
            if options.window is None:
                v = up(grid(net, feed, bank, seen), (H, W))
                v = v.softmax(1) if soft else v
            else:
                rows,cols = options.window
                dy,dx = options.stride if isinstance(options.stride, tuple) else (round(options.stride*rows), round(options.stride*cols))
                total,count = torch.zeros(B, K, h, w),torch.zeros(h, w)
                for y in plain_places(h, rows, dy):
                    for x in plain_places(w, cols, dx):
                        cut = seen[:, :, y:y+rows, x:x+cols]
                        z = up(grid(net, feed, bank, cut), cut.shape[2:])
                        total[:, :, y:y+rows, x:x+cols] += z.softmax(1) if soft else z
                        count[y:y+rows, x:x+cols] += 1
                v = up(total/count, (H, W))
            votes.append(v.flip(3) if back else v)
    return torch.stack(votes).mean(0)

OPTIONS = dict(window=TestTime((33, 41)), scales=TestTime(scales=(.6, 1., 1.7)), flip=TestTime(flip=True),
               all=TestTime((40, 33), (17, 33), (.75, 1.3), True))

@pytest.mark.parametrize('average', ['probabilities', 'logits'])
@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('name', NETS)
def test_agrees_with_a_plain_loop(made, name, options, average):
    net,feed,bank = made[name]
    options,images = replace(OPTIONS[options], average=average),photos(57, 70)
    got = at_test_time(segmenter(net, feed, bank), options, K, tile_values=700)(images)
    want = plain_loop(net, feed, bank, images, options)
    assert got.shape == (2, K, 57, 70) and got.dtype == torch.float32 and not got.isnan().any()
    if bank is not None: assert got[:, [1, 4]].eq(-torch.inf).all() and got[:, [0, 2, 3]].isfinite().all()
    if average == 'probabilities': got = got.exp()
    else: got,want = (t if bank is None else t[:, [0, 2, 3]] for t in (got, want))
    assert want.std() > .01                         # something to compare
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('size', [(33, 41), (34, 42), (20, 30), (33, 90), (66, 82), (67, 83), (1, 1), (31, 1)])
@pytest.mark.parametrize('window', [(33, 41), (500, 500), (1, 41)])
def test_windows_cover_and_stay_inside(size, window):
    for stride in (.5, 1, .3, (1, 41), (window[0], 1)):
        if isinstance(stride, tuple) and size[0] > 60: continue
        places,seen = window_places(size, window, stride),torch.zeros(size)
        for t,l,b,r in places:
            assert 0 <= t < b <= size[0] and 0 <= l < r <= size[1]
            assert (b-t, r-l) == (min(size[0], window[0]), min(size[1], window[1]))
            seen[t:b, l:r] += 1
        assert seen.min() >= 1 and len(set(places)) == len(places)
        dy,dx = stride if isinstance(stride, tuple) else (max(1, round(stride*n)) for n in window)
        want = [(t, l) for t in plain_places(size[0], window[0], dy) for l in plain_places(size[1], window[1], dx)]
        assert [p[:2] for p in places] == want

@pytest.mark.parametrize('size', [(33, 41), (34, 41), (33, 42), (25, 60), (97, 35)])
@pytest.mark.parametrize('name', ['pbal', 'wdass'])
def test_odd_sizes(made, name, size):
    net,feed,bank = made[name]
    options,images = TestTime((33, 41), flip=True),photos(*size, n=1)
    got = at_test_time(segmenter(net, feed), options, K)(images).exp()
    torch.testing.assert_close(got, plain_loop(net, feed, bank, images, options), atol=1e-5, rtol=1e-5)

def test_a_window_as_large_as_the_image_is_one_look(made):
    net,feed,_ = made['pbal']
    images,segment = photos(49, 65),segmenter(net, feed)
    for window in ((49, 65), (1000, 65), (50, 66)):
        got = at_test_time(segment, TestTime(window, average='logits'), K)(images)
        torch.testing.assert_close(got, enlarged(segment(images), (49, 65)), atol=1e-6, rtol=1e-6)

def test_rows_at_a_time_change_nothing(made):
    for name in ('pbal', 'wdass'):
        net,feed,_ = made[name]
        segment,images = segmenter(net, feed),photos(57, 70)
        whole,*parts = (at_test_time(segment, TestTime(scales=(.5, 1.5), flip=True), K, tile_values=t)(images) for t in (2**30, 1, 2000))
        for part in parts: torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-6)

def test_views_are_never_all_held():
    "One sum, one view of logits on the grid, one band: the loop's memory does not grow with the number of views."
    alive,most = [],0
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal most
            out = f(*args, **kwargs or {})
            if isinstance(out, torch.Tensor): most = max(most, out.numel())
            return out
    segment = lambda x: x.float().mean(1, keepdim=True)[..., ::8, ::8].expand(-1, 50, -1, -1)
    images = photos(128, 128, n=1)
    look = at_test_time(segment, TestTime(scales=(.5, 1., 2.), flip=True), 50, tile_values=50*128*4)
    with Watch(): z = look(images)
    assert z.shape == (1, 50, 128, 128) and most == z.numel()   # nothing larger than the sum, though the views are four times its pixels

# today's segmenters, bit for bit

def written_out(name, net, feed, bank):
    "What each method's own segmenter does, line by line."
    def call(x):
        size = x.shape[2:]
        if feed.height:
            at = feed.height,round(size[1]*feed.height/size[0])
            x = F.interpolate(x.float(), at, mode='bicubic', align_corners=False, antialias=True).clamp(0, 255)
        z = net(frozen_input(x, feed))
        if name == 'dip': return prototype_logits(z, bank.matrix, scale=8.).masked_fill(~bank.valid[None, :, None, None], -torch.inf)
        return F.interpolate(z.float(), size, mode='bilinear', align_corners=False) if name == 'wdass' else z
    return torch.no_grad()(call)

@pytest.mark.parametrize('name', NETS)
def test_bit_for_bit_as_the_methods_had_it(made, name):
    net,feed,bank = made[name]
    for size in ((48, 64), (57, 70), (40, 33)):
        images = photos(*size)
        got,want = segmenter(net, feed, bank)(images),written_out(name, net, feed, bank)(images)
        assert torch.equal(got, want) and got.dtype == want.dtype and not got.requires_grad

OLD = [('source_only', {}, {}), ('source_only', dict(augment={}, lr=.1), {}), ('iapc', dict(test_height=40, view=dict(base_height=640)), dict(height=40)),
       ('iapc', dict(test_height=None, view=dict(base_height=640)), {}), ('pixda', dict(view=dict(height=24, width=48)), dict(height=24)),
       ('warm_up', dict(mean_std=False), dict(input='unit')), ('distill', dict(mean_std=True, view=dict(height=24)), {}),
       ('wdass', dict(view=dict(height=24)), dict(enlarge='centred')), ('bpl', dict(view=dict(low=.5)), {}), ('dpl', dict(view=None), {})]

@pytest.mark.parametrize('stage, hyper, want', OLD)
def test_old_run_folders(stage, hyper, want):
    "By what their settings said: the size of the view, x/255, logits enlarged without aligned corners."
    feed = feed_of_old(stage, json.loads(json.dumps(dict(hyper=hyper, net='any'))))
    assert feed == Feed(**want) and Feed.from_dict(json.loads(json.dumps(feed.to_dict()))) == feed

def test_old_dip_runs():
    assert feed_of_old('dip', dict(hyper=dict(scale=10.))) == Feed(scale=10.)
    assert feed_of_old('source_only', dict(net='dip_small')) == Feed()

# ranges, modes, types

def test_network_input():
    images = photos(8, 9)
    class Says(torch.nn.Module): input_range = 'unit'
    class Wraps(torch.nn.Module):
        def __init__(self): super().__init__(); self.module = Says()
    for x in (images, images.float(), images.double()):
        assert torch.equal(network_input(torch.nn.Identity(), x), normalize(images))
        assert torch.equal(network_input(Says(), x), images.float()/255)
        assert torch.equal(network_input(Wraps(), x), images.float()/255)
        assert torch.equal(network_input(Says(), x, 'imagenet'), normalize(images))
        assert torch.equal(network_input(Says(), x, 'signed'), images.float()/127.5 - 1)
        assert network_input(Says(), x).dtype == torch.float32
    with pytest.raises(ValueError, match='must be'): network_input(Says(), images[0])
    Says.input_range = 'bytes'
    with pytest.raises(InputError, match="'bytes'"): network_input(Says(), images)

def test_the_feed_overrules_the_network(made):
    net,images = made['pbal'][0],photos(40, 48)
    as_imagenet = segmenter(net)(images)
    net.input_range = 'unit'
    try:
        assert not torch.equal(segmenter(net)(images), as_imagenet)
        assert torch.equal(segmenter(net, Feed(input='imagenet'))(images), as_imagenet)
    finally: del net.input_range

def test_eval_mode_no_gradient_floats(made):
    net,feed,_ = made['pbal']
    net.train()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    segment = segmenter(net, feed)
    assert not net.training
    images = photos(57, 70)
    for options in (TestTime(), TestTime((33, 33), flip=True)):
        look = at_test_time(segment, options, K)
        a,b = look(images),look(images.float())
        assert not a.requires_grad and torch.equal(a, b)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_absent_classes_with_centred_enlargement(made):
    net,_,bank = made['dip']
    z = segmenter(net, Feed(enlarge='centred'), bank)(photos(57, 70))
    assert z.shape == (2, K, 57, 70) and not z.isnan().any() and (z[:, [1, 4]] < -1e29).all()
    for average in ('logits', 'probabilities'):
        z = at_test_time(segmenter(net, Feed(30, enlarge='centred'), bank), TestTime((20, 20), average=average), K)(photos(57, 70))
        assert not z.isnan().any() and z[:, [1, 4]].eq(-torch.inf).all()
        assert not set(argmax_upsampled(z[0], (57, 70)).unique().tolist()) & {1, 4}

def test_a_diverged_network_stays_visible():
    look = at_test_time(lambda x: torch.full((len(x), K, 4, 4), torch.nan), TestTime(flip=True), K)
    assert look(photos(9, 9)).isnan().all()

def test_any_callable_and_the_rest_of_the_library(made):
    "A function of one's own, and what stands on segmenters: label_map and evaluate."
    net,feed,_ = made['iapc']
    own = torch.no_grad()(lambda x: net.eval()(normalize(x)))
    images,options = photos(57, 70),TestTime((33, 33), scales=(1., 1.5), flip=True)
    assert torch.equal(at_test_time(own, options, K)(images), at_test_time(segmenter(net), options, K)(images))
    look = at_test_time(segmenter(net, feed), options, K)
    z = look(images[:1])[0]
    assert torch.equal(label_map(look, images[0]), z.argmax(0))
    truth = z.argmax(0)
    assert evaluate(look, [(images[0], truth)], FIVE, progress=False).accuracy == 1

def test_one_look_is_the_segmenter_itself(made):
    segment = segmenter(*made['pbal'][:2])
    assert at_test_time(segment, TestTime(), K) is segment
    assert at_test_time(segment, TestTime(average='logits', stride=.25), K) is segment

def test_resized_is_todays_arithmetic():
    x = photos(37, 53)
    assert resampled(x, (37, 53)) is x
    same = F.interpolate(x.float(), (37, 53), mode='bicubic', align_corners=False, antialias=True).clamp(0, 255)
    assert torch.equal(same, x.float())            # so leaving it out changes no bit
    assert resampled(x, (20, 90)).min() >= 0 and resampled(x, (20, 90)).max() <= 255

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_images_on_the_cpu_network_on_the_gpu(made):
    net,feed,bank = made['dip']
    images,options = photos(57, 70),TestTime((33, 33), scales=(1., 1.5), flip=True)
    want = at_test_time(segmenter(net, feed, bank), options, K)(images)
    got = at_test_time(segmenter(net.cuda(), feed, bank), options, K)(images)
    net.cpu()
    torch.testing.assert_close(got.exp().cpu(), want.exp(), atol=1e-3, rtol=1e-3)

# people

@pytest.mark.parametrize('bad, says', [
    (dict(height=0), 'height is 0'), (dict(height=1.5), 'height is 1.5'), (dict(height='512'), "height is '512'"),
    (dict(input='bgr'), "input is 'bgr'"), (dict(enlarge='nearest'), "enlarge is 'nearest'"), (dict(scale=0), 'scale is 0'),
    (dict(scale=float('nan')), 'scale is nan'), (dict(hieght=3), 'hieght')])
def test_bad_feeds(bad, says):
    with pytest.raises(InputError, match=says): Feed.from_dict(bad)

@pytest.mark.parametrize('bad, says', [
    (dict(window=(0, 4)), 'window is'), (dict(window=65), 'window is 65'), (dict(window=(4, 4, 4)), 'window is'),
    (dict(window=(4., 4)), 'window is'), (dict(stride=0), 'stride is 0'), (dict(stride=1.5), 'stride is 1.5'), (dict(stride='.5'), 'stride is'),
    (dict(stride=(0, 3)), 'stride is'), (dict(window=(8, 8), stride=(8, 9)), 'leave no pixel out'), (dict(scales=()), 'scales is'),
    (dict(scales=1.), 'scales is 1.0'), (dict(scales=(1., 0)), 'scales is'), (dict(scales=(9.,)), 'scales is'),
    (dict(scales=(float('nan'),)), 'scales is'), (dict(average='mean'), "average is 'mean'")])
def test_bad_options(bad, says):
    with pytest.raises(InputError, match=says): TestTime(**bad)

def test_lists_from_json():
    assert TestTime(window=[3, 4], stride=[1, 2], scales=[1, .5]) == TestTime((3, 4), (1, 2), (1, .5))
    assert TestTime(scales=[1]).plain

def test_wrong_numbers_of_classes_and_missing_prototypes(made):
    with pytest.raises(InputError, match='needs prototypes'): segmenter(made['dip'][0])
    with pytest.raises(ValueError, match=f'gives {K} classes, expected 3'):
        at_test_time(segmenter(made['pbal'][0]), TestTime(flip=True), 3)(photos(33, 33))
