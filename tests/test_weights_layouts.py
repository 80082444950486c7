"""Weight files as people have them: each layout, written from our own networks, loads for training, predict and eval; nothing in a file runs."""
import io
import os
import pickle
import zipfile
from argparse import Namespace
from collections import defaultdict
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from protonb.checkpoints import fit_of
from protonb.cli import main
from protonb.core import InputError
from protonb.deeplab import iapc_small, pbal_small, proda_small, to_released
from protonb.deeplabv2 import pixda_small, wdass_small
from protonb.dip_net import dip_small
from protonb.resnet import to_torchvision_keys
from protonb.runs import FileOptions, build_net, open_file
from protonb.weights import load_weights, read_file

K = 4
SMALL = dict(iapc_small=iapc_small, pbal_small=pbal_small, proda_small=proda_small, wdass_small=wdass_small, pixda_small=pixda_small,
             dip_small=dip_small)


def seeded(make, *args, **kw):
    """A network with statistics that differ from those of a new one."""
    torch.manual_seed(3)
    net = make(*args, **kw).eval()
    for name, b in net.named_buffers():
        if "running" in name: b.copy_(torch.rand_like(b) + .5)
    return net


def module(state): return {f"module.{k}": v for k, v in state.items()}
def under_model(state): return {f"model.{k}": v for k, v in state.items()}
def doubled(state): return {k: v*2 if v.is_floating_point() else v for k, v in state.items()}


def optimizer(net):
    """The state of an optimizer that has made a step."""
    opt = torch.optim.SGD(net.parameters(), .1, momentum=.9)
    return dict(opt.state_dict(), state={i: dict(momentum_buffer=torch.ones(2)) for i in range(3)})


