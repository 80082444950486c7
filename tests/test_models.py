"""Networks and weight files: sizes, names, counts, an independent forward pass, frozen parts, faults of files."""
import json, os, pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from protonb.core import InputError
from protonb.dip_net import (dip_head_version, dip_mobilenetv2, dip_resnet101, dip_small, dip_vgg16, freeze, from_vgg16_keys,
                             set_train)
from protonb.mobilenet import MobileNetV2, to_stage_keys
from protonb.resnet import Basic, Bottleneck, ResNet, freeze_affine, from_torchvision_keys, rename_keys, to_torchvision_keys
from protonb.weights import fingerprint, load_backbone, load_into, load_weights, read_meta, save_weights

DATA = Path(__file__).parents[2]/'shared'/'data'
needs_data = pytest.mark.skipif(not DATA.exists(), reason='needs ../shared/data')
MOBILENET = DATA/'weights'/'mobilenetv2_imagenet_fp16.safetensors'

OS8 = dict(strides=(1,2,1,1), dilations=(1,1,2,4))
FLAVOURS = dict(dip=dict(stem_widths=(64,64,128), **OS8), caffe=dict(stride_first=True, ceil_mode=True, **OS8), wdass=OS8,
                pbal=dict(strides=(1,2,2,1), dilations=(1,1,1,2), multi_grid=(1,2,4)))

def meta(make, *args, **kw):
    with torch.device('meta'): return make(*args, **kw)

def out_size(net, h, w):
    out = net.eval()(torch.empty(1, 3, h, w, device='meta'))
    return tuple((out[-1] if isinstance(out, list) else out).shape[1:])

def params(net): return sum(p.numel() for p in net.parameters())

def randomise_bn(net, seed=0):
    "Batch norms that a forward pass must get right."
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=g)*.3)
            m.running_var.copy_(torch.rand(m.num_features, generator=g)+.5)
            m.weight.data.copy_(torch.rand(m.num_features, generator=g)+.5)
            m.bias.data.copy_(torch.randn(m.num_features, generator=g)*.1)
    return net

# ---------------------------------------------------------------- resnet

@pytest.mark.parametrize('flavour,size,want', [
    ('dip', (1025, 1025), (129, 129)), ('dip', (1024, 2048), (128, 256)), ('dip', (720, 1280), (90, 160)),
    ('caffe', (256, 512), (33, 65)), ('caffe', (512, 1024), (65, 129)), ('caffe', (640, 1280), (81, 161)),
    ('caffe', (384, 768), (49, 97)), ('caffe', (512, 896), (65, 113)), ('caffe', (1024, 2048), (129, 257)),
    ('pbal', (512, 896), (32, 56)), ('wdass', (512, 512), (64, 64))])
def test_sizes_of_the_published_backbones(flavour, size, want):
    assert out_size(meta(ResNet, **FLAVOURS[flavour]), *size) == (2048, *want)

@pytest.mark.parametrize('flavour', FLAVOURS)
def test_resnet101_tensors(flavour):
    net = meta(ResNet, **FLAVOURS[flavour])
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    plain = flavour != 'dip'
    assert len(convs) == (104 if plain else 106) and all(m.bias is None for m in convs)
    assert params(net) == (42_500_160 if plain else 42_623_936)   # torchvision: 44,549,160 with 2,049,000 in fc

def test_strides_and_dilations_sit_where_they_should():
    caffe,tv,pbal = (meta(ResNet, **FLAVOURS[k]) for k in ('caffe', 'wdass', 'pbal'))
    assert caffe.layer2[0].conv1.stride == (2, 2) and caffe.layer2[0].conv2.stride == (1, 1)
    assert tv.layer2[0].conv1.stride == (1, 1) and tv.layer2[0].conv2.stride == (2, 2)
    for net in (caffe, tv):
        for i,d in enumerate((1, 1, 2, 4)):
            for block in getattr(net, f'layer{i+1}'):
                assert block.conv2.dilation == block.conv2.padding == (d, d)
                if i >= 2: assert block.conv1.stride == block.conv2.stride == (1, 1)
            assert getattr(net, f'layer{i+1}')[0].downsample[0].stride == ((2, 2) if i == 1 else (1, 1))
    assert [b.conv2.dilation[0] for b in pbal.layer4] == [2, 4, 8]
    assert {b.conv2.dilation[0] for b in pbal.layer3} == {1}

