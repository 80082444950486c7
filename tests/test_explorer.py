"""The explorer: the numbers of the page are PyTorch's within what the page states, it stays small, and what does not fit together is one clear line."""
import base64
import json
import re

import numpy as np
import pytest
import torch
from explorer_cases import K, by_torch, lens, numbers, scene, smooth
from torch.nn import functional as F

from protonb import explorer as X
from protonb.cli import main
from protonb.core import InputError
from protonb.dip_net import dip_small
from protonb.feeding import segmenter
from protonb.labels import CITYSCAPES, ClassSpace
from protonb.report import write_report
from protonb.runs import NETWORKS


@pytest.mark.parametrize("rule,every,size", [("aligned", 1, (97, 193)), ("centred", 1, (96, 192)), ("aligned", 3, (97, 193)), ("centred", 2, (90, 77))])
def test_twenty_pixels_agree_with_pytorch(rule, every, size):
    lenses, images = [lens("a", 0, 8, rule), lens("b", 1, 4, rule)], [scene(*size, s) for s in range(2)]
    kept = [[-(-n//s//every) for n in size] for s in (8, 4)]
    d = X.explore(lenses, images, CITYSCAPES, most=sum(len(images)*K*h*w for h, w in kept), points=40)
    assert d["every"] == every and d["off"] < .005
    rng = np.random.default_rng(0)
    for _ in range(20):
        i, n, y, x = rng.integers(2), rng.integers(2), rng.integers(size[0]), rng.integers(size[1])
        here, there = numbers(d, n, i, x, y), by_torch(lenses[n], images[i][1], x, y, every)
        known = d["nets"][n]["known"]
        assert 4 not in known and len(known) == K - 1
        assert np.abs(here - there)[known].max() <= d["off"] + 1e-6
        assert np.abs(here.round(3) - there)[known].max() <= X.stated_error(d)


def test_labels_and_predictions_are_kept():
    l, (name, image, truth) = lens(), scene(40, 64, 3)
    d = X.explore([l], [(name, image, truth)], CITYSCAPES)
    def read(packed): return np.repeat(np.frombuffer(base64.b64decode(packed["ids"]), np.uint8), np.frombuffer(base64.b64decode(packed["lengths"]), "<u2"))
    assert (read(d["images"][0]["truth"]).reshape(40, 64) == truth.numpy()).all()
    want = F.interpolate(l.segment(image[None]), (40, 64), mode="bilinear", align_corners=True)[0].argmax(0)
    assert (read(d["nets"][0]["maps"][0]["called"]).reshape(40, 64) == want.numpy()).all()


def test_sampled_pixels_belong_to_the_cloud():
    lenses, images = [lens("a"), lens("b", 1, 4)], [scene(97, 193, s) for s in range(3)]
    d = X.explore(lenses, images, CITYSCAPES, points=90)
    assert 0 < len(d["pixels"]) <= 90 and [p[0] for p in d["pixels"]] == sorted(p[0] for p in d["pixels"])
    for i, r, c, k in d["pixels"]: assert images[i][2][r, c] == k
    for l, net in zip(lenses, d["nets"]):
        for xy in net["cloud"].values(): assert len(xy) == 2*(len(net["known"]) + len(d["pixels"])) and max(map(abs, xy)) == 1000
        grid = [l.segment.both(x[None])[1][0] for _, x, _ in images]
        rows = [grid[i][:, X.cell_at(r, *X.lattice(97, grid[i].shape[1])), X.cell_at(c, *X.lattice(193, grid[i].shape[2]))] for i, r, c, _ in d["pixels"]]
        assert net["cloud"]["pca"] == X.layouts(torch.cat([l.prototypes[net["known"]], torch.stack(rows)]))["pca"]


def test_without_truth_points_have_predicted_classes():
    l, images = lens(), [scene(64, 96, 1, truth=False)]
    d = X.explore([l], images, CITYSCAPES)
    called = F.interpolate(l.segment(images[0][1][None]), (64, 96), mode="bilinear", align_corners=True)[0].argmax(0)
    assert d["images"][0]["truth"] is None and all(called[r, c] == k for _, r, c, k in d["pixels"])
    assert "view:truth" not in X.explorer_section(d)
    assert list(X._keys(d)) == ["← → ↑ ↓", "P M I", "1 … 9 0", ", ."] and "truth" not in str(X._keys(d))      # one network, one image
    both = X.explore([l, lens("b", 1)], [scene(64, 96, s) for s in (1, 2)], CITYSCAPES)
    assert X._keys(both) == X.EXPLORER_KEYS


def test_six_large_photographs_and_two_networks_fit_into_8_mb(tmp_path):
    """Grain makes pictures as heavy as photographs are."""
    grain = torch.randint(-25, 26, (3, 1024, 2048), generator=torch.Generator().manual_seed(0))
    images = [(n, (x.int() + grain).clamp(0, 255).byte(), y) for n, x, y in (scene(1024, 2048, s) for s in range(6))]
    d = X.explore([lens("a"), lens("b", 1)], images, CITYSCAPES)
    page = write_report(tmp_path/"report.html", title="large", explorer=X.explorer_section(d), space=CITYSCAPES,
                        panels=[(n, x, y, dict(a=y, b=y)) for n, x, y in images])
    assert d["every"] == 2 and d["off"] < .005
    assert 3e6 < page.stat().st_size < 8e6, page.stat().st_size


def test_nothing_in_the_page_asks_for_more():
    d = X.explore([lens("</script><script>alert(1)</script>")], [scene(40, 64, 0)], CITYSCAPES)
    text = X.explorer_section(d)
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", text)
    data = json.loads(re.search(r'id="explorer-data">(.*?)</script>', text, re.S)[1])
    assert data["nets"][0]["name"].startswith("</script>") and data["classes"] == list(CITYSCAPES.classes)


def test_constant_maps_and_one_pixel():
    codes, low, step = X.quantised(torch.full((2, 1, 1), .5))
    assert X.restored(codes, low, step).flatten().tolist() == [.5, .5]
    d = X.explore([lens(stride=1)], [scene(1, 1, 0, truth=False)], CITYSCAPES)
    assert d["nets"][0]["maps"][0]["across"] == (0., 1., 1) and d["pixels"]


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    d = X.explore([lens()], [scene(64, 96, 0)], CITYSCAPES)
    assert list(d["nets"][0]["cloud"]) == ["pca"] and "No t-SNE: it needs scikit-learn" in X.explorer_section(d)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n.endswith("small")])
def test_every_network_hands_out_features(name):
    space = ClassSpace("three", tuple("abc"), ((9, 9, 9),)*3)
    s = segmenter(NETWORKS[name](num_classes=3))
    data = [((255*smooth(64, 96, i)).byte(), smooth(64, 96, i, 3).argmax(0)) for i in range(2)]
    P = X.mean_prototypes(s, type("Data", (list,), dict(space=space))(data))
    d = X.explore([X.Lens(name, s, P, "")], [("a", *data[0])], space, points=30)
    assert d["off"] < .005 and P.shape[0] == 3 and P.isfinite().all()


def test_features_of_a_classifier_are_what_its_last_layer_sees():
    net, x = dip_small(num_classes=5).eval(), smooth(33, 49, 0)[None]
    z, f = net(x, features=True)
    torch.testing.assert_close(z, net(x))
    torch.testing.assert_close(z, net.projector[-1](f))


@pytest.mark.parametrize("change,said", [
    (dict(lenses=[]), "lenses is empty"),
    (dict(images=[]), "images are 0; the explorer wants 1 to 6"),
    (dict(images=[scene(16, 16, 0)]*7), "images are 7"),
    (dict(images=[("odd", torch.zeros(1, 8, 8, dtype=torch.uint8), None)]), r"odd: the image is \(1, 8, 8\), expected \(3,H,W\)"),
    (dict(images=[("odd", torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(4, 8))]), r"odd: the image is \(8, 8\) but its label is \(4, 8\)"),
    (dict(lenses=[X.Lens("net", lens().segment, torch.zeros(K, 24), "")]), r"net: prototypes are \(19, 24\), 0 of them not zero"),
    (dict(lenses=[X.Lens("net", lens().segment, torch.ones(K, 5), "")]), "net: prototypes of 5 channels, but its features have 24"),
    (dict(lenses=[X.Lens("net", lambda x: x, torch.ones(K, 24), "")]), "net: is a function, expected a Segmenter"),
])
def test_bad_input(change, said):
    with pytest.raises(InputError, match=said): X.explore(**dict(lenses=[lens()], images=[scene(16, 16, 0)], space=CITYSCAPES) | change)


def test_report_has_it_unless_told_otherwise(tmp_path, capsys):
    run, data = str(tmp_path/"run"), "streets:real,count=2,size=64x128"
    words = "--steps 1 --batch-size 2 --device cpu --net pbal_small --crop-height 48 --crop-width 96".split()
    assert main(["train", "source-only", "--source", "streets:synthetic,count=2,size=64x128", "--out", run, *words]) == 0
    for more, there in (([], True), (["--explore", "0"], False)):
        assert main(["report", run, "--data", data, "--images", "1", "--out", str(tmp_path/"page.html"), *more]) == 0
        text = (tmp_path/"page.html").read_text()
        assert ('id="explorer-page"' in text) == there == ('<div id="explorer-page"><p class="soft">Prototypes: the mean features of the classes in 2 of these labelled images.</p>' in text)
    assert main(["report", run, "--data", data, "--explore", "7"]) == 2 and "explore" in capsys.readouterr().err
