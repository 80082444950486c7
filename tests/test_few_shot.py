import hashlib, os, subprocess, sys
from collections import Counter
from importlib.resources import files
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from protonb.core import InputError
from protonb.datasets import Cached, camvid, cityscapes, resized
from protonb.few_shot import city_of, draw_shots, few_shot, group_of, pixda_list, uniform_index
from protonb.sampling import batches
from protonb.streets import REAL, Streets

DATA = Path(__file__).parents[2]/'shared'/'data'
real = pytest.mark.skipif(not DATA.exists(), reason='needs ../shared/data')
LISTS = {k: pixda_list(k) for k in range(1, 6)}
CITIES = """aachen bochum bremen cologne darmstadt dusseldorf erfurt hamburg hanover jena krefeld monchengladbach strasbourg stuttgart
    tubingen ulm weimar zurich""".split()

# ---- the published lists

def test_lengths_cities_and_order():
    for k, names in LISTS.items():
        assert isinstance(names, tuple) and len(names) == 18*k
        assert [city_of(n) for n in names] == [c for c in CITIES for _ in range(k)]
    assert [len(set(n)) for n in LISTS.values()] == [18, 36, 54, 72, 89]

def test_one_duplicate_and_no_other():
    twice = [n for n, c in Counter(LISTS[5]).items() if c > 1]
    assert twice == ['zurich_000112_000019'] and LISTS[5][-5:].index(twice[0]) == 0 and LISTS[5][-2] == twice[0]

def test_not_nested():
    shared = {(a, b): len(set(LISTS[a]) & set(LISTS[b])) for a in LISTS for b in LISTS if a < b}
    assert shared == {(1, 2): 0, (1, 3): 0, (1, 4): 0, (1, 5): 0, (2, 3): 1, (2, 4): 2, (2, 5): 1, (3, 4): 2, (3, 5): 1, (4, 5): 3}

@pytest.mark.parametrize('k,name', [(1, 'aachen_000082_000019'), (1, 'strasbourg_000001_034494'), (2, 'hamburg_000000_099368'),
    (3, 'tubingen_000115_000019'), (3, 'strasbourg_000000_006621'), (4, 'bremen_000255_000019'), (5, 'monchengladbach_000000_004580'),
    (5, 'ulm_000058_000019'), (5, 'krefeld_000000_015494')])
def test_some_entries(k, name): assert name in LISTS[k]

def test_the_file_is_what_was_checked():
    """The whole table, entry by entry and in order; a changed entry must be a decision."""
    data = (files('protonb')/'lists'/'pixda_cityscapes.csv').read_bytes()
    assert data.startswith(b'shots,city,sequence,frame\n1,aachen,000082,000019\n') and data.count(b'\n') == 271
    assert hashlib.sha256(data).hexdigest() == '3f061a5425ea5e68910f44cbf17e352e472388304f94ddcb078a31554a85e6a5'

@pytest.mark.parametrize('shots', [0, 6, -1, '1', None])
def test_no_such_list(shots):
    with pytest.raises(InputError, match='expected one of 1, 2, 3, 4, 5'): pixda_list(shots)

def test_found_from_any_folder(tmp_path):
    code = 'from protonb.few_shot import pixda_list; print(len(pixda_list(5)))'
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True).stdout == '90\n'

# ---- names -> data set

@pytest.fixture(scope='module')
def train(tmp_path_factory):
    "Cityscapes' layout with all listed images and others; only the files that a test opens are pictures."
    root = tmp_path_factory.mktemp('cityscapes')
    names = sorted({n for names in LISTS.values() for n in names} | {f'{c}_999999_000019' for c in CITIES})
    for folder, end in (('leftImg8bit', 'leftImg8bit'), ('gtFine', 'gtFine_labelIds')):
        for n in names:
            p = root/folder/'train'/city_of(n)/f'{n}_{end}.png'
            p.parent.mkdir(parents=True, exist_ok=True)
            p.touch()
    for i, n in enumerate(LISTS[5][-5:]):
        Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(root/'leftImg8bit/train/zurich'/f'{n}_leftImg8bit.png')
        Image.fromarray(np.full((4, 6), 24+i, np.uint8)).save(root/'gtFine/train/zurich'/f'{n}_gtFine_labelIds.png')
    return cityscapes(root)

@pytest.mark.parametrize('k', range(1, 6))
def test_names_are_those_of_the_reader(train, k):
    ds = few_shot(train, pixda_list(k))
    assert len(ds) == 18*k and tuple(ds.names) == pixda_list(k) and ds.space is train.space

def test_order_and_duplicate(train):
    ds = few_shot(train, pixda_list(5))
    last = [ds[i] for i in range(85, 90)]
    assert [y.unique().item() for _, y in last] == [14, 12, 13, 14, 15]                # raw ids 27, 25, 26, 27 again, 28
    assert last[0][0].equal(last[3][0]) and [x.unique().item() for x, _ in last] == [3, 1, 2, 3, 4]
    assert few_shot(Cached(resized(train, (2, 3))), pixda_list(5)[-2:])[0][1].shape == (2, 3)

def test_missing_names_are_listed(train):
    with pytest.raises(InputError) as e: few_shot(train, ['ulm_1', *pixda_list(1), 'ulm_2', 'ulm_1'])
    assert str(e.value).endswith('lacks 2 of the 20 few-shot images: ulm_1, ulm_2') and 'aachen' in str(e.value)
    with pytest.raises(InputError, match='lacks 89 of the 89 few-shot images: aachen_000106_000019, .* and 81 more'):
        few_shot(Streets(REAL, 2, (32, 64)), pixda_list(5))
    with pytest.raises(InputError, match='list of few-shot images is empty'): few_shot(train, [])

# ---- draws

