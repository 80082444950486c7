"""The networks of IAPC, PBAL and ProDA and their discriminators: sizes, names, an independent forward pass, start, released files."""
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from protonb.core import InputError
from protonb.deeplab import (from_released, iapc_mobilenetv2, iapc_resnet101, iapc_small, pbal_mobilenetv2, pbal_resnet101,
                             pbal_small, proda_mobilenetv2, proda_resnet101, proda_small, released_repeats, to_released)
from protonb.dip_net import freeze, set_train, under
from protonb.discriminators import pbal_discriminator, proda_discriminator
from protonb.mobilenet import MobileNetV2
from protonb.resnet import to_torchvision_keys
from protonb.source_only import upsampled_cross_entropy
from protonb.transforms import normalize
from protonb.weights import load_backbone, save_weights

DATA = Path(__file__).parents[2]/'shared'/'data'
MOBILENET = DATA/'weights'/'mobilenetv2_imagenet_fp16.safetensors'
BIG = dict(iapc=iapc_resnet101, pbal=pbal_resnet101, proda=proda_resnet101)
SMALL = dict(iapc=iapc_small, pbal=pbal_small, proda=proda_small)
MOBILE = dict(iapc=iapc_mobilenetv2, pbal=pbal_mobilenetv2, proda=proda_mobilenetv2)
each = pytest.mark.parametrize('name', list(BIG))

@cache
def meta(make, *args, **kw):
    "A network without memory; shared between the tests, which only look at it."
    with torch.device('meta'): return make(*args, **kw)

def params(net, trained=False): return sum(p.numel() for p in net.parameters() if p.requires_grad or not trained)

def shapes(net, *size): return [tuple(m.shape[1:]) for m in net.eval()(torch.empty(2, 3, *size, device='meta'), features=True)]

def seeded(make, *args, **kw):
    torch.manual_seed(0)
    return make(*args, **kw)

def randomised(net, seed=0):
    "Batch norms, group norms and biases that a forward pass must get right."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name,t in net.state_dict().items():
            if name.endswith('running_var'): t.copy_(torch.rand(t.shape, generator=g)+.5)
            elif name.endswith('running_mean') or name.endswith('bias'): t.copy_(torch.randn(t.shape, generator=g)*.2)
            elif name.endswith('weight') and t.ndim == 1: t.copy_(torch.rand(t.shape, generator=g)+.5)
    return net.eval()

# ---------------------------------------------------------------- sizes

@pytest.mark.parametrize('name,kw,entries,count,trained', [
    ('iapc', {}, 632, 43_901_068, 43_795_724), ('iapc', dict(train_affine=True), 632, 43_901_068, 43_901_068),
    ('pbal', {}, 674, 58_753_459, 58_753_459), ('proda', {}, 653, 65_063_568, 65_063_568),
    ('proda', dict(bn_clr=True), 658, 65_067_664, 65_067_664)])
def test_counts_of_the_released_networks(name, kw, entries, count, trained):
    net = meta(BIG[name], **kw)
    assert (len(net.state_dict()), params(net), params(net, True)) == (entries, count, trained)

@pytest.mark.parametrize('name,size,logits,features', [
    ('iapc', (256, 512), (33, 65), (1024, 33, 65)), ('iapc', (512, 1024), (65, 129), (1024, 65, 129)),
    ('iapc', (640, 1280), (81, 161), (1024, 81, 161)), ('iapc', (384, 768), (49, 97), (1024, 49, 97)),
    ('pbal', (512, 896), (128, 224), (256, 128, 224)), ('pbal', (1024, 2048), (256, 512), (256, 256, 512)),
    ('proda', (512, 896), (65, 113), (256, 65, 113)), ('proda', (1024, 2048), (129, 257), (256, 129, 257))])
def test_sizes_of_logits_and_features(name, size, logits, features):
    net = meta(BIG[name])
    assert shapes(net, *size) == [(19, *logits), features]
    assert net.channels == features[0] and net.num_classes == 19
    plain = net(torch.empty(1, 3, *size, device='meta'))
    assert isinstance(plain, torch.Tensor) and plain.shape[1:] == (19, *logits)

