"""The report: one file, nothing from elsewhere, any part may be missing, no text becomes markup."""
import base64, io, re
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from protonb.core import InputError
from protonb.evaluation import Scores, confusion_matrix
from protonb.labels import CAMVID, CITYSCAPES, ClassSpace
from protonb.pictures import (class_ids, cosine_matrix, image_miou, mistakes, pca_2d, plot_confusion, plot_curves, plot_iou_bars, plot_projection,
                              plot_similarity, running_mean, series, show_legend, show_panel, style)
from protonb.report import data_uri, el, in_words, mix_ups, write_report

THREE = ClassSpace('three', ('a', 'b', '<c>'), ((9, 0, 0), (0, 9, 0), (0, 0, 9)))

def gen(seed=0): return torch.Generator().manual_seed(seed)
def label(K, *shape, seed=0): return torch.randint(0, K, shape, generator=gen(seed))
def some_scores(space=CITYSCAPES, seed=1, right=.5, absent='skip_both'):
    K = space.num_classes
    truth, other = label(K, 60, 60), label(K, 60, 60, seed=seed)
    return Scores(confusion_matrix(torch.where(torch.rand(60, 60, generator=gen(seed)) < right, truth, other), truth, K), space, absent)
def panel(name='one', H=30, W=60, K=19, methods=('source only', 'DIP'), truth=True):
    y = label(K, H, W)
    y[:2] = 255
    image = torch.randint(0, 255, (3, H, W), generator=gen(), dtype=torch.uint8)
    return name, image, y if truth else None, {m: label(K, H, W, seed=5+i) for i, m in enumerate(methods)}

class Checker(HTMLParser):
    "Every element closed in order; collects tags and what they load."
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.loads, self.text = [], [], [], []
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ('src', 'srcset', 'href', 'data', 'action') and v]
        self.loads += [u for k, v in attrs if k == 'style' for u in re.findall(r'url\(([^)]*)\)', v)]
        if tag not in ('img', 'input', 'meta', 'source', 'br'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)

def read(path):
    text = Path(path).read_text(encoding='utf-8')
    page = Checker()
    page.feed(text)
    assert not page.open
    assert all(u.startswith(('data:image/png;base64,', 'data:image/jpeg;base64,', '#')) for u in page.loads), [u[:60] for u in page.loads]
    assert not {'script', 'link', 'iframe', 'object'} & set(page.tags)
    assert 'http' not in text and '@import' not in text
    return text, page

@pytest.fixture
def out(tmp_path): return tmp_path/'report.html'

def everything():
    t = list(range(1, 40))
    return dict(title='All', summary='Words.', scores={'source only': some_scores(), 'DIP': some_scores(right=.8)}, panels=[panel(), panel('two')],
                curves=dict(stage_a=dict(loss=(t, [1/i for i in t])), stage_b=dict(loss=(t, [2/i for i in t]), lr=(t, t))),
                prototypes=torch.randn(19, 8, generator=gen()), features=dict(source=(torch.randn(80, 8, generator=gen()), label(19, 80))),
                config=dict(seed=0, train=dict(steps=5)), commands=['protonb demo'], versions=dict(torch='2'))

def test_everything(out):
    write_report(out, **everything())
    text, page = read(out)
    for part in ('Result', 'Pictures', 'Classes', 'Training', 'Prototypes', 'Set-up'): assert f'<h2>{part}</h2>' in text
    assert len(text) < 4e6
    s = everything()['scores']
    assert f'{100*s["DIP"].miou:.1f}' in text and f'+{100*(s["DIP"].miou-s["source only"].miou):.1f}' in text
    for target in re.findall(r'href="#([^"]+)"', text): assert f'id="{target}"' in text
    assert [p.name for p in out.parent.iterdir()] == ['report.html']
    kinds = set()
    for u in page.loads:                   # every picture inside is whole
        if u.startswith('data:'):
            im = Image.open(io.BytesIO(base64.b64decode(u.split(',', 1)[1])))
            im.load()
            kinds.add(im.format)
    assert 'PNG' in kinds

@pytest.mark.parametrize('missing', ['summary', 'scores', 'panels', 'curves', 'prototypes', 'features', 'config', 'commands', 'versions'])
def test_any_part_may_be_missing(out, missing):
    parts = everything()
    heavy = {'curves', 'prototypes'} - {missing}
    for k in heavy: parts.pop(k)    # the figures take the time
    parts.pop(missing, None)
    write_report(out, **parts)
    read(out)

def test_nothing_but_a_title(out):
    write_report(out, title='Bare')
    assert 'Bare' in read(out)[0]

def test_same_input_same_file(tmp_path):
    t = list(range(9))
    for n in 'ab': write_report(tmp_path/n, **{**everything(), 'curves': dict(loss=(t, t)), 'prototypes': None})
    assert (tmp_path/'a').read_bytes() == (tmp_path/'b').read_bytes()

