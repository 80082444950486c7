"""The networks of WDASS and PixDA and PixDA's discriminators: sizes, names, an independent forward pass, start, groups, released files."""
import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from protonb.core import InputError
from protonb.deeplab import from_released, iapc_small, init_keys, pbal_small, released_repeats, to_released
from protonb.deeplabv2 import (pixda_mobilenetv2, pixda_resnet101, pixda_small, wdass_groups, wdass_mobilenetv2, wdass_resnet101,
                               wdass_small)
from protonb.dip_net import freeze, set_train, under
from protonb.discriminators import pbal_discriminator, pixda_image_discriminator, pixda_pixel_discriminator
from protonb.mobilenet import MobileNetV2
from protonb.resnet import to_torchvision_keys
from protonb.optimization import make_optimizer, parameter_groups
from protonb.source_only import upsampled_cross_entropy
from protonb.transforms import normalize
from protonb.weights import load_backbone, load_into, load_weights, save_weights
from test_deeplab import MOBILENET, bottleneck_names, by_hand_backbone, meta, params, randomised, seeded, shapes, walked

BIG = dict(wdass=wdass_resnet101, pixda=pixda_resnet101)
SMALL = dict(wdass=wdass_small, pixda=pixda_small)
MOBILE = dict(wdass=wdass_mobilenetv2, pixda=pixda_mobilenetv2)
each = pytest.mark.parametrize('name', list(BIG))

def body(net): return net.backbone if 'backbone' in net._modules else net

# ---------------------------------------------------------------- sizes

@pytest.mark.parametrize('name,kw,entries,count,trained', [
    ('wdass', {}, 634, 44_425_612, 44_425_612), ('pixda', {}, 640, 44_601_560, 43_795_724),
    ('pixda', dict(train_affine=True), 640, 44_601_560, 43_901_068)])
def test_counts_of_the_released_networks(name, kw, entries, count, trained):
    net = meta(BIG[name], **kw)
    assert (len(net.state_dict()), params(net), params(net, True)) == (entries, count, trained)

@pytest.mark.parametrize('name,size,logits,features', [
    ('wdass', (512, 512), (64, 64), (256, 64, 64)), ('wdass', (1024, 2048), (128, 256), (256, 128, 256)),
    ('wdass', (520, 516), (65, 65), (256, 65, 65)), ('pixda', (512, 1024), (65, 129), (1024, 65, 129))])
def test_sizes_of_logits_and_features(name, size, logits, features):
    net = meta(BIG[name])
    assert shapes(net, *size) == [(19, *logits), features] and (net.channels, net.num_classes) == (features[0], 19)
    plain = net(torch.empty(1, 3, *size, device='meta'))
    assert isinstance(plain, torch.Tensor) and plain.shape == (1, 19, *logits)

@each
@pytest.mark.parametrize('classes', [13, 16])
def test_other_numbers_of_classes(name, classes):
    net = meta(BIG[name], classes)
    assert shapes(net, 64, 96)[0][0] == classes == net.num_classes
    lost = (2048*9*4 + 4 if name == 'wdass' else (2048 + 1024)*9*4 + 8)*(19 - classes)
    assert params(meta(BIG[name])) - params(net) == lost

@each
def test_small_and_mobile_networks(name):
    small,mobile = seeded(SMALL[name]),meta(MOBILE[name])
    assert 3e5 < params(small) < 6.2e5
    z,f = small(torch.randn(2, 3, 96, 192), features=True)
    where = (12, 24) if name == 'wdass' else (13, 25)
    assert z.shape == (2, 19, *where) and f.shape == (2, small.channels, *where)
    assert shapes(mobile, 96, 192) == [(19, 12, 24), (mobile.channels, 12, 24)]
    for net in (small, mobile, meta(BIG[name])):
        assert all(any(under(n, (h,)) for n,_ in net.named_parameters()) for h in net.head_prefixes)