def test_names_are_torchvisions_after_renaming():
    net = meta(ResNet, **FLAVOURS['wdass'])
    names = list(to_torchvision_keys(net.state_dict()))
    bn = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    want = ['conv1.weight'] + [f'bn1.{n}' for n in bn]
    for i,blocks in enumerate((3, 4, 23, 3), 1):
        for b in range(blocks):
            for j in (1, 2, 3): want += [f'layer{i}.{b}.conv{j}.weight'] + [f'layer{i}.{b}.bn{j}.{n}' for n in bn]
            if b == 0: want += [f'layer{i}.0.downsample.0.weight'] + [f'layer{i}.0.downsample.1.{n}' for n in bn]
    assert set(names) == set(want) and len(names) == len(want) == 624

@pytest.mark.parametrize('stem_widths', [(8,), (8, 8, 16)])
def test_rename_round_trip(stem_widths):
    state = ResNet((1,1,1,1), stem_widths, (4,4,4,4)).state_dict()
    there = to_torchvision_keys(state)
    back = from_torchvision_keys(there | {'fc.weight': torch.zeros(1), 'fc.bias': torch.zeros(1)})
    assert list(back) == list(state) and all(back[k] is state[k] for k in state)
    assert 'layer1.0.conv2.weight' in there and 'layer1.0.conv2.weight' in back   # only the stem's conv2 is renamed

def test_rename_takes_whole_prefixes_longest_first():
    got = rename_keys({'a.b.c': 1, 'a.bb': 2, 'ab': 3}, {'a': 'x', 'a.b': 'y'})
    assert got == {'y.c': 1, 'x.bb': 2, 'ab': 3}
    assert rename_keys({'Scale.conv1.weight': 1, 'layer5.w': 2}, {'Scale': '', 'layer5': None}) == {'conv1.weight': 1}

def bn_(s, name, x): return F.batch_norm(x, s[name+'.running_mean'], s[name+'.running_var'], s[name+'.weight'], s[name+'.bias'])