def test_text_never_becomes_markup(out):
    evil = '<script>alert("1")</script>&\'"><img src=x onerror=y>'
    t = [1, 2, 3]
    write_report(out, title=evil, summary=evil, scores={evil: some_scores(THREE), evil+'2': some_scores(THREE, right=.9)},
                 panels=[panel(evil, K=3, methods=(evil,))], curves={evil: {'loss<b>': (t, t)}}, config={evil: {evil: evil}}, commands=[evil],
                 versions={evil: evil})
    text, page = read(out)
    assert '<script' not in text and 'onerror=y>' not in text.replace('onerror=y&gt;', '')
    assert ''.join(page.text).count(evil) >= 8

@pytest.mark.parametrize('absent', ['skip_both', 'zero', 'skip_gt'])
def test_absent_classes(out, absent):
    cm = torch.zeros(19, 19, dtype=torch.int64)
    cm[0, 0], cm[13, 0], cm[13, 13], cm[0, 5] = 90, 5, 20, 3
    write_report(out, title='few', scores={'a': Scores(cm, CITYSCAPES, absent), 'b': Scores(cm+torch.eye(19).long()*(cm > 0), CITYSCAPES, absent)})
    assert 'nan' not in ''.join(read(out)[1].text)

def test_scores_without_any_pixel(out):
    empty = Scores(torch.zeros(19, 19), CITYSCAPES)
    write_report(out, title='none', scores={'a': empty, 'b': empty})
    assert 'nan' not in ''.join(read(out)[1].text)

def test_one_method_has_no_gain(out):
    write_report(out, title='one', scores={'DIP': some_scores()})
    text = read(out)[0]
    assert '<th>gain</th>' not in text and 'points</span>' not in text

def test_three_methods_and_other_classes(out):
    names = ('source only', 'DIP', 'oracle')
    write_report(out, title='three', scores={n: some_scores(CAMVID, right=.4+.2*i) for i, n in enumerate(names)}, panels=[panel(K=11, methods=names)])
    text = read(out)[0]
    assert text.count('class="card"') == 3 and 'bicyclist' in text and 'sidewalk' not in text

def test_large_and_many_images_stay_small(out):
    y = label(19, 16, 32).repeat_interleave(40, 0).repeat_interleave(40, 1)
    image = (np.add.outer(np.arange(640), np.arange(1280))[..., None] % (211, 223, 227)).astype(np.uint8)
    rows = [(f'{i}', image, y, {'a': y, 'b': y.roll(9, 1), 'c': y.roll(40, 0)}) for i in range(14)]
    write_report(out, title='large', panels=rows)
    text = read(out)[0]
    assert len(text) < 4e6 and text.count('class="row"') == 12 and '12 of 14 images' in text

@pytest.mark.parametrize('H,W', [(1, 1), (3, 700), (700, 3)])
def test_odd_image_sizes(out, H, W):
    write_report(out, title='odd', panels=[panel(H=H, W=W)])
    read(out)

def test_no_truth(out):
    write_report(out, title='unlabelled', panels=[panel(truth=False)])
    assert 'class="err"' not in read(out)[0]

def test_mistake_layer_is_exact(out):
    name, image, truth, preds = panel(methods=('m',))
    write_report(out, title='x', panels=[(name, image, truth, preds)])
    uri = re.search(r'src="data:image/png;base64,([^"]+)" class="err"', Path(out).read_text())[1]
    got = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert('RGBA'))[..., 3] > 0
    assert (got == ((preds['m'] != truth) & (truth != 255)).numpy()).all()

@pytest.mark.parametrize('P', [torch.zeros(19, 4), torch.eye(19)[:1].expand(19, 19)*torch.eye(19)[:, :1], torch.full((19, 4), torch.nan)])
def test_too_few_prototypes_are_left_out(out, P):
    write_report(out, title='p', prototypes=P, scores={'a': some_scores()})
    assert '<h2>Prototypes</h2>' not in read(out)[0]

def test_two_prototypes_are_enough(out):
    P = torch.zeros(19, 4)
    P[0, 0], P[5, 1] = 1, 2
    write_report(out, title='p', prototypes=P)
    assert 'Closest pair: road and pole, cosine 0.00' in read(out)[0]

def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('in the way')
    with pytest.raises(InputError): write_report(tmp_path/'file'/'report.html', title='x')

def test_failure_leaves_the_old_file(out):
    out.write_text('old')
    with pytest.raises(Exception): write_report(out, title='x', panels=[('a', 'not an image', None, {})])
    assert out.read_text() == 'old' and len(list(out.parent.iterdir())) == 1

def test_pyplot_is_left_alone(out):
    import matplotlib.pyplot as plt
    plt.rcdefaults()
    before, open_before = dict(plt.rcParams), plt.get_fignums()
    write_report(out, title='x', prototypes=torch.randn(5, 3, generator=gen()), space=ClassSpace('5', tuple('abcde'), ((0, 0, 0),)*5))
    assert plt.get_fignums() == open_before and dict(plt.rcParams) == before