def test_small_options():
    assert shapes(meta(wdass_small, 5, output_stride=4), 96, 192) == [(5, 24, 48), (64, 24, 48)]
    assert shapes(meta(wdass_small, 5, channels=32, width=8, blocks=(1,1,1,1)), 96, 192) == [(5, 12, 24), (32, 12, 24)]
    assert shapes(meta(pixda_small, 5, output_stride=4), 96, 192) == [(5, 25, 49), (256, 25, 49)]
    assert shapes(meta(wdass_mobilenetv2, 5, output_stride=16), 96, 192) == [(5, 6, 12), (256, 6, 12)]
    for make in (wdass_small, pixda_small):
        with pytest.raises(InputError, match='output_stride is 16'): make(output_stride=16)

# ---------------------------------------------------------------- inside

def three_by_three(stage): return [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]

@each
def test_strides_dilations_and_pool(name):
    net = meta(BIG[name])
    stages = [getattr(body(net), f'layer{i}') for i in range(1, 5)]
    rates = [[c.dilation[0] for c in three_by_three(s)] for s in stages]
    assert rates == [[1]*3, [1]*4, [2]*23, [4]*3]
    assert all(c.padding == c.dilation for s in stages for c in three_by_three(s))
    for s,stride in zip(stages, (1, 2, 1, 1)):
        strided = {n.split('.')[0] for n,m in s[0].named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
        assert strided == ({'conv2' if name == 'wdass' else 'conv1', 'downsample'} if stride == 2 else set())
    assert body(net).layer0[3].ceil_mode is (name == 'pixda')

def test_heads():
    wdass,pixda = (meta(make) for make in BIG.values())
    for convs,rates,wide in ((wdass.aspp.features, [12, 24, 36, 48], 2048), (pixda.layer5.conv2d_list, [6, 12, 18, 24], 1024),
                             (pixda.layer6.conv2d_list, [6, 12, 18, 24], 2048)):
        assert [c.dilation[0] for c in convs] == rates == [c.padding[0] for c in convs]
        assert all(c.weight.shape == (19, wide, 3, 3) and c.bias is not None for c in convs)
    one, = wdass.representation
    assert one.weight.shape == (256, 2048, 1, 1) and one.bias is not None

def summed(S, k, x, rates):
    return sum(F.conv2d(x, S[f'{k}.{i}.weight'], S[f'{k}.{i}.bias'], padding=d, dilation=d) for i,d in enumerate(rates))

def wdass_by_hand(S, x):
    S = {k.replace('layer0.0.', 'conv1.').replace('layer0.1.', 'bn1.'): v for k,v in S.items()}
    x = by_hand_backbone(S, x, 'backbone.', (1,2,1,1), [[1], [1]*2, [2]*2, [4]], False)[4]
    f = F.conv2d(x, S['representation.0.weight'], S['representation.0.bias'])
    return summed(S, 'aspp.features', x, (3, 6, 9, 12)), f/f.pow(2).sum(1, keepdim=True).sqrt()

def pixda_by_hand(S, x):
    maps = by_hand_backbone(S, x, '', (1,2,1,1), [[1], [1]*2, [2]*2, [4]], True)
    return summed(S, 'layer6.conv2d_list', maps[4], (3, 6, 9, 12)), maps[3]

@pytest.mark.parametrize('make,by_hand', [(wdass_small, wdass_by_hand), (pixda_small, pixda_by_hand)])
def test_forward_equals_a_second_writing_from_the_released_names(make, by_hand):
    net = randomised(seeded(make)).double()
    x = torch.randn(2, 3, 70, 94, dtype=torch.float64)
    with torch.no_grad(): got,want = net(x, features=True),by_hand(to_released(net), x)
    for a,b in zip(got, want):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-9*b.abs().max()
    assert torch.equal(net(x), got[0])

def test_the_exact_pixda_network_sees_blue_green_red_minus_a_mean():
    net = randomised(seeded(pixda_resnet101))
    images = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    S,bgr = to_released(net),images.float().flip(1) - torch.tensor([104.00698793, 116.66876762, 122.67891434])[:, None, None]
    with torch.no_grad():
        maps = by_hand_backbone(S, bgr, '', (1,2,1,1), [[1]*3, [1]*4, [2]*23, [4]*3], True)
        z,f = net(normalize(images), features=True)
        for a,b in ((z, summed(S, 'layer6.conv2d_list', maps[4], (6, 12, 18, 24))), (f, maps[3])):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-3*b.abs().max()

@pytest.mark.parametrize('make', [wdass_small, wdass_mobilenetv2])
def test_features_of_wdass_have_length_one_and_their_own_gradient(make):
    net = seeded(make).train()
    z,f = net(torch.randn(2, 3, 64, 96), features=True)
    assert torch.allclose(f.norm(dim=1), torch.ones(f[:, 0].shape), atol=1e-5) and (f < 0).any()
    (f*torch.randn_like(f)).sum().backward()
    assert all(p.grad is None for p in net.aspp.parameters())
    assert all(p.grad is not None and p.grad.any() for p in net.representation.parameters())

def test_a_feature_of_length_zero_is_no_nan():
    net = seeded(wdass_small)
    nn.init.zeros_(net.representation[0].weight), nn.init.zeros_(net.representation[0].bias)
    f = net(torch.randn(1, 3, 64, 96), features=True)[1]
    f.sum().backward()
    assert not f.any() and all(torch.isfinite(p.grad).all() for p in net.backbone.parameters())

def test_layer5_of_pixda_is_never_computed_nor_trained():
    net,calls = seeded(pixda_small),[]
    for conv in net.layer5.conv2d_list: conv.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(net.state_dict())
    opt = make_optimizer('sgd', parameter_groups(net, .01, 10, weight_decay=5e-4, repeats=released_repeats(net)), .01)
    for _ in range(2):
        upsampled_cross_entropy(net(torch.randn(2, 3, 64, 96), features=True)[0], torch.ones(2, 64, 96, dtype=torch.long)).backward()
        opt.step()
    after = net.state_dict()
    assert not calls and all(torch.equal(before[k], after[k]) for k in before if k.startswith('layer5'))
    assert not torch.equal(before['layer6.conv2d_list.0.weight'], after['layer6.conv2d_list.0.weight'])
    assert not any(p.requires_grad for p in net.layer5.parameters())
    assert not any(under(n, ('layer5',)) for n,p in freeze(net).named_parameters() if p.requires_grad)

# ---------------------------------------------------------------- start and training

def convs(net): return {n: m for n,m in net.named_modules() if isinstance(m, nn.Conv2d)}

def test_wdass_starts_by_fan_in_in_the_classifier_and_as_torch_does_in_the_projection():
    net = seeded(wdass_resnet101)
    for c in net.aspp.features: assert abs(c.weight.std()/(2/(2048*9))**.5 - 1) < .02 and not c.bias.any()
    w,b = net.representation[0].weight,net.representation[0].bias
    assert abs(w.std()*(3*2048)**.5 - 1) < .02 and w.abs().max() <= 2048**-.5 and b.any() and b.abs().max() <= 2048**-.5
    for m in convs(net.backbone).values():
        assert abs(m.weight.std()/(2/(m.out_channels*m.kernel_size[0]**2))**.5 - 1) < .06
    assert all(m.weight.requires_grad and m.bias.requires_grad for m in net.modules() if isinstance(m, nn.BatchNorm2d))

def test_pixda_starts_from_a_narrow_normal_distribution_and_fixes_the_batch_norms():
    net = seeded(pixda_resnet101)
    assert all(abs(m.weight.std() - .01) < 5e-4 and abs(m.weight.mean()) < 2e-4 for m in convs(net).values())
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): assert not m.weight.requires_grad and not m.bias.requires_grad
    before = net.layer4[2].bn3.running_mean.clone()
    set_train(net)(torch.randn(2, 3, 32, 32))
    assert not torch.equal(before, net.layer4[2].bn3.running_mean), 'the statistics must stay alive'

