"""The counts against scikit-learn, the tiles against the whole, the files against people."""
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image
from protonb.core import InputError
from protonb.evaluation import (Scores, argmax_upsampled, compare_table, confusion_matrix, evaluate, iou, label_map, output_paths, palette_png,
                                predict_files)
from protonb.labels import CAMVID, CITYSCAPES, CITYSCAPES13, IGNORE, ClassSpace, colorize

DATA = Path(__file__).parents[2]/'shared'/'data'
THREE = ClassSpace('three', ('a', 'b', 'c'), ((9, 0, 0), (0, 9, 0), (0, 0, 9)), (('3', (0, 1, 2)), ('2', (0, 1))))

def gen(seed=0): return torch.Generator().manual_seed(seed)
def ids(K, *shape, seed=0, ignore=.2):
    y = torch.randint(0, K, shape, generator=gen(seed))
    return torch.where(torch.rand(shape, generator=gen(seed+1)) < ignore, torch.full_like(y, IGNORE), y)

# counts

@pytest.mark.parametrize('K', [1, 2, 11, 19, 150])
@pytest.mark.parametrize('shape', [(1, 1), (37, 53), (3, 8, 9)])
def test_matches_sklearn(K, shape):
    from sklearn.metrics import confusion_matrix as reference
    pred, label = ids(K, *shape, seed=3, ignore=0), ids(K, *shape)
    keep = label != IGNORE
    want = reference(label[keep].flatten(), pred[keep].flatten(), labels=range(K)) if keep.any() else np.zeros((K, K), int)
    got = confusion_matrix(pred, label, K)
    assert got.dtype == torch.int64 and got.shape == (K, K)
    assert (got.numpy() == want).all()

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type(dtype):
    pred, label = ids(19, 20, 20, seed=3, ignore=0), ids(19, 20, 20)
    assert (confusion_matrix(pred.to(dtype), label.to(dtype), 19) == confusion_matrix(pred, label, 19)).all()

def test_uint8_does_not_wrap():
    pred, label = torch.full((4,), 200, dtype=torch.uint8), torch.full((4,), 201, dtype=torch.uint8)
    assert confusion_matrix(pred, label, 250)[201, 200] == 4    # 250*201 does not fit a byte

def test_out_of_range_counts_nowhere():
    label = torch.tensor([0, -1, 3, 255, 1, 1, 2**40])
    pred = torch.tensor([0, 0, 0, 0, 3, -1, 0])
    assert confusion_matrix(pred, label, 3).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]

def test_no_pixels():
    assert confusion_matrix(torch.empty(0, 5).long(), torch.empty(0, 5).long(), 4).sum() == 0
    assert confusion_matrix(torch.zeros(2, 2).long(), torch.full((2, 2), 255), 4).sum() == 0

def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r'pred is \(2, 2\) but label is \(2, 3\)'):
        confusion_matrix(torch.zeros(2, 2), torch.zeros(2, 3), 3)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_agrees_and_never_waits():
    pred, label = ids(19, 512, 512, seed=3, ignore=0), ids(19, 512, 512)
    want, p, l = confusion_matrix(pred, label, 19), pred.cuda(), label.cuda()
    confusion_matrix(p, l, 19)
    torch.cuda.set_sync_debug_mode('error')
    try: got = confusion_matrix(p, l, 19)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert (got.cpu() == want).all()

# IoU

