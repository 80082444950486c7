"The registered operations: PyTorch's own checks, the compiler, and which code runs when."
import os
import subprocess
import sys
import pytest
import torch
from torch.library import opcheck
from protonb import ops
from protonb.ops import (logits_cross_entropy, masked_average_pool, nearest_prototype, pool_and_pass, prototype_contrast, prototype_cross_entropy,
                         prototype_logits, soft_neighbourhood_density, use_backend)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BACKENDS = ['torch', 'triton']
O = torch.ops.protonb


def rand(*shape, seed=0, grad=False, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_(grad)


def ids(*shape, classes, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < .2, 255, y).to(DEVICE)


def samples():
    "One call of each registered operation, with everything that can be left out given, and once without."
    x, q, y = rand(2, 5, 3, 4, grad=True), rand(3, 5, seed=1, grad=True), ids(2, 3, 4, classes=3)
    masks, weights, valid = rand(2, 3, 3, 4).abs().requires_grad_(), rand(2, 3, 4, seed=2).abs().requires_grad_(), torch.tensor([True, False, True], device=DEVICE)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    k, t, s = rand(7, 5, seed=3, grad=True), ids(7, classes=3, seed=4), ids(6, classes=3, seed=5)
    w = rand(7, seed=6).abs()
    return dict(
        pool=(O.masked_average_pool, (x, y, None, 3, 255, False, 0.)),
        pool_soft=(O.masked_average_pool, (x, masks, weights, 3, 255, True, .1)),
        pool_last=(O.masked_average_pool, (last, y, weights, 3, 255, False, 0.)),
        pool_rows=(O.masked_average_pool, (last, y, None, 3, 255, True, 0.)),
        logits=(O.prototype_logits, (x, q, 'cosine', 2., 1e-12)),
        logits_last=(O.prototype_logits, (last, q, 'euclidean', 1., 1e-12)),
        nearest=(O.nearest_prototype, (x.detach(), q.detach(), valid, 'cosine')),
        cross_entropy=(O.prototype_cross_entropy, (x, q, y, valid, 'cosine', 5., 255, 'mean')),
        cross_entropy_each=(O.prototype_cross_entropy, (x, q, y, None, 'sqeuclidean', 1., 255, 'none')),
        upsampled=(O.logits_cross_entropy, (rand(2, 3, 3, 4, grad=True), ids(2, 5, 9, classes=3), valid, 255, 'mean')),
        contrast=(O.prototype_contrast, (rand(6, 5, grad=True), s, k, t, w, .5, 255, True)),
        contrast_fixed=(O.prototype_contrast, (rand(6, 5), s, k.detach(), t, None, .1, 255, False)),
        density=(O.soft_neighbourhood_density, (rand(6, 5), .05)))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name', samples())
def test_opcheck(name, backend):
    "Schema, fake against real results (types, shapes, strides), autograd registration, compilation with dynamic shapes."
    op, args = samples()[name]
    with use_backend(backend): opcheck(op, args)


def test_every_registered_operation_is_checked():
    mine = {n.name.split('::')[1] for n in torch._C._dispatch_get_all_op_names() and map(OpName, torch._C._dispatch_get_all_op_names()) if n.name.startswith('protonb::')}
    checked = {op._qualified_op_name.split('::')[1] for op, _ in samples().values()}
    assert {n.removesuffix('_backward') for n in mine} == checked


class OpName:
    def __init__(self, name): self.name = name.split('.')[0]


# ------------------------------------------------------------------------------------------------ a training step

def training_step(x, q, bank, y, fine, t):
    "All operations at once."
    p, mass = masked_average_pool(x, y, 3, per_image=False, eps=.01)
    p2, _, x = pool_and_pass(x, y[:1], 3, images=slice(0, 1))
    loss = prototype_cross_entropy(x, q+p, y, scale=3., valid=mass > 0)+prototype_cross_entropy(x, q, fine, metric='euclidean')
    loss = loss+logits_cross_entropy(prototype_logits(x, p2, metric='dot'), fine, reduction='sum')
    label, _ = nearest_prototype(x, q, valid=mass > 0)
    return loss+prototype_contrast(x.flatten(2).mT.flatten(0, 1), label.flatten(), bank, t)


def step_inputs():
    return (rand(2, 5, 3, 4, grad=True), rand(3, 5, seed=1, grad=True), rand(7, 5, seed=3, grad=True), ids(2, 3, 4, classes=3), ids(2, 5, 9, classes=3),
            ids(7, classes=3, seed=4))


@pytest.mark.parametrize('compiler', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_a_training_step_compiles_as_one_graph(compiler):
    eager, whole = step_inputs(), step_inputs()
    training_step(*eager).backward()
    torch._dynamo.reset()
    torch.compile(training_step, fullgraph=True, backend=compiler)(*whole).backward()
    for a, b in zip(whole[:3], eager): torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize('backend', BACKENDS)
def test_registered_step_equals_the_plain_one(backend, monkeypatch):
    plain, boxed = step_inputs(), step_inputs()
    with use_backend('torch'): a = training_step(*plain)
    monkeypatch.setattr(ops, '_eager', lambda *_: False)                              # the way the compiler goes, without it
    with use_backend(backend): b = training_step(*boxed)
    a.backward()
    with use_backend(backend): b.backward()
    torch.testing.assert_close(a, b)
    for u, v in zip(plain[:3], boxed): torch.testing.assert_close(u.grad, v.grad)


@pytest.mark.parametrize('first,then', [('torch', 'triton'), ('triton', 'torch')])
def test_the_backward_pass_may_run_elsewhere(first, then, monkeypatch):
    "What is kept in between means the same to both: `with use_backend(...)` often ends before loss.backward()."
    monkeypatch.setattr(ops, '_eager', lambda *_: False)
    plain, mixed = step_inputs(), step_inputs()
    with use_backend('torch'): training_step(*plain).backward()
    with use_backend(first): loss = training_step(*mixed)
    with use_backend(then): loss.backward()
    for u, v in zip(plain[:3], mixed): torch.testing.assert_close(u.grad, v.grad, rtol=1e-5, atol=1e-5)
    q, k = rand(6, 5, grad=True), rand(7, 5, seed=3, grad=True)
    y, t = torch.tensor([0, 1, 2, 5, 255, 0], device=DEVICE), torch.tensor([0, 0, 1, 1, 1, 2, 255], device=DEVICE)     # 5 has no positive
    for t in (t, torch.zeros_like(t)):                                                                                # then nobody has a negative
        grads = []
        for a, b in (('torch', 'torch'), (first, then)):
            with use_backend(a): loss = prototype_contrast(q, y, k, t, reduction='sum')
            with use_backend(b): grads.append(torch.autograd.grad(loss, (q, k)))
        for u, v in zip(*grads): torch.testing.assert_close(u, v, rtol=1e-5, atol=1e-5)


def test_kernels_are_really_called(monkeypatch):
    from protonb.kernels import common
    started = []
    launch = common.launch
    monkeypatch.setattr(common, 'launch', lambda kernel, *a, **k: (started.append(kernel.__name__), launch(kernel, *a, **k))[1])
    with use_backend('torch'): masked_average_pool(rand(1, 4, 2, 2), ids(1, 2, 2, classes=2), 2)
    assert not started
    with use_backend('triton'): training_step(*step_inputs()).backward()
    assert {n.split('_')[0] for n in started} >= {'pool', 'logits', 'nearest', 'cross', 'upsampled', 'contrast'}
    with use_backend('triton'): by_kernel = soft_neighbourhood_density(rand(6, 5))
    assert started[-1] == 'density_kernel'
    with use_backend('torch'): torch.testing.assert_close(by_kernel, soft_neighbourhood_density(rand(6, 5)))


def test_the_density_compiles():
    whole = torch.compile(soft_neighbourhood_density, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(whole(rand(6, 5)), soft_neighbourhood_density(rand(6, 5)))


# ------------------------------------------------------------------------------------------------ which code runs, and what is refused

def test_half_types_through_the_door():
    x, q, y = rand(1, 5, 3, 4, dtype=torch.bfloat16, grad=True), rand(3, 5, seed=1), ids(1, 3, 4, classes=3)
    for backend in BACKENDS:
        with use_backend(backend), torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = prototype_cross_entropy(x, q, y)
            g, = torch.autograd.grad(loss, x)
        assert loss.dtype == torch.float32 and g.dtype == torch.bfloat16


def test_triton_refuses_what_it_can_not_do():
    x, y = rand(1, 5, 3, 4, dtype=torch.float64), ids(1, 3, 4, classes=3)
    with use_backend('triton'):
        with pytest.raises(RuntimeError, match='float64'): masked_average_pool(x, y, 3)
        with pytest.raises(RuntimeError, match='256 classes, not 300'): masked_average_pool(x.float(), y, 300)
    assert masked_average_pool(x, y, 300)[0].shape == (300, 5)
    assert ops._state == dict(backend='auto', check=None)


def python(code, **env):
    "Runs code in a fresh interpreter of Python; returns what it printed."
    clean = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'} | env
    done = subprocess.run([sys.executable, '-c', code], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_without_gpu_and_interpreter_triton_says_why():
    said = python('''
from protonb.ops import use_backend
import torch
try: use_backend('triton')
except RuntimeError as e: print(e)
''', CUDA_VISIBLE_DEVICES='')
    assert 'TRITON_INTERPRET=1' in said


def test_triton_is_imported_only_when_needed():
    said = python('''
import sys, torch
from protonb.ops import masked_average_pool
masked_average_pool(torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), 2)
print('triton' in sys.modules, 'protonb.kernels.common' in sys.modules)
''')
    assert said == 'False False'


def test_without_triton_everything_else_works(tmp_path):
    said = python('''
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)
import torch
from protonb.ops import masked_average_pool, no_triton, use_backend
print(masked_average_pool(torch.ones(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), 1)[0].tolist(), no_triton())
''')
    assert said == '[[1.0, 1.0, 1.0]] the package triton is not installed'


def test_the_folder_of_kernels_does_not_shadow_the_package_of_that_name():
    "From the repository's root, `import kernels` must not find files of ours as a package with code."
    said = python('import importlib.util as u; s = u.find_spec("kernels"); print(s is None or s.origin is None)')
    assert said == 'True'
    assert python('import protonb.kernels.common as c; print(c.MAX_CLASSES)') == str(ops.MOST_CLASSES)