@each
def test_small_networks_start_undecided_and_learn(name):
    net = seeded(SMALL[name])
    x,y = torch.randn(4, 3, 64, 96),torch.zeros(4, 64, 96, dtype=torch.long)
    y[:, 32:] = 3
    y[:, :, :20] = 11
    y[:, 60:] = 255
    x[:, 0] += 2*(y == 3)
    x[:, 1] += 2*(y == 11)
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], .01, .9)
    losses = []
    for _ in range(8):
        z,f = net(x, features=True)
        loss = upsampled_cross_entropy(z, y)
        opt.zero_grad()
        (loss + 0*f.sum()).backward()
        opt.step()
        losses.append(loss.item())
    assert abs(losses[0] - 2.944) < .6 and losses[-1] < .7*losses[0]
    for n,p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all() and (p.grad.any() or under(n, ('representation',))), n

@each
def test_one_image_in_train_mode(name):
    assert seeded(SMALL[name]).train()(torch.randn(1, 3, 64, 96)).isfinite().all()

# ---------------------------------------------------------------- groups for the optimisers

def test_four_groups_of_wdass():
    net = meta(wdass_resnet101)
    groups = wdass_groups(net, 2.5e-3)
    assert [(len(g['params']), g['lr'], g['weight_decay']) for g in groups] == [
        (104, 2.5e-3, 1e-4), (208, 2.5e-3, 0.), (5, 2.5e-2, 1e-4), (5, 2.5e-2, 0.)]
    ids = [id(p) for g in groups for p in g['params']]
    assert len(ids) == len(set(ids)) == len(list(net.parameters()))
    names = {id(p): n for n,p in net.named_parameters()}
    assert {names[id(p)] for p in groups[3]['params']} == {f'aspp.features.{i}.bias' for i in range(4)} | {'representation.0.bias'}
    assert all(p.ndim == 4 for i in (0, 2) for p in groups[i]['params'])
    assert [(g['lr'], g['weight_decay']) for g in wdass_groups(net, 1., .5, 3.)] == [(1., .5), (1., 0.), (3., .5), (3., 0.)]

