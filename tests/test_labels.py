import pickle
import numpy as np, pytest, torch
from PIL import Image
from pathlib import Path
from protonb.core import InputError
from protonb.labels import (IGNORE, CAMVID, CAMVID_IDS, CARLA_TO_CAMVID, CARLA_TO_CITYSCAPES, CARLASCAPES_IDS, CITYSCAPES, CITYSCAPES13,
    CITYSCAPES16, CITYSCAPES_IDS, GTA5_IDS, SPACES, SYNTHIA_IDS,
    SYNTHIA_IDS_LANE_ROAD, TRAIN_IDS, ClassSpace, colorize, label_table, map_ids)

DATA = Path(__file__).parents[2]/'shared'/'data'
real = pytest.mark.skipif(not DATA.exists(), reason='needs ../shared/data')
CITY_TABLES = dict(CITYSCAPES_IDS=CITYSCAPES_IDS, GTA5_IDS=GTA5_IDS, SYNTHIA_IDS=SYNTHIA_IDS, LANE=SYNTHIA_IDS_LANE_ROAD,
    TRAIN_IDS=TRAIN_IDS, CARLA=CARLA_TO_CITYSCAPES, CARLASCAPES=CARLASCAPES_IDS)

# spec dip.md 2.1: train id -> (Cityscapes/GTA5 id, SYNTHIA id)
SPEC = [(7,3),(8,4),(11,2),(12,21),(13,5),(17,7),(19,15),(20,9),(21,6),(22,16),(23,1),(24,10),(25,17),(26,8),
    (27,18),(28,19),(31,20),(32,12),(33,11)]

def test_id_tables_are_those_of_the_spec():
    for ids, col in ((CITYSCAPES_IDS,0), (GTA5_IDS,0), (SYNTHIA_IDS,1)):
        t = label_table(ids, CITYSCAPES)
        want = np.full(256, IGNORE)
        for k, row in enumerate(SPEC): want[row[col]] = k
        assert (t.ids == want).all()
    assert label_table(SYNTHIA_IDS_LANE_ROAD, CITYSCAPES).ids[22] == 0

def test_known_ids():
    known = lambda ids: set(np.flatnonzero(label_table(ids, CITYSCAPES).known))
    assert known(GTA5_IDS) == set(range(35))
    assert known(CITYSCAPES_IDS) == {*range(34), 255}
    assert known(SYNTHIA_IDS) == set(range(23))
    assert known(TRAIN_IDS) == {*range(19), 255}
    assert known(CARLA_TO_CITYSCAPES) == set(range(13))
    assert known(CARLASCAPES_IDS) == set(range(28))

@pytest.mark.parametrize('name', CITY_TABLES)
def test_every_name_exists(name):
    assert {c for c in CITY_TABLES[name].values() if c} <= set(CITYSCAPES.classes)

def test_camvid_tables():
    assert {c for c in (*CAMVID_IDS.values(), *CARLA_TO_CAMVID.values()) if c} <= set(CAMVID.classes)
    t = label_table(CARLA_TO_CAMVID, CAMVID)
    assert t.ids[:13].tolist() == [0, 1, 7, 255, 9, 2, 3, 3, 4, 5, 8, 255, 6]

def test_spaces():
    assert CITYSCAPES16.classes == tuple(c for c in CITYSCAPES.classes if c not in ('terrain', 'truck', 'train'))
    assert CITYSCAPES13.classes == tuple(c for c in CITYSCAPES16.classes if c not in ('wall', 'fence', 'pole'))
    for s in SPACES.values():
        assert len(set(s.palette)) == s.num_classes == len(s.classes) and s.subsets[0] == (str(s.num_classes), tuple(range(s.num_classes)))
        for title, ids in s.subsets: assert int(title) == len(ids) == len(set(ids)) and max(ids) < s.num_classes
        assert pickle.loads(pickle.dumps(s)) == s and hash(s) == hash(pickle.loads(pickle.dumps(s)))
    sub = dict(CITYSCAPES.subsets)
    assert tuple(CITYSCAPES.classes[i] for i in sub['16']) == CITYSCAPES16.classes
    assert tuple(CITYSCAPES.classes[i] for i in sub['13']) == CITYSCAPES13.classes