CM = torch.tensor([[6, 2, 0, 1], [1, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])   # class 2 nowhere, class 3 only predicted

@pytest.mark.parametrize('absent,want', [('skip_both', [.6, .625, np.nan, 0]), ('zero', [.6, .625, 0, 0]), ('skip_gt', [.6, .625, np.nan, np.nan])])
def test_absent_by_hand(absent, want): np.testing.assert_allclose(iou(CM, absent).numpy(), want, atol=1e-9)

def test_zero_is_the_formula_of_dip():
    pred, label = ids(19, 30, 30, seed=5, ignore=0) % 7, ids(19, 30, 30) % 9
    label[label == IGNORE % 9] = IGNORE
    keep = label != IGNORE
    p, l = pred[keep], label[keep]
    want = [((p == c) & (l == c)).sum().item() / (((p == c) | (l == c)).sum().item() + 1e-10) for c in range(19)]
    got = Scores(confusion_matrix(pred, label, 19), CITYSCAPES, 'zero')
    np.testing.assert_allclose(got.iou.numpy(), want, rtol=1e-12)
    assert got.miou == pytest.approx(np.mean(want), rel=1e-12)

def test_matches_sklearn_jaccard():
    from sklearn.metrics import jaccard_score
    pred, label = ids(19, 60, 60, seed=3, ignore=0), ids(19, 60, 60, ignore=0)
    np.testing.assert_allclose(iou(confusion_matrix(pred, label, 19)).numpy(), jaccard_score(label.flatten(), pred.flatten(), average=None))

def test_large_counts_are_exact():
    cm = torch.tensor([[2**52, 1], [1, 2**52]])
    assert Scores(cm, ClassSpace('two', ('a', 'b'), ((0, 0, 0), (1, 1, 1)))).cm.tolist() == cm.tolist()
    assert 0 < 1 - iou(cm)[0] < 1e-15

def test_wrong_rule(): 
    with pytest.raises(ValueError, match="absent is 'none'"): iou(CM, 'none')
    with pytest.raises(ValueError, match="absent is 'none'"): Scores(CM[:3, :3], THREE, 'none')

# scores

def test_scores_by_hand():
    s = Scores(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), THREE)
    assert s.accuracy == pytest.approx(5/6) and s.mean_class_accuracy == pytest.approx((3/4+1)/2)
    assert s.miou == pytest.approx((3/4+2/3)/2) and s.subset_mious == pytest.approx({'3': (3/4+2/3)/2, '2': (3/4+2/3)/2})
    z = Scores(s.cm, THREE, 'zero')
    assert z.miou == pytest.approx((3/4+2/3)/3) and z.subset_mious['2'] == pytest.approx((3/4+2/3)/2)

def test_cityscapes_subsets():
    cm = confusion_matrix(ids(19, 80, 80, seed=3, ignore=0), ids(19, 80, 80), 19)
    s, dropped = Scores(cm, CITYSCAPES), [CITYSCAPES.index(n) for n in ('terrain', 'truck', 'train')]
    keep = [i for i in range(19) if i not in dropped]
    assert list(s.subset_mious) == ['19', '16', '13']
    assert s.subset_mious['16'] == pytest.approx(s.iou[keep].mean().item()) and s.subset_mious['19'] == pytest.approx(s.miou)

def test_scores_of_nothing():
    s = Scores(torch.zeros(3, 3), THREE)
    assert np.isnan(s.miou) and np.isnan(s.accuracy)
    assert 'mIoU 3 (0 there)' in s.table()
    assert Scores.from_dict(json.loads(json.dumps(s.to_dict(), allow_nan=False)), THREE).cm.sum() == 0

def test_table_lines_up():
    lines = Scores(CM[:3, :3], THREE).table().splitlines()
    head = lines[0]
    for line in lines[2:5]: assert len(line) <= len(head) and line[head.index('IoU')+2] not in ' '
    assert lines[2].split() == ['a', '66.7', '75.0', '57.1']

def test_compare_table():
    a, b = Scores(torch.diag(torch.tensor([2, 2, 0])) + torch.tensor([[0, 2, 0]]*3).triu(1), THREE), Scores(torch.diag(torch.tensor([4, 2, 0])), THREE)
    text = compare_table({'source only': a, 'DIP': b})
    assert text.splitlines()[2].split() == ['a', '50.0', '100.0', '+50.0']
    assert text.splitlines()[4].split() == ['c', '-', '-', '-']
    assert 'gain' not in compare_table({'DIP': b})
    assert 'beware' in compare_table({'a': a, 'b': Scores(b.cm, THREE, 'zero')})
    with pytest.raises(ValueError, match='different classes'): compare_table({'a': a, 'b': Scores(torch.zeros(19, 19), CITYSCAPES)})
    with pytest.raises(ValueError, match='empty'): compare_table({})

def test_json_round_trip_and_faults():
    s = Scores(ids(50, 19, 19, ignore=0), CITYSCAPES, 'zero')
    back = Scores.from_dict(json.loads(json.dumps(s.to_dict(), allow_nan=False)))
    assert (back.cm == s.cm).all() and back.absent == 'zero' and back.space is CITYSCAPES
    with pytest.raises(InputError, match="'three', not a known"): Scores.from_dict(Scores(CM[:3, :3], THREE).to_dict())
    with pytest.raises(InputError, match='not those of cityscapes13'): Scores.from_dict(s.to_dict(), CITYSCAPES13)
    with pytest.raises(InputError, match='cm missing'): Scores.from_dict({k: v for k, v in s.to_dict().items() if k != 'cm'})