def test_city_of():
    assert city_of('aachen_000082_000019') == city_of('train/aachen/aachen_000082_000019') == 'aachen'
    assert city_of('0001TP_006690') == '0001TP' and city_of('real_0_00012') == 'real'
    for bad in ('00001', '_x', ''):
        with pytest.raises(InputError, match='expected one such as aachen_000082_000019'): city_of(bad)

def test_k_per_group_seeded_and_nested(train):
    for k in (1, 2, 5):
        got = draw_shots(train.names, k, seed=4)
        assert len(set(got)) == 18*k and Counter(city_of(train.names[i]) for i in got) == dict.fromkeys(CITIES, k)
        assert all(type(i) is int for i in got) and got == draw_shots(train.names, k, seed=4) != draw_shots(train.names, k, seed=5)
        assert set(got) < set(draw_shots(train.names, k+1, seed=4))

def test_a_draw_depends_on_names_only(train):
    mixed = [train.names[i] for i in np.random.default_rng(0).permutation(len(train))]
    want = [train.names[i] for i in draw_shots(train.names, 3)]
    assert [mixed[i] for i in draw_shots(mixed, 3)] == want
    some = [n for n in mixed if city_of(n) != 'ulm']
    assert [some[i] for i in draw_shots(some, 3)] == [n for n in want if city_of(n) != 'ulm']

def test_a_known_draw():
    """The same on every machine and in every version: runs are compared by their seed."""
    assert draw_shots([f'{c}_{i:06d}_000019' for c in 'ab' for i in range(10)], 2, seed=7) == [8, 0, 11, 17]

def test_every_image_has_the_same_chance():
    names = [f'{c}_{i}' for c, n in (('a', 3), ('b', 8)) for i in range(n)]
    count = Counter(names[i] for seed in range(1200) for i in draw_shots(names, 1, seed))
    assert max(abs(count[n]-400) for n in names[:3]) < 70 and max(abs(count[n]-150) for n in names[3:]) < 50

def test_groups_may_be_numbers():
    got = draw_shots([f'{i:02d}' for i in range(12)], 1, group=lambda n: int(n) % 3)
    assert [i % 3 for i in got] == [0, 1, 2]

@pytest.mark.parametrize('names,k,text', [(['a_1', 'a_2', 'b_1'], 2, 'k is 2 images per group, but b has 1$'), (['a_1'], 0, 'k is 0'),
    ([], 1, '0 groups'), (['17'], 1, "image '17'"), (['a_1', 'b_1'], 3, 'a has 1, b has 1')])
def test_draw_faults(names, k, text):
    with pytest.raises(InputError, match=text): draw_shots(names, k)

@real
def test_camvid_by_recording():
    ds = camvid(DATA/'camvid')
    got = few_shot(ds, [ds.names[i] for i in draw_shots(ds.names, 2)])
    assert set(Counter(map(city_of, got.names)).values()) == {2} and len(got) == 2*len({city_of(n) for n in ds.names})
    assert got[0][1].max() > 2

# ---- with replacement

def test_uniform_index():
    a = [uniform_index(p, 18, 0) for p in range(5400)]
    assert all(type(i) is int for i in a[:3]) and set(a) == set(range(18))
    assert np.abs(np.bincount(a)-300).max() < 4*np.sqrt(300)
    assert a[4000:4010] == [uniform_index(p, 18, 0) for p in range(4000, 4010)]
    agree = lambda b: np.mean(np.array(a[:2000]) == b)
    others = [[uniform_index(p, 18, seed, s) for p in range(2000)] for seed, s in ((1, 'target'), (0, 'source'), (0, 3))]
    assert all(abs(agree(b) - 1/18) < .025 for b in others)                            # independent streams
    assert abs(np.mean(np.array(a[1:]) == a[:-1]) - 1/18) < .015                       # with replacement, no memory
    pairs = np.bincount(18*np.array(a[1:]) + a[:-1], minlength=324)
    assert ((pairs - pairs.mean())**2).sum()/pairs.mean() < 324 + 5*np.sqrt(2*324)     # chi squared of neighbours

def test_uniform_index_faults():
    with pytest.raises(InputError, match='empty'): uniform_index(0, 0, 0)

def test_batches_go_on_where_they_stopped():
    read = lambda first: [b.tolist() for b in batches(lambda p: uniform_index(p, 18, 5), steps=6, batch_size=4, first_step=first)]
    assert read(0)[3:] == read(3)

@pytest.mark.parametrize('names,want', [(['aachen_1_2', 'aachen_3_4', 'ulm_1_2'], {'aachen', 'ulm'}), (['img1', 'img2', 'img3'], {'the whole set'}),
    (['IMG_1', 'IMG_2', 'IMG_3'], {'IMG'}), (['a/1', 'a/2', 'b/1'], {'a', 'b'}), (['a/x/1', 'a/y/1', '3'], {'a/x', 'a/y', 'the whole set'}),
    (['01_rgb', '02_rgb', '03_rgb'], {'the whole set'}), (['s/01_rgb', 's/02_rgb', 't/03_rgb'], {'s', 't'}), (['a_1', 'a_2', '3'], {'the whole set'})])
def test_groups_of_names_without_a_city(names, want):
    "A number of its own in front of every image makes no cities; one name without a city, and there are none."
    group = group_of(names)
    got = draw_shots(names, 1, group=group)
    assert set(map(group, names)) == want and len(got) == len(want) == len({group(names[i]) for i in got})

def test_too_few_images_without_a_city():
    with pytest.raises(InputError, match='but the whole set has 2$'): draw_shots(['img1', 'img2'], 3, group=group_of(['img1', 'img2']))
    with pytest.raises(InputError, match='0 groups'): draw_shots([], 1, group=group_of([]))