@each
@pytest.mark.parametrize('classes', [13, 16])
def test_other_numbers_of_classes(name, classes):
    net = meta(BIG[name], classes)
    assert shapes(net, 64, 96)[0][0] == classes == net.num_classes
    if name == 'proda': assert params(net) == 65_063_568 - (19-classes)*256
    if name == 'pbal': assert params(net) == 58_753_459 - (19-classes)*257

@each
def test_small_and_mobile_networks(name):
    small,mobile = seeded(SMALL[name]),meta(MOBILE[name])
    assert 3e5 < params(small) < 6.2e5
    where = (24, 48) if name == 'pbal' else (13, 25)
    z,f = small(torch.randn(2, 3, 96, 192), features=True)
    assert z.shape == (2, 19, *where) and f.shape[1] == small.channels and f.shape[2:] == where
    z,f = shapes(mobile, 96, 192)
    assert z == (19, *((24, 48) if name == 'pbal' else (12, 24))) and f[0] == mobile.channels
    for net in (small, mobile, meta(BIG[name])):
        assert net.frozen_prefixes == () and all(any(under(n, (h,)) for n,_ in net.named_parameters()) for h in net.head_prefixes)

def test_small_options():
    assert shapes(meta(iapc_small, 5, output_stride=4), 96, 192) == [(5, 25, 49), (256, 25, 49)]
    assert shapes(meta(proda_small, 5, output_stride=4, channels=32), 96, 192) == [(5, 25, 49), (32, 25, 49)]
    coarse = meta(pbal_small, 5, output_stride=16)
    assert shapes(coarse, 96, 192)[0] == (5, 24, 48)
    assert coarse.backbone(torch.empty(1, 3, 96, 192, device='meta'))[4].shape[2:] == (6, 12)
    for make,kw in ((iapc_small, dict(output_stride=16)), (pbal_small, dict(output_stride=4)), (proda_small, dict(output_stride=3))):
        with pytest.raises(InputError, match='output_stride is'): make(**kw)
    with pytest.raises(InputError, match='three blocks'): pbal_small(blocks=(1,2,2,1))

# ---------------------------------------------------------------- inside

def three_by_three(stage): return [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]