def test_groups_leave_out_what_is_not_trained_and_take_other_networks():
    net = seeded(wdass_small)
    for p in net.backbone.layer1.parameters(): p.requires_grad_(False)
    ids = {id(p) for g in wdass_groups(net, .1) for p in g['params']}
    assert ids == {id(p) for p in net.parameters() if p.requires_grad}
    other = wdass_groups(seeded(pbal_small), .1)
    assert len(other) == 4 and all(g['params'] for g in other)
    frozen = wdass_groups(seeded(iapc_small), .1)      # no trained batch norm: an empty group that an optimiser takes
    assert not frozen[1]['params']
    torch.optim.SGD(frozen, .1).step()

def test_repeats_of_pixda_are_those_of_the_walk():
    net = meta(pixda_resnet101)
    listed = walked([net.layer0[0], net.layer0[1], net.layer1, net.layer2, net.layer3, net.layer4])
    repeats,named = released_repeats(net),dict(net.named_parameters())
    inner = {n: r for n,r in repeats.items() if not under(n, net.head_prefixes)}
    assert {n: listed[id(named[n])] for n in inner} == inner
    assert (sum(inner.values()), Counter(inner.values())) == (314, {1: 1, 3: 99, 4: 4})
    assert {n: r for n,r in repeats.items() if n not in inner} == {f'layer6.conv2d_list.{i}.{e}': 1 for i in range(4) for e in ('weight', 'bias')}
    assert inner['layer0.0.weight'] == 1 and inner['layer3.0.downsample.0.weight'] == 4 and inner['layer3.0.conv1.weight'] == 3

def test_wdass_lists_everything_once():
    assert set(released_repeats(meta(wdass_resnet101)).values()) == {1}

# ---------------------------------------------------------------- files

