"""Tags against `unique`, points against counting, polygons against pencil and paper, files against everything that can be wrong in them."""
import pickle, subprocess, sys, time
from pathlib import Path
import cv2, numpy as np, pytest, torch, yaml
from PIL import Image
import protonb.weak_labels as wl
from protonb.core import InputError, rng_for
from protonb.datasets import Cached, camvid, resized, take
from protonb.labels import CAMVID, CITYSCAPES, CITYSCAPES13, CITYSCAPES_IDS, IGNORE, label_table
from protonb.pseudo_labels import Unlabelled
from protonb.streets import REAL, Streets
from protonb.transforms import resize_label
from protonb.weak_labels import (Points, PointFolder, WeakLabels, cityscapes_weak, coarse_from_fine, draw_points, image_tags, pick_points,
    point_pngs, read_points, render_points, write_points)

DATA = Path(__file__).parents[2]/'shared'/'data'
TABLE = label_table(CITYSCAPES_IDS, CITYSCAPES)
ROAD, BUILDING, SKY, CAR = (CITYSCAPES.index(c) for c in ('road', 'building', 'sky', 'car'))
RNG = np.random.default_rng

def noise(*shape, K=19, seed=0, ignored=.2):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, K, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < ignored, IGNORE, label)

@pytest.fixture(scope='module')
def streets(): return Streets(REAL, 4, (96, 192), seed=5)

# tags

@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.int32])
def test_tags_are_the_unique_classes(dtype):
    labels = torch.stack([noise(9, 7, K=k, seed=k) for k in (1, 4, 19)])
    got = image_tags(labels.to(dtype), 19)
    assert got.shape == (3, 19) and got.dtype == torch.bool
    for row, label in zip(got, labels):
        assert row.nonzero().flatten().tolist() == [i for i in label.unique().tolist() if i < 19]
        assert image_tags(label.to(dtype), 19).equal(row)

def test_tags_of_nothing_and_of_strangers():
    assert not image_tags(torch.full((2, 5, 5), IGNORE), 19).any()
    assert image_tags(torch.tensor([[19, 254, -1, 3]]), 19).nonzero().tolist() == [[3]]
    assert image_tags(torch.empty(0, 4, 4, dtype=torch.long), 19).shape == (0, 19)
    assert not image_tags(torch.empty(2, 0, 4, dtype=torch.long), 19).any()
    assert image_tags(noise(6, 8).t(), 19).equal(image_tags(noise(6, 8), 19))         # not contiguous
    for bad in (torch.zeros(3), torch.zeros(1, 1, 2, 2)):
        with pytest.raises(ValueError, match='labels must be'): image_tags(bad, 19)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_tags_on_the_device_without_waiting():
    labels = noise(4, 64, 64).cuda()
    torch.cuda.set_sync_debug_mode('error')
    try: got = image_tags(labels, 19)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert got.is_cuda and got.cpu().equal(image_tags(labels.cpu(), 19))

# drawing points