@each
def test_strides_dilations_and_pool(name):
    net = meta(BIG[name])
    body = net.backbone if name == 'pbal' else net
    stages = [getattr(body, f'layer{i}') for i in range(1, 5)]
    assert [len(s) for s in stages] == [3, 4, 23, 3]
    rates = [[c.dilation[0] for c in three_by_three(s)] for s in stages]
    carrier = 'conv2' if name == 'pbal' else 'conv1'
    assert rates == ([[1]*3, [1]*4, [1]*23, [2, 4, 8]] if name == 'pbal' else [[1]*3, [1]*4, [2]*23, [4]*3])
    assert all(c.padding == c.dilation for s in stages for c in three_by_three(s))
    for s,stride in zip(stages, (1, 2, 2, 1) if name == 'pbal' else (1, 2, 1, 1)):
        strided = {n.split('.')[0] for n,m in s[0].named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
        assert strided == ({carrier, 'downsample'} if stride == 2 else set())
    assert body.layer0[3].ceil_mode is (name != 'pbal')

def test_heads():
    iapc,pbal,proda = (meta(make) for make in BIG.values())
    assert [c.dilation[0] for c in iapc.layer6.conv2d_list] == [6, 12, 18, 24]
    assert all(c.bias is not None and c.padding == c.dilation for c in iapc.layer6.conv2d_list)
    assert [getattr(pbal.aspp, f'aspp{i}').atrous_conv.dilation[0] for i in (1, 2, 3, 4)] == [1, 6, 12, 18]
    assert [n for n,m in pbal.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None] == ['decoder.head']
    assert [(type(m), m.p) for m in pbal.modules() if 'Dropout' in type(m).__name__] == [(nn.Dropout, .1)]
    assert pbal.classifier.weight.shape == (19, 256, 1, 1) and pbal.decoder.conv1.weight.shape == (48, 256, 1, 1)
    assert [b[0].dilation[0] for b in proda.layer5.conv2d_list] == [1, 6, 12, 18, 24]
    assert all(m.num_groups == 32 for m in proda.modules() if isinstance(m, nn.GroupNorm))
    assert [(type(m), m.p) for m in proda.modules() if 'Dropout' in type(m).__name__] == [(nn.Dropout2d, .1)]
    assert proda.classifier.bias is None and proda.classifier.weight.shape == (19, 256, 1, 1)

def norm(S, k, x): return F.batch_norm(x, S[f'{k}.running_mean'], S[f'{k}.running_var'], S[f'{k}.weight'], S[f'{k}.bias'])

def up(x, size): return F.interpolate(x, size, mode='bilinear', align_corners=True)

def by_hand_backbone(S, x, pre, strides, rates, caffe):
    "The backbone from its released names alone, written down once more from the specification."
    x = F.conv2d(x, S[f'{pre}conv1.weight'], stride=2, padding=3)
    x = F.max_pool2d(norm(S, f'{pre}bn1', x).relu(), 3, 2, 1, ceil_mode=caffe)
    maps = [x]
    for i in (1, 2, 3, 4):
        for j,d in enumerate(rates[i-1]):
            k,s = f'{pre}layer{i}.{j}',strides[i-1] if j == 0 else 1
            y = norm(S, f'{k}.bn1', F.conv2d(x, S[f'{k}.conv1.weight'], stride=s if caffe else 1)).relu()
            y = norm(S, f'{k}.bn2', F.conv2d(y, S[f'{k}.conv2.weight'], stride=1 if caffe else s, padding=d, dilation=d)).relu()
            y = norm(S, f'{k}.bn3', F.conv2d(y, S[f'{k}.conv3.weight']))
            if f'{k}.downsample.0.weight' in S:
                x = norm(S, f'{k}.downsample.1', F.conv2d(x, S[f'{k}.downsample.0.weight'], stride=s))
            x = (x + y).relu()
        maps.append(x)
    return maps

def iapc_by_hand(S, x):
    maps = by_hand_backbone(S, x, '', (1,2,1,1), [[1], [1]*2, [2]*2, [4]], True)
    z = 0
    for i,d in enumerate((3, 6, 9, 12)):
        z = z + F.conv2d(maps[4], S[f'layer6.conv2d_list.{i}.weight'], S[f'layer6.conv2d_list.{i}.bias'], padding=d, dilation=d)
    return z, maps[3]

def pbal_by_hand(S, x):
    maps = by_hand_backbone(S, x, 'backbone.', (1,2,1,1), [[1], [1]*2, [1]*2, [2, 4, 8]], False)
    x,low = maps[4],maps[1]
    parts = [F.conv2d(x, S['aspp.aspp1.atrous_conv.weight'])]
    parts += [F.conv2d(x, S[f'aspp.aspp{i}.atrous_conv.weight'], padding=d, dilation=d) for i,d in ((2,3), (3,6), (4,9))]
    parts = [norm(S, f'aspp.aspp{i+1}.bn', p).relu() for i,p in enumerate(parts)]
    whole = norm(S, 'aspp.global_avg_pool.2', F.conv2d(x.mean((2, 3), keepdim=True), S['aspp.global_avg_pool.1.weight'])).relu()
    x = norm(S, 'aspp.bn1', F.conv2d(torch.cat(parts + [up(whole, x.shape[2:])], 1), S['aspp.conv1.weight'])).relu()
    low = norm(S, 'decoder.bn1', F.conv2d(low, S['decoder.conv1.weight'])).relu()
    f = torch.cat([up(x, low.shape[2:]), low], 1)
    f = norm(S, 'decoder.fuse_conv.1', F.conv2d(f, S['decoder.fuse_conv.0.weight'], padding=1)).relu()
    return F.conv2d(f, S['decoder.head.weight'], S['decoder.head.bias']), f

def proda_by_hand(S, x):
    x = by_hand_backbone(S, x, '', (1,2,1,1), [[1], [1]*2, [2]*2, [4]], True)[4]
    if 'bn_pretrain.weight' in S: x = norm(S, 'bn_pretrain', x)
    group = lambda k, x: F.group_norm(x, len(S[f'{k}.weight'])//8, S[f'{k}.weight'], S[f'{k}.bias'])
    parts = []
    for i,d in enumerate((0, 3, 6, 9, 12)):
        k = f'layer5.conv2d_list.{i}'
        parts.append(group(f'{k}.1', F.conv2d(x, S[f'{k}.0.weight'], S[f'{k}.0.bias'], padding=d, dilation=max(d, 1))).relu())
    x,k = torch.cat(parts, 1),'layer5.bottleneck.0.se'
    gate = F.linear(F.linear(x.mean((2, 3)), S[f'{k}.0.weight'], S[f'{k}.0.bias']).relu(), S[f'{k}.2.weight'], S[f'{k}.2.bias'])
    x = x*gate.sigmoid()[..., None, None]
    f = group('layer5.bottleneck.2', F.conv2d(x, S['layer5.bottleneck.1.weight'], S['layer5.bottleneck.1.bias'], padding=1))
    return F.conv2d(f, S['layer5.head.1.weight']), f

@pytest.mark.parametrize('make,by_hand', [(iapc_small, iapc_by_hand), (pbal_small, pbal_by_hand), (proda_small, proda_by_hand),
                                          (lambda: proda_small(bn_clr=True), proda_by_hand)])
def test_forward_equals_a_second_writing_from_the_released_names(make, by_hand):
    net = randomised(seeded(make)).double()
    x = torch.randn(2, 3, 70, 94, dtype=torch.float64)
    with torch.no_grad(): got,want = net(x, features=True),by_hand(to_released(net), x)
    for a,b in zip(got, want):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-9*b.abs().max()
    assert torch.equal(net(x), got[0])

def test_iapc_features_lie_below_stage_4():
    net = seeded(iapc_small)
    _,f = net(torch.randn(2, 3, 64, 96), features=True)
    assert (f >= 0).all() and (f > 0).any()
    f.sum().backward()
    moved = {n.split('.')[0] for n,p in net.named_parameters() if p.grad is not None}
    assert moved == {'layer0', 'layer1', 'layer2', 'layer3'}

def test_features_of_mobilenet_are_cut_off_below_zero_and_the_logits_are_not_touched():
    net = seeded(iapc_mobilenetv2).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        z,f = net(x, features=True)
        raw = net.layer3(net.layer2(net.layer1(net.layer0(x))))
        assert torch.equal(z, net.layer6(net.layer4(raw)))
    assert (raw < 0).any() and torch.equal(f, raw.clamp(min=0))

@pytest.mark.parametrize('make', [pbal_small, proda_small])
def test_features_are_taken_after_dropout(make):
    net = set_train(seeded(make))
    z,f = net(torch.randn(4, 3, 96, 192), features=True)
    w = net.classifier
    assert torch.allclose(z, F.conv2d(f, w.weight, w.bias), atol=1e-5)
    quiet = (f == 0).flatten(2).all(2)
    if make is proda_small:
        assert .01 < quiet.float().mean() < .3 and (f[~quiet] == 0).float().mean() < .01
        again = net.eval()(torch.randn(4, 3, 96, 192), features=True)[1]
        assert not (again == 0).flatten(2).all(2).any()

def test_dropout_of_pbal_removes_entries_at_its_rate():
    net = set_train(seeded(pbal_small))
    kept = []
    net.decoder.fuse_conv[3].register_forward_hook(lambda m, i, o: kept.append((i[0].detach(), o.detach())))
    net(torch.randn(2, 3, 96, 192))
    before,after = kept[0]
    alive = before > 0
    assert abs((after[alive] == 0).float().mean() - .1) < .01
    assert torch.allclose(after[alive & (after > 0)], before[alive & (after > 0)]/.9)

# ---------------------------------------------------------------- start and training

def convs(net): return {n: m for n,m in net.named_modules() if isinstance(m, nn.Conv2d)}

def test_iapc_starts_from_a_narrow_normal_distribution_and_fixes_the_batch_norms():
    net = seeded(iapc_resnet101)
    assert all(abs(m.weight.std() - .01) < 5e-4 and abs(m.weight.mean()) < 2e-4 for m in convs(net).values())
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): assert not m.weight.requires_grad and not m.bias.requires_grad
    before = net.layer4[2].bn3.running_mean.clone()
    set_train(net)(torch.randn(2, 3, 32, 32))
    assert not torch.equal(before, net.layer4[2].bn3.running_mean), 'the statistics must stay alive'

def test_pbal_starts_by_fan_in():
    net = seeded(pbal_resnet101)
    for name,m in convs(net).items():
        want = (2/m.weight[0].numel())**.5
        assert abs(m.weight.std()/want - 1) < .06, name
        if m.bias is not None: assert not m.bias.any()

def test_proda_starts_from_a_narrow_normal_distribution():
    net = seeded(proda_resnet101)
    assert all(abs(m.weight.std() - .01) < 5e-4 for m in convs(net).values())
    assert not net.layer5.bottleneck[1].bias.any()
    assert all(b[0].bias.any() for b in net.layer5.conv2d_list)
    assert net.layer5.bottleneck[0].se[0].weight.std() > .012       # PyTorch's own start: uniform, width 1/sqrt(1280)

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
        loss = upsampled_cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert abs(losses[0] - 2.944) < 1.5 and losses[-1] < .7*losses[0]
    for n,p in net.named_parameters():
        if p.requires_grad: assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), n

