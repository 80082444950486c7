import os, pickle, struct, time, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from protonb.core import InputError
from protonb.datasets import (Cached, Mapped, PairFolder, camvid, carla, cityscapes, folder, gta5, open_dataset, read_image,
    read_label, read_label16, resized, synthia, take)
from protonb.labels import CAMVID, CAMVID_IDS, CITYSCAPES, CITYSCAPES13, CITYSCAPES16, ClassSpace, label_table
from protonb.sampling import batches

DATA = Path(__file__).parents[2]/'shared'/'data'
real = pytest.mark.skipif(not DATA.exists(), reason='needs ../shared/data')
PHOTO = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)

def save(path, a, palette=False, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = Image.fromarray(a)
    if palette: im.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
    im.save(path, **kw)
    return path

def png(path, a, depth, kind, palette=False):
    "A PNG written by hand: (H,W) or (H,W,3) samples at any bit depth."
    H, W = a.shape[:2]
    if depth == 16: rows = [r.astype('>u2').tobytes() for r in a]
    else: rows = [np.packbits((r[:,None] >> np.arange(depth)[::-1] & 1).astype(np.uint8).ravel()).tobytes() for r in a]
    chunk = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t+d))
    colours, body = chunk(b'PLTE', bytes(range(3*2**depth))) if palette else b'', zlib.compress(b''.join(b'\0'+r for r in rows))
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', W, H, depth, kind, 0, 0, 0))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + head + colours + chunk(b'IDAT', body) + chunk(b'IEND', b''))
    return path

# ---- one file

def test_read_image_formats(tmp_path):
    assert (read_image(save(tmp_path/'a.png', PHOTO)) == PHOTO).all()
    assert np.abs(read_image(save(tmp_path/'a.jpg', np.full((8, 8, 3), 90, np.uint8), quality=95)).astype(int)-90).max() < 4
    assert (read_image(save(tmp_path/'g.png', PHOTO[..., 0])) == PHOTO[..., :1]).all()
    rgba = np.dstack([PHOTO, np.full((6, 8), 255, np.uint8)])
    assert (read_image(save(tmp_path/'rgba.png', rgba)) == PHOTO).all()
    assert read_image(tmp_path/'a.png').flags.writeable

@pytest.mark.parametrize('part', [0, .001, .005, .1, .5, .95])
@pytest.mark.parametrize('read', [read_image, read_label])
def test_truncated_files(tmp_path, part, read):
    a = np.random.default_rng(0).integers(0, 256, (48, 64, 3) if read is read_image else (48, 64), dtype=np.uint8)
    whole = save(tmp_path/'whole.png', a).read_bytes()
    (tmp_path/'cut.png').write_bytes(whole[:int(part*len(whole))])
    with pytest.raises(InputError, match=r'cut\.png: is damaged or no picture') as e: read(tmp_path/'cut.png')
    assert '\n' not in str(e.value)

