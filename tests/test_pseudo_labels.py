"""Votes against the plain version, quantiles against numpy, folders against runs that are killed anywhere."""
import json, subprocess, sys, tracemalloc
import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image
import protonb.datasets, protonb.pseudo_labels as pl
from protonb.core import InputError
from protonb.datasets import Cached, Mapped, PairFolder, resized, take
from protonb.feeding import Feed, segmenter
from protonb.labels import CITYSCAPES, CITYSCAPES13, IGNORE, TRAIN_IDS, ClassSpace, label_table
from protonb.pseudo_labels import (STEPS, HardLabels, Histogram, SoftLabels, Unlabelled, class_probabilities, classwise_thresholds,
    confidence_bytes, coverage, hard_label, kept_from, label_paths, labels_and_confidence, read_histogram, soft_label, soft_map,
    soft_path, write_labels, write_soft)

THREE = ClassSpace('three', ('a', 'b', 'c'), ((9, 0, 0), (0, 9, 0), (0, 0, 9)), (('3', (0, 1, 2)),))
MIX = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))

BIAS = torch.tensor([1.5, 2.2, -1.])[:, None, None]       # so that every class wins somewhere

def gen(seed=0): return torch.Generator().manual_seed(seed)
def photo(H, W, seed=0): return torch.randint(0, 256, (3, H, W), generator=gen(seed), dtype=torch.uint8)

def by_content(images):
    "Logits that depend on what is there, not on where: a mirrored image has mirrored logits."
    return torch.einsum('kc,bchw->bkhw', MIX, images.float()/64 - 2)