# upsampling

def margin_of(logits, size):
    full = F.interpolate(logits[None].double(), size, mode='bilinear', align_corners=True)[0]
    top = full.topk(2, 0).values
    return full.argmax(0), top[0] - top[1]

@pytest.mark.parametrize('hw', [(1, 1), (1, 5), (4, 1), (5, 8), (33, 17)])
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (7, 1), (40, 63), (33, 17), (16, 8)])
def test_tiles_equal_whole(hw, size):
    logits = torch.randn(7, *hw, generator=gen())
    whole = argmax_upsampled(logits, size, tile_values=2**30)
    for values in (1, 500, 3001): assert (argmax_upsampled(logits, size, values) == whole).all()
    want, margin = margin_of(logits, size)
    assert whole.shape == size and (whole == want)[margin > 1e-4].all() and (margin > 1e-4).float().mean() > .9

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_logits(dtype):
    logits = torch.randn(5, 6, 7, generator=gen()).to(dtype)
    want, margin = margin_of(logits, (30, 31))
    assert (argmax_upsampled(logits, (30, 31)) == want)[margin > 1e-4].all()

def test_minus_infinity_never_wins():
    logits = torch.randn(4, 5, 6, generator=gen())
    logits[2] = -torch.inf
    got = argmax_upsampled(logits, (21, 33))
    assert (got != 2).all() and (got == argmax_upsampled(logits[[0, 1, 3]], (21, 33)).apply_(lambda i: (0, 1, 3)[i])).all()
    assert (argmax_upsampled(torch.full((4, 2, 2), -torch.inf), (5, 5)) == 0).all()

def test_ties_go_to_the_lowest(): assert (argmax_upsampled(torch.ones(6, 3, 3), (10, 10)) == 0).all()

def test_memory_is_bounded():
    "A Cityscapes image: 19 enlarged planes would be 160 MB."
    from torch.profiler import ProfilerActivity, profile
    logits = torch.randn(19, 128, 256, generator=gen())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: argmax_upsampled(logits, (1024, 2048))
    biggest = max(e.cpu_memory_usage for e in prof.events())
    assert 16e6 <= biggest < 40e6    # the answer itself is 16 MB

# data sets

def scene(H, W, seed=0):
    blocks = torch.randint(0, 19, (1, 1, 4, 4), generator=gen(seed)).float()
    label = F.interpolate(blocks, (H, W), mode='nearest')[0, 0].long()
    label[-3:] = IGNORE
    return torch.from_numpy(colorize(label, CITYSCAPES)).permute(2, 0, 1).contiguous(), label

def by_colour(images):
    palette = torch.tensor(CITYSCAPES.palette).float()
    return -(images.float()[:, None] - palette[None, :, :, None, None]).square().sum(2)

class Scenes:
    space, names = CITYSCAPES, ['ulm/0', 'ulm/1', 'bonn/2', 'bonn/3', 'bonn/4']
    def __len__(self): return 5
    def __getitem__(self, i):
        if i >= 5: raise IndexError
        return scene(40+8*i, 60-4*i, seed=i)

def test_perfect_segmenter():
    s = evaluate(by_colour, Scenes(), progress=False)
    assert s.accuracy == 1 and s.miou == 1 and s.cm.sum() == sum((l != IGNORE).sum() for _, l in Scenes())

def test_scored_at_label_resolution():
    "A coarse answer is enlarged to the label: the score equals the one of the untiled plain way."
    def coarse(x): return F.interpolate(by_colour(x), scale_factor=.25, mode='bilinear', align_corners=True)
    s = evaluate(coarse, Scenes(), progress=False)
    plain = lambda x, l: F.interpolate(coarse(x[None]), tuple(l.shape), mode='bilinear', align_corners=True)[0].argmax(0)
    want = sum(confusion_matrix(plain(x, l), l, 19) for x, l in Scenes())
    assert 0 < s.miou < 1 and (s.cm - want).abs().sum() <= 4