def released_names(name):
    if name == 'wdass':
        stem = lambda k: k.replace('backbone.conv1.', 'backbone.layer0.0.').replace('backbone.bn1.', 'backbone.layer0.1.')
        last = [f'aspp.features.{i}.{e}' for i in range(4) for e in ('weight', 'bias')] + ['representation.0.weight', 'representation.0.bias']
        return [stem(k) for k in bottleneck_names('backbone.', lambda bn: last)]
    return bottleneck_names('', lambda bn: [f'layer{j}.conv2d_list.{i}.{e}' for j in (5, 6) for i in range(4) for e in ('weight', 'bias')])

@each
def test_names_of_the_released_files(name):
    net,want = meta(BIG[name]),released_names(name)
    theirs = to_released(net)
    assert len(want) == len(set(want)) and set(theirs) == set(want)
    back = from_released(theirs, net)
    assert list(back) == list(net.state_dict()) and all(back[k].shape == v.shape for k,v in net.state_dict().items())

def module(state): return {f'module.{k}': v for k,v in state.items()}

WRAPS = dict(wdass=lambda s: dict(iter=3, arch='x', num_classes=19, state_dict=module(s), state_dict_ema={k: v+1 for k,v in module(s).items()},
                                  optimizer={}, prototype=dict(real=torch.zeros(19, 256), syn=torch.ones(19, 256))),
             pixda=lambda s: dict(model_state=module(s), model_d1_state=module(pixda_pixel_discriminator(19, 4).state_dict()),
                                  model_d2_state=module(pixda_image_discriminator(19, 4).state_dict()), total_steps_so_far=7))

@each
@pytest.mark.parametrize('counters', [True, False])
def test_round_trip_with_values(name, counters):
    one,two = randomised(seeded(SMALL[name])),SMALL[name]().eval()
    state = {k: v for k,v in to_released(one).items() if counters or 'num_batches_tracked' not in k}
    ours = from_released(WRAPS[name](state), two, 'a.pth')
    two.load_state_dict(ours, strict=True)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(one(x), two(x))
    bare = from_released(state, two)
    assert all(torch.equal(bare[k], ours[k]) for k in ours)

def test_the_teacher_of_a_wdass_checkpoint(tmp_path):
    net = seeded(wdass_small)
    file = WRAPS['wdass'](to_released(net))
    ours = from_released(file, net, entry='state_dict_ema')
    assert all(torch.equal(ours[k], v+1) for k,v in net.state_dict().items())
    with pytest.raises(InputError, match="d.pth: has no entry 'teacher'"): from_released(file, net, 'd.pth', entry='teacher')
    torch.save(file, tmp_path/'last_checkpoint.pth')
    load_into(wdass_small(), load_weights(tmp_path/'last_checkpoint.pth', 'state_dict_ema'))   # the released names are ours
    assert load_weights(tmp_path/'last_checkpoint.pth', 'prototype')['syn'].shape == (19, 256)

def test_discriminators_of_a_pixda_checkpoint(tmp_path):
    torch.save(WRAPS['pixda'](to_released(seeded(pixda_small))), tmp_path/'model_7.pth')
    for entry,d in (('model_d1_state', pixda_pixel_discriminator(19, 4)), ('model_d2_state', pixda_image_discriminator(19, 4))):
        assert not any(load_into(d, load_weights(tmp_path/'model_7.pth', entry)).values())

def init_file(net, classes=21):
    "What AdaptSegNet and PixDA start from: a trained DeepLab of another data set with one head, called layer5."
    g = torch.Generator().manual_seed(5)
    state = {k: torch.randn(v.shape, generator=g) if v.is_floating_point() else v for k,v in to_released(net).items()
             if not k.startswith(('layer5', 'layer6'))}
    head = {f'layer5.conv2d_list.{i}.{e}': torch.ones(classes, *((8, 3, 3) if e == 'weight' else ())) for i in range(4) for e in ('weight', 'bias')}
    return {f'Scale.{k}': v for k,v in (state | head).items()}