def test_damaged_middle(tmp_path):
    b = bytearray(save(tmp_path/'x.png', np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes())
    b[3000:3040] = bytes(40)
    (tmp_path/'x.png').write_bytes(b)
    with pytest.raises(InputError, match=r'x\.png: is damaged'): read_image(tmp_path/'x.png')

def test_missing_folder_text_file(tmp_path):
    (tmp_path/'t.png').write_text('hello')
    for path, text in ((tmp_path/'no.png', 'no such file'), (tmp_path, 'is a folder'), (tmp_path/'t.png', 'no picture')):
        for read in (read_image, read_label):
            with pytest.raises(InputError, match=text) as e: read(path)
            assert str(path) in str(e.value)

def test_label_reads_indices_not_colours(tmp_path):
    ids = np.arange(48, dtype=np.uint8).reshape(6, 8)
    assert (read_label(save(tmp_path/'p.png', ids, palette=True)) == ids).all()
    assert (read_label(save(tmp_path/'l.png', ids)) == ids).all()

@pytest.mark.parametrize('depth', [1, 2, 4])
@pytest.mark.parametrize('kind', [0, 3])
def test_label_of_few_bits(tmp_path, depth, kind):
    ids = np.random.default_rng(0).integers(0, 2**depth, (5, 8)).astype(np.uint8)
    got = read_label(png(tmp_path/'few.png', ids, depth, kind, palette=kind == 3))
    assert got.dtype == np.uint8 and (got == ids).all()

def test_16_bit_labels_are_read_or_refused_by_their_values(tmp_path):
    rgb = np.zeros((4, 4, 3), np.uint16)
    rgb[..., 0] = 7
    path = _rgb16(tmp_path/'s.png', rgb)
    assert (read_label(path, 0) == 7).all() and (read_label(path, 1) == 0).all()      # Pillow alone would say 0
    with pytest.raises(InputError, match=r's\.png: has 3 colour channels'): read_label(path)
    with pytest.raises(InputError, match=r's\.png: has 3 colour channels'): read_label(path, colours=True)   # colours have 8 bits
    grey = png(tmp_path/'g.png', np.full((4, 4), 24001, np.uint16), 16, 0)
    with pytest.raises(InputError, match=r'g\.png: holds the value 24001, expected class ids below 256 \(it is a 16-bit file\)'): read_label(grey)
    with pytest.raises(InputError, match=r'g\.png: holds'): read_image(grey)

def _rgb16(path, a):
    png(path, a.reshape(len(a), -1), 16, 2)
    b = bytearray(path.read_bytes())
    b[16:20] = struct.pack('>I', a.shape[1])
    b[29:33] = struct.pack('>I', zlib.crc32(bytes(b[12:29])))
    path.write_bytes(b)
    if a.max() < 256: assert np.array(Image.open(path)).shape == a.shape and np.array(Image.open(path)).max() == 0    # the trap itself
    return path

def test_16_bits_are_read_where_they_are_wanted(tmp_path):
    a = np.random.default_rng(0).integers(0, 23, (37, 53, 3), dtype=np.uint16)
    ours = _rgb16(tmp_path/'hand.png', a)
    import cv2
    assert cv2.imwrite(str(tmp_path/'cv.png'), a[..., ::-1])             # OpenCV takes blue first, filters its rows and compresses otherwise
    for c in range(3):
        for path in (ours, tmp_path/'cv.png'):
            got = read_label16(path, c)
            assert got.dtype == np.uint8 and got.shape == (37, 53) and (got == a[..., c]).all()
    grey = png(tmp_path/'g.png', a[..., 1], 16, 0)
    assert (read_label16(grey, None) == a[..., 1]).all()
    rgba = np.dstack([a[..., ::-1], np.full((37, 53), 65535, np.uint16)])
    assert cv2.imwrite(str(tmp_path/'a.png'), rgba) and (read_label16(tmp_path/'a.png') == a[..., 0]).all()
    with pytest.raises(InputError, match=r'g\.png: has 1 channel\(s\), expected several'): read_label16(grey)
    with pytest.raises(InputError, match=r'hand\.png: has 3 channel\(s\), expected one'): read_label16(ours, None)
    with pytest.raises(InputError, match='expected several, and a channel 3'): read_label16(tmp_path/'a.png', 3)

@pytest.mark.parametrize('part', [0, .001, .01, .2, .5, .9, .999])
def test_truncated_16_bit_labels(tmp_path, part):
    a = np.random.default_rng(0).integers(0, 23, (64, 80, 3), dtype=np.uint16)
    whole = _rgb16(tmp_path/'whole.png', a).read_bytes()
    (tmp_path/'cut.png').write_bytes(whole[:int(part*len(whole))])
    with pytest.raises(InputError, match=r'cut\.png: is damaged or no picture') as e: read_label16(tmp_path/'cut.png')
    assert '\n' not in str(e.value)

def test_16_bit_label_faults(tmp_path, capfd):
    a = np.random.default_rng(0).integers(0, 23, (64, 80, 3), dtype=np.uint16)
    b = bytearray(_rgb16(tmp_path/'x.png', a).read_bytes())
    b[2000:2010] = bytes(10)
    (tmp_path/'x.png').write_bytes(b)
    for path, text in ((tmp_path/'x.png', 'is damaged'), (tmp_path/'no.png', 'no such file'), (tmp_path, 'is a folder'),
            (save(tmp_path/'eight.png', PHOTO), 'is no 16-bit PNG'), (save(tmp_path/'j.jpg', PHOTO), 'is no 16-bit PNG'),
            (_rgb16(tmp_path/'big.png', np.full((4, 4, 3), 7000, np.uint16)), 'holds the value 7000, expected class ids below 256')):
        with pytest.raises(InputError, match=text) as e: read_label16(path)
        assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert capfd.readouterr().err == ''                                   # OpenCV's own warnings are not shown beside ours

def test_label_channels(tmp_path):
    p = save(tmp_path/'c.png', PHOTO)
    for c in range(3): assert (read_label(p, c) == PHOTO[..., c]).all()
    rgba = save(tmp_path/'a.png', np.dstack([PHOTO, np.full((6, 8), 255, np.uint8)]))
    assert (read_label(rgba, 0) == PHOTO[..., 0]).all()
    with pytest.raises(InputError, match='has 3 colour channels'): read_label(p)
    with pytest.raises(InputError, match='has 3 colour channels'): read_label(rgba)
    with pytest.raises(InputError, match='there is no channel 3'): read_label(p, 3)
    with pytest.raises(InputError, match='there is no channel 1'): read_label(save(tmp_path/'g.png', PHOTO[..., 0]), 1)

def test_jpeg_label_is_refused(tmp_path):
    with pytest.raises(InputError, match='alters label ids'): read_label(save(tmp_path/'l.jpg', PHOTO[..., 0]))

# ---- layouts

@pytest.fixture
def gta(tmp_path):
    for i in range(3):
        save(tmp_path/f'images/{i:05d}.png', PHOTO)
        save(tmp_path/f'labels/{i:05d}.png', np.full((6, 8), (7, 34, 26)[i], np.uint8), palette=True)
    return tmp_path

def test_gta5(gta):
    save(gta/'labels/99999.png', PHOTO[..., 0])          # a label without an image is fine
    (gta/'images/.hidden.png').write_text('x')
    (gta/'images/readme.txt').write_text('x')
    ds = gta5(gta)
    assert isinstance(ds, torch.utils.data.Dataset) and len(ds) == 3 and ds.names == ['00000', '00001', '00002'] and ds.space is CITYSCAPES
    for i, want in enumerate((0, 255, 13)):
        x, y = ds[i]
        assert x.dtype == torch.uint8 and (x.permute(1, 2, 0).numpy() == PHOTO).all() and x.is_contiguous()
        assert y.dtype == torch.int64 and y.shape == (6, 8) and (y == want).all()
    assert len(list(ds)) == 3
    again = pickle.loads(pickle.dumps(ds))
    assert again[2][1].equal(ds[2][1]) and again.names == ds.names

def test_gta5_resizes_a_label_of_another_size(gta):
    raw = np.kron([[7, 8], [11, 12]], np.ones((6, 8), int)).astype(np.uint8)      # 12x16, image 6x8
    save(gta/'labels/00000.png', raw)
    y = gta5(gta)[0][1]
    assert y.tolist() == np.kron([[0, 1], [2, 3]], np.ones((3, 4), int)).tolist()

def test_gta5_faults(gta):
    os.remove(gta/'labels/00001.png')
    with pytest.raises(InputError) as e: gta5(gta)
    assert str(e.value) == f'{gta}/images/00001.png: has no label, expected {gta}/labels/00001.png'
    os.remove(gta/'labels/00002.png')
    with pytest.raises(InputError, match='and 1 more images'): gta5(gta)
    with pytest.raises(InputError, match=f'{gta}/x/images: no such folder'): gta5(gta/'x')
    (gta/'e/images').mkdir(parents=True), (gta/'e/labels').mkdir()
    with pytest.raises(InputError, match='e/images: holds no image'): gta5(gta/'e')
    save(gta/'labels/00001.png', PHOTO[..., 0]), save(gta/'labels/00002.png', PHOTO[..., 0]), save(gta/'images/00001.jpg', PHOTO)
    with pytest.raises(InputError, match=r'same name as 00001\.jpg'): gta5(gta)

def test_opening_decodes_nothing(gta):
    for p in gta.glob('*/*.png'): p.write_bytes(b'not a png')
    assert len(gta5(gta)) == 3
    with pytest.raises(InputError, match='00002.png: is damaged'): gta5(gta)[2]

def test_unknown_id(gta):
    raw = np.full((6, 8), 7, np.uint8)
    raw[0, :3] = 200
    save(gta/'labels/00001.png', raw)
    with pytest.raises(InputError, match=r'labels/00001\.png: unknown label id 200 \(3 px\)'): gta5(gta)[1]

def test_subsets_of_classes(gta):
    assert gta5(gta, CITYSCAPES16)[2][1].unique().tolist() == [CITYSCAPES16.index('car')]
    with pytest.raises(InputError, match="camvid: gta5 has no class 'pavement'"): gta5(gta, CAMVID)

def test_cityscapes(tmp_path):
    for city, n in (('ulm', 2), ('aachen', 1)):
        for i in range(n):
            save(tmp_path/f'leftImg8bit/val/{city}/{city}_00000{i}_000019_leftImg8bit.png', PHOTO)
            save(tmp_path/f'gtFine/val/{city}/{city}_00000{i}_000019_gtFine_labelIds.png', np.full((6, 8), 24+i, np.uint8))
            save(tmp_path/f'gtFine/val/{city}/{city}_00000{i}_000019_gtFine_color.png', PHOTO)
    ds = cityscapes(tmp_path, 'val')
    assert ds.names == ['aachen_000000_000019', 'ulm_000000_000019', 'ulm_000001_000019']
    assert [ds[i][1].unique().tolist() for i in range(3)] == [[11], [11], [12]]
    with pytest.raises(InputError, match='leftImg8bit/train: no such folder'): cityscapes(tmp_path)
    p = tmp_path/'gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png'
    save(p, np.full((3, 4), 7, np.uint8))
    with pytest.raises(InputError, match=r'labelIds\.png: is 3x4 \(height x width\), but its image .*leftImg8bit\.png is 6x8'): ds[2]
    p.unlink()
    text = r'ulm_000001_000019_leftImg8bit\.png: has no label, expected .*ulm/ulm_000001_000019_gtFine_labelIds\.png'
    with pytest.raises(InputError, match=text): cityscapes(tmp_path, 'val')

# the table of SYNTHIA in words: raw id -> train id, written down apart from labels.py
SYNTHIA = {0: 255, 1: 10, 2: 2, 3: 0, 4: 1, 5: 4, 6: 8, 7: 5, 8: 13, 9: 7, 10: 11, 11: 18, 12: 17, 13: 255, 14: 255, 15: 6, 16: 9,
    17: 12, 18: 14, 19: 15, 20: 16, 21: 3}

@pytest.fixture
def rand_cityscapes(tmp_path):
    root = tmp_path/'RGB of SYNTHIA'/'RGB'                               # the released reader replaces "RGB" wherever it stands
    (root/'GT/LABELS').mkdir(parents=True)
    raw = np.zeros((6, 8, 3), np.uint16)
    raw[..., 1] = 1000                                                   # number of the object
    raw[..., 0].flat[:23] = np.arange(23)
    for i in range(2):
        save(root/f'RGB/{i:07d}.png', PHOTO)
        _rgb16_any(root/f'GT/LABELS/{i:07d}.png', raw)
    return root

def _rgb16_any(path, a):
    import cv2
    assert cv2.imwrite(str(path), np.ascontiguousarray(a[..., ::-1]))

def test_synthia(rand_cityscapes):
    ds = synthia(rand_cityscapes)
    assert ds.names == ['0000000', '0000001'] and ds.space is CITYSCAPES
    x, y = pickle.loads(pickle.dumps(ds))[1]
    assert (x.permute(1, 2, 0).numpy() == PHOTO).all() and y.shape == (6, 8) and y.dtype == torch.int64
    assert y.flatten()[:23].tolist() == [SYNTHIA[i] for i in range(22)] + [0] and (y.flatten()[23:] == 255).all()
    y = synthia(rand_cityscapes, lane_is_road=False)[0][1].flatten()
    assert y[:23].tolist() == [SYNTHIA[i] for i in range(22)] + [255]
    y = synthia(rand_cityscapes, CITYSCAPES16)[0][1].flatten()
    assert [y[i].item() for i in (16, 18, 20)] == [255]*3 and y[8] == CITYSCAPES16.index('car')
    with pytest.raises(InputError, match='synthia has no class'): synthia(rand_cityscapes, CAMVID)

def test_synthia_by_text_and_unlabelled(rand_cityscapes):
    spec = f'synthia:{rand_cityscapes},lane_is_road=false,size=3x4,cache=true'
    assert open_dataset(spec)[0][1].shape == (3, 4) and open_dataset(spec, space=CITYSCAPES13).space is CITYSCAPES13
    full = [open_dataset(f'synthia:{rand_cityscapes}{more}', 'val')[0][1].flatten()[22] for more in ('', ',lane_is_road=no')]
    assert full == [0, 255]
    for p in (rand_cityscapes/'GT/LABELS').glob('*'): p.unlink()
    (rand_cityscapes/'GT/LABELS').rmdir()
    with pytest.raises(InputError, match='GT/LABELS: no such folder, expected SYNTHIA'): open_dataset(spec)
    assert (open_dataset(spec, labelled=False)[0][1] == 255).all()
    with pytest.raises(InputError, match="lane_is_road is 'perhaps'"): open_dataset(f'synthia:{rand_cityscapes},lane_is_road=perhaps')

def test_synthia_faults(rand_cityscapes):
    label = rand_cityscapes/'GT/LABELS/0000001.png'
    save(label, PHOTO)
    with pytest.raises(InputError, match=r'LABELS/0000001\.png: is no 16-bit PNG'): synthia(rand_cityscapes)[1]
    _rgb16_any(label, np.full((6, 8, 3), 23, np.uint16))
    with pytest.raises(InputError, match=r'0000001\.png: unknown label id 23 \(48 px\); known are 0\.\.22'): synthia(rand_cityscapes)[1]
    _rgb16_any(label, np.full((3, 4, 3), 3, np.uint16))
    with pytest.raises(InputError, match=r'0000001\.png: is 3x4 \(height x width\), but its image .* is 6x8'): synthia(rand_cityscapes)[1]
    label.unlink()
    with pytest.raises(InputError, match=r'RGB/0000001\.png: has no label, expected .*GT/LABELS/0000001\.png'): synthia(rand_cityscapes)
    with pytest.raises(InputError, match='RGB: no such folder'): synthia(rand_cityscapes/'GT')

def test_synthia_in_workers(rand_cityscapes):
    ds = synthia(rand_cityscapes)
    read = lambda w: list(batches(ds.__getitem__, steps=2, workers=w))
    assert all(a[1].equal(b[1]) for a, b in zip(read(0), read(1)))

def test_paths_with_braces_and_commas(tmp_path):
    root = tmp_path/'{a},b'
    save(root/'images/1.png', PHOTO), save(root/'labels/2.png', PHOTO[..., 0])
    with pytest.raises(InputError, match='has no label'): gta5(root)
    save(root/'labels/1.png', np.full((6, 8), 7, np.uint8))
    assert len(open_dataset(f'gta5:{root},size=3x4')) == 1

def test_carla_bonnet(tmp_path):
    seg = np.zeros((600, 4, 3), np.uint8)
    seg[..., 1], seg[..., 2] = 99, 200                     # only red counts
    seg[480:, :2, 0], seg[480:, 2:, 0] = 10, 7
    save(tmp_path/'CameraRGB/1.jpg', 0*seg), save(tmp_path/'CameraSeg/1.png', seg)
    y = carla(tmp_path)[0][1]
    assert (y[480:490, :2] == 8).all() and (y[490:, :2] == 255).all() and (y[480:, 2:] == 3).all() and (y[:480] == 0).all()
    y = carla(tmp_path, CITYSCAPES, bonnet=False)[0][1]
    assert (y[480:, :2] == 13).all() and (y[480:, 2:] == 0).all() and (y[:480] == 10).all()
    with pytest.raises(InputError, match='carla has no class'): carla(tmp_path, ClassSpace('x', ('cat',), ((0,0,0),)))

# ---- TOML

BASE = dict(images='images = {train = "i"}', labels='labels = {train = "l"}', classes='classes = {street = [1, 2, 3], grass = [4, 5, 6]}',
    ids='ids = {0 = "ignore", 1 = "street", 2 = "street", 7 = "grass"}')

@pytest.fixture
def town(tmp_path):
    def make(**kw):
        (tmp_path/'town.toml').write_text('\n'.join(v for v in {**BASE, **kw}.values() if v))
        return tmp_path/'town.toml'
    raw = np.array([[0, 1, 2], [7, 7, 7]], np.uint8)
    save(tmp_path/'i/a/1.jpg', PHOTO[:2, :3]), save(tmp_path/'l/a/1.png', raw)
    save(tmp_path/'i/b/1.png', PHOTO[:2, :3]), save(tmp_path/'l/b/1.png', raw)
    return make

def test_folder(town, tmp_path, monkeypatch):
    monkeypatch.chdir('/')                                  # paths are relative to the TOML file
    ds = folder(town())
    assert ds.names == ['a__1', 'b__1'] and ds.space == ClassSpace('town', ('street', 'grass'), ((1,2,3), (4,5,6)))
    assert all(y.tolist() == [[255, 0, 0], [1, 1, 1]] for _, y in ds)
    save(tmp_path/'l/a/1.png', np.full((2, 3), 3, np.uint8))
    with pytest.raises(InputError, match=r'l/a/1\.png: unknown label id 3 \(6 px\); known are 0\.\.2, 7'): ds[0]
    assert folder(town(name='name = "mytown"')).space.name == 'mytown'

def test_folder_train_ids_by_default_and_known_space(town, tmp_path):
    for f in ('a', 'b'): save(tmp_path/f'l/{f}/1.png', np.array([[0, 1, 255], [10, 10, 10]], np.uint8))
    ds = folder(town(classes='space = "camvid"', ids=''))
    assert ds.space is CAMVID and ds[0][1].tolist() == [[0, 1, 255], [10, 10, 10]]
    small = ClassSpace('two', ('building', 'sky'), ((0,0,0), (1,1,1)))
    assert folder(town(classes='space = "camvid"', ids=''), space=small)[0][1].tolist() == [[1, 0, 255], [255]*3]
    with pytest.raises(InputError, match="has no class 'sidewalk'"): folder(town(classes='space = "camvid"', ids=''), space=CITYSCAPES)

def test_folder_unlabelled_suffixes_channel_resize(town, tmp_path):
    ds = folder(town(labels=''))
    assert ds[1][1].tolist() == [[255]*3]*2 and ds.names == ['a__1', 'b__1']
    both = tmp_path/'both'
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 0] = 7
    save(both/'1_photo.png', PHOTO[:4, :6]), save(both/'1_mask.png', red)
    ds = folder(town(images='images = {val = "both"}', labels='labels = {val = "both"}', 
        more='image_suffix = "_photo.png"\nlabel_suffix = "_mask.png"\nchannel = 0\nresize_label = true'), 'val')
    assert ds.names == ['1'] and ds[0][1].tolist() == [[1]*6]*4