@pytest.mark.parametrize('shrink', [1, 2, 3])
@pytest.mark.parametrize('shape', [(40, 60), (41, 63)])
def test_one_point_for_each_class_where_the_class_is(shape, shrink):
    label = noise(*shape, seed=3)
    small = resize_label(label, tuple(n//shrink for n in shape))
    got = draw_points(label, RNG(0), 19, shrink)
    assert got.shape == small.shape and got.dtype == torch.int64
    assert sorted(got[got < 19].tolist()) == [i for i in small.unique().tolist() if i < 19]
    assert got[got < 19].equal(small[got < 19])

def test_points_are_uniform_over_the_pixels_of_their_class():
    label = torch.full((4, 10), IGNORE)
    label[1:3, 2:9], label[3, 0] = 7, 2                             # 14 pixels of one class, 1 of another
    hits = torch.zeros(4, 10)
    for i in range(4200): hits += draw_points(label, rng_for(1, i), 19, 1) == 7
    assert not hits[label != 7].any()
    chi2 = ((hits[label == 7] - 300)**2/300).sum()
    assert chi2 < 34.5                                              # 13 degrees of freedom, 0.1 %
    assert hits[label == 7].min() > 0

def test_the_point_of_a_class_depends_on_no_other_class():
    label = torch.full((20, 20), IGNORE)
    label[5:15, 5:15] = 4
    alone = pick_points(label, rng_for(3), 19, 1)
    label[:4], label[16:] = 0, 18
    among = pick_points(label, rng_for(3), 19, 1)
    i = among.ids.tolist().index(4)
    assert (among.rows[i], among.cols[i]) == (alone.rows[0], alone.cols[0])

def test_points_of_arrays_empty_labels_and_bad_arguments():
    label = noise(12, 12)
    assert draw_points(label.numpy().astype(np.uint8), RNG(0), 19).equal(draw_points(label, RNG(0), 19))
    assert len(pick_points(torch.full((8, 8), IGNORE), RNG(0), 19)) == 0
    assert (draw_points(torch.full((8, 8), IGNORE), RNG(0), 19) == IGNORE).all()
    assert draw_points(torch.full((2, 2), 30), RNG(0), 19).tolist() == [[IGNORE]]
    with pytest.raises(TypeError, match='rng'): draw_points(label, 0, 19)
    for bad, why in (((label[None], RNG(0), 19), 'label must be'), ((label, RNG(0), 0), 'num_classes'), ((label, RNG(0), 255), 'num_classes'),
                     ((label, RNG(0), 19, 13), 'shrink'), ((label, RNG(0), 19, 0), 'shrink')):
        with pytest.raises(ValueError, match=why): draw_points(*bad)

# what scaling does to points (spec, section 3.1)

def survival(streets, s):
    kept = total = 0
    for i in range(len(streets)):
        for j in range(60):
            points = draw_points(streets[i][1], rng_for(2, i, j), 19, 1)
            small = resize_label(points, tuple(int(n*s) for n in points.shape))
            kept, total = kept + int(image_tags(small, 19).sum()), total + int(image_tags(points, 19).sum())
    return kept/total

@pytest.mark.parametrize('s, share', [(.5, .25), (.75, .5625), (1, 1), (1.5, 1)])
def test_points_survive_shrinking_with_the_square_of_the_scale(streets, s, share):
    assert abs(survival(streets, s) - share) < .04

def test_a_point_becomes_four_at_twice_the_size_and_one_in_64_meets_the_grid(streets):
    points = draw_points(streets[0][1], RNG(0), 19, 1)
    assert (resize_label(points, (192, 384)) < 19).sum() == 4*(points < 19).sum()
    big = torch.full((512, 512), IGNORE)
    hit = 0
    for r, c in RNG(0).integers(0, 512, (2000, 2)): hit += r % 8 == 0 and c % 8 == 0
    big[::8, ::8] = 1
    assert (resize_label(big, (64, 64)) == 1).all() and abs(hit/2000 - 1/64) < .008

# the YAML file

PUBLISHED = '''\
- image: aachen_000000_000019_leftImg8bit.png
  points:
  - c: 7
    x: 5
    y: 9
  - {c: 26, x: 0, y: 11}
  size: &id001 !!python/tuple
  - 8
  - 12
  - 3
- image: /leftImg8bit/train/bonn/bonn_000001_000019_leftImg8bit.png
  points: []
  size: *id001
'''

def file(tmp_path, text, name='points.yaml'):
    path = tmp_path/name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

@pytest.mark.parametrize('pure', [False, True])
def test_the_published_form_is_read(tmp_path, monkeypatch, pure):
    if pure: monkeypatch.delattr(yaml, 'CSafeLoader', raising=False)
    wl._yaml_loader.cache_clear()
    try: got = read_points(file(tmp_path, PUBLISHED))
    finally: wl._yaml_loader.cache_clear()
    assert list(got) == ['aachen_000000_000019', 'bonn_000001_000019']
    p = got['aachen_000000_000019']
    assert p.size == (8, 12) and len(got['bonn_000001_000019']) == 0
    full = render_points(p, TABLE)
    assert full[5, 9] == ROAD and full[0, 11] == CAR and (full < 255).sum() == 2      # x is the row
    assert render_points(p)[5, 9] == 7
    assert (render_points(got['bonn_000001_000019'], TABLE) == IGNORE).all()

def test_plain_yaml_still_refuses_the_tag_and_nothing_was_added_to_it(tmp_path):
    read_points(file(tmp_path, PUBLISHED))
    for loader in (yaml.SafeLoader, getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
        with pytest.raises(yaml.YAMLError): yaml.load(PUBLISHED, Loader=loader)

def test_no_other_tag_is_obeyed(tmp_path):
    mark = tmp_path/'run'
    evil = f"- image: !!python/object/apply:os.system ['touch {mark}']\n  size: !!python/tuple [8, 12, 3]\n  points: []\n"
    for text in (evil, PUBLISHED.replace('python/tuple', 'python/list'), PUBLISHED.replace('x: 5', 'x: !!python/int 5')):
        with pytest.raises(InputError, match='points.yaml: is no valid file of points'): read_points(file(tmp_path, text))
    assert not mark.exists()

@pytest.mark.parametrize('old, new, why', [
    ('x: 5', 'x: 8', 'entry 1: point .*row x below 8, a column y below 12'), ('y: 9', 'y: 12', 'entry 1: point'), ('c: 7', 'c: 256', 'entry 1: point'),
    ('c: 7', 'c: -1', 'entry 1: point'), ('x: 5', 'x: 5.0', 'entry 1: point'), ('x: 5', 'x: true', 'entry 1: point'), ('x: 5', 'z: 5', 'entry 1: point'),
    ('x: 0, y: 11', 'x: 5, y: 9', 'entry 1: two points lie on the same pixel'), ('- {c: 26, x: 0, y: 11}', '- 26', 'entry 1: point 26'),
    ('points: []', 'points: 3', 'entry 2: points are'), ('points: []', 'points: !!python/tuple [{x: 1, y: 1, c: 7}]', 'entry 2: points are'),
    ('points: []', 'dots: []', "entry 2 is .*expected image, size and points"), ('- 8\n', '- 0\n', 'entry 1: size is'), ('- 8\n', "- '8'\n", 'entry 1: size'),
    ('  - 3\n', '  - 3\n  - 1\n', 'entry 1: size'), ('image: aachen_000000_000019_leftImg8bit.png', 'image: 17', 'entry 1: image is 17'),
    ('bonn_000001_000019_leftImg8bit.png', 'aachen_000000_000019.png', None), ('*id001', '*id002', 'no valid file'), ('- c: 7', '- c: [7', 'no valid file')])
def test_every_fault_of_the_file_is_named(tmp_path, old, new, why):
    assert old in PUBLISHED
    path = file(tmp_path, PUBLISHED.replace(old, new))
    if why is None: return test_names_that_need_their_folders(tmp_path)
    with pytest.raises(InputError, match=f'points.yaml: .*{why}' if 'valid' in why else f'points.yaml: {why}'): read_points(path)

def test_names_that_need_their_folders(tmp_path):
    text = '- {image: day/1.png, size: [4, 4], points: []}\n- {image: night/1.png, size: [4, 4], points: []}\n'
    assert list(read_points(file(tmp_path, text))) == ['day__1', 'night__1']
    with pytest.raises(InputError, match='image night__1 occurs more than once'): read_points(file(tmp_path, text.replace('day', 'night')))

@pytest.mark.parametrize('text', ['', '[]', '{}', 'hello', '3', '- 3', 'a: b: c', b'\x80\xff\x00', '\t- x', '[' * 5000, '- 2001-13-45'])
def test_what_is_no_file_of_points(tmp_path, text):
    with pytest.raises(InputError, match='points.yaml'): read_points(file(tmp_path, text))

def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path, tmp_path/'nowhere.yaml'):
        with pytest.raises(InputError, match='cannot be read .*expected a YAML file of points'): read_points(path)

def test_every_cut_of_a_file_is_an_error_or_a_shorter_list(tmp_path):
    for n in range(0, len(PUBLISHED), 7):
        try: got = read_points(file(tmp_path, PUBLISHED[:n]))
        except InputError: continue
        assert len(got) <= 2 and all(p.size in ((8, 12), (8, 1), (8, 3)) for p in got.values())

def test_an_id_nobody_knows_names_the_picture(tmp_path):
    p = read_points(file(tmp_path, PUBLISHED.replace('c: 26', 'c: 99')))['aachen_000000_000019']
    with pytest.raises(InputError, match='aachen: unknown label id 99'): render_points(p, TABLE, 'aachen')

def test_points_written_and_read_are_the_same(tmp_path, streets):
    points = {n: pick_points(streets[i][1], rng_for(0, i), 19) for i, n in enumerate(streets.names)}
    got = read_points(write_points(tmp_path/'a'/'p.yaml', points))
    assert list(got) == streets.names
    for n, p in points.items():
        assert got[n].size == p.size and render_points(got[n]).equal(render_points(p))
    assert '!!python/tuple' in (tmp_path/'a'/'p.yaml').read_text()
    odd = {k: points[streets.names[0]] for k in ('no', '17', 'ä ö: #', '- x', 'a.b')}      # texts that YAML would love to misread
    assert list(read_points(write_points(tmp_path/'odd.yaml', odd))) == list(odd)

def test_a_file_of_the_published_size_is_read_whole_in_a_sensible_time(tmp_path):
    "2975 images, 34 720 points; 4 to 18 points each, never two of a class in one image; in the block style that PyYAML writes by itself."
    rng, raw = RNG(0), np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])
    counts = rng.permutation(np.concatenate([np.full(2975, 11), [4, 18]]))[:2975]
    counts[:34720 - counts.sum()] += 1
    assert counts.sum() == 34720 and counts.max() <= 19
    lines = []
    for i, n in enumerate(counts):
        lines += [f'- image: town{i % 18}_{i:06d}_000019_leftImg8bit.png', '  points:']
        flat = rng.choice(512*1024, n, replace=False)
        for x, y, c in zip(flat//1024, flat % 1024, rng.permutation(raw)[:n]): lines += [f'  - c: {c}', f'    x: {x}', f'    y: {y}']
        lines += ['  size: !!python/tuple', '  - 512', '  - 1024', '  - 3']
    path = file(tmp_path, '\n'.join(lines))
    start = time.process_time()
    got = read_points(path)
    took = time.process_time() - start
    assert len(got) == 2975 and sum(map(len, got.values())) == 34720
    assert [len(p) for p in got.values()] == counts.tolist() and {p.size for p in got.values()} == {(512, 1024)}
    assert took < (20 if hasattr(yaml, 'CSafeLoader') else 90), f'{took:.1f} s'
    every = np.bincount(np.concatenate([p.ids for p in got.values()]), minlength=256)
    assert set(np.flatnonzero(every)) == set(raw)

# PNGs of points

def some_points(n=3):
    return {f'{city}_{i:06d}_000019': pick_points(noise(16, 24, seed=i), rng_for(i), 19)
            for i, city in enumerate(('aachen', 'bonn', 'aachen', 'ulm')[:n])}

def test_point_pngs_lie_where_the_loader_looks(tmp_path):
    points = some_points()
    paths = point_pngs(write_points(tmp_path/'p.yaml', points), tmp_path)
    assert paths[1] == tmp_path/'gtPoint2'/'train'/'bonn'/'bonn_000001_000019_gtPoint2_labelIds.png'
    for path, p in zip(paths, points.values()):
        im = Image.open(path)
        assert im.mode == 'L' and torch.from_numpy(np.array(im)).long().equal(render_points(p))

def test_point_pngs_go_on_after_a_break_and_leave_finished_files_alone(tmp_path, monkeypatch):
    points = some_points(4)
    saved, save = [], Image.Image.save
    def failing(self, path, *a, **kw):
        if len(saved) == 2:
            Path(path).write_bytes(b'half a file')
            raise OSError('disk full')
        saved.append(path)
        save(self, path, *a, **kw)
    monkeypatch.setattr(Image.Image, 'save', failing)
    with pytest.raises(OSError): point_pngs(points, tmp_path)
    monkeypatch.undo()
    there = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
    assert len(there) == 2
    paths = point_pngs(points, tmp_path)
    assert all(p.exists() for p in paths) and len([p for p in tmp_path.rglob('*') if p.is_file()]) == 4
    assert all(p.stat().st_mtime_ns == t for p, t in there.items())

def test_point_pngs_do_not_mix_with_other_points(tmp_path):
    points = some_points(1)
    path, = point_pngs(points, tmp_path)
    name, p = next(iter(points.items()))
    with pytest.raises(InputError, match='exists and holds other points'): point_pngs({name: Points(p.size, p.rows[1:], p.cols[1:], p.ids[1:])}, tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match='gtPoint2_labelIds.png: is damaged'): point_pngs(points, tmp_path)

# coarse labels

def test_a_square_shrinks_to_the_nearest_possible_share():
    label = torch.full((60, 60), IGNORE)
    label[10:50, 10:50] = 3
    got = coarse_from_fine(label, 19)
    side = int((got == 3).any(1).sum())
    best = min(range(1, 41), key=lambda s: abs(1 - (s/40)**2 - .35))
    assert side == best == 32 and 32**2-4 <= (got == 3).sum() <= 32**2       # 36 % are gone, and a polygon may miss a corner
    assert (coarse_from_fine(label, 19, vertices=200) == 3).sum() == 32**2
    for eroded in (0., .1, .6, .9):
        left = (coarse_from_fine(label, 19, eroded=eroded) == 3).sum()/1600
        assert abs(1 - eroded - left) < .03

def test_the_edge_of_the_picture_erodes_nothing():
    label = torch.full((40, 80), ROAD)
    assert coarse_from_fine(label, 19, vertices=1000).equal(label) and (coarse_from_fine(label, 19) == ROAD).float().mean() > .98
    label[:, 40:] = SKY
    got = coarse_from_fine(label, 19, vertices=1000)
    assert [got[0].tolist().count(c) for c in (ROAD, SKY)] == [26, 26] and (got == got[0]).all()
    assert (got[:, :26] == ROAD).all() and (got[:, 54:] == SKY).all()

def test_small_parts_are_left_out_by_both_rules():
    label = torch.full((100, 200), IGNORE)
    label[5:14, 5:16], label[30:40, 30:40], label[60:90, 60:90] = 1, 2, 3        # 99, 100 and 900 pixels
    assert coarse_from_fine(label, 19).unique().tolist() == [2, 3, IGNORE]
    assert coarse_from_fine(label, 19, least=99).unique().tolist() == [1, 2, 3, IGNORE]
    assert coarse_from_fine(label, 19, share=.006).unique().tolist() == [3, IGNORE]
    assert coarse_from_fine(label, 19, least=1000).unique().tolist() == [IGNORE]
    label[30:40, 41:51] = 2                                          # apart: still two parts of 100, each judged alone
    assert coarse_from_fine(label, 19, least=101).unique().tolist() == [3, IGNORE]

def test_a_hole_stays_a_hole():
    label = torch.full((100, 100), ROAD)
    label[40:60, 40:60] = CAR
    got = coarse_from_fine(label, 19, vertices=1000)
    assert not ((got == ROAD) & (label == CAR)).any() and (got[45:55, 45:55] == CAR).all()
    assert (got[:5] == ROAD).all()

def test_a_thin_pole_keeps_a_line():
    label = torch.full((200, 50), BUILDING)
    label[:, 20:22], label[:, 35] = 5, 6
    got = coarse_from_fine(label, 19, least=50)
    assert (got == 5).sum(1).max() == 1 and (got == 5).any(1).sum() == 200       # two pixels wide: half goes, the nearest to 35 %
    assert (got[:, 35] == 6).all()                                   # one pixel wide: nothing can go

def test_parts_that_touch_at_a_corner_are_one_and_no_part_vanishes():
    label = torch.full((60, 60), IGNORE)
    label[10:18, 10:18], label[18:26, 18:26] = 4, 4                  # 64 pixels each: only together are they enough
    assert (coarse_from_fine(label, 19) == 4).any() and (coarse_from_fine(label, 19, least=129) == IGNORE).all()
    line = torch.full((200, 9), IGNORE)
    line[:, 4] = 5
    for eroded in (.35, .6, .95): assert (coarse_from_fine(line, 19, eroded=eroded) == 5).sum() == 200

def test_polygons_have_few_corners_and_stay_inside():
    yy, xx = np.mgrid[:200, :200]
    disc = torch.from_numpy(np.where((yy-100)**2 + (xx-100)**2 < 90**2, 4, 255))
    rough, fine = coarse_from_fine(disc, 19, vertices=5, eroded=0), coarse_from_fine(disc, 19, eroded=0)
    pent = .5*5*90**2*np.sin(2*np.pi/5)
    assert abs(int((rough == 4).sum()) - pent) < .03*pent
    assert .98 < int((fine == 4).sum())/(np.pi*90**2) <= 1.01
    assert not ((rough == 4) & (disc != 4)).any()
    ring = np.stack([xx[0], 0*xx[0]], 1)[:, None].astype(np.int32)
    assert len(wl._polygon(ring, 50)) == 50 and wl._polygon(ring[:50], 50) is not None

def test_coarse_is_true_and_incomplete(streets):
    for i in range(len(streets)):
        label = streets[i][1]
        got = coarse_from_fine(label, 19)
        said = got < 19
        assert got.dtype == torch.int64 and got.shape == label.shape
        assert (got[said] == label[said]).float().mean() > .99
        assert .5 < said.float().mean() < .72
        assert not (image_tags(got, 19) & ~image_tags(label, 19)).any()
        assert got.equal(coarse_from_fine(label.numpy(), 19))

def test_the_erosion_agrees_with_trying_every_square():
    rng = RNG(4)
    for _ in range(12):
        mask = cv2.dilate((rng.random((40, 50)) < .01).astype(np.uint8), np.ones((9, 7), np.uint8))
        n = int(mask.sum())
        if not n: continue
        gone = {k: n - int(cv2.erode(mask, np.ones((k, k), np.uint8)).sum()) for k in range(1, 60)}
        best = min(abs(g - .35*n) for g in gone.values() if g < n)
        assert abs(n - int(wl._eroded(mask, .35).sum()) - .35*n) == pytest.approx(best)

def test_coarse_of_nothing_and_bad_arguments():
    assert (coarse_from_fine(torch.full((9, 9), IGNORE), 19) == IGNORE).all()
    assert (coarse_from_fine(torch.full((90, 90), 40), 19) == IGNORE).all()
    for kw in (dict(eroded=1.), dict(eroded=-.1), dict(vertices=2)):
        with pytest.raises(ValueError): coarse_from_fine(noise(9, 9), 19, **kw)

@pytest.mark.skipif(not DATA.exists(), reason='needs ../shared/data')
@pytest.mark.parametrize('i', [0, 200])
def test_a_real_photo(i):
    ds = WeakLabels(camvid(DATA/'camvid', 'train'), 'coarse')
    image, coarse = ds[i]
    fine = ds.dataset[i][1]
    said = coarse < 11
    assert image.shape[1:] == coarse.shape == (360, 480) and ds.space == CAMVID
    assert (coarse[said] == fine[said]).float().mean() > .995
    assert .5 < said.sum()/(fine < 11).sum() < .75
    points = WeakLabels(ds.dataset, 'point')[i][1]
    assert image_tags(points, 11).equal(image_tags(resize_label(fine, (180, 240)), 11)) and (points[points < 11] == fine[points < 11]).all()

# the data set

@pytest.mark.parametrize('kind', ['image', 'point', 'coarse'])
def test_a_weak_data_set_has_the_protocol(streets, kind):
    ds = WeakLabels(streets, kind)
    assert len(ds) == 4 and ds.names == streets.names and ds.space == CITYSCAPES and ds.kind == kind
    image, label = ds[1]
    assert image.equal(streets[1][0]) and label.shape == (96, 192) and label.dtype == torch.int64
    label.zero_()
    again = ds[1][1]
    assert again.any() and again.equal(pickle.loads(pickle.dumps(ds))[1][1]) and again.equal(ds[-3][1])
    with pytest.raises(IndexError): ds[4]
    assert len(list(ds)) == 4
    small = Cached(resized(take(ds, ['real_5_00002', 0]), (48, 96)))
    assert small[0][1].shape == (48, 96)
    blind = Unlabelled(ds)[1]
    assert blind[0].equal(image) and (blind[1] == IGNORE).all()
    loader = torch.utils.data.DataLoader(ds, batch_size=2, num_workers=2)
    assert torch.cat([b[1] for b in loader])[1].equal(again)

def test_labels_are_made_once(streets, monkeypatch):
    calls, true = [], wl.coarse_from_fine
    monkeypatch.setattr(wl, 'coarse_from_fine', lambda *a, **kw: calls.append(1) or true(*a, **kw))
    ds = WeakLabels(streets, 'coarse').fill()
    for _ in range(3): ds[0], ds[3]
    assert len(calls) == 4

def test_points_lie_on_one_pixel_each_and_belong_to_name_and_seed(streets):
    ds = WeakLabels(streets, 'point', seed=3)
    for i in range(4):
        fine, got = streets[i][1], ds[i][1]
        half = resize_label(fine, (48, 96))
        assert (got < 19).sum() == image_tags(half, 19).sum() and (got[got < 19] == fine[got < 19]).all()
        assert image_tags(resize_label(got, (48, 96)), 19).equal(image_tags(half, 19))      # the half-size map still has them all
    few = WeakLabels(take(streets, [2, 0]), 'point', seed=3)
    assert few[0][1].equal(ds[2][1]) and few[1][1].equal(ds[0][1])
    assert not WeakLabels(streets, 'point', seed=4)[0][1].equal(ds[0][1])

@pytest.mark.parametrize('size', [(7, 9), (1, 5), (33, 20)])
def test_points_of_odd_sizes(size):
    class One:
        names, space = ['a'], CITYSCAPES
        def __len__(self): return 1
        def __getitem__(self, i): return torch.zeros(3, *size, dtype=torch.uint8), noise(*size, seed=9)
    fine, got = noise(*size, seed=9), WeakLabels(One(), 'point')[0][1]
    assert got.shape == size and (got[got < 19] == fine[got < 19]).all()

def test_tags_may_come_from_either_map(streets):
    coarse, fine = (WeakLabels(streets, 'image', tags_from=t)[0][1] for t in ('coarse', 'fine'))
    assert coarse.equal(coarse_from_fine(streets[0][1], 19)) and fine.equal(streets[0][1])
    assert coarse.equal(WeakLabels(streets)[0][1])
    more = WeakLabels(streets, 'image', least=10)[0][1]
    assert image_tags(more, 19).sum() > image_tags(coarse, 19).sum()

def test_bad_kinds_are_refused(streets):
    with pytest.raises(InputError, match="'box': expected one of: image, point, coarse"): WeakLabels(streets, 'box')
    with pytest.raises(InputError, match='tags_from'): WeakLabels(streets, 'image', tags_from='points')

# the real files

RAW = np.full(256, 0, np.uint8)
for raw, name in CITYSCAPES_IDS.items():
    if name: RAW[CITYSCAPES.index(name)] = raw

@pytest.fixture
def city(tmp_path, streets):
    "Two pictures in the layout of Cityscapes, with coarse labels and points."
    coarse, points = WeakLabels(streets, 'coarse'), {}
    for i, name in enumerate(('aachen_000000_000019', 'bonn_000001_000019')):
        image, label = streets[i]
        for folder, end, a in (('leftImg8bit', 'leftImg8bit', image.permute(1, 2, 0).numpy()), ('gtCoarse', 'gtCoarse_labelIds', RAW[coarse[i][1]])):
            path = tmp_path/folder/'train'/name.split('_')[0]/f'{name}_{end}.png'
            path.parent.mkdir(parents=True)
            Image.fromarray(a).save(path)
        p = pick_points(label, rng_for(1, i), 19)
        points[name] = Points(p.size, p.rows, p.cols, RAW[p.ids])
    write_points(tmp_path/'points.yaml', points)
    return tmp_path

@pytest.mark.parametrize('kind', ['coarse', 'image'])
def test_real_coarse_files(city, streets, kind):
    ds = cityscapes_weak(city, kind)
    assert ds.names == ['aachen_000000_000019', 'bonn_000001_000019'] and ds.space == CITYSCAPES
    for i in range(2):
        assert ds[i][0].equal(streets[i][0]) and ds[i][1].equal(coarse_from_fine(streets[i][1], 19))
    assert image_tags(cityscapes_weak(city, kind, space=CITYSCAPES13)[0][1], 13).any()

@pytest.mark.parametrize('form', ['yaml', 'png'])
def test_real_points(city, streets, form):
    if form == 'png': point_pngs(city/'points.yaml', city)
    ds = cityscapes_weak(city, 'point', points=city/'points.yaml' if form == 'yaml' else None)
    assert isinstance(ds, PointFolder) and len(ds) == 2 and ds.names == ['aachen_000000_000019', 'bonn_000001_000019']
    for i in range(2):
        image, label = ds[i]
        assert image.shape == (3, 48, 96) and image.dtype == torch.uint8
        assert label.equal(draw_points(streets[i][1], rng_for(1, i), 19))
        assert (image.float().mean() - streets[i][0].float().mean()).abs() < 1
    assert (pickle.loads(pickle.dumps(ds))[1][1] < 19).any()
    assert (cityscapes_weak(city, 'point', space=CITYSCAPES13, points=city/'points.yaml')[0][1] < 13).any()

def test_what_is_missing_is_named(city):
    with pytest.raises(InputError, match=r'gtPoint2/train: no such folder, expected PNGs of points .*points=FILE.yaml'): cityscapes_weak(city, 'point')
    with pytest.raises(InputError, match='leftImg8bit/val: no such folder'): cityscapes_weak(city, 'coarse', 'val')
    with pytest.raises(InputError, match="'boxes': expected one of"): cityscapes_weak(city, 'boxes')
    with pytest.raises(InputError, match='expected kind point$'): cityscapes_weak(city, 'coarse', points=city/'points.yaml')
    with pytest.raises(InputError, match='cannot be read'): cityscapes_weak(city, 'point', points=city/'none.yaml')
    one = {k: v for k, v in read_points(city/'points.yaml').items() if 'bonn' in k}
    write_points(city/'one.yaml', one)
    with pytest.raises(InputError, match='one.yaml: has no points for image aachen_000000_000019$'): cityscapes_weak(city, 'point', points=city/'one.yaml')
    point_pngs(one, city)
    with pytest.raises(InputError, match='aachen_000000_000019_leftImg8bit.png: has no weak label, expected .*aachen_000000_000019_gtPoint2'):
        cityscapes_weak(city, 'point')
    (city/'gtCoarse/train/bonn/bonn_000001_000019_gtCoarse_labelIds.png').unlink()
    with pytest.raises(InputError, match='has no weak label'): cityscapes_weak(city, 'coarse')
    (city/'gtCoarse').rename(city/'elsewhere')
    with pytest.raises(InputError, match='gtCoarse/train: no such folder, expected the train part of Cityscapes'): cityscapes_weak(city, 'image')

def test_points_of_another_shape_or_larger_than_the_image(city):
    good = read_points(city/'points.yaml')
    for size in ((48, 95), (192, 384), (96, 96)):
        bad = {k: Points(size, p.rows[:1]*0, p.cols[:1]*0, p.ids[:1]) for k, p in good.items()}
        ds = cityscapes_weak(city, 'point', points=write_points(city/'bad.yaml', bad))
        with pytest.raises(InputError, match=f'bad.yaml: has points on {size[0]}x{size[1]} \\(height x width\\), but image .* is 96x192'): ds[0]
    odd = {k: Points(p.size, p.rows, p.cols, p.ids*0 + 77) for k, p in good.items()}
    with pytest.raises(InputError, match='odd.yaml: aachen_000000_000019: unknown label id 77'):
        cityscapes_weak(city, 'point', points=write_points(city/'odd.yaml', odd))[0]
    path = point_pngs(good, city)[0]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match='is damaged'): cityscapes_weak(city, 'point')[0]

def test_importing_costs_neither_opencv_nor_yaml():
    code = 'import sys, protonb.weak_labels; print([m for m in ("cv2", "yaml") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