def test_words():
    a, b = some_scores(right=.3), some_scores(right=.9)
    assert 'above a: better in 19 of 19 classes, worse in none. It gains most on' in in_words({'a': a, 'b': b})
    assert 'below b: better in 0 of 19' in in_words({'b': b, 'a': a})

def test_mix_ups_by_hand():
    cm = torch.tensor([[80, 20, 0], [3, 97, 0], [6, 0, 4]])
    assert mix_ups(Scores(cm, THREE)) == [(0, 1, .2), (2, 0, .6)]

def test_data_uri_of_a_small_image_is_png(): assert data_uri(Image.new('RGB', (9, 9)), lossy=True).startswith('data:image/png')
def test_element_attributes(): assert el('img', src='a"b', alt=None) == '<img src="a&quot;b">'

# pictures

@pytest.fixture
def plt():
    import matplotlib
    matplotlib.use('Agg')
    matplotlib.rcdefaults()
    import matplotlib.pyplot as plt
    yield plt
    plt.close('all')

@pytest.mark.parametrize('dark', [False, True])
def test_every_picture_draws_on_given_axes(plt, dark):
    s = {'a': some_scores(), 'b': some_scores(right=.9)}
    P = torch.randn(19, 8, generator=gen())
    with style(dark):
        for draw in (lambda ax: plot_iou_bars(s, ax), lambda ax: plot_confusion(s['a'], ax), lambda ax: plot_similarity(P, CITYSCAPES, ax),
                     lambda ax: plot_projection(P, CITYSCAPES, ax=ax), lambda ax: plot_curves(dict(x=([1, 2], [3, 4])), ax=ax),
                     lambda ax: show_legend(CITYSCAPES, ax=ax)):
            fig, ax = plt.subplots()
            assert draw(ax) is ax
            fig.canvas.draw()

def test_style_is_undone_after_an_error(plt):
    before = dict(plt.rcParams)
    with pytest.raises(ZeroDivisionError):
        with style(dark=True): 1/0
    assert dict(plt.rcParams) == before

def test_pca_matches_torch_and_sklearn():
    from sklearn.decomposition import PCA
    x = torch.randn(50, 7, generator=gen()) * torch.arange(1, 8)
    centre, axes, share = pca_2d(x)
    want = PCA(2).fit(x.numpy())
    np.testing.assert_allclose(np.abs(((x-centre) @ axes).numpy()), np.abs(want.transform(x.numpy())), atol=1e-3)
    np.testing.assert_allclose(share.numpy(), want.explained_variance_ratio_, atol=1e-5)
    torch.testing.assert_close(pca_2d(-x)[1], axes)    # a picture does not flip with the sign

@pytest.mark.parametrize('n,C', [(2, 1), (2, 5), (1, 3), (3, 2)])
def test_pca_of_few_points(n, C):
    centre, axes, share = pca_2d(torch.randn(n, C, generator=gen()))
    assert axes.shape == (C, 2) and share.shape == (2,) and axes.isfinite().all()

def test_cosine_matrix_with_absent_class():
    S = cosine_matrix(torch.tensor([[1., 0], [0, 0], [2, 2]]))
    assert S[0, 2].item() == pytest.approx(.5**.5) and S[1].isnan().all() and S[:, 1].isnan().all()

def test_running_mean_keeps_lines_and_length():
    x = np.linspace(3, -2, 31)
    for w in (1, 2, 5, 100): np.testing.assert_allclose(running_mean(x, w), x, atol=1e-12)
    assert len(running_mean(np.zeros(0), 3)) == 0

def test_series_of_both_forms():
    for m in (dict(loss=([1, 2, 3], [.5, float('nan'), .25])), dict(step=['1', '2', '3'], loss=['.5', '', '.25'])):
        x, y = series(m, 'loss')
        assert x.tolist() == [1, 3] and y.tolist() == [.5, .25]

def test_mistakes_and_class_ids():
    image, truth, pred = torch.full((3, 1, 3), 100, dtype=torch.uint8), torch.tensor([[0, 1, 255]]), torch.tensor([[0, 2, 2]])
    out = mistakes(image, truth, pred)
    assert out[0, 1].tolist() == [213, 94, 0] and out[0, 0].tolist() == [190]*3 and out[0, 2].max() < 100
    assert class_ids([truth, pred.numpy()], CITYSCAPES) == [0, 1, 2]

def test_panel_with_gaps(plt):
    axs = show_panel([panel(methods=('a',)), panel(methods=('b',), truth=False)], CITYSCAPES)
    assert axs.shape == (2, 4)
    assert 0 < image_miou(panel()[3]['DIP'], panel()[2], CITYSCAPES) < 1