@pytest.mark.parametrize('counters', [True, False])
def test_the_init_file_of_pixda(counters, tmp_path):
    net = seeded(pixda_small)
    file = {k: v for k,v in init_file(net).items() if counters or 'num_batches' not in k}
    own,ours = copy.deepcopy(net.state_dict()),from_released(file, net)
    theirs = {k: v for k,v in init_keys(file).items() if not k.startswith('layer5')}
    assert len(theirs) == len(file) - 8
    for k,v in ours.items():
        if under(k, net.head_prefixes): assert torch.equal(v, own[k]), k
        elif 'num_batches' not in k: assert torch.equal(v, theirs[k]), k
    torch.save(file, tmp_path/'init.pth')
    other = load_backbone(seeded(pixda_small), tmp_path/'init.pth')
    assert all(torch.equal(v, ours[k]) for k,v in other.state_dict().items() if 'num_batches' not in k)

def test_init_files_that_do_not_fit():
    net = seeded(pixda_small)
    file = init_file(net)
    with pytest.raises(InputError, match=r'e\.pth: .*lacks 1 entries: layer3.1.conv2.weight'):
        from_released({k: v for k,v in file.items() if k != 'Scale.layer3.1.conv2.weight'}, net, 'e.pth')
    with pytest.raises(InputError, match='has besides 1 entries: odd.x'): from_released(file | {'Scale.odd.x': torch.zeros(1)}, net)
    with pytest.raises(InputError, match='holds 1 entries: .*instead of'): from_released(file | {'Scale.conv1.weight': torch.zeros(2)}, net)
    with pytest.raises(InputError, match='not a file for this network'): from_released(file | {'conv1.weight': torch.zeros(2)}, net)
    with pytest.raises(InputError, match='lacks'): from_released(file, seeded(wdass_small))

@each
def test_files_that_do_not_fit(name):
    net = seeded(SMALL[name])
    state = to_released(net)
    gone = next(k for k in reversed(state) if k.endswith('weight'))
    with pytest.raises(InputError, match=r'b\.pth: .*lacks 1 entries: '):
        from_released({k: v for k,v in state.items() if k != gone}, net, 'b.pth')
    with pytest.raises(InputError, match='has besides 1 entries: decoder.proj.0.weight'):
        from_released(state | {'decoder.proj.0.weight': torch.zeros(1)}, net)
    with pytest.raises(InputError, match=r'holds 1 entries: .*instead of'): from_released(state | {gone: torch.zeros(2)}, net)
    with pytest.raises(InputError, match='not a file for this network'):
        from_released(state, SMALL['pixda' if name == 'wdass' else 'wdass']())
    for bad in ([1, 2], {}, torch.zeros(3), {'model_state': {'iter': 3}}, {'state_dict': {'a': 1}}):
        with pytest.raises(InputError, match='c.pkl'): from_released(bad, net, 'c.pkl')

def test_iapc_and_pixda_files_are_told_apart():
    iapc,pixda = iapc_small(),pixda_small()
    with pytest.raises(InputError, match='lacks 8 entries: layer5'): from_released(to_released(iapc), pixda)
    assert list(from_released(to_released(pixda), iapc)) == list(iapc.state_dict())     # the unused head is dropped, the rest is the same

@each
def test_pretrained_backbones_load(name, tmp_path):
    net = seeded(SMALL[name])
    stages = tuple(f'layer{i}' for i in range(5))
    source = {k: torch.randn_like(v) if v.is_floating_point() else v for k,v in body(net).state_dict().items() if under(k, stages)}
    source = {k: v for k,v in source.items() if not k.startswith(('layer5', 'layer6'))}
    path = tmp_path/'imagenet.safetensors'
    save_weights(path, to_torchvision_keys(source) | {'fc.weight': torch.zeros(10, 4), 'fc.bias': torch.zeros(10)})
    load_backbone(net, path)
    assert all(torch.equal(body(net).state_dict()[k], v) for k,v in source.items())
    save_weights(path, {k: v for k,v in to_torchvision_keys(source).items() if not k.startswith('layer3')})
    with pytest.raises(InputError, match='missing'): load_backbone(net, path)