def plain_resnet(s, x, blocks, strides, dilations, stride_first, ceil_mode, grid=None):
    "The forward pass written straight from a state dict, sharing nothing with the module."
    convs = [k for k in ('layer0.0', 'layer0.3', 'layer0.6') if k+'.weight' in s]
    for i,k in enumerate(convs):
        w = s[k+'.weight']
        x = F.conv2d(x, w, stride=1 if i else 2, padding=w.shape[-1]//2)
        x = F.relu(bn_(s, f'layer0.{3*i+1}', x))
    maps = [x := F.max_pool2d(x, 3, 2, 1, ceil_mode=ceil_mode)]
    for i in range(4):
        for b in range(blocks[i]):
            p,st,d = f'layer{i+1}.{b}.',strides[i] if b == 0 else 1,dilations[i]*(grid[b] if grid and i == 3 else 1)
            y = F.relu(bn_(s, p+'bn1', F.conv2d(x, s[p+'conv1.weight'], stride=st if stride_first else 1)))
            y = F.conv2d(y, s[p+'conv2.weight'], stride=1 if stride_first else st, padding=d, dilation=d)
            y = bn_(s, p+'bn3', F.conv2d(F.relu(bn_(s, p+'bn2', y)), s[p+'conv3.weight']))
            if p+'downsample.0.weight' in s: x = bn_(s, p+'downsample.1', F.conv2d(x, s[p+'downsample.0.weight'], stride=st))
            x = F.relu(x + y)
        maps.append(x)
    return maps

@pytest.mark.parametrize('options', [
    dict(stem_widths=(6, 6, 8)), dict(stem_widths=(8,), stride_first=True, ceil_mode=True),
    dict(stem_widths=(8,), strides=(1,2,2,1), dilations=(1,1,1,2), grid=(1, 2))])
def test_forward_equals_an_independent_one(options):
    torch.manual_seed(0)
    o = dict(blocks=(1,2,1,2), strides=(1,2,1,1), dilations=(1,1,2,4), stride_first=False, ceil_mode=False, grid=None) | options
    stem_widths,grid = o.pop('stem_widths'),o.pop('grid')
    net = randomise_bn(ResNet(stem_widths=stem_widths, planes=(4,4,8,8), multi_grid=grid, **o)).eval()
    x = torch.randn(2, 3, 70, 97)
    with torch.no_grad(): got,want = net(x),plain_resnet(net.state_dict(), x, grid=grid, **o)
    assert len(got) == 5 and tuple(g.shape[1] for g in got) == net.widths
    for g,w in zip(got, want): torch.testing.assert_close(g, w)

def test_basic_blocks_make_resnet18():
    net = meta(ResNet, (2,2,2,2), block=Basic)
    assert params(net) == 11_689_512 - 513_000   # torchvision's ResNet-18 without fc
    assert out_size(net, 224, 224) == (512, 7, 7)

def test_freeze_affine_keeps_statistics_alive():
    net = freeze_affine(ResNet((1,1,1,1), (4,), (4,4,4,4)))
    assert all(p.requires_grad == (p.ndim == 4) for p in net.parameters())
    before = net.layer4[0].bn3.running_var.clone()
    net.train()(torch.randn(2, 3, 32, 32))
    assert not torch.equal(before, net.layer4[0].bn3.running_var)

# ---------------------------------------------------------------- mobilenet

def test_mobilenet_counts_and_names():
    net = meta(MobileNetV2)
    assert params(net) == 3_504_872 - 1_281_000   # torchvision's without its classifier
    s = net.state_dict()
    assert s['features.1.conv.1.weight'].shape == (16, 32, 1, 1) and s['features.18.0.weight'].shape == (1280, 320, 1, 1)

@pytest.mark.parametrize('stride,rates', [(32, [1]*17), (16, [1]*14 + [2]*3), (8, [1]*7 + [2]*7 + [4]*3)])
def test_mobilenet_output_strides(stride, rates):
    net = meta(MobileNetV2, output_stride=stride)
    assert [m.dilation[0] for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups > 1] == rates
    assert out_size(net, 256, 512)[1:] == (256//stride, 512//stride)

@needs_data
def test_pretrained_mobilenet_loads_and_dilation_keeps_its_features():
    state,x = load_weights(MOBILENET),photo(128, 192)
    maps = {}
    for s in (32, 16, 8):
        net = MobileNetV2(output_stride=s).eval()
        load_into(net, state, MOBILENET)
        assert all(p.dtype == torch.float32 for p in net.parameters())
        with torch.no_grad(): maps[s] = net(x)[4]
    for s,step in ((16, 2), (8, 4)):
        torch.testing.assert_close(maps[s][..., ::step, ::step], maps[32], atol=1e-4, rtol=1e-4)

def photo(h, w):
    from PIL import Image
    path = sorted((DATA/'camvid'/'val').iterdir())[0]
    x = torch.tensor(np.array(Image.open(path).convert('RGB').resize((w, h), Image.BILINEAR))).permute(2, 0, 1)[None]/255
    return (x - torch.tensor((.485, .456, .406)).view(3,1,1))/torch.tensor((.229, .224, .225)).view(3,1,1)

def bn_inputs(net, x):
    "Mean of each batch norm's input in units of its stored statistics, and the ratio of the variances."
    out = []
    def hook(m, inputs, _):
        std = (m.running_var + m.eps).sqrt()
        out.append(((inputs[0].mean((0,2,3)) - m.running_mean)/std, inputs[0].var((0,2,3))/std**2))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.register_forward_hook(hook)
    with torch.no_grad(): net.eval()(x)
    return torch.stack([z.abs().mean() for z,_ in out]), torch.stack([v.median() for _,v in out])

@needs_data
def test_pretrained_mobilenet_sees_what_it_was_trained_on():
    # Every batch norm knows the mean and variance of its input over ImageNet. On a street photo the means were measured at
    # .15-.20 standard deviations off on average (.44 in the worst of 52 layers, ten photos of three data sets); noise gives .53,
    # one layer with its channels in the wrong order .54, unnormalised images 1.3.
    net = MobileNetV2()
    load_into(net, load_weights(MOBILENET), MOBILENET)
    mean,var = bn_inputs(net, photo(320, 448))
    assert mean.mean() < .3 and mean.max() < .7 and .4 < var.median() < 1.6
    wrong = MobileNetV2()
    load_into(wrong, load_weights(MOBILENET), MOBILENET)
    wrong.features[5].conv[2].weight.data = wrong.features[5].conv[2].weight.data.flip(0)
    assert bn_inputs(wrong, photo(320, 448))[0].mean() > .4

@needs_data
def test_pretrained_backbone_into_dip_mobilenetv2():
    net = dip_mobilenetv2(output_stride=16)
    head = {k: v.clone() for k,v in net.state_dict().items() if k.startswith(net.head_prefixes)}
    load_backbone(net, MOBILENET)
    now,plain = net.state_dict(),load_weights(MOBILENET)
    assert torch.equal(now['layer4.17.conv.2.weight'], plain['features.17.conv.2.weight'].float())
    assert head and all(torch.equal(now[k], v) for k,v in head.items())

# ---------------------------------------------------------------- the DIP network

def test_dip_has_679_entries_and_54168512_parameters():
    net = meta(dip_resnet101)
    assert len(net.state_dict()) == 679 and params(net) == 54_168_512

@pytest.mark.parametrize('size,want', [((1025, 1025), (129, 129)), ((1024, 2048), (128, 256)), ((720, 1280), (90, 160))])
def test_dip_feature_sizes(size, want): assert out_size(meta(dip_resnet101), *size) == (1024, *want)

def dip_names():
    bn = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    want = [f'layer0.{i}.weight' for i in (0, 3, 6)] + [f'layer0.{i}.{n}' for i in (1, 4, 7) for n in bn]
    for i,blocks in enumerate((3, 4, 23, 3), 1):
        for b in range(blocks):
            for j in (1, 2, 3): want += [f'layer{i}.{b}.conv{j}.weight'] + [f'layer{i}.{b}.bn{j}.{n}' for n in bn]
        want += [f'layer{i}.0.downsample.0.weight'] + [f'layer{i}.0.downsample.1.{n}' for n in bn]
    for i in range(4): want += [f'ppm.features.{i}.1.weight'] + [f'ppm.features.{i}.2.{n}' for n in bn]
    want += ['down.0.weight'] + [f'down.1.{n}' for n in bn]
    want += [f'projector.{i}.weight' for i in (0, 3, 6)] + [f'projector.{i}.{n}' for i in (1, 4) for n in bn]
    return want

def test_dip_key_layout():
    state = meta(dip_resnet101).state_dict()
    assert set(state) == set(dip_names()) and len(dip_names()) == 679
    assert state['ppm.features.3.1.weight'].shape == (512, 2048, 1, 1)
    assert state['down.0.weight'].shape == (1024, 4096, 1, 1)
    assert all(state[f'projector.{i}.weight'].shape == (1024, 1024, 1, 1) for i in (0, 3, 6))

def test_dip_forward_equals_an_independent_one():
    torch.manual_seed(0)
    for fuse,x in (('l4', torch.randn(2, 3, 65, 97)), ('l4+l2', torch.randn(2, 3, 65, 97))):
        net = randomise_bn(dip_small(width=4, channels=8, fuse=fuse)).eval()
        s = net.state_dict()
        maps = plain_resnet(s, x, (1,2,2,1), (1,2,1,1), (1,1,2,4), False, False)
        y = maps[4] if fuse == 'l4' else torch.cat([maps[4], maps[2]], 1)
        parts = [y]
        for i,b in enumerate((1, 2, 3, 6)):
            z = F.relu(bn_(s, f'ppm.features.{i}.2', F.conv2d(F.adaptive_avg_pool2d(y, b), s[f'ppm.features.{i}.1.weight'])))
            parts.append(F.interpolate(z, y.shape[2:], mode='bilinear', align_corners=True))
        y = F.relu(bn_(s, 'down.1', F.conv2d(torch.cat(parts, 1), s['down.0.weight'])))
        for i in (0, 3): y = F.relu(bn_(s, f'projector.{i+1}', F.conv2d(y, s[f'projector.{i}.weight'])))
        with torch.no_grad(): torch.testing.assert_close(net(x), F.conv2d(y, s['projector.6.weight']))

@pytest.mark.parametrize('layers', [1, 2, 3])
@pytest.mark.parametrize('norm', ['bn', 'gn8'])
@pytest.mark.parametrize('fuse', ['l4', 'l4+l2'])
@pytest.mark.parametrize('classes', [None, 19])
def test_version_detection(layers, norm, fuse, classes, tmp_path):
    want = dict(projector_layers=layers, head_norm=norm, fuse=fuse, channels=1024, num_classes=classes)
    state = meta(dip_resnet101, classes, layers, norm, fuse).state_dict()
    assert dip_head_version(state) == want
    assert dip_head_version(dict(sorted(state.items()))) == want     # the order in a safetensors file
    assert set(meta(dip_resnet101, **want).state_dict()) == set(state)

def test_version_detection_of_the_others():
    want = dict(projector_layers=2, head_norm='gn8', fuse='l4+l2', channels=1024, num_classes=None)
    assert dip_head_version(meta(dip_vgg16).state_dict()) == want
    assert dip_head_version(meta(dip_mobilenetv2).state_dict())['fuse'] == 'l4'
    with pytest.raises(InputError, match='not a DIP checkpoint'): dip_head_version(meta(ResNet).state_dict())

@pytest.mark.parametrize('bad,said', [(dict(projector_layers=0), 'projector_layers is 0'), (dict(head_norm='gn'), "head_norm is 'gn'"),
                                      (dict(fuse='l3'), "fuse is 'l3'")])
def test_options_are_checked(bad, said):
    with pytest.raises(InputError, match=said): meta(dip_resnet101, **bad)

def test_round_trip_through_a_file(tmp_path):
    torch.manual_seed(0)
    a = randomise_bn(dip_small(width=4, channels=8))
    x = torch.randn(2, 3, 64, 64)
    for name in ('a.safetensors', 'a.pth'):
        save_weights(tmp_path/name, a)
        b = dip_small(width=4, channels=8)
        load_into(b, load_weights(tmp_path/name), tmp_path/name)
        assert list(b.state_dict()) == list(a.state_dict())
        with torch.no_grad(): assert torch.equal(a.eval()(x), b.eval()(x))

@pytest.mark.parametrize('make', [dip_small, lambda k: dip_mobilenetv2(k, output_stride=16)])
@pytest.mark.parametrize('classes', [None, 7])
def test_every_trained_parameter_gets_a_gradient(make, classes):
    torch.manual_seed(0)
    net = freeze(make(classes))
    y = set_train(net)(torch.randn(2, 3, 64, 96))
    assert y.shape[1] == (classes or net.channels) and y.isfinite().all()
    (y*torch.randn_like(y)).sum().backward()
    frozen = tuple(p + '.' for p in net.frozen_prefixes)
    for name,p in net.named_parameters():
        if name.startswith(frozen): assert p.grad is None and not p.requires_grad
        else: assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name

def test_classifier_has_a_bias_and_replaces_the_last_conv():
    net = meta(dip_resnet101, num_classes=19)
    s = net.state_dict()
    assert s['projector.6.weight'].shape == (19, 1024, 1, 1) and s['projector.6.bias'].shape == (19,)
    assert len(s) == 680

def test_nothing_before_layer2_is_kept():
    net = set_train(freeze(dip_small(), ('layer0', 'layer1')))
    x = torch.randn(2, 3, 65, 65)
    low = net.layer1(net.layer0(x))
    assert not low.requires_grad and low.grad_fn is None
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t): net(x)
    finest = [s for s in sizes if len(s) == 4 and s[0] == 2 and s[2] > 9]   # the grid of layer0 and layer1 is 17x17, later 9x9
    assert set(finest) <= {(2, low.shape[1], 17, 17), (2, 32, 17, 17)}   # input and first 1x1 conv of layer2, which does the halving
    free = []
    freeze(net, ())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: free.append(tuple(t.shape)) or t, lambda t: t): net(x)
    assert len(free) > len(sizes) and (2, 16, 33, 33) in free and (2, 16, 33, 33) not in sizes