def by_place(images):
    "Logits on a coarse grid that also depend on the place."
    H, W = images.shape[-2:]
    small = F.adaptive_avg_pool2d(images.float(), (max(1, H//4), max(1, W//3)))
    return torch.einsum('kc,bchw->bkhw', MIX, small/40 - 2) + torch.linspace(0, 2, small.shape[-1])*torch.arange(3.)[:, None, None] + BIAS

class Photos:
    "Images in memory; counts what is read, and has no label to give."
    def __init__(self, n=4, size=(20, 33), space=THREE):
        self.names, self.space, self.size, self.read = [f'city/{i}' for i in range(n)], space, size, []
    def __len__(self): return len(self.names)
    def __getitem__(self, i):
        if not 0 <= i < len(self): raise IndexError(i)
        self.read.append(i)
        return photo(*self.size, seed=i), None

QUIET = dict(progress=False)

# votes

def whole(segment, image, sizes, flip, soft_before):
    total, n = 0, 0
    for size in sizes:
        view = torch.from_numpy(np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.BICUBIC))).permute(2, 0, 1)
        for back in (False, True)[:1 + flip]:
            z = segment((view.flip(-1) if back else view)[None])
            z = z.flip(-1) if back else z
            up = lambda x: F.interpolate(x, image.shape[1:], mode='bilinear', align_corners=True)[0]
            total, n = total + (up(z.softmax(1)) if soft_before else up(z).softmax(0)), n + 1
    return total/n

@pytest.mark.parametrize('soft_before', [True, False])
@pytest.mark.parametrize('flip', [True, False])
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (5, 1), (19, 31), (40, 64)])
@pytest.mark.parametrize('values', [1, 200, 2**22])
def test_tiles_are_the_whole(size, flip, soft_before, values):
    image, sizes = photo(*size), [size, (size[0]+3, size[1]+5), (max(1, size[0]-4), max(1, size[1]//2))]
    want = whole(by_place, image, sizes, flip, soft_before)
    tiles = list(class_probabilities(by_place, image, sizes, flip, soft_before, values))
    got = torch.cat([p for _, p in tiles], 1)
    assert [top for top, _ in tiles] == np.cumsum([0] + [p.shape[1] for _, p in tiles])[:-1].tolist()
    assert all(p.shape[0]*p.shape[1]*p.shape[2] <= max(values, 3*size[1]) for _, p in tiles)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    labels, confidence = labels_and_confidence(by_place, image, sizes, flip, soft_before, values)
    assert labels.dtype == torch.uint8 and labels.shape == size
    torch.testing.assert_close(confidence, want.max(0).values, atol=2e-6, rtol=0)
    torch.testing.assert_close(want.gather(0, labels.long()[None])[0], want.max(0).values, atol=4e-6, rtol=0)

def test_the_mirrored_view_is_turned_back():
    image = photo(12, 20)
    plain, both = (labels_and_confidence(by_content, image, flip=f) for f in (False, True))
    assert plain[0].equal(both[0])
    torch.testing.assert_close(plain[1], both[1])

def test_factors_and_sizes_name_the_same_views():
    seen = []
    def spy(images):
        seen.append(tuple(images.shape))
        return by_content(images)
    list(class_probabilities(spy, photo(10, 20), (1., .5, (15, 30)), flip=True))
    assert seen == [(1, 3, 10, 20)]*2 + [(1, 3, 5, 10)]*2 + [(1, 3, 15, 30)]*2

def test_a_class_that_cannot_win():
    def never(images): return torch.cat([by_content(images), torch.full_like(images[:, :1], -torch.inf, dtype=torch.float32)], 1)
    for soft_before in (True, False):
        labels, confidence = labels_and_confidence(never, photo(9, 9), soft_before=soft_before)
        want = labels_and_confidence(by_content, photo(9, 9), soft_before=soft_before)
        assert labels.equal(want[0]) and confidence.allclose(want[1])

@pytest.mark.parametrize('scales,what', [((512, 1024), '0..8'), ((0,), '0..8'), (((0, 5),), 'factor'), (((5, 5, 5),), 'factor'), ((), 'empty')])
def test_wrong_scales(scales, what):
    with pytest.raises(ValueError, match=what): list(class_probabilities(by_content, photo(4, 4), scales))

@pytest.mark.parametrize('image', [torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])
def test_wrong_images(image):
    with pytest.raises(ValueError, match='expected uint8'): list(class_probabilities(by_content, image))

def test_too_many_classes_for_a_byte():
    with pytest.raises(ValueError, match='256 classes'): labels_and_confidence(lambda x: torch.zeros(1, 256, 2, 2), photo(4, 4))

# bytes

def test_every_half_percent_is_an_edge():
    for k in range(STEPS+1):
        edge = np.float32(k/STEPS)
        around = torch.tensor([np.nextafter(edge, np.float32(-1)), edge, np.nextafter(edge, np.float32(2))]).clamp(0, 1)
        stored = confidence_bytes(around)
        assert stored[1] == k == kept_from(k/STEPS), k
        assert stored[2] == k
    p = torch.rand(200_000, generator=gen())
    for k in range(STEPS+1):
        clear = (p - k/STEPS).abs() > 1e-7
        assert ((confidence_bytes(p) >= kept_from(k/STEPS)) == (p >= k/STEPS))[clear].all()
        assert ((confidence_bytes(p) >= kept_from(k/STEPS, '<=')) == (p > k/STEPS))[clear].all()

def test_a_threshold_between_edges():
    assert kept_from(torch.tensor([0., .5001, .999, 1., 1.5])).tolist() == [0, 100, 199, 200, 201]
    assert kept_from(torch.tensor([0., .5001, .999, 1., 1.5]), '<=').tolist() == [0, 101, 200, 201, 201]
    with pytest.raises(ValueError, match="'<='"): kept_from(.5, '>')

# histogram

SHAPES = dict(flat=lambda g: torch.rand(5001, generator=g), sure=lambda g: 1 - torch.rand(4000, generator=g)**6*.4, saturated=lambda g: torch.ones(77),
              two=lambda g: torch.tensor([.1, .9]), one=lambda g: torch.tensor([.37]), gap=lambda g: torch.tensor([.2]*50 + [.8]*50))

@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('q', [0, .1, .5, .66, .9, 1])
@pytest.mark.parametrize('bins', [2**14, 500])
def test_quantiles_agree_with_numpy_within_a_bin(name, q, bins):
    values = SHAPES[name](gen())
    h = Histogram(3, bins).add(torch.full(values.shape, 1), values)
    got = h.quantile(q)
    assert got[0].isnan() and got[2].isnan()
    assert abs(got[1] - np.quantile(values.double().numpy(), q)) <= h.width + 1e-7
    assert h.width <= 1/(bins-1-STEPS)

def test_counts_add_up_in_any_order():
    y, p = torch.randint(0, 5, (40, 30), generator=gen()), torch.rand(40, 30, generator=gen(1))
    y[0] = IGNORE
    y[1] = 3                                                               # outside 0..2
    together = Histogram(3).add(y, p)
    apart = Histogram(3).add(y[20:].to(torch.uint8), p[20:]).add(y[:20].to(torch.uint8), p[:20])
    assert together.counts.equal(apart.counts) and int(together.count.sum()) == int((y < 3).sum())
    other = Histogram(3)
    other.load_state_dict(together.state_dict())
    assert other.quantile(.3).equal(together.quantile(.3))
    with pytest.raises(InputError, match='expected'): Histogram(4).load_state_dict(together.state_dict())
    with pytest.raises(ValueError, match='confidence is'): together.add(y, p[:3])
    with pytest.raises(ValueError, match='bins is 100'): Histogram(3, 100)
    with pytest.raises(ValueError, match='q is 2'): together.quantile(2)

def test_memory_does_not_grow():
    h = Histogram(19)
    def more(n):
        for i in range(n): h.add(torch.randint(0, 19, (60, 60), generator=gen(i)), torch.rand(60, 60, generator=gen(i)))
    before = h.counts.nbytes
    more(3)
    tracemalloc.start()
    more(3); few = tracemalloc.get_traced_memory()[0]
    more(60); many = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert h.counts.nbytes == before == 19*2**14*8 and int(h.counts.sum()) == 66*3600
    assert many - few < 20_000, 'python objects are kept per image'

def test_thresholds():
    h = Histogram(4)
    h.add(torch.zeros(5).long(), torch.tensor([.95, .97, .99, 1., 1.])).add(torch.full((3,), 2), torch.tensor([.3, .41, .8]))
    theta = classwise_thresholds(h)
    assert theta.dtype == torch.float32 and theta.tolist()[0] == pytest.approx(.9) and theta.tolist()[1] == theta.tolist()[3] == 0
    assert .41 - h.width < theta[2] <= .41
    assert h.kept(theta).tolist() == [5, 0, 2, 0] and kept_from(theta)[0] == 180
    assert classwise_thresholds(h, quantile=0, cap=1.)[0] == pytest.approx(.95)
    assert h.kept(.95).tolist() == [5, 0, 0, 0] and h.kept(1., '<=').sum() == 0 and h.kept().tolist() == [5, 0, 3, 0]
    with pytest.raises(ValueError, match='cap'): classwise_thresholds(h, cap=90)

# labels are never opened

def disk(tmp_path, n=3, size=(20, 33), labels=None):
    paths = [tmp_path/f'photo{i}.png' for i in range(n)]
    for i, p in enumerate(paths): Image.fromarray(photo(*size, seed=i).permute(1, 2, 0).numpy()).save(p)
    return PairFolder(paths, labels, [p.stem for p in paths], label_table(TRAIN_IDS, CITYSCAPES), CITYSCAPES)

def nineteen(images): return F.pad(by_place(images), (0, 0, 0, 0, 0, 16), value=-9.)

@pytest.mark.parametrize('wrap', [lambda d: d, lambda d: take(d, [2, 0, 1]), lambda d: resized(d, (10, 16)), lambda d: Mapped(d, CITYSCAPES13), Cached,
                                  lambda d: Cached(resized(take(Mapped(d, CITYSCAPES13), [0, 2]), (10, 16)))])
def test_no_label_file_is_opened(tmp_path, monkeypatch, wrap):
    bare = wrap(disk(tmp_path))
    full = wrap(disk(tmp_path, labels=[tmp_path/'there is no such file']*3))
    def refuse(*a, **kw): raise AssertionError('a label was read')
    monkeypatch.setattr(protonb.datasets, 'read_label', refuse)
    free = Unlabelled(full)
    assert len(free) == len(full) and free.names == full.names and free.space is full.space
    for i in range(len(free)):
        assert free[i][0].equal(bare[i][0]) and free[i][1].dtype == torch.int64 and free[i][1].shape == free[i][0].shape[1:]
        assert free[i][1].eq(IGNORE).all()
    with pytest.raises(AssertionError): full[0]                             # the wrapped data set itself is as it was

def test_writing_and_reading_need_no_labels(tmp_path, monkeypatch):
    for labels in (None, [tmp_path/'nowhere.png']*3):
        ds, out = disk(tmp_path, labels=labels), tmp_path/f'out{labels is None}'
        write_labels(nineteen, ds, out, CITYSCAPES, **QUIET)
        write_soft(nineteen, ds, tmp_path/f'soft{labels is None}', **QUIET)
        assert len(HardLabels(ds, out, .5)[1]) == len(SoftLabels(ds, tmp_path/f'soft{labels is None}')[1]) == 2

def test_a_cache_that_holds_labels_gives_none():
    class Labelled(Photos):
        def __getitem__(self, i): return super().__getitem__(i)[0], torch.zeros(self.size, dtype=torch.int64)
    full = Cached(Labelled()).fill()
    assert Unlabelled(full)[0][1].eq(IGNORE).all() and full[0][1].eq(0).all()

# folders

def content(folder): return {p.relative_to(folder).as_posix(): np.asarray(Image.open(p)).tobytes() for p in folder.rglob('*.png')}

def test_files_hold_what_was_said(tmp_path):
    ds = Photos()
    done = write_labels(by_place, ds, tmp_path, THREE, flip=True, scales=(1., .75), **QUIET)
    assert (done.written, done.skipped) == (4, 0) and sorted(ds.read) == [0, 1, 2, 3], 'each image is decoded once'
    for i in range(4):
        y, c = labels_and_confidence(by_place, photo(20, 33, seed=i), flip=True, scales=(1., .75))
        ids, stored = (np.asarray(Image.open(p)) for p in label_paths(tmp_path, ds.names[i]))
        assert ids.dtype == np.uint8 and (ids == y.numpy()).all() and (stored == confidence_bytes(c).numpy()).all()
    assert not list(tmp_path.rglob('.*')), 'scratch is left'

@pytest.mark.parametrize('below', ['<', '<='])
def test_histogram_and_files_agree_to_the_pixel(tmp_path, below):
    ds = Photos(6)
    write_labels(by_place, ds, tmp_path, THREE, **QUIET)
    h = read_histogram(tmp_path)
    for t in [None, .5, .6, .777, .95, 1., classwise_thresholds(h), classwise_thresholds(h, .3, 1.), torch.rand(3, generator=gen())]:
        seen = torch.bincount(torch.cat([hard_label(HardLabels(ds, tmp_path, t, below), i, ds.size).flatten() for i in range(6)]), minlength=256)
        got = coverage(tmp_path, t, below)
        assert got['kept'].equal(seen[:3]) and int(seen.sum()) == int(got['total'].sum()) == 6*20*33

def test_the_surer_half_stays(tmp_path):
    h = write_labels(by_place, Photos(6, (60, 90)), tmp_path, THREE, **QUIET).histogram
    share = h.kept(classwise_thresholds(h, .5, cap=1.)) / h.count
    assert h.count.min() > 200 and (share >= .5).all() and (share < .55).all()

class Kill(BaseException): pass

def dies_after(n, what):
    "what, but the n-th call dies before anything is done."
    left = [n]
    def f(*a, **kw):
        if not left[0]: raise Kill
        left[0] -= 1
        return what(*a, **kw)
    return f

@pytest.mark.parametrize('n', range(0, 9))
def test_a_killed_network(tmp_path, n):
    want = write_labels(by_place, Photos(), tmp_path/'whole', THREE, flip=True, **QUIET).histogram
    with pytest.raises(Kill) if n < 8 else pytest.MonkeyPatch.context():
        write_labels(dies_after(n, by_place), Photos(), tmp_path/'cut', THREE, flip=True, **QUIET)
    ds = Photos()
    done = write_labels(by_place, ds, tmp_path/'cut', THREE, flip=True, **QUIET)
    assert sorted(ds.read) == list(range(n//2, 4)), 'a finished image is decoded again'
    assert done.skipped == n//2 and done.histogram.counts.equal(want.counts)
    assert read_histogram(tmp_path/'cut').counts.equal(want.counts) and content(tmp_path/'cut') == content(tmp_path/'whole')

@pytest.mark.parametrize('save_every', [1, 2, 100])
def test_killed_at_every_file(tmp_path, monkeypatch, save_every):
    "The process dies before the m-th file appears, for every m; then once more; then it is left alone."
    opt = dict(save_every=save_every, **QUIET)
    want = write_labels(by_place, Photos(3), tmp_path/'whole', THREE, **opt).histogram
    save, m = pl._save, 0
    while True:
        out, ended = tmp_path/f'cut{m}', []
        for n in (m, m//2):
            monkeypatch.setattr(pl, '_save', dies_after(n, save))
            try: ended.append(write_labels(by_place, Photos(3), out, THREE, **opt))
            except Kill: pass
        monkeypatch.setattr(pl, '_save', save)
        if len(ended) == 2: break                                          # m is more than all files
        ds = Photos(3)
        whole_before = [i for i, name in enumerate(ds.names) if all(p.exists() for p in label_paths(out, name))]
        got = write_labels(by_place, ds, out, THREE, **opt)
        assert got.histogram.counts.equal(want.counts) and content(out) == content(tmp_path/'whole')
        assert not set(ds.read) & set(whole_before), 'a finished image is decoded again'
        m += 1
    assert m >= 3*3 + 1

def test_killed_while_notes_are_cleared(tmp_path, monkeypatch):
    want = write_labels(by_place, Photos(), tmp_path/'whole', THREE, **QUIET).histogram
    unlink = pl.Path.unlink
    for n in range(4):
        monkeypatch.setattr(pl.Path, 'unlink', dies_after(n, unlink))
        with pytest.raises(Kill): write_labels(by_place, Photos(), tmp_path/str(n), THREE, **QUIET)
        monkeypatch.setattr(pl.Path, 'unlink', unlink)
        ds = Photos()
        assert write_labels(by_place, ds, tmp_path/str(n), THREE, **QUIET).histogram.counts.equal(want.counts) and not ds.read

def test_a_process_that_vanishes(tmp_path):
    code = f'''import os, sys, torch
sys.path.insert(0, {str(__import__('pathlib').Path(__file__).parent)!r})
from test_pseudo_labels import *
calls = []
def gone(images):
    calls.append(0)
    if len(calls) == 3: os._exit(9)
    return by_place(images)
write_labels(gone, Photos(), {str(tmp_path/'cut')!r}, THREE, progress=False)'''
    assert subprocess.run([sys.executable, '-c', code]).returncode == 9
    ds, want = Photos(), write_labels(by_place, Photos(), tmp_path/'whole', THREE, **QUIET).histogram
    assert write_labels(by_place, ds, tmp_path/'cut', THREE, **QUIET).histogram.counts.equal(want.counts) and sorted(ds.read) == [2, 3]

def test_lost_files_are_made_again_and_counted_once(tmp_path):
    want = write_labels(by_place, Photos(), tmp_path, THREE, **QUIET).histogram
    (tmp_path/'city/1.png').unlink()
    ds = Photos()
    assert write_labels(by_place, ds, tmp_path, THREE, **QUIET).histogram.counts.equal(want.counts) and ds.read == [1]
    more = Photos(6)
    got = write_labels(by_place, more, tmp_path, THREE, **QUIET)
    assert sorted(more.read) == [4, 5] and int(got.histogram.counts.sum()) == 6*20*33

def test_pictures_without_their_counts_are_not_finished(tmp_path):
    want = write_labels(by_place, Photos(), tmp_path, THREE, **QUIET).histogram
    (tmp_path/'histogram.json').unlink()
    ds = Photos()
    assert write_labels(by_place, ds, tmp_path, THREE, **QUIET).histogram.counts.equal(want.counts) and sorted(ds.read) == [0, 1, 2, 3]

def test_loader_workers_change_nothing(tmp_path):
    a, b = (write_labels(by_place, Photos(), tmp_path/str(n), THREE, workers=n, **QUIET) for n in (0, 2))
    assert a.histogram.counts.equal(b.histogram.counts) and content(tmp_path/'0') == content(tmp_path/'2')

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))])
def test_devices(tmp_path, device):
    seen = []
    def spy(images):
        seen.append(images.device.type)
        return nineteen(images.cpu()).to(images.device)
    done = write_labels(spy, Photos(space=CITYSCAPES), tmp_path, CITYSCAPES, scales=(1., .5), flip=True, device=device, **QUIET)
    write_soft(spy, Photos(space=CITYSCAPES), tmp_path/'soft', device=device, **QUIET)
    want = write_labels(nineteen, Photos(space=CITYSCAPES), tmp_path/'cpu', CITYSCAPES, scales=(1., .5), flip=True, **QUIET)
    assert set(seen) == {device} and (done.histogram.count - want.histogram.count).abs().max() < 5

# faults

def test_faults_of_writing(tmp_path):
    with pytest.raises(InputError, match='gives 3 classes; cityscapes has 19'): write_labels(by_place, Photos(), tmp_path/'a', CITYSCAPES, **QUIET)
    with pytest.raises(InputError, match='city/0: the segmenter gives nan'):
        write_labels(lambda x: by_place(x)*torch.nan, Photos(), tmp_path/'b', THREE, **QUIET)
    with pytest.raises(InputError, match='is empty'): write_labels(by_place, Photos(0), tmp_path/'c', THREE, **QUIET)
    for names, what in ((['x', 'x'], '1 names of the data set are there twice'), (['x', 'x_confidence'], 'x_confidence: names an image'), (['../x'], 'would leave'), (['/x'], 'would leave')):
        ds = Photos(len(names))
        ds.names = names
        with pytest.raises(InputError, match=what): write_labels(by_place, ds, tmp_path/'d', THREE, **QUIET)
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cannot write there'): write_labels(by_place, Photos(), tmp_path/'file'/'x', THREE, **QUIET)

def test_a_folder_is_not_mixed(tmp_path):
    with pytest.raises(Kill): write_labels(dies_after(1, by_place), Photos(), tmp_path, THREE, **QUIET)
    for opt, what in ((dict(flip=True), 'flip=False, not flip=True'), (dict(scales=(.5,)), 'scales'), (dict(soft_before=False), 'soft_before')):
        with pytest.raises(InputError, match=what): write_labels(by_place, Photos(), tmp_path, THREE, **opt, **QUIET)
    other = ClassSpace('other', ('a', 'b', 'd'), THREE.palette, THREE.subsets)
    with pytest.raises(InputError, match='classes'): write_labels(by_place, Photos(), tmp_path, other, **QUIET)

def linear(seed, classes=3):
    torch.manual_seed(seed)
    return torch.nn.Conv2d(3, classes, 1).requires_grad_(False)

@pytest.mark.parametrize('write', [lambda s, out, ds: write_labels(s, ds, out, THREE, **QUIET), lambda s, out, ds: write_soft(s, ds, out, **QUIET)])
def test_labels_of_two_networks_are_not_mixed(tmp_path, write):
    "Whatever the folder was left like: other weights or another feed are refused, the same network goes on."
    ds = Photos(4)
    write(segmenter(linear(0)), tmp_path, Photos(2))
    for other in (segmenter(linear(1)), segmenter(linear(0), Feed(input='unit')), segmenter(linear(0), Feed(16))):
        with pytest.raises(InputError, match='these labels were made with network='): write(other, tmp_path, ds)
    assert write(segmenter(linear(0)), tmp_path, ds).skipped == 2

def test_a_folder_that_names_no_network_goes_on(tmp_path):
    "Those of older versions, and of segmenters that are plain functions."
    plain = lambda images: linear(0)(images.float())
    write_labels(plain, Photos(2), tmp_path, THREE, **QUIET)
    assert 'network' not in json.loads((tmp_path/'histogram.json').read_text())
    assert write_labels(segmenter(linear(0)), Photos(4), tmp_path, THREE, **QUIET).written == 2
    with pytest.raises(InputError, match="network=.*, not network=mine; give another folder"):
        write_labels(plain, Photos(4), tmp_path, THREE, network='mine', **QUIET)

@pytest.mark.parametrize('text', ['', '{', '[]', '{"classes": ["a", "b", "c"]}',
    '{"classes": ["a", "b", "c"], "bins": 16384, "names": [], "counts": [[[99999, 1]], [], []], "scales": [1.0], "flip": false, "soft_before": true}'])
def test_a_damaged_histogram(tmp_path, text):
    (tmp_path/'histogram.json').write_text(text)
    for f in (lambda: read_histogram(tmp_path), lambda: write_labels(by_place, Photos(), tmp_path, THREE, **QUIET)):
        with pytest.raises(InputError, match='histogram.json'): f()

def test_faults_of_reading(tmp_path):
    ds = Photos(5)
    with pytest.raises(InputError, match='nowhere: no such folder'): HardLabels(ds, tmp_path/'nowhere')
    with pytest.raises(InputError, match='histogram.json: no such file'): coverage(tmp_path)
    write_labels(by_place, Photos(4), tmp_path, THREE, **QUIET)
    with pytest.raises(InputError, match=r'4.png: no such file.*1 of 5'): HardLabels(ds, tmp_path)
    ds = Photos(4)
    paths = [label_paths(tmp_path, n) for n in ds.names]
    for t, what in ((torch.rand(4), r'\(3,\)'), (torch.rand(1, 3), r'\(3,\)')):
        with pytest.raises(ValueError, match=what): HardLabels(ds, tmp_path, t)
    with pytest.raises(InputError, match='classes'): HardLabels(ds, tmp_path, space=CITYSCAPES)
    paths[3][1].unlink()
    with pytest.raises(InputError, match='3_confidence.png: no such file'): HardLabels(ds, tmp_path, .5)
    assert HardLabels(ds, tmp_path)[3][1].max() < 3                         # without a threshold nobody asks for it
    paths[3][1].write_bytes(paths[2][1].read_bytes())
    damaged = paths[0][0].read_bytes()[:60]
    paths[0][0].write_bytes(damaged)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(paths[1][0])
    Image.fromarray(np.full((20, 33), 3, np.uint8)).save(paths[2][0])
    Image.fromarray(np.full((20, 33), 255, np.uint8)).save(paths[3][1])
    for i, what in enumerate(('0.png: is damaged', r'1.png: is 9x9 \(height x width\), but its image is 20x33', '2.png: holds the id 3', '3_confidence.png: holds the value 255')):
        with pytest.raises(InputError, match=what): HardLabels(ds, tmp_path, .5)[i]
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(paths[3][1])
    with pytest.raises(InputError, match='3_confidence.png: is 9x9'): HardLabels(ds, tmp_path, .5)[3]

def test_labels_from_elsewhere(tmp_path):
    "Plain PNG files with 255 in them, as other programs write them."
    ids = np.array([[0, 1, 255], [2, 2, 2]], np.uint8)
    (tmp_path/'city').mkdir()
    Image.fromarray(ids).save(tmp_path/'city/0.png')
    assert HardLabels(Photos(1, (2, 3)), tmp_path)[0][1].tolist() == ids.tolist()

# soft labels

def test_soft_labels(tmp_path):
    ds = Photos()
    for dtype, most in (('uint8', 1/255), ('float16', 5e-4), ('float32', 0)):
        done = write_soft(by_place, ds, tmp_path/dtype, dtype=dtype, **QUIET)
        soft = SoftLabels(ds, tmp_path/dtype)
        assert (done.written, done.skipped, len(soft), soft.names, soft.dtype) == (4, 0, 4, ds.names, dtype)
        for i in range(4):
            want, (image, p) = by_place(photo(20, 33, seed=i)[None])[0].softmax(0), soft[i]
            assert image.equal(photo(20, 33, seed=i)) and p.dtype == torch.float32 and p.shape == want.shape
            assert (p - want).abs().max() <= most
            assert isinstance(soft_map(soft, i), np.memmap) and soft_map(soft, i).dtype == dtype
            assert soft_label(soft, i, (slice(1, 3), slice(0, 4))).equal(p[:, 1:3, :4])

def test_bytes_of_a_distribution_add_up_and_keep_their_order():
    for K, sharp in ((2, 1), (19, .1), (19, 5), (150, 3)):
        p = (sharp*torch.randn(K, 20, 20, generator=gen())).softmax(0)
        b = pl._packed(p, 'uint8')
        assert b.dtype == torch.uint8 and (b.long().sum(0) == 255).all() and (b/255 - p).abs().max() < 1/255
        ranked = b.long().gather(0, p.argsort(0, descending=True))
        assert (ranked[1:] <= ranked[:-1]).all()
    assert pl._packed(torch.tensor([1., 0.])[:, None, None], 'uint8').flatten().tolist() == [255, 0]

@pytest.mark.parametrize('n', range(5))
def test_soft_labels_go_on(tmp_path, n):
    with pytest.raises(Kill) if n < 4 else pytest.MonkeyPatch.context(): write_soft(dies_after(n, by_place), Photos(), tmp_path, **QUIET)
    ds = Photos()
    assert write_soft(by_place, ds, tmp_path, **QUIET).skipped == n and sorted(ds.read) == list(range(n, 4))
    assert len(list(SoftLabels(Photos(), tmp_path))) == 4

def test_faults_of_soft_labels(tmp_path):
    with pytest.raises(ValueError, match='dtype'): write_soft(by_place, Photos(), tmp_path, dtype='int4', **QUIET)
    with pytest.raises(InputError, match='nan'): write_soft(lambda x: by_place(x)*torch.nan, Photos(), tmp_path/'n', **QUIET)
    with pytest.raises(InputError, match='no such folder'): SoftLabels(Photos(), tmp_path/'nowhere')
    write_soft(by_place, Photos(), tmp_path, **QUIET)
    with pytest.raises(InputError, match='dtype=uint8, not dtype=float16'): write_soft(by_place, Photos(), tmp_path, dtype='float16', **QUIET)
    with pytest.raises(InputError, match='classes=3'): write_soft(nineteen, Photos(5), tmp_path, **QUIET)
    with pytest.raises(InputError, match='4.npy: no such file'): SoftLabels(Photos(5), tmp_path)
    with pytest.raises(InputError, match='holds 3 classes; cityscapes has 19'): SoftLabels(Photos(space=CITYSCAPES), tmp_path)
    soft, path = SoftLabels(Photos(), tmp_path), soft_path(tmp_path, 'city/0')
    whole_file = path.read_bytes()
    for broken in (b'', whole_file[:40], whole_file[:-9]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match='0.npy: is damaged'): soft[0]
    np.save(path, np.zeros((4, 2, 2), np.uint8))
    with pytest.raises(InputError, match='0.npy: is uint8'): soft[0]
    (tmp_path/'soft.json').write_text(json.dumps(dict(classes=3)))
    with pytest.raises(InputError, match="has no 'dtype'"): SoftLabels(Photos(), tmp_path)