def test_workers_change_nothing():
    assert (evaluate(by_colour, Scenes(), progress=False, workers=2).cm == evaluate(by_colour, Scenes(), progress=False).cm).all()

def test_no_gradients_kept():
    net = torch.nn.Conv2d(3, 19, 1)
    seen = []
    def segment(x):
        seen.append(net(x.float()))
        return seen[-1]
    evaluate(segment, Scenes(), progress=False)
    assert not any(t.requires_grad for t in seen)

def test_evaluate_faults():
    with pytest.raises(InputError, match='empty'): evaluate(by_colour, [], CITYSCAPES, progress=False)
    with pytest.raises(ValueError, match='gives 19 classes; camvid has 11'): evaluate(by_colour, Scenes(), CAMVID, progress=False)
    class Bad(Scenes):
        def __getitem__(self, i): return scene(20, 20)[0], scene(20, 24)[1]
    with pytest.raises(InputError, match=r'ulm/0: the image is \(20, 20\) but its label is \(20, 24\)'): evaluate(by_colour, Bad(), progress=False)

TWO = '''
import sys; sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from protonb.evaluation import evaluate
from test_evaluation import Scenes, by_colour
acc = Accelerator(cpu=True)
assert acc.num_processes == 2
s = evaluate(by_colour, Scenes(), progress=False, accelerator=acc)
assert s.cm.dtype.is_floating_point is False
print('COUNTS', acc.process_index, int(s.cm.sum()), s.accuracy, flush=True)
'''