def running(net): return {k: v.clone() for k,v in net.state_dict().items() if 'running_mean' in k}

@pytest.mark.parametrize('freeze_bn,still', [(False, ()), (True, ('layer0', 'layer1')),
                                             (('layer0', 'ppm'), ('layer0', 'ppm')), (('',), ('',)),
                                             ('backbone', ('layer0', 'layer1', 'layer2', 'layer3', 'layer4'))])
def test_batch_norms_follow_unless_told(freeze_bn, still):
    torch.manual_seed(0)
    net = freeze(dip_small(), ('layer0', 'layer1'))
    net.frozen_prefixes = ('layer0', 'layer1')
    before = running(net)
    set_train(net, freeze_bn)(torch.randn(2, 3, 64, 64) + .5)
    for k,v in running(net).items():
        assert torch.equal(v, before[k]) == any(p == '' or k.startswith(p+'.') for p in still), k

def test_a_batch_of_one():
    x = torch.randn(1, 3, 64, 64)
    net = dip_small()
    with pytest.raises(InputError, match='batch of one image'): net.train()(x)
    assert net.eval()(x).isfinite().all()
    assert set_train(net, ('ppm',))(x).isfinite().all()
    assert dip_small(width=16, head_norm='gn8', channels=128).train()(x).isfinite().all()