@pytest.mark.parametrize('args,text', [
    ((('a','a'), ((0,0,0),(1,1,1))), 'class a is named more than once'),
    ((('a','b'), ((0,0,0),)), '2 classes but 1 colours'),
    (((), ()), 'has 0 classes'),
])
def test_bad_space(args, text):
    with pytest.raises(InputError, match=text): ClassSpace('mine', *args)

def test_map_ids_every_value_and_layout():
    t = label_table(CITYSCAPES_IDS, CITYSCAPES)
    raw = np.random.default_rng(0).choice(np.flatnonzero(t.known), (37, 51)).astype(np.uint8)
    want = np.array([[t.ids[v] for v in row] for row in raw])
    for r in (raw, raw[::-1, ::2], np.asfortranarray(raw)):
        got = map_ids(r, t)
        assert got.dtype == np.uint8 and got.shape == r.shape
    assert (map_ids(raw, t) == want).all() and (map_ids(raw[::-1, ::2], t) == want[::-1, ::2]).all()
    assert map_ids(raw[:0], t).shape == (0, 51)

def test_map_ids_faults():
    t = label_table(CITYSCAPES_IDS, CITYSCAPES)
    raw = np.full((4, 5), 7, np.uint8)
    raw[0, :3], raw[1, 0] = 77, 200
    text = r'a/b\.png: unknown label id 77 \(3 px\), 200 \(1 px\); known are 0\.\.33, 255'
    with pytest.raises(InputError, match=text): map_ids(raw, t, 'a/b.png')
    with pytest.raises(TypeError, match='uint8, got int64'): map_ids(raw.astype(np.int64), t)
    with pytest.raises(InputError, match='none of the classes'): label_table({0: 'cat', 1: 'dog'}, CAMVID)
    with pytest.raises(InputError, match='300 does not fit'): label_table({300: 'sky'}, CAMVID)

def test_colorize():
    y = np.array([[0, 18, 255], [254, 19, 10]])
    want = np.array([[CITYSCAPES.palette[0], CITYSCAPES.palette[18], (0,0,0)], [(0,0,0), (0,0,0), CITYSCAPES.palette[10]]], np.uint8)
    for a in (y.astype(np.uint8), y, torch.tensor(y), torch.tensor(y, dtype=torch.uint8), np.where(y > 100, -1, y)):
        got = colorize(a, CITYSCAPES)
        assert got.dtype == np.uint8 and (got == want).all()
    with pytest.raises(ValueError, match=r'\(H,W\)'): colorize(y[None], CITYSCAPES)

@real
@pytest.mark.parametrize('pattern,ids,space,channel', [
    ('gta5/labels/*.png', GTA5_IDS, CITYSCAPES, None), ('gta5_labels_only/*.png', GTA5_IDS, CITYSCAPES, None),
    ('cityscapes/gtFine/*/*/*_labelIds.png', CITYSCAPES_IDS, CITYSCAPES, None), ('bdd100k/masks/*.png', TRAIN_IDS, CITYSCAPES, None),
    ('camvid/valannot/*.png', CAMVID_IDS, CAMVID, None), ('carla/CameraSeg/*.png', CARLA_TO_CAMVID, CAMVID, 0),
    ('carlascapes/labels/*.png', CARLASCAPES_IDS, CITYSCAPES, None)])
def test_real_files_hold_known_ids_only(pattern, ids, space, channel):
    files, t = sorted(DATA.glob(pattern))[:8], label_table(ids, space)
    assert files
    for f in files:
        raw = np.asarray(Image.open(f))
        y = map_ids(raw if channel is None else raw[..., channel].copy(), t, f)
        assert (y != IGNORE).mean() > .1, f

@real
def test_real_train_ids_agree_with_label_ids():
    f = next(DATA.glob('cityscapes/gtFine/val/*/*_labelIds.png'))
    train = np.asarray(Image.open(str(f).replace('labelIds', 'labelTrainIds')))
    got = map_ids(np.asarray(Image.open(f)), label_table(CITYSCAPES_IDS, CITYSCAPES), f)
    assert (got == map_ids(train, label_table(TRAIN_IDS, CITYSCAPES), f)).mean() > .995   # the two crops were resized separately