@each
def test_mobilenet_backbones_load(name, tmp_path):
    net,file = seeded(MOBILE[name]),MobileNetV2()
    path = tmp_path/'mobile.safetensors'
    save_weights(path, file.state_dict() | {'classifier.1.weight': torch.zeros(10, 4)})
    load_backbone(net, path)
    theirs = [p for n,p in file.named_parameters() if not n.startswith('features.18.')]
    ours = [p for n,p in net.named_parameters() if not under(n, net.head_prefixes)]
    assert len(theirs) == len(ours) and all(torch.equal(a, b) for a,b in zip(theirs, ours))
    again = from_released(to_released(net), MOBILE[name]())
    assert all(torch.equal(again[k], v) for k,v in net.state_dict().items())

@pytest.mark.skipif(not MOBILENET.exists(), reason='needs ../shared/data')
@each
def test_the_real_mobilenet_file_loads(name):
    load_backbone(MOBILE[name](), MOBILENET)

# ---------------------------------------------------------------- discriminators

def test_sizes_of_the_discriminators():
    for make,count,size in ((pixda_pixel_discriminator, 84_993, (512, 1024)), (pixda_image_discriminator, 2_781_121, (16, 32))):
        d = meta(make)
        assert params(d) == count and d(torch.empty(2, 19, 512, 1024, device='meta')).shape == (2, 1, *size)
        assert meta(make, 13, 8)(torch.empty(1, 13, 64, 96, device='meta')).shape[:2] == (1, 1)

def test_the_pixel_discriminator_by_hand():
    d,x = seeded(pixda_pixel_discriminator, 5, 8),torch.rand(2, 5, 20, 30)
    S = d.state_dict()
    assert list(S) == [f'{l}.{e}' for l in ('conv1', 'conv2', 'classifier') for e in ('weight', 'bias')]
    y = F.leaky_relu(F.conv2d(x, S['conv1.weight'], S['conv1.bias'], padding=1), .2)
    y = F.leaky_relu(F.conv2d(y, S['conv2.weight'], S['conv2.bias'], padding=1), .2)
    assert torch.allclose(d(x), F.conv2d(y, S['classifier.weight'], S['classifier.bias']), atol=1e-6)

def test_the_pixel_discriminator_sees_five_by_five_pixels():
    d,x = seeded(pixda_pixel_discriminator, 3, 8),torch.rand(1, 3, 31, 41, requires_grad=True)
    d(x)[0, 0, 15, 20].backward()
    seen = x.grad[0].abs().sum(0).nonzero()
    assert seen.min(0).values.tolist() == [13, 18] and seen.max(0).values.tolist() == [17, 22]

def test_one_forward_of_the_pixel_discriminator_serves_two_backward_passes():
    d,p = seeded(pixda_pixel_discriminator, 3, 8),torch.rand(1, 3, 12, 16, requires_grad=True)
    verdict = d(p)
    to_input, = torch.autograd.grad(F.softplus(verdict).mean(), p, retain_graph=True)
    to_weights = torch.autograd.grad(F.softplus(-verdict).mean(), list(d.parameters()))
    again, = torch.autograd.grad(F.softplus(d(p)).mean(), p)
    assert torch.equal(to_input, again)
    for a,b in zip(to_weights, torch.autograd.grad(F.softplus(-d(p.detach())).mean(), list(d.parameters()))): assert torch.equal(a, b)

def test_the_image_discriminator_is_pbal_s():
    a,b = seeded(pixda_image_discriminator, 5, 4),seeded(pbal_discriminator, 5, 4)
    x = torch.rand(1, 5, 64, 96)
    assert list(a.state_dict()) == list(b.state_dict()) and torch.equal(a(x), b(x))
