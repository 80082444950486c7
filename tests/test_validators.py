"Scores that need no labels: each against a plain form, in the corners, and from the command line."
import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_cli import fails

from protonb.cli import main
from protonb.core import InputError
from protonb.deeplab import iapc_small, pbal_small
from protonb.dip_net import dip_small
from protonb.evaluation import confusion_matrix, iou
from protonb.feeding import Feed, segmenter
from protonb.methods import Job, judge_of, train
from protonb.mixteacher import MixTeacher
from protonb.pseudo_labels import Unlabelled
from protonb.prototypes import Prototypes
from protonb.runs import METHODS, open_run, space_to_dict
from protonb.source_only import SourceOnly
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.training import Train, checkpoint_info, checkpoints, judged_by, read_states
from protonb.transforms import Augment
from protonb.validation import candidates
from protonb.validators import (VALIDATORS, Look, information_maximisation, looks, mean_entropy, neighbourhood_density, prototype_margin, rank_correlation,
                                regret, teacher_agreement, validate, view_agreement)
from protonb.windows import Window

SIZE = (65, 97)


def looked(n=40, K=5, C=7, parts=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = lambda: torch.randint(0, K, (n,), generator=g)
    return [Look((3*torch.randn(n, K, generator=g)).softmax(1), torch.randn(n, C, generator=g), ids(), ids()) for _ in range(parts)]


def cat(parts, name): return torch.cat([getattr(s, name) for s in parts])


# ------------------------------------------------------------------------------------------------ the scores

def test_entropies_are_their_definition():
    parts = looked()
    p = cat(parts, 'probabilities').double()
    mean = -(p*p.log()).sum(1).mean()
    assert mean_entropy(iter(parts)) == pytest.approx(-mean.item(), rel=1e-9)
    assert information_maximisation(iter(parts)) == pytest.approx((-(p.mean(0)*p.mean(0).log()).sum()-mean).item(), rel=1e-9)
    uneven = [Look(s.probabilities[:7*i+1], None, None) for i, s in enumerate(parts)]            # each pixel counts the same
    p = cat(uneven, 'probabilities').double()
    assert mean_entropy(uneven) == pytest.approx((p*p.log()).sum(1).mean().item(), rel=1e-9)


def test_density_is_its_definition():
    parts = looked()
    f = F.normalize(cat(parts, 'probabilities').double(), dim=1)
    for tau in (.05, .5):
        p = (f@f.T/tau).fill_diagonal_(-math.inf).softmax(1)
        assert neighbourhood_density(iter(parts), tau) == pytest.approx(torch.special.entr(p).sum(1).mean().item(), abs=1e-5)


def test_agreements_are_their_definition():
    parts = looked()
    for score, name in ((view_agreement, 'view'), (teacher_agreement, 'teacher')):
        a, b = cat(parts, 'labels'), cat(parts, name)
        both = [((a == k) & (b == k)).sum()/((a == k) | (b == k)).sum() for k in range(5)]
        assert score(iter(parts)) == pytest.approx(torch.stack(both).mean().item(), abs=1e-6)
        assert score(parts) == pytest.approx(iou(confusion_matrix(a, b, 5)).nanmean().item())


def test_margin_is_its_definition():
    parts = looked()
    f, y = cat(parts, 'features').double(), cat(parts, 'labels')
    P = F.normalize(torch.stack([f[y == k].mean(0) for k in y.unique()]), dim=1)
    top = (F.normalize(f, dim=1)@P.T).sort(1, descending=True).values
    assert prototype_margin(iter(parts)) == pytest.approx((top[:, 0]-top[:, 1]).mean().item(), abs=1e-5)


def test_better_is_higher():
    "Surer predictions, tighter clouds, equal opinions."
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (200,), generator=g)
    def made(noise):
        z = 6*F.one_hot(y, 4)+noise*torch.randn(200, 4, generator=g)
        return [Look(z.softmax(1), z, (z+noise*torch.randn(200, 4, generator=g)).argmax(1), y)]
    good, bad = made(.3), made(6.)
    for name, score in VALIDATORS.items(): assert score(good) > score(bad) or name == 'entropy', name
    soft = [Look((good[0].features/8).softmax(1), good[0].features, y, y)]
    assert mean_entropy(good) > mean_entropy(soft)