@pytest.mark.parametrize('kw,text', [
    (dict(images=''), r'has no table \[images\]'),
    (dict(images='images = {val = "i"}'), r"\[images\] has no split 'train', only: val; folder:.*,split=val takes that one"),
    (dict(images='images = {train = "nowhere"}'), 'nowhere: no such folder'),
    (dict(images='images = {train = 3}'), r'train in \[images\] is 3, expected a folder'),
    (dict(images='images = "i"'), "images is 'i', expected a table"),
    (dict(labels='labels = {train = "nowhere"}'), 'nowhere: no such folder'),
    (dict(labels='labels = {train = "i"}'), r'i/a/1\.jpg: has no label, expected .*/i/a/1\.png'),
    (dict(classes=''), r'expected either space = "\.\.\." or a table'),
    (dict(classes='space = "paris"'), "unknown space 'paris', expected one of: cityscapes"),
    (dict(classes='classes = {street = [1, 2], grass = [4, 5, 6]}'), "class 'street' has colour"),
    (dict(classes='classes = {street = [1, 2, 300]}'), "class 'street' has colour"),
    (dict(ids='ids = {x = "street"}'), "id 'x' in"),
    (dict(ids='ids = {300 = "street"}'), "id '300' in"),
    (dict(ids='ids = {1 = "stret"}'), "id 1 is 'stret', expected"),
    (dict(ids='ids = {1 = 2}'), 'id 1 is 2, expected'),
    (dict(more='chanel = 0'), "unknown key 'chanel'"),
    (dict(more='channel = true'), 'channel is True, expected a number'),
    (dict(more='resize_label = 1'), 'resize_label is 1, expected true or false'),
    (dict(more='x = ='), 'is not valid TOML'),
])
def test_folder_faults(town, kw, text):
    with pytest.raises(InputError, match=text) as e: folder(town(**kw))
    assert '\n' not in str(e.value) and ('town.toml' in str(e.value) or '/' in str(e.value))