def test_one_image_in_train_mode():
    x = torch.randn(1, 3, 64, 96)
    with pytest.raises(InputError, match='batch of one image'): seeded(pbal_small).train()(x)
    assert set_train(seeded(pbal_small), freeze_bn=('',))(x).shape == (1, 19, 16, 24)
    assert seeded(proda_small).train()(x).shape == seeded(iapc_small).train()(x).shape == (1, 19, 9, 13)

@each
def test_freezing_by_prefix(name):
    net = seeded(SMALL[name])
    freeze(net, net.head_prefixes)
    assert all(p.requires_grad is not under(n, net.head_prefixes) for n,p in net.named_parameters())

# ---------------------------------------------------------------- files

def bottleneck_names(pre, last):
    bn = lambda k: [f'{k}.{e}' for e in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')]
    names = [f'{pre}conv1.weight'] + bn(f'{pre}bn1')
    for i,n in enumerate((3, 4, 23, 3), 1):
        for j in range(n):
            for c in (1, 2, 3): names += [f'{pre}layer{i}.{j}.conv{c}.weight'] + bn(f'{pre}layer{i}.{j}.bn{c}')
        names += [f'{pre}layer{i}.0.downsample.0.weight'] + bn(f'{pre}layer{i}.0.downsample.1')
    return names + last(bn)

NAMES = dict(
    iapc=('', lambda bn: [f'layer6.conv2d_list.{i}.{e}' for i in range(4) for e in ('weight', 'bias')]),
    pbal=('backbone.', lambda bn: [k for i in range(1, 5) for k in [f'aspp.aspp{i}.atrous_conv.weight'] + bn(f'aspp.aspp{i}.bn')]
          + ['aspp.global_avg_pool.1.weight', 'aspp.conv1.weight', 'decoder.conv1.weight', 'decoder.fuse_conv.0.weight',
             'decoder.head.weight', 'decoder.head.bias']
          + bn('aspp.global_avg_pool.2') + bn('aspp.bn1') + bn('decoder.bn1') + bn('decoder.fuse_conv.1')),
    proda=('', lambda bn: [f'layer5.conv2d_list.{i}.{j}.{e}' for i in range(5) for j in (0, 1) for e in ('weight', 'bias')]
           + [f'layer5.bottleneck.{p}.{e}' for p in ('0.se.0', '0.se.2', '1', '2') for e in ('weight', 'bias')]
           + ['layer5.head.1.weight']))

@each
def test_names_of_the_released_files(name):
    net = meta(BIG[name])
    want = bottleneck_names(*NAMES[name])
    theirs = to_released(net)
    assert len(want) == len(set(want)) and set(theirs) == set(want)
    back = from_released(theirs, net)
    assert list(back) == list(net.state_dict())
    assert all(back[k] is v or back[k].shape == v.shape for k,v in net.state_dict().items())

def test_extra_batch_norm_of_proda_in_the_file():
    theirs = to_released(meta(proda_resnet101, bn_clr=True))
    assert {k for k in theirs if k.startswith('bn_pretrain')} == {f'bn_pretrain.{e}' for e in
            ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')}
    with pytest.raises(InputError, match='has besides 5 entries: bn_pretrain'): from_released(theirs, meta(proda_resnet101))
    with pytest.raises(InputError, match='lacks 4 entries: bn_pretrain'):
        from_released(to_released(meta(proda_resnet101)), meta(proda_resnet101, bn_clr=True))

WRAPS = dict(iapc=lambda s: {'state_dict': {f'module.{k}': v for k,v in s.items()}},
             pbal=lambda s: {'DeepLab': {'model_state': s, 'optimizer_state': {}, 'scheduler_state': {}}, 'iter': 5, 'best_iou': .4},
             proda=lambda s: {'ResNet101': {'model_state': s, 'objective_vectors': torch.zeros(19, 48)}, 'iter': 5, 'best_iou': .4})

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

def test_the_unused_head_in_iapc_files_is_dropped():
    net = seeded(iapc_small)
    state = to_released(net)
    extra = {f'layer5.conv2d_list.{i}.{e}': torch.zeros(19) for i in range(4) for e in ('weight', 'bias')}
    for s in (state | extra, {f'module.{k}': v for k,v in (state | extra).items()}):
        assert list(from_released(s, net)) == list(net.state_dict())

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
    other = SMALL[dict(iapc='pbal', pbal='proda', proda='iapc')[name]]()
    with pytest.raises(InputError, match='not a file for this network'): from_released(state, other)
    for bad in ([1, 2], {}, torch.zeros(3), {'DeepLab': {'iter': 3}}, {'state_dict': {'a': 1}}):
        with pytest.raises(InputError, match='c.pkl'): from_released(bad, net, 'c.pkl')

@each
def test_pretrained_backbones_load(name, tmp_path):
    net = seeded(SMALL[name])
    body = net.backbone if name == 'pbal' else net
    stages = tuple(f'layer{i}' for i in range(5))
    source = {k: torch.randn_like(v) if v.is_floating_point() else v for k,v in body.state_dict().items() if under(k, stages)}
    path = tmp_path/'imagenet.safetensors'
    save_weights(path, to_torchvision_keys(source) | {'fc.weight': torch.zeros(10, 4), 'fc.bias': torch.zeros(10)})
    load_backbone(net, path)
    assert all(torch.equal(body.state_dict()[k], v) for k,v in source.items())
    short = {k: v for k,v in to_torchvision_keys(source).items() if not k.startswith('layer3')}
    save_weights(path, short)
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

@pytest.mark.skipif(not MOBILENET.exists(), reason='needs ../shared/data')
@each
def test_the_real_mobilenet_file_loads(name):
    load_backbone(MOBILE[name](), MOBILENET)

# ---------------------------------------------------------------- the released optimiser's list

def walked(parts):
    "What one gets by walking over all modules of each part and, at each, over all parameters below it."
    return Counter(id(p) for part in parts for m in part.modules() for p in m.parameters() if p.requires_grad)

@pytest.mark.parametrize('make,entries,tensors', [(iapc_resnet101, 314, {1: 1, 3: 99, 4: 4}), (proda_resnet101, 942, {1: 3, 3: 297, 4: 12})])
def test_repeats_are_those_of_the_walk(make, entries, tensors):
    net = meta(make)
    listed = walked([net.layer0[0], net.layer0[1], net.layer1, net.layer2, net.layer3, net.layer4])
    repeats = released_repeats(net)
    body = {n: r for n,r in repeats.items() if not under(n, net.head_prefixes)}
    named = dict(net.named_parameters())
    assert {n: listed[id(named[n])] for n in body} == body
    assert (sum(body.values()), Counter(body.values())) == (entries, tensors)
    assert {n: r for n,r in repeats.items() if n not in body} == {n: 1 for n in named if under(n, net.head_prefixes)}

@each
def test_repeats_name_what_is_trained(name):
    for make in (SMALL[name], MOBILE[name]):
        net = make()
        repeats = released_repeats(net)
        assert list(repeats) == [n for n,p in net.named_parameters() if p.requires_grad]
        assert set(repeats.values()) == ({1} if name == 'pbal' else {1, 3, 4} if make is SMALL[name] else {1, 3})
    net = freeze(seeded(SMALL[name]), ('',))
    assert released_repeats(net) == {}

# ---------------------------------------------------------------- discriminators

@pytest.mark.parametrize('make,count,out', [(pbal_discriminator, 2_781_121, (16, 28)), (proda_discriminator, 1_560_705, (32, 56))])
def test_discriminators(make, count, out):
    d = meta(make)
    assert params(d) == count and d(torch.empty(4, 19, 512, 896, device='meta')).shape == (4, 1, *out)
    assert list(d.state_dict()) == [f'{k}.{e}' for k in ('conv1', 'conv2', 'conv3', 'conv4', 'classifier') for e in ('weight', 'bias')]
    k = 16 if make is pbal_discriminator else 9
    assert params(meta(make, 16)) == count - 3*64*k
    assert all(m.negative_slope == .2 for m in d if isinstance(m, nn.LeakyReLU))
    assert [type(m) for m in d][1::2] == ([nn.LeakyReLU]*4 if make is pbal_discriminator else [nn.ReLU]*3 + [nn.LeakyReLU])
    first = d.conv1
    assert (first.kernel_size, first.stride, first.padding) == ((4, 4) if k == 16 else (3, 3), (2, 2), (1, 1))

@pytest.mark.parametrize('make', [pbal_discriminator, proda_discriminator])
def test_a_discriminator_passes_gradients_to_the_probabilities_and_can_be_frozen(make):
    d = seeded(make, 5, 8)
    for p in d.parameters(): p.requires_grad_(False)
    z = torch.randn(2, 5, 96, 160, requires_grad=True)
    F.binary_cross_entropy_with_logits(d(z.softmax(1)), torch.zeros(())[None].expand_as(d(z.softmax(1)))).backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in d.parameters())


def test_the_exact_network_of_iapc_sees_what_caffe_models_see():
    """BGR, 0..255, minus the means; 632 entries all the same, so nothing of it is in the file."""
    torch.manual_seed(0)
    net = iapc_resnet101().eval()
    images = torch.randint(0, 256, (1, 3, 33, 65), dtype=torch.uint8)
    caffe = images.float()[:, [2, 1, 0]] - torch.tensor([104.00698793, 116.66876762, 122.67891434])[:, None, None]
    seen = []
    net.layer0[0].register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        net(normalize(images))
    assert (seen[0] - caffe).abs().max() < 1e-3
    assert len(net.state_dict()) == 632

@pytest.mark.parametrize('size', [(31, 64), (64, 31), (3, 3)])
def test_windows_that_cannot_be_halved_five_times_are_named(size):
    d = pbal_discriminator(3, 4)
    with pytest.raises(InputError, match=f'windows of {size[0]}x{size[1]} pixels are too small'): d(torch.zeros(1, 3, *size))
    assert d(torch.zeros(1, 3, 32, 40)).shape == (1, 1, 1, 1)