def test_one_class_for_everything():
    one = [Look(torch.eye(3)[[1]*9], torch.ones(9, 4), torch.ones(9).long(), torch.ones(9).long())]
    got = {n: v(one) for n, v in VALIDATORS.items()}
    assert got == pytest.approx(dict(entropy=0, information=0, density=math.log(8), views=1, margin=0, teacher=1), abs=1e-5)
    single = [Look(torch.eye(3)[[1]], torch.ones(1, 4), torch.ones(1).long())]
    assert neighbourhood_density(single) == 0 and prototype_margin(single) == 0


@pytest.mark.parametrize('score', VALIDATORS.values(), ids=VALIDATORS)
def test_nothing_was_looked_at(score):
    with pytest.raises(InputError, match='nothing to (validate|compare)'): score([])


def test_a_second_opinion_is_needed():
    with pytest.raises(InputError, match='looked at twice'): teacher_agreement([Look(torch.eye(3), torch.eye(3), torch.arange(3))])


# ------------------------------------------------------------------------------------------------ looking

@pytest.fixture(scope='module')
def scenes(): return Streets(REAL, 5, size=SIZE, seed=1)


def test_looks_at_the_same_pixels_each_time(scenes):
    net = segmenter(pbal_small(num_classes=19))
    a, b, c = (list(looks(net, scenes, pixels=100, images=4, seed=s)) for s in (0, 0, 1))
    assert [len(s.labels) for s in a] == [25]*4
    assert all(torch.equal(x.features, y.features) and torch.equal(x.view, y.view) for x, y in zip(a, b))
    assert not torch.equal(a[0].features, c[0].features)
    z, f = net.net(torch.zeros(1, 3, *SIZE), features=True)
    assert a[0].features.shape[1] == f.shape[1] and a[0].probabilities.shape[1] == 19


@pytest.mark.parametrize('feed', [Feed(), Feed(height=33), Feed(enlarge='centred')], ids=str)
def test_the_network_is_fed_as_at_test_time(scenes, feed):
    net = segmenter(iapc_small(num_classes=19), feed)
    s, = looks(net, scenes, pixels=10**6, images=1)
    z = net.grid(F.interpolate(scenes[0][0][None].float(), net.base(SIZE), mode='bicubic', antialias=True).clamp(0, 255) if feed.height else scenes[0][0][None])
    want, got = (p.sort(0)[0] for p in (z[0].flatten(1).T.softmax(1), s.probabilities))       # every pixel, in an order of its own
    torch.testing.assert_close(got, want)


def test_networks_with_prototypes_and_plain_functions(scenes):
    net, K = dip_small(num_classes=None), 19
    counts = torch.ones(K).long()
    counts[3] = 0                                       # a class without an image is never predicted
    P = Prototypes(torch.randn(K, net.channels, generator=torch.Generator().manual_seed(0)), counts, scenes.space.classes, {})
    s, = looks(segmenter(net, prototypes=P), scenes, pixels=100, images=1)
    assert s.features.shape == (100, net.channels) and not s.probabilities[:, 3].any()
    assert all(map(math.isfinite, validate(segmenter(net, prototypes=P), scenes, pixels=300).values()))
    plain = lambda images: torch.stack([images.float().mean(1), 255-images.float().mean(1)], 1)[..., ::4, ::4]
    got = validate(plain, scenes, pixels=200, teacher=plain)
    assert set(got) == set(VALIDATORS) and got['teacher'] == 1 and got == validate(plain, scenes, pixels=200, teacher=plain)


def test_empty_data(scenes):
    for how in (dict(images=0), dict(pixels=0)):
        with pytest.raises(InputError, match='the data set is empty'): validate(segmenter(pbal_small(num_classes=19)), scenes, **how)
    with pytest.raises(InputError, match='the data set is empty'): validate(segmenter(pbal_small(num_classes=19)), [])


def test_a_second_network_that_is_the_first(scenes):
    net = segmenter(pbal_small(num_classes=19))
    assert validate(net, scenes, teacher=net, pixels=500)['teacher'] == 1


# ------------------------------------------------------------------------------------------------ ranks

def test_rank_correlation_and_regret():
    scipy = pytest.importorskip('scipy.stats')
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randint(0, 6, (9,), generator=g).tolist(), torch.randn(9, generator=g).tolist()
        assert rank_correlation(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic, abs=1e-12)
    assert regret([1, 3, 2], [5., 4., 7.]) == 3 and regret([1], [5.]) == 0
    assert math.isnan(rank_correlation([1, 1], [2, 3]))