def test_folder_missing_toml(tmp_path):
    with pytest.raises(InputError, match='no.toml: cannot be read'): folder(tmp_path/'no.toml')
    with pytest.raises(InputError, match='is a folder, expected a TOML file'): folder(tmp_path)

# ---- wrappers

def test_take(gta):
    ds = gta5(gta)
    few = take(ds, ['00002', 0, np.int64(1), 0])
    assert few.names == ['00002', '00000', '00001', '00000'] and len(few) == 4 and few.space is CITYSCAPES
    assert [y.unique().item() for _, y in few] == [13, 0, 255, 0]
    assert take(few, [0])[0][1].equal(ds[2][1]) and pickle.loads(pickle.dumps(few)).names == few.names
    for bad in ([3], [-1], ['x']):
        with pytest.raises(InputError): take(ds, bad)

def test_resized(gta):
    ds = resized(gta5(gta), (3, 4))
    x, y = ds[2]
    assert x.shape == (3, 3, 4) and x.dtype == torch.uint8 and y.shape == (3, 4) and (y == 13).all() and y.dtype == torch.int64
    assert (x.float()-torch.from_numpy(PHOTO).permute(2,0,1).float().view(3,3,2,4,2).mean((2,4))).abs().mean() < 15
    assert resized(gta5(gta), (6, 8))[0][0].equal(gta5(gta)[0][0])
    with pytest.raises(InputError): resized(ds, (0, 4))
    with pytest.raises(InputError): resized(ds, (4,))