def test_vgg_loads_layer_by_layer():
    torch.manual_seed(0)
    with torch.device('meta'): net = dip_vgg16(channels=16)
    own = {k: v for k,v in net.state_dict().items() if k.startswith('layer')}
    convs = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    blocks = [f'layer{b}.{2*i}' for b,n in enumerate((2,2,3,3,3)) for i in range(n)]
    for shift in (0, 1):
        file = {}
        for i,ours in zip(convs, blocks):
            for part in ('weight', 'bias'): file[f'features.{i - shift*(i >= 24)}.{part}'] = own[f'{ours}.{part}']
        got = from_vgg16_keys(file | {'classifier.0.weight': torch.zeros(1)})
        assert set(got) == set(own) and all(got[k] is own[k] for k in own)
    with pytest.raises(InputError, match='2 missing, e.g. layer4.4.weight'):
        load_into(net, {k: v for k,v in got.items() if not k.startswith('layer4.4')}, 'vgg16.pth', skip=net.head_prefixes)

def test_vgg_structure():
    net = meta(dip_vgg16)
    assert sum(p.numel() for n,p in net.named_parameters() if n.startswith('layer')) == 14_714_688   # torchvision's `features`
    assert [len(getattr(net, f'layer{i}')) for i in range(5)] == [5, 5, 7, 6, 6]   # convs, ReLUs, three pools
    assert all(m.dilation == (2, 2) for m in net.layer4 if isinstance(m, nn.Conv2d))
    assert not any('running' in k for k in net.state_dict())
    assert out_size(net, 1025, 1025) == (1024, 129, 129) and out_size(net, 1024, 2048) == (1024, 128, 256)