# ------------------------------------------------------------------------------------------------ the command

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A run of source-only with two checkpoints, one of MixTeacher, which has a teacher."
    out, source, target = tmp_path_factory.mktemp('runs'), Streets(SYNTHETIC, 4, size=SIZE, seed=0), Streets(REAL, 4, size=SIZE, seed=1)
    about = dict(net='pbal_small', space=space_to_dict(source.space))
    run = Train(steps=4, batch_size=2, checkpoint_every=2)
    make = lambda: pbal_small(num_classes=19)
    train(Job(METHODS['source-only'], SourceOnly(augment=Augment(crop_height=65, crop_width=97)), run, out/'plain', make(), source, None, make, about, progress=False))
    cfg = MixTeacher(window=Window(low=1., high=1., crop_height=65, crop_width=97, flip_p=.5, pad=True))
    train(Job(METHODS['mixteacher'], cfg, run, out/'mix', make(), source, Unlabelled(target), make, about, progress=False))
    return out


DATA = ['--data', 'streets:real,size=65x97', '--images', '2', '--pixels', '200']


def test_candidates(home):
    (one, second), = candidates(open_run(home/'mix'))
    assert one.step == 4 and any(not a.equal(b) for a, b in zip(one.net.parameters(), second.net.parameters()))
    assert [(r.step, s) for r, s in candidates(open_run(home/'plain'), every=True)] == [(2, None), (4, None)]