def test_cached(gta):
    ds = Cached(gta5(gta))
    x, y = ds[1]
    (gta/'images/00001.png').unlink(), (gta/'images/00002.png').unlink()
    x.zero_(), y.zero_()
    x, y = ds[1]
    assert (x.permute(1, 2, 0).numpy() == PHOTO).all() and (y == 255).all() and y.dtype == torch.int64
    with pytest.raises(InputError): ds.fill()
    with pytest.raises(IndexError): ds[3]

def test_workers_read_the_same(gta):
    ds = gta5(gta)
    read = lambda w: list(batches(ds.__getitem__, steps=3, workers=w))
    assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(read(0), read(2)))
    (gta/'labels/00001.png').write_bytes(b'')
    with pytest.raises(InputError) as e: read(2)
    assert str(e.value).startswith(f'{gta}/labels/00001.png: is damaged') and '\n' not in str(e.value)

# ---- texts

@pytest.mark.parametrize('spec,text', [
    ('gta:x', "unknown kind 'gta', expected kind:path.*gta5, cityscapes, camvid, carla, folder, images, streets"), ('gta5', "data set 'gta5'"),
    ('', 'unknown kind'), ('gta5:', 'names no path'),
    ('gta5:x,bonnet=1', "gta5 has no option 'bonnet'"), ('gta5:x,size=96', 'size is .96., expected HEIGHTxWIDTH'),
    ('gta5:x,size=0x4', 'size is'),
    ('carla:x,bonnet=maybe', "bonnet is 'maybe', expected true or false"),
    ('streets:real,count=-1', "count is '-1', expected a whole number"),
    ('streets:paris', 'unknown domain, expected one of: '),
    ('streets:real,count=0', 'count is 0'), ('streets:real,split=test', "no split 'test'"),
    ('gta5:/no/where', 'no such folder'), ('folder:/no/where.toml', 'cannot be read')])