def test_small_is_the_same_on_channels_last_and_small_enough():
    torch.manual_seed(0)
    net,x = dip_small().eval(),torch.randn(2, 3, 96, 192)
    assert params(net) < 500_000
    with torch.no_grad():
        a = net(x)
        b = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert a.shape == (2, 128, 12, 24)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert out_size(meta(dip_small, output_stride=4), 96, 192) == (128, 24, 48)

# ---------------------------------------------------------------- weight files

def small(): return ResNet((1,1,1,1), (4,), (4,4,4,4))

def test_note_and_fingerprint(tmp_path):
    p,q = tmp_path/'a.safetensors',tmp_path/'b.safetensors'
    net = small()
    save_weights(p, net, dict(step=3, classes=['road', 'Straße']))
    save_weights(q, net.state_dict(), dict(step=3, classes=['road', 'Straße']))
    assert read_meta(p) == dict(step=3, classes=['road', 'Straße'])
    assert fingerprint(p) == fingerprint(q) and len(fingerprint(p)) == 64
    save_weights(q, net, dict(step=4))
    assert fingerprint(p) != fingerprint(q)
    from safetensors.torch import save_file
    save_file({'a': torch.ones(1)}, q)
    assert read_meta(q) == {}

@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
@pytest.mark.parametrize('share', [0, .001, .3, .9, .9999])
def test_a_cut_file_is_an_input_error(tmp_path, suffix, share):
    p = tmp_path/f'w{suffix}'
    save_weights(p, small())
    whole = p.read_bytes()
    p.write_bytes(whole[:int(len(whole)*share)])
    with pytest.raises(InputError, match=f'w{suffix}: cut short or not a'): load_weights(p)