def test_rows_ranks_json_and_csv(home, capsys, tmp_path):
    command = ['validate', str(home/'plain'), str(home/'mix'), *DATA, '--checkpoints', '--by', 'density']
    assert main([*command, '--json', '--out', str(tmp_path/'rows.csv')]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 4 and [r['density'] for r in rows] == sorted((r['density'] for r in rows), reverse=True)
    assert all((r['teacher'] is None) == r['run'].endswith('plain') and 0 <= r['miou'] <= 100 for r in rows)
    with open(tmp_path/'rows.csv') as f: assert [(r['run'], int(r['step'])) for r in csv.DictReader(f)] == [(r['run'], r['step']) for r in rows]
    assert main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 7 and said[0].split() == ['run', 'stage', 'step', *VALIDATORS, 'miou'] and 'ranked by density' in said[-1]


def test_images_without_labels(home, capsys, tmp_path):
    for i in range(2): Image.fromarray(Streets(REAL, 2, size=SIZE, seed=1)[i][0].permute(1, 2, 0).numpy()).save(tmp_path/f'{i}.png')
    assert main(['validate', str(home/'plain'), '--data', f'images:{tmp_path}', '--pixels', '200']) == 0
    said = capsys.readouterr().out
    assert 'miou' not in said and '2 of 2 images without labels' in said


def test_bad_input_is_one_line(home, capsys, tmp_path):
    fails(['validate', home/'none', *DATA], capsys, home/'none', 'no such run folder')
    fails(['validate', tmp_path, *DATA], capsys, tmp_path, 'not a run folder and holds none')
    fails(['validate', home, home/'plain', *DATA], capsys, 'named twice')
    fails(['validate', home/'plain', home/'plain', *DATA], capsys, 'named twice')
    fails(['validate', home/'plain', *DATA, '--by', 'teacher'], capsys, '--by teacher', 'no checkpoint holds a second network')
    fails(['validate', home/'plain', *DATA, '--by', 'luck'], capsys, 'luck')
    fails(['validate', home/'plain', '--data', f'images:{tmp_path}/nothing'], capsys, 'nothing')
    fails(['validate', home/'plain', *DATA, '--out', tmp_path], capsys, '--out', 'is a folder')
    fails(['validate', home/'plain', *DATA, '--images', '0'], capsys, 'images')


# ------------------------------------------------------------------------------------------------ the best checkpoint of a run

def mix(folder, best='density', steps=6, target=None, **more):
    "MixTeacher on a few scenes; a checkpoint every two steps."
    source = Streets(SYNTHETIC, 4, size=SIZE, seed=0)
    cfg = MixTeacher(alpha=.5, lr=1e-2, warm=1, window=Window(low=1., high=1., crop_height=65, crop_width=97, flip_p=.5, pad=True))
    torch.manual_seed(0)
    net = pbal_small(num_classes=19)
    run = Train(steps=steps, batch_size=2, checkpoint_every=2, best=best, keep=9)
    about = dict(net='pbal_small', space=space_to_dict(source.space))
    return Job(METHODS['mixteacher'], cfg, run, folder, net, source, target or Unlabelled(Streets(REAL, 4, size=SIZE, seed=1)), None, about, progress=False, **more)


def weights(path): return read_states(path, ['net'])['net']


def test_the_best_of_all_checkpoints_is_kept(tmp_path):
    train(mix(tmp_path/'a'))
    judge, scores = judge_of(mix(tmp_path/'a')), {}
    for step, path in checkpoints(tmp_path/'a', 'mixteacher'):
        net = pbal_small(num_classes=19)
        net.load_state_dict(weights(path))
        scores[step] = judge(dict(net=net))
    info, run = checkpoint_info(tmp_path/'a/best/density'), open_run(tmp_path/'a/best/density')
    assert info['score'] == max(scores.values()) and info['step'] == run.step == max(scores, key=scores.get) and len(set(scores.values())) == 3
    assert all(v.equal(weights(tmp_path/'a/checkpoints'/f'mixteacher-{run.step:07d}')[k]) for k, v in run.net.state_dict().items())
    assert validate(run.segment, Unlabelled(Streets(REAL, 4, size=SIZE, seed=1)), images=32)['density'] == info['score']


def test_judging_changes_nothing(tmp_path):
    for name, best in (('a', 'views'), ('b', '')): train(mix(tmp_path/name, best))
    a, b = (weights(tmp_path/n/'checkpoints/mixteacher-0000006') for n in 'ab')
    assert all(v.equal(b[k]) for k, v in a.items()) and not (tmp_path/'b/best').exists()
    assert (tmp_path/'a/metrics.csv').read_text() == (tmp_path/'b/metrics.csv').read_text()


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    train(mix(home := tmp_path_factory.mktemp('unbroken')/'run'))
    return home


@pytest.mark.parametrize('when', ['while judging', 'before the checkpoint', 'after it'])
def test_killed_and_started_again_keeps_the_same(tmp_path, unbroken, when, monkeypatch):
    "Killed at the second checkpoint: before, between and after what is written."
    from protonb import training
    class Killed(BaseException): pass
    name = dict([('while judging', '_keep_best'), ('before the checkpoint', '_keep_best'), ('after it', '_tidy')])[when]
    real, calls = getattr(training, name), []
    def dies(run, *args):
        calls.append(run.done)
        if when != 'while judging' or run.done != 4: real(run, *args)
        if run.done == 4: raise Killed
    monkeypatch.setattr(training, name, dies)
    with pytest.raises(Killed): train(mix(tmp_path/'cut'))
    monkeypatch.setattr(training, name, real)
    train(mix(tmp_path/'cut'))
    a, b = (checkpoint_info(run/'best/density') for run in (unbroken, tmp_path/'cut'))
    assert 4 in calls and (a['step'], a['score']) == (b['step'], b['score'])
    assert all(v.equal(weights(tmp_path/'cut/best/density/checkpoints'/f'mixteacher-{a["step"]:07d}')[k])
               for k, v in weights(unbroken/'best/density/checkpoints'/f'mixteacher-{a["step"]:07d}').items())


def test_who_cannot_be_judged_is_told_before_anything_is_written(tmp_path, capsys):
    common = ['--source', 'streets:synthetic,size=65x97', '--steps', '2', '--batch-size', '2', '--crop-height', '65', '--crop-width', '97', '--best', 'views']
    fails(['train', 'source-only', *common, '--net', 'pbal_small', '--out', tmp_path/'a'], capsys, '--best views', 'no target images', out=tmp_path/'a'/'checkpoints')
    fails(['train', 'dip', *common, '--target', 'streets:real,size=65x97', '--net', 'dip_small', '--shots', '1', '--allow-missing', '--out', tmp_path/'b'], capsys,
          '--best views', 'classifier', out=tmp_path/'b'/'checkpoints')
    fails(['train', 'source-only', *common[:-1], 'luck', '--net', 'pbal_small', '--out', tmp_path/'c'], capsys, 'luck', out=tmp_path/'c')


def test_the_names_that_training_takes_are_those_of_the_validators():
    from typing import get_args, get_type_hints
    assert set(get_args(get_type_hints(Train)['best'])) == {'', *VALIDATORS} - {'teacher'}
    with judged_by(len): pass