SCORE = np.float64(.5)
#: name -> (network, (net) -> what the file holds)
LAYOUTS = dict(
    pbal=("pbal_small", lambda n: {"DeepLab": {"model_state": to_released(n), "optimizer_state": optimizer(n), "scheduler_state": {}},
                                   "FCDiscriminator": {"model_state": {"conv1.weight": torch.ones(2, 2)}}, "iter": 5, "best_iou": SCORE}),
    pbal_with_projection=("pbal_small", lambda n: {"DeepLab": {"model_state": to_released(n) | {"decoder.proj.0.weight": torch.ones(2)}}}),
    proda=("proda_small", lambda n: {"ResNet101": {"model_state": to_released(n), "objective_vectors": torch.zeros(K, 48)}, "iter": 5, "best_iou": SCORE}),
    iapc_source=("iapc_small", lambda n: {"state_dict": module(to_released(n))}),
    iapc_final=("iapc_small", to_released),
    iapc_two_heads=("iapc_small", lambda n: to_released(n) | {f"layer5.conv2d_list.{i}.bias": torch.zeros(K) for i in range(4)}),
    pixda=("pixda_small", lambda n: {"model_state": module(to_released(n)), "model_d1_state": {"module.conv1.weight": torch.ones(3)},
                                     "optimizer_state": optimizer(n), "total_steps_so_far": 7}),
    wdass=("wdass_small", lambda n: dict(iter=3, arch="x", num_classes=K, state_dict=module(to_released(n)),
                                         state_dict_ema=module(doubled(n.state_dict())), optimizer=optimizer(n),
                                         prototype=dict(real=torch.zeros(K, 256), syn=torch.ones(K, 256)))),
    timm=("iapc_small", lambda n: dict(model=n.state_dict(), model_ema=doubled(n.state_dict()), optimizer=optimizer(n), epoch=3,
                                       args=Namespace(lr=.1))),
    own_loop=("proda_small", lambda n: dict(model_state_dict=n.state_dict(), optimizer_state_dict=optimizer(n), loss=.3)),
    network=("wdass_small", lambda n: dict(network=module(n.state_dict()), best=np.float32(2), iou=np.ones(K))),
    net=("pixda_small", lambda n: dict(net=n.state_dict(), acc=1.)),
    lightning=("pbal_small", lambda n: dict(state_dict=under_model(n.state_dict()), **{"pytorch-lightning_version": "2"}, callbacks={})),
    averaged=("iapc_small", lambda n: module(n.state_dict()) | dict(n_averaged=torch.tensor(9))),
    profiled=("iapc_small", lambda n: n.state_dict() | {"layer1.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}),
    compiled=("proda_small", lambda n: {f"_orig_mod.{k}": v for k, v in n.state_dict().items()}),
    configured=("wdass_small", lambda n: dict(model=n.state_dict(), date=datetime(2020, 1, 2), log=defaultdict(list, loss=[1., 2.]), out=Path("x"),
                                              cfg=SimpleNamespace(lr=.1, shapes=defaultdict(int)), took=timedelta(1))),
    half=("iapc_small", lambda n: {k: v.double() if v.is_floating_point() else v for k, v in n.state_dict().items()}),
)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_layout
def test_each_layout_starts_a_training_and_segments_with_equal_logits(layout, tmp_path):
    name, wrap = LAYOUTS[layout]
    net, path, x = seeded(SMALL[name], K), tmp_path / "w.pth", torch.randint(0, 256, (1, 3, 65, 97), dtype=torch.uint8)
    torch.save(wrap(net), path)
    told = []
    start = build_net(name, K, path, seed=8, tell=told.append).eval()
    run = open_file(path, FileOptions(name), space=space_of(K), tell=told.append)
    y = x.float()/255
    with torch.no_grad():
        want = net(y)
        assert torch.equal(start(y), want) and torch.equal(run.net(y), want)
    assert run.space.num_classes == K and len(told) == 2 and str(path) in told[0] and "\n" not in told[0]
    if layout == "wdass": assert "'state_dict'" in told[0] and "state_dict_ema" in told[0]
    if layout == "timm": assert "'model'" in told[0] and "model_ema" in told[0]


def space_of(k):
    from protonb.labels import ClassSpace
    return ClassSpace("own", tuple("abcdefghij"[:k]), tuple((10*i, 5*i, 99) for i in range(k)))


def test_another_entry_is_taken_when_it_is_named(tmp_path):
    for layout, ema in (("wdass", "state_dict_ema"), ("timm", "model_ema")):
        name, wrap = LAYOUTS[layout]
        net = seeded(SMALL[name], K)
        torch.save(wrap(net), tmp_path / "w.pth")
        start = build_net(name, K, tmp_path / "w.pth", entry=ema)
        assert all(torch.equal(start.state_dict()[k], v) for k, v in doubled(net.state_dict()).items())
        with pytest.raises(InputError, match="no entry 'teacher'.*state_dict|no entry 'teacher'.*model"):
            build_net(name, K, tmp_path / "w.pth", entry="teacher")
    torch.save(dict(G=net.state_dict(), F=net.state_dict()), tmp_path / "w.pth")
    with pytest.raises(InputError, match="'F' and 'G' both|'G' and 'F' both"): build_net(name, K, tmp_path / "w.pth")
    build_net(name, K, tmp_path / "w.pth", entry="F")


def test_the_extra_batch_norm_of_prodas_students(tmp_path):
    net = seeded(proda_small, K, bn_clr=True)
    torch.save({"ResNet101": {"model_state": to_released(net)}}, tmp_path / "w.pkl")
    run, x = open_file(tmp_path / "w.pkl", FileOptions("proda_small"), space_of(K)), torch.rand(1, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(run.net(x), net(x)) and torch.equal(build_net("proda_small", K, tmp_path / "w.pkl").eval()(x), net(x))


def test_dips_files_with_their_prototypes(tmp_path):
    net = seeded(dip_small)
    torch.save(dict(epoch=20, state_dict=net.state_dict(), optimizer=optimizer(net)), tmp_path / "final.pth")
    torch.save(torch.randn(19, net.channels), tmp_path / "prototypes.pth")
    run = open_file(tmp_path / "final.pth", FileOptions("dip_small", prototypes=tmp_path / "prototypes.pth"))
    assert run.space.name == "cityscapes" and run.segment(torch.zeros(1, 3, 65, 97, dtype=torch.uint8)).shape[1] == 19
    with pytest.raises(InputError, match="--prototypes"): open_file(tmp_path / "final.pth", FileOptions("dip_small"))
    torch.save(torch.randn(19, 7), tmp_path / "odd.pth")
    with pytest.raises(InputError, match="7 channels"): open_file(tmp_path / "final.pth", FileOptions("dip_small", prototypes=tmp_path / "odd.pth"))


BACKBONES = dict(
    torchvision=lambda s: to_torchvision_keys(s) | {"fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)},
    torchvision_segmenter=lambda s: {f"backbone.{k}": v for k, v in to_torchvision_keys(s).items()} | {"classifier.4.bias": torch.zeros(21),
                                                                                                    "aux_classifier.4.bias": torch.zeros(21)},
    mmseg=lambda s: dict(meta=dict(epoch=1, CLASSES=("a",)), optimizer={}, state_dict={f"backbone.{k}": v for k, v in to_torchvision_keys(s).items()}
                         | {"decode_head.conv_seg.weight": torch.zeros(19, 8, 1, 1), "auxiliary_head.conv_seg.bias": torch.zeros(19)}),
    lightning_mmseg=lambda s: dict(state_dict={f"model.backbone.{k}": v for k, v in to_torchvision_keys(s).items()}
                                   | {"model.decode_head.x": torch.zeros(2)}),
    moco=lambda s: dict(arch="resnet", state_dict={f"module.encoder_q.{k}": v for k, v in to_torchvision_keys(s).items()}
                        | {f"module.encoder_k.{k}": v for k, v in doubled(to_torchvision_keys(s)).items()} | {"module.queue": torch.zeros(3)}),
    scale=lambda s: {f"Scale.{k}": v for k, v in to_torchvision_keys(s).items()} | {f"Scale.layer5.conv2d_list.{i}.bias": torch.zeros(21) for i in range(4)},
    scale_module=lambda s: dict(model={f"module.Scale.{k}": v for k, v in to_torchvision_keys(s).items()}),
)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("name", ["iapc_small", "pbal_small", "proda_small", "wdass_small", "pixda_small"])
def test_backbones_of_other_programs_load_and_the_head_starts_anew(kind, name, tmp_path):
    net = seeded(SMALL[name], K)
    body = net.backbone if hasattr(net, "backbone") else net
    stages = {k: v for k, v in body.state_dict().items() if k.startswith(("layer0", "layer1", "layer2", "layer3", "layer4"))}
    torch.save(BACKBONES[kind](stages), tmp_path / "w.pth")
    told = []
    start, fresh = build_net(name, K, tmp_path / "w.pth", seed=8, tell=told.append), build_net(name, K, seed=8)
    now = (start.backbone if hasattr(start, "backbone") else start).state_dict()
    assert all(torch.equal(now[k], v) for k, v in stages.items())
    heads = [k for k in start.state_dict() if k.startswith(net.head_prefixes)]
    assert heads and all(torch.equal(start.state_dict()[k], fresh.state_dict()[k]) for k in heads)
    assert "head starts anew" in told[0]
    with pytest.raises(InputError, match="backbone without a head"): open_file(tmp_path / "w.pth", FileOptions(name))


def test_the_deep_stem_of_mmsegmentation(tmp_path):
    net = seeded(dip_small, K)
    stages = {k.replace("layer0.", "stem."): v for k, v in net.state_dict().items() if k.startswith("layer")}
    torch.save(dict(state_dict={f"backbone.{k}": v for k, v in stages.items()} | {"decode_head.b": torch.ones(1)}), tmp_path / "w.pth")
    start = build_net("dip_small", K, tmp_path / "w.pth")
    assert all(torch.equal(start.state_dict()[k], v) for k, v in net.state_dict().items() if k.startswith("layer"))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("here,there", [(2, 19), (19, 2), (5, 4)])
def test_other_classes_start_the_last_layer_anew(name, here, there, tmp_path):
    net, told = seeded(SMALL[name], there), []
    torch.save(dict(state_dict=net.state_dict()), tmp_path / "w.pth")
    start, fresh = build_net(name, here, tmp_path / "w.pth", seed=8, tell=told.append), build_net(name, here, seed=8)
    own, theirs = start.state_dict(), net.state_dict()
    anew = [k for k, v in own.items() if v.shape != theirs[k].shape]
    assert anew and all(torch.equal(own[k], fresh.state_dict()[k]) for k in anew)
    assert all(torch.equal(own[k], v) for k, v in theirs.items() if k not in anew)
    assert f"for {there} classes, this run has {here}" in told[0]
    with pytest.raises(InputError, match=f"of {there} classes, but own has 7"): open_file(tmp_path / "w.pth", FileOptions(name), space_of(7))


# ---------------------------------------------------------------- refused, in one line

def said(path, name="iapc_small", **kw):
    with pytest.raises(InputError) as e: build_net(name, K, path, **kw)
    assert "\n" not in str(e.value) and Path(path).name in str(e.value)
    return str(e.value)


def test_another_network_is_named_by_three_differences_and_their_number(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(dict(state_dict=seeded(wdass_small, K).state_dict()), path)
    assert "another network" in said(path) and "another network" in said(path, "pbal_small")
    torch.save(iapc_small(K, width=8).state_dict(), path)
    line = said(path)
    assert line.count("instead of") == 3 and "differences, the first 3" in line
    state = seeded(iapc_small, K).state_dict()
    gone = [k for k in state if "layer3.0.conv" in k]
    torch.save({k: v for k, v in state.items() if k not in gone}, path)
    assert all(f"{k} missing" in said(path) for k in gone) and "3 differences:" in said(path)
    torch.save(state | {"extra.weight": torch.ones(1)}, path)
    assert "1 difference: extra.weight unknown" in said(path)
    torch.save({k: v for k, v in to_torchvision_keys(state).items() if "layer6" not in k} | {"layer3.9.conv1.weight": torch.ones(1)}, path)
    assert "layer3.9.conv1.weight unknown" in said(path)


ODD = dict(
    nan=("holds NaN", lambda k, v: v*torch.nan if v.is_floating_point() else v),
    one_nan=("1 tensor: layer2.0.bn1.weight holds NaN", lambda k, v: v.index_fill(0, torch.tensor([1]), torch.nan) if k == "layer2.0.bn1.weight" else v),
    inf=("infinite", lambda k, v: v + torch.inf if k.endswith("running_mean") else v),
    too_large=("infinite", lambda k, v: v.double() + 1e200 if k.endswith("conv1.weight") else v),
    negative=("negative variance", lambda k, v: -v if k.endswith("running_var") else v),
    sparse=("is sparse", lambda k, v: v.to_sparse() if k.endswith("conv1.weight") else v),
    integers=("is int8", lambda k, v: v.to(torch.int8) if k.endswith("conv1.weight") else v),
    complex=("is complex64", lambda k, v: v.to(torch.complex64) if k.endswith("conv1.weight") else v),
    meta=("is empty", lambda k, v: v.to("meta") if k.endswith("conv1.weight") else v),
    quantized=("is qint8", lambda k, v: torch.quantize_per_tensor(v, .1, 0, torch.qint8) if k.endswith("conv1.weight") else v),
)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("layout", ["proda", "iapc_final", "timm"])
def test_unusable_numbers_are_named(kind, layout, tmp_path):
    word, spoil = ODD[kind]
    name, wrap = LAYOUTS[layout]
    net = seeded(SMALL[name], K)
    state = {k: spoil(k, v) for k, v in net.state_dict().items()}

    class Spoiled:                                 # what the layouts ask of a network
        released, parameters, state_dict = net.released, net.parameters, staticmethod(lambda: state)
    torch.save(wrap(Spoiled), tmp_path / "w.pth")
    assert word in said(tmp_path / "w.pth", name) and "not usable" in said(tmp_path / "w.pth", name)
    with pytest.raises(InputError, match="w.pth: not usable"): open_file(tmp_path / "w.pth", FileOptions(name), space_of(K))


class Evil:
    mark = "x"
    def __reduce__(self): return os.system, (f"touch {Evil.mark}",)


def places(value, at=()):
    """Every dictionary of a checkpoint, as a path of keys; of the numbered ones of an optimizer the first."""
    yield at
    for k, v in value.items():
        if isinstance(v, dict) and k in (0, str(k)): yield from places(v, (*at, k))


@each_layout
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_in_each_place_is_refused_and_nothing_runs(layout, protocol, tmp_path):
    name, wrap = LAYOUTS[layout]
    Evil.mark, net = str(tmp_path / "ran"), seeded(SMALL[name], K)
    whole = wrap(net)
    for at in places(whole):
        file = dict(whole)
        inner = file
        for k in at:
            inner[k] = dict(inner[k])
            inner = inner[k]
        inner["z"] = Evil()
        torch.save(file, tmp_path / "w.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=protocol == 2)
        with pytest.raises(InputError, match="could run code"): read_file(tmp_path / "w.pth")
    assert "could run code" in said(tmp_path / "w.pth", name)
    with pytest.raises(InputError, match="could run code"): open_file(tmp_path / "w.pth", FileOptions(name))
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Evil(), protocol))
    assert "could run code" in said(tmp_path / "w.pth", name)
    assert not (tmp_path / "ran").exists()


def test_the_prototype_file_runs_nothing(tmp_path):
    Evil.mark = str(tmp_path / "ran")
    torch.save(dict(state_dict=seeded(dip_small).state_dict()), tmp_path / "w.pth")
    torch.save([torch.zeros(19, 128), Evil()], tmp_path / "p.pth")
    with pytest.raises(InputError, match="p.pth.*could run code"):
        open_file(tmp_path / "w.pth", FileOptions("dip_small", prototypes=tmp_path / "p.pth"))
    assert not (tmp_path / "ran").exists()


def test_numbers_and_notes_of_any_numpy_are_read(tmp_path):
    beside = dict(a=np.float64(.5), b=np.int64(3), c=np.float32(.25), d=np.bool_(True), e=np.arange(5.), f=[np.float16(2)], g=Namespace(x=1),
                  h=Path("x"), i=np.str_("best"), j={1, 2}, l=frozenset([1]), m=slice(1), n=1j, o=range(3), k=np.random.get_state())
    torch.save(dict(state_dict={"w": torch.ones(2)}, **beside), tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as z, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for n in z.namelist(): old.writestr(n, z.read(n).replace(b"cnumpy._core.", b"cnumpy.core."))
    for name in ("new.pth", "old.pth"):
        got = read_file(tmp_path / name)
        assert [got[k] for k in "abcd"] == [.5, 3, .25, True] and got["f"] == [2.]
        assert torch.equal(load_weights(tmp_path / name)["w"], torch.ones(2))


@pytest.mark.parametrize("what, words", [([torch.zeros(2)], "holds a list"), ({}, "holds nothing"), ("hello", "holds a str"),
                                         ({"a": np.ones(2)}, "holds the entries a, not names with tensors")])
def test_what_holds_no_network_is_named_with_its_file(what, words, tmp_path):
    torch.save(what, tmp_path / "odd.pth")
    for net in ("iapc_small", "proda_small", "dip_small"):
        with pytest.raises(InputError, match=rf"odd\.pth: .*{words}"): build_net(net, K, tmp_path / "odd.pth")
        with pytest.raises(InputError, match=rf"odd\.pth: .*{words}"): open_file(tmp_path / "odd.pth", FileOptions(net=net))


def test_functions_of_numpy_are_not_called(tmp_path):
    class Load:
        def __reduce__(self): return np.load, ("x.npy",)
    torch.save(dict(state_dict={"w": torch.ones(2)}, x=Load()), tmp_path / "w.pth")
    with pytest.raises(InputError, match="numpy.*could run code"): read_file(tmp_path / "w.pth")


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_protocol_that_nobody_writes_is_named(protocol, tmp_path):
    torch.save({"module.w": torch.ones(2), "module.b": torch.ones(2)}, tmp_path / "w.pth", pickle_protocol=protocol)
    assert f"pickle protocol {protocol}; torch.save writes 2" in said(tmp_path / "w.pth")      # and no word of code


def test_scripts_and_whole_modules_are_refused(tmp_path):
    net = torch.nn.Linear(2, 2)
    torch.save(net, tmp_path / "w.pth")
    assert "could run code" in said(tmp_path / "w.pth")
    torch.jit.trace(net, torch.ones(1, 2)).save(str(tmp_path / "w.pth"))
    assert "could run code" in said(tmp_path / "w.pth")


@pytest.mark.parametrize("share", [0, .2, .7, .999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_cut_files_of_each_kind(share, suffix, tmp_path):
    state, path = seeded(iapc_small, K).state_dict(), tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(dict(model=state), path, _use_new_zipfile_serialization=suffix == ".pth")
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    assert "cut short" in said(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(dict(model=seeded(iapc_small, K).state_dict()), path)
    raw = bytearray(path.read_bytes())
    raw[len(raw)//2] ^= 64
    path.write_bytes(raw)
    assert "damaged" in said(path) and "checksum" in said(path)


# ---------------------------------------------------------------- from the shell

@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(2):
        for folder, a in (("img", rng.integers(0, 255, (48, 64, 3))), ("lab", rng.integers(0, 2, (48, 64)))):
            (tmp_path / "d" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(a.astype(np.uint8)).save(tmp_path / "d" / folder / f"{i}.png")
    (tmp_path / "d" / "d.toml").write_text('[images]\ntrain="img"\nval="img"\n[labels]\ntrain="lab"\nval="lab"\n'
                                           '[classes]\nbackground=[0,0,0]\nobject=[255,0,0]\n')
    return tmp_path


def shell(*words): return main([str(w) for w in words])


@pytest.mark.parametrize("name,wrap", [("proda_small", lambda n: {"ResNet101": {"model_state": to_released(n)}}),
                                       ("pixda_small", lambda n: {"model_state": module(to_released(n))}),
                                       ("pbal_small", lambda n: {"model": n.state_dict()})])
def test_train_eval_predict_and_report_with_a_bare_file(name, wrap, photos, capsys):
    net, data = seeded(SMALL[name], 2), f"folder:{photos}/d/d.toml"
    torch.save(wrap(net), photos / "w.pth")
    bare = [photos / "w.pth", "--net", name]
    assert shell("train", "source-only", "--source", data, "--weights", photos / "w.pth", "--net", name, "--out", photos / "r", "--steps", 1,
                 "--batch-size", 2, "--crop-height", 33, "--crop-width", 33, "--device", "cpu", "--lr", 1e-9) == 0
    assert shell("eval", *bare, "--data", data, "--device", "cpu") == 0
    table = capsys.readouterr().out
    assert "object" in table and "whole network" in table
    assert shell("predict", *bare, photos / "d" / "img", "--out", photos / "p", "--classes", data, "--device", "cpu") == 0
    run = open_file(photos / "w.pth", FileOptions(name), space_of(2))
    from protonb.evaluation import label_map
    for i in range(2):
        image = torch.from_numpy(np.array(Image.open(photos / "d" / "img" / f"{i}.png"))).permute(2, 0, 1)
        assert np.array_equal(np.array(Image.open(photos / "p" / f"{i}_trainIds.png")), label_map(run.segment, image).numpy())
    assert shell("report", *bare[:1], "--net", name, "--data", data, "--images", 1, "--device", "cpu", "--out", photos / "a.html") == 0
    assert (photos / "a.html").stat().st_size > 10_000


def test_a_bare_file_needs_its_network_and_a_folder_does_not(photos, capsys):
    torch.save(seeded(iapc_small, 2).state_dict(), photos / "w.pth")
    data = f"folder:{photos}/d/d.toml"
    assert shell("eval", photos / "w.pth", "--data", data) == 2 and "--net" in capsys.readouterr().err
    assert shell("predict", photos / "w.pth", photos / "d" / "img", "--net", "iapc_small", "--out", photos / "p") == 2
    assert "2 classes; say which by --classes" in capsys.readouterr().err
    assert shell("eval", photos / "w.pth", "--net", "pbal_small", "--data", data) == 2 and "another network" in capsys.readouterr().err
    assert shell("eval", photos / "none.pth", "--net", "pbal_small", "--data", data) == 2 and "none.pth" in capsys.readouterr().err
    assert not (photos / "p").exists()


@pytest.mark.parametrize("name,wrap", [("iapc_small", lambda n: {"state_dict": module(to_released(n))}),
                                       ("proda_small", lambda n: {"ResNet101": {"model_state": to_released(n)}})])
def test_iapc_starts_from_a_source_model_that_others_trained(name, wrap, photos):
    net, path = seeded(SMALL[name], 19), photos / "source.pth"
    torch.save(wrap(net), path)
    words = ["train", "iapc", "--start", path, "--target", f"images:{photos}/d/img", "--out", photos / "r", "--steps", 1, "--batch-size", 2, "--device", "cpu",
             "--lr", 1e-9, "--scales", 1., "--test-height", "None", "--crop-height", 33, "--crop-width", 33, "--refresh-height", 48, "--refresh-width", 64]
    assert shell(*words) == 2                    # which network?
    assert shell(*words, "--net", name) == 0 and shell("info", photos / "r") == 0


@pytest.mark.parametrize("kind", ["classes of the data", "named"])
def test_classes_of_a_bare_file(kind, photos, capsys):
    torch.save(seeded(iapc_small, 16).state_dict(), photos / "w.pth")
    more = ["--classes", "cityscapes13"] if kind == "named" else []
    rc = shell("eval", photos / "w.pth", "--net", "iapc_small", "--data", "streets:real,count=1,size=48x64", "--device", "cpu", *more)
    said = capsys.readouterr()
    if kind == "named": assert rc == 2 and "16 classes, but cityscapes13 has 13" in said.err
    else: assert rc == 0 and "cityscapes16" in said.out and "terrain" not in said.out


def test_what_a_file_is_called_does_not_matter(tmp_path):
    state = seeded(iapc_small, K).state_dict()
    save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"): assert torch.equal(load_weights(tmp_path / name)["layer0.0.weight"], state["layer0.0.weight"])