@pytest.mark.parametrize('name', ['w.safetensors', 'w.pth', 'w.pkl'])
@pytest.mark.parametrize('content', [b'<html>404 not found</html>', b'version https://git-lfs.github.com/spec/v1\n', bytes(200),
                                     np.random.default_rng(0).bytes(5000)])
def test_something_else_is_an_input_error(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(InputError, match='cut short or not a'): load_weights(tmp_path/name)

def test_missing_and_folders(tmp_path):
    with pytest.raises(InputError, match='does not exist'): load_weights(tmp_path/'no.pth')
    with pytest.raises(InputError, match='is a folder'): load_weights(tmp_path)
    with pytest.raises(InputError, match='does not exist'): read_meta(tmp_path/'no.safetensors')
    with pytest.raises(InputError, match='does not exist'): fingerprint(tmp_path/'no')

class Evil:
    def __reduce__(self): return os.system, ('touch ' + Evil.mark,)

def test_a_pickle_cannot_run_code(tmp_path):
    Evil.mark = str(tmp_path/'ran')
    torch.save({'state_dict': {'a': torch.ones(1)}, 'x': Evil()}, tmp_path/'evil.pth')
    (tmp_path/'evil.pkl').write_bytes(pickle.dumps(Evil(), 2))
    for name in ('evil.pth', 'evil.pkl'):
        with pytest.raises(InputError, match='could run code|cut short or not'): load_weights(tmp_path/name)
    with pytest.raises(InputError, match='could run code'): load_weights(tmp_path/'evil.pth')
    assert not (tmp_path/'ran').exists()

def test_numpy_numbers_beside_the_weights_are_let_through(tmp_path):
    torch.save({'DeepLab': {'model_state': {'a': torch.ones(2)}}, 'best_iou': np.float64(.5), 'iter': 3}, tmp_path/'pbal.pkl')
    assert list(load_weights(tmp_path/'pbal.pkl', 'DeepLab.model_state')) == ['a']
    with pytest.raises(InputError, match="no entry 'ResNet101.model_state'; it holds the entries DeepLab, best_iou, iter"):
        load_weights(tmp_path/'pbal.pkl', 'ResNet101.model_state')
    with pytest.raises(InputError, match='not a checkpoint; it holds the entries DeepLab'): load_weights(tmp_path/'pbal.pkl')

def test_a_training_checkpoint_is_unwrapped(tmp_path):
    net = small()
    opt = torch.optim.SGD(net.parameters(), .1, momentum=.9)
    net(torch.randn(2, 3, 32, 32))[-1].sum().backward()
    opt.step()
    torch.save(dict(epoch=20, state_dict=nn.DataParallel(net).state_dict(), optimizer=opt.state_dict()), tmp_path/'final.pth')
    state = load_weights(tmp_path/'final.pth')
    assert list(state) == list(net.state_dict()) and all(torch.equal(state[k], v) for k,v in net.state_dict().items())
    torch.save(torch.zeros(19, 1024), tmp_path/'prototypes.pth')
    with pytest.raises(InputError, match=r'a tensor of shape \(19, 1024\)'): load_weights(tmp_path/'prototypes.pth')

def test_half_weights_become_float(tmp_path):
    net = small()
    save_weights(tmp_path/'h.safetensors', {k: v.half() if v.is_floating_point() else v for k,v in net.state_dict().items()})
    other = small()
    load_into(other, load_weights(tmp_path/'h.safetensors'))
    assert other.layer0[0].weight.dtype == torch.float32
    assert torch.equal(other.layer0[0].weight, net.layer0[0].weight.half().float())

def test_a_misfit_is_named_in_one_line_and_changes_nothing():
    net = small()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    state = {k: torch.full_like(v, 7) for k,v in before.items()}
    del state['layer2.0.conv1.weight'], state['layer2.0.conv2.weight']
    state['fc.weight'] = torch.ones(1)
    state['layer0.0.weight'] = torch.ones(4, 3, 3, 3)
    with pytest.raises(InputError) as e: load_into(net, state, 'w.pth')
    assert str(e.value) == ('w.pth: checkpoint of another network: 2 missing, e.g. layer2.0.conv1.weight; 1 unexpected, e.g. fc.weight; '
                            '1 of other shape, e.g. layer0.0.weight (4, 3, 3, 3) instead of (4, 3, 7, 7)')
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    left = load_into(net, state, strict=False)
    assert [len(left[k]) for k in ('missing', 'unexpected', 'other shape')] == [2, 1, 1]
    assert net.layer4[0].conv1.weight.eq(7).all() and not net.layer0[0].weight.eq(1).all()

def test_old_checkpoints_without_counters_load():
    net = small()
    state = {k: v for k,v in net.state_dict().items() if 'num_batches_tracked' not in k}
    assert not any(load_into(small(), state).values())

def test_skip_means_the_head_only(tmp_path):
    net = dip_small(width=4, channels=8)
    body = {k: v for k,v in net.state_dict().items() if k.startswith('layer')}
    load_into(net, body, skip=net.head_prefixes)
    del body['layer3.0.conv1.weight']
    with pytest.raises(InputError, match='1 missing, e.g. layer3.0.conv1.weight'): load_into(net, body, skip=net.head_prefixes)
    body['layer3.0.conv1.weight'] = net.layer3[0].conv1.weight
    with pytest.raises(InputError, match='missing, e.g. ppm'): load_into(net, body)

def test_a_plain_stem_does_not_go_into_a_deep_one(tmp_path):
    torch.save(to_torchvision_keys(ResNet((1,2,2,1), (32,), (16,32,64,64), (1,2,1,1)).state_dict()), tmp_path/'r.pth')
    with pytest.raises(InputError, match='another network.*layer0.3.weight'): load_backbone(dip_small(), tmp_path/'r.pth')

def test_nothing_stands_after_a_failed_save(tmp_path):
    with pytest.raises(TypeError): save_weights(tmp_path/'a.safetensors', small(), dict(x=object()))
    with pytest.raises(InputError, match="ends in '.bin'"): save_weights(tmp_path/'a.bin', small())
    with pytest.raises(InputError, match="ends in ''"): save_weights(tmp_path/'a', small())
    assert list(tmp_path.iterdir()) == []
    (tmp_path/'f').write_text('a file')
    with pytest.raises(InputError, match='cannot write'): save_weights(tmp_path/'f'/'a.safetensors', small())

def test_views_and_channels_last_are_written_as_they_look(tmp_path):
    w = torch.arange(24.).view(2, 3, 2, 2)
    save_weights(tmp_path/'v.safetensors', dict(a=w[:, 1:], b=w.contiguous(memory_format=torch.channels_last), c=w))
    back = load_weights(tmp_path/'v.safetensors')
    assert torch.equal(back['a'], w[:, 1:]) and torch.equal(back['b'], w) and torch.equal(back['c'], w)

def test_a_safetensors_header_can_be_read_by_hand(tmp_path):
    save_weights(tmp_path/'a.safetensors', small(), dict(step=1))
    raw = (tmp_path/'a.safetensors').read_bytes()
    header = json.loads(raw[8:8+int.from_bytes(raw[:8], 'little')])
    assert json.loads(header['__metadata__']['meta']) == dict(step=1)