def test_open_dataset_faults(spec, text):
    with pytest.raises(InputError, match=text) as e: open_dataset(spec)
    assert '\n' not in str(e.value)

def test_open_dataset(gta, town, tmp_path, monkeypatch):
    assert open_dataset(f'gta5:{gta}', space=CITYSCAPES13).space is CITYSCAPES13
    monkeypatch.setenv('HOME', str(gta.parent))
    ds = open_dataset(f'gta5:~/{gta.name},size=3x4,cache=true')
    assert isinstance(ds, Cached) and ds[0][1].shape == (3, 4)
    assert len(open_dataset(f'folder:{town()},split=train', split='val')) == 2

def test_open_streets():
    pytest.importorskip('protonb.streets')
    spec = 'streets:synthetic,count=2,size=32x64,seed=5'
    a, b = open_dataset(spec), open_dataset(spec, 'val')
    assert len(a) == len(b) == 2 and a[0][1].shape == (32, 64) and not a[0][0].equal(b[0][0]) and not set(a.names) & set(b.names)
    m = open_dataset(spec, space=CITYSCAPES13)
    table = label_table({i: c for i, c in enumerate(CITYSCAPES.classes)}, CITYSCAPES13).ids
    assert isinstance(m, Mapped) and (m[0][1].numpy() == table[a[0][1].numpy()]).all() and m.space is CITYSCAPES13
    with pytest.raises(InputError): open_dataset(spec, space=CAMVID)