def test_two_processes_add_up(tmp_path):
    "Five images over two processes: each is counted once, and both know the sum."
    import socket
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = str(sock.getsockname()[1])
    (tmp_path/'two.py').write_text(TWO)
    env = dict(os.environ, WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='',
               ACCELERATE_USE_CPU='true')
    jobs = [subprocess.Popen([sys.executable, str(tmp_path/'two.py'), str(Path(__file__).parent)], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    try: outs = [j.communicate(timeout=100)[0] for j in jobs]
    finally: [j.kill() for j in jobs]
    want = int(sum((l != IGNORE).sum() for _, l in Scenes()))
    for r, out in enumerate(outs): assert f'COUNTS {r} {want} 1.0' in out, out

def test_accelerator_alone():
    from accelerate import Accelerator
    assert evaluate(by_colour, Scenes(), progress=False, accelerator=Accelerator(cpu=True)).accuracy == 1

# files

def items(n=3): return [(Scenes.names[i], Scenes()[i][0]) for i in range(n)]

def test_predict_files(tmp_path):
    assert predict_files(by_colour, items(), tmp_path, CITYSCAPES, progress=False) == dict(written=3, skipped=0)
    image, label = Scenes()[0]
    paths = output_paths(tmp_path, 'ulm/0')
    raw, col, over = (Image.open(paths[k]) for k in ('trainIds', 'color', 'overlay'))
    assert (raw.mode, col.mode, over.mode) == ('L', 'P', 'RGB')
    want = label_map(by_colour, image).numpy()
    assert (np.asarray(raw) == want).all() and (np.asarray(col) == want).all()
    assert (np.asarray(col.convert('RGB')) == colorize(want, CITYSCAPES)).all()
    assert abs(np.asarray(over).astype(float) - (image.permute(1, 2, 0).numpy()/2 + colorize(want, CITYSCAPES)/2)).max() <= .5
    assert len(list(tmp_path.rglob('*'))) == 9 + 2    # nothing else is left behind

def test_palette_png_shows_void_black():
    im = palette_png(torch.tensor([[0, 255]]), CITYSCAPES)
    assert np.asarray(im).tolist() == [[0, 255]] and im.convert('RGB').getpixel((1, 0)) == (0, 0, 0)

def test_predict_resumes(tmp_path):
    calls = []
    def counting(x):
        calls.append(1)
        return by_colour(x)
    predict_files(counting, items(), tmp_path, CITYSCAPES, progress=False)
    output_paths(tmp_path, 'ulm/1')['overlay'].unlink()
    assert predict_files(counting, items(), tmp_path, CITYSCAPES, progress=False) == dict(written=1, skipped=2) and len(calls) == 4
    assert predict_files(counting, items(), tmp_path, CITYSCAPES, overwrite=True, progress=False) == dict(written=3, skipped=0)

def test_predict_reads_files_and_names_the_broken_one(tmp_path):
    whole, cut = tmp_path/'a.png', tmp_path/'b.png'
    Image.fromarray(Scenes()[0][0].permute(1, 2, 0).numpy()).save(whole)
    cut.write_bytes(whole.read_bytes()[:200])
    out = tmp_path/'out'
    with pytest.raises(InputError, match=r'b\.png: is damaged or no picture'):
        predict_files(by_colour, [('a', whole), ('b', cut)], out, CITYSCAPES, progress=False)
    assert sorted(p.name for p in out.rglob('*')) == ['a_color.png', 'a_overlay.png', 'a_trainIds.png']
    for bad in (tmp_path/'none.png', tmp_path, Path(__file__)):
        with pytest.raises(InputError, match=bad.name): predict_files(by_colour, [('x', bad)], out, CITYSCAPES, progress=False)
    with pytest.raises(InputError, match='x: got float64'): predict_files(by_colour, [('x', np.zeros((4, 4, 3)))], out, CITYSCAPES, progress=False)

def test_grey_image_is_read(tmp_path):
    Image.new('L', (8, 6), 70).save(tmp_path/'g.png')
    assert predict_files(by_colour, [('g', tmp_path/'g.png')], tmp_path/'o', CITYSCAPES, progress=False)['written'] == 1

def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('in the way')
    with pytest.raises(InputError, match='cannot'): predict_files(by_colour, items(1), tmp_path/'file', CITYSCAPES, progress=False)

@pytest.mark.parametrize('name', ['../x', '/etc/x', 'a/../../x', ''])
def test_names_stay_inside(tmp_path, name):
    with pytest.raises(InputError): output_paths(tmp_path, name)

@pytest.mark.skipif(not DATA.exists(), reason='needs ../shared/data')
def test_real_label_against_itself():
    label = torch.from_numpy(np.array(Image.open(next((DATA/'camvid'/'valannot').glob('*.png'))))).long()
    s = Scores(confusion_matrix(label.clamp(max=10), torch.where(label == 11, 255, label), 11), CAMVID)
    assert s.accuracy == 1 and s.miou == 1

# other scores

@pytest.mark.parametrize('absent,accuracy,precision', [('skip_both', (3/4+1)/2, (1+2/3)/2), ('skip_gt', (3/4+1)/2, (1+2/3)/2),
                                                       ('zero', (3/4+1)/3, (1+2/3)/3)])
def test_a_class_that_is_not_there_counts_as_the_rule_has_it(absent, accuracy, precision):
    s = Scores(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), THREE, absent)
    assert s.mean_class_accuracy == pytest.approx(accuracy) and s.mean_class_precision == pytest.approx(precision)
    assert s.frequency_weighted_iou == pytest.approx(4/6*3/4 + 2/6*2/3)
    assert s.to_dict()['mean_class_precision'] == pytest.approx(precision, abs=1e-6)

def test_precision_and_weighted_iou_against_scikit_learn():
    from sklearn.metrics import jaccard_score, precision_score
    truth, guess = ids(19, 40, 60, ignore=0).flatten(), ids(19, 40, 60, seed=3, ignore=0).flatten()
    truth[truth == 4] = 5
    s = Scores(confusion_matrix(guess[None], truth[None], 19), CITYSCAPES)
    want = precision_score(truth, guess, average=None, labels=range(19))
    np.testing.assert_allclose(s.class_precision.numpy(), want)
    weighted = jaccard_score(truth, guess, average='weighted')
    assert s.frequency_weighted_iou == pytest.approx(weighted) and s.to_dict()['frequency_weighted_iou'] == pytest.approx(weighted, abs=1e-6)

def test_a_class_predicted_nowhere_has_no_precision():
    s = Scores(torch.tensor([[3, 0, 0], [2, 0, 0], [0, 0, 0]]), THREE)
    assert s.class_precision[0] == 3/5 and s.class_precision[1:].isnan().all() and s.class_accuracy[:2].tolist() == [1, 0]
    assert np.isnan(Scores(torch.zeros(3, 3), THREE).frequency_weighted_iou) and np.isnan(Scores(torch.zeros(3, 3), THREE, 'zero').frequency_weighted_iou)