# ---- real files

@real
@pytest.mark.parametrize('spec,split,n,size,space', [
    ('gta5:{}/gta5', 'train', 2, (1052, 1914), CITYSCAPES), ('cityscapes:{}/cityscapes', 'train', 1, (1024, 2048), CITYSCAPES),
    ('cityscapes:{}/cityscapes', 'val', 1, (128, 256), CITYSCAPES), ('camvid:{}/camvid', 'train', 367, (360, 480), CAMVID),
    ('camvid:{}/camvid', 'val', 101, (360, 480), CAMVID), ('carla:{}/carla', 'train', 54, (600, 800), CAMVID)])
def test_real(spec, split, n, size, space):
    t = time.time()
    ds = open_dataset(spec.format(DATA), split)
    assert time.time()-t < 2 and len(ds) == n and ds.space is space and len(set(ds.names)) == n
    for i in {0, n//2, n-1}:
        x, y = ds[i]
        assert x.shape == (3, *size) and y.shape == size and x.float().std() > 5
        ids = set(y.unique().tolist())
        assert ids <= {*range(space.num_classes), 255} and len(ids) > 4 and (y == 255).float().mean() < .6

@real
def test_real_carla_bonnet_and_cityscapes_classes():
    a, b = (carla(DATA/'carla', bonnet=f)[0][1] for f in (True, False))
    gone = a != b
    assert (b[gone] == 8).all() and gone[:490].sum() == 0 and gone[490:].float().mean() > .1
    y = carla(DATA/'carla', CITYSCAPES)[0][1]
    assert {0, 10} <= set(y.unique().tolist())

@real
def test_real_folder_and_traps(tmp_path):
    text = f'''image_suffix = "_img.jpg"
label_suffix = "_labelIds.png"
space = "cityscapes"
images = {{train = "{DATA}/carlascapes/images"}}
labels = {{train = "{DATA}/carlascapes/labels"}}
[ids]
0 = "ignore"
1 = "road"
2 = "sidewalk"
14 = "car"
'''
    (tmp_path/'c.toml').write_text(text + ''.join(f'{i} = "ignore"\n' for i in range(3, 28) if i != 14))
    ds = folder(tmp_path/'c.toml')
    assert len(ds) == 4 and set(ds[0][1].unique().tolist()) <= {0, 1, 13, 255}
    assert read_label(DATA/'bdd100k/masks/masks_0.png').shape == (720, 1280)
    with pytest.raises(InputError, match='16-bit'): read_label(next(DATA.glob('cityscapes/gtFine/train/*/*_instanceIds.png')))
    with pytest.raises(InputError, match='16-bit'): read_label(next(DATA.glob('vistas/instances/*.png')))
    assert read_label(next(DATA.glob('vistas/labels/*.png'))).max() <= 65

@real
def test_real_gta5_label_ids_in_camvid_are_noticed():
    ds = PairFolder([DATA/'gta5/images/00001.png'], [DATA/'gta5/labels/00001.png'], ['1'], label_table(CAMVID_IDS, CAMVID), CAMVID)
    with pytest.raises(InputError, match='unknown label id'): ds[0]
