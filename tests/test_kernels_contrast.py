"""Contrast kernels against the plain PyTorch contrast: interpreted without a GPU, natively with one."""
import math

import pytest
import torch
import torch.nn.functional as F

from protonb import contrast as plain
from protonb.kernels import common
from protonb.kernels import contrast as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = [pytest.mark.usefixtures("poison"),
              pytest.mark.filterwarnings("ignore:(divide by zero|overflow):RuntimeWarning")]  # of the interpreter


def vectors(n, C, dtype, layout, seed, size=None):
    """Unit vectors (or of a length of about `size`) in one of the layouts users have."""
    x = torch.randn(n, C, generator=torch.Generator().manual_seed(seed))
    x = (F.normalize(x, dim=1) if size is None else x * size).to(dtype).to(DEVICE)
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "crop":
        return torch.zeros(2 * n, C + 5, dtype=dtype, device=DEVICE)[1::2, 3:-2].copy_(x)
    return x[:1].expand(n, C) if layout == "expanded" else x


def case(N, M, C, classes, dtype=F32, layout="rows", weighted=False, key_dtype=None, size=None, labels=torch.int64):
    """Unsorted, a fifth ignored on both sides, and queries of a class that the bank lacks."""
    g = torch.Generator().manual_seed(N + M + C)
    q, k = vectors(N, C, dtype, layout, 0, size), vectors(M, C, key_dtype or dtype, layout, 1, size)
    y, t = torch.randint(0, classes + 1, (N,), generator=g), torch.randint(0, classes, (M,), generator=g)
    y[torch.rand(N, generator=g) < 0.2], t[torch.rand(M, generator=g) < 0.2] = 255, 255
    if M < 3:
        y, t = y * 0, torch.arange(M)
    w = torch.rand(2 * M, generator=g)[::2] * 3 if weighted else None
    return q, y.to(labels).to(DEVICE), k, t.to(labels).to(DEVICE), None if w is None else w.to(DEVICE)


def table(q, y, k, t, w, tau, ignore):
    """The formula with the whole (N,M) table: products in the vectors' type, softmax in float32 -> loss (N,)."""
    s = q @ k.T if q.dtype == k.dtype else q.float() @ k.float().T
    s = s.to(torch.promote_types(s.dtype, F32)) / tau
    there, same = (t != ignore) & (t >= 0), (y[:, None] == t) & (y != ignore)[:, None] & (y >= 0)[:, None]
    z = s if w is None else s + w.to(s.dtype).log()
    logz = z.masked_fill((y[:, None] == t) | ~there, -math.inf).logsumexp(1, keepdim=True)
    each = torch.where(same, -F.logsigmoid(torch.where(same, s - logz, 0)), 0)
    return each.sum(1) / same.sum(1).clamp(min=1)


def run_kernels(q, y, k, t, w, up, tau=0.1, ignore=255):
    loss, counts, dq, stats = kernels.contrast_fwd(q, y, k, t, w, tau, ignore, True)
    dk = kernels.contrast_bwd(up, q, y, k, t, w, stats, tau, ignore)
    for d, x in ((dq, q), (dk, k)):
        assert d.dtype == x.dtype and d.shape == x.shape and d.stride() == torch.empty_like(x).stride()
    return loss, counts, dq, dk


def run_plain(function, q, y, k, t, w, up, dtype=None):
    """Loss and both gradients by autograd."""
    q, k = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k))
    loss = function(q, y, k, t, None if w is None else w.to(dtype or w.dtype))
    return loss.detach(), *torch.autograd.grad(loss, (q, k), up.to(loss.dtype))


def assert_right(q, y, k, t, w=None, tau=0.1, ignore=255):
    """At most twice PyTorch's own error, the rounding of what is stored, and a millionth."""
    up = torch.randn(len(q), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    loss, counts, dq, dk = run_kernels(q, y, k, t, w, up, tau, ignore)
    reference = plain.prototype_contrast_ref
    truth = run_plain(lambda q, y, k, t, w: reference(q, y, k, t, temperature=tau, key_weights=w, ignore_index=ignore,
                                                      reduction="none"), q, y, k, t, w, up, torch.float64)
    torchs = run_plain(lambda *a: table(*a, tau, ignore), q, y, k, t, w, up)
    assert torch.equal(counts, plain.contrast_fwd(q.double(), y, k.double(), t, None, tau, ignore, False)[1])
    for name, got, own, want in zip(("loss", "queries", "keys"), (loss, dq.double() * up[:, None], dk), torchs, truth):
        stored = 0 if name == "loss" else dict(queries=q, keys=k)[name].dtype
        stored = torch.finfo(stored).eps / 2 if stored in (BF16, F16) else 0
        error, base, most = (got.double() - want).abs().max(), (own.double() - want).abs().max(), want.abs().max()
        assert error <= 2 * base + (1e-6 + stored) * most, f"{name}: {error:.1e}, PyTorch {base:.1e}, of {most:.1e}"
    assert not loss[~counts].any() and not dq[~counts].any() and not dk[(t == ignore) | (t < 0)].any()
    return loss, counts, dq, dk


ONE_TILE = dict(
    one_of_each=dict(N=1, M=1, C=1, classes=1),
    one_query_two_keys=dict(N=1, M=2, C=3, classes=2),
    tiny=dict(N=17 * 33, M=2, C=3, classes=2, dtype=F16),
    prototypes=dict(N=17 * 33, M=19, C=64, classes=19, dtype=BF16),
    prototypes_wide=dict(N=20, M=19, C=2048, classes=19, dtype=BF16, layout="transposed"),
    prototypes_float=dict(N=70, M=19, C=256, classes=19),
    several_each=dict(N=130, M=64, C=130, classes=5, layout="crop", weighted=True),
    several_each_half=dict(N=130, M=33, C=130, classes=5, dtype=F16, weighted=True),
    expanded=dict(N=70, M=19, C=64, classes=4, layout="expanded"),
    two_types=dict(N=70, M=19, C=64, classes=4, dtype=BF16, key_dtype=F32),
    small_labels=dict(N=70, M=19, C=16, classes=4, labels=torch.uint8),
    many_queries=dict(N=65 * 129, M=19, C=1, classes=19),
)
STREAMED = dict(
    one_query=dict(N=1, M=65, C=16, classes=3),
    bank=dict(N=150, M=200, C=64, classes=5),
    bank_bf16=dict(N=150, M=200, C=256, classes=5, dtype=BF16, weighted=True),
    bank_f16=dict(N=150, M=330, C=128, classes=150, dtype=F16),
    uneven_channels=dict(N=140, M=70, C=3, classes=2, dtype=BF16, weighted=True),
    crop=dict(N=70, M=70, C=130, classes=3, dtype=BF16, layout="crop"),
    transposed=dict(N=70, M=100, C=64, classes=3, dtype=F16, layout="transposed"),
    expanded=dict(N=70, M=100, C=64, classes=3, dtype=BF16, layout="expanded"),
    gradient_apart=dict(N=70, M=70, C=130, classes=3),
    gradient_apart_bf16=dict(N=140, M=70, C=320, classes=3, dtype=BF16, weighted=True),
    wide=dict(N=20, M=66, C=640, classes=3, dtype=F16),
    wide_crop=dict(N=20, M=66, C=258, classes=3, dtype=BF16, layout="crop"),
    one_class=dict(N=70, M=100, C=16, classes=1),
    two_types=dict(N=70, M=100, C=64, classes=4, dtype=F32, key_dtype=F16),
    small_labels=dict(N=140, M=100, C=16, classes=4, labels=torch.uint8),
)


@pytest.mark.parametrize("name", ONE_TILE)
def test_small_bank(name):
    assert_right(*case(**ONE_TILE[name]))


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_bank(name):
    assert_right(*case(**STREAMED[name]))


@pytest.fixture
def started(monkeypatch):
    """Names of the kernels that have been launched."""
    names, launch = [], common.launch

    def note(kernel, grid, **arguments):
        names.append(kernel.__name__)
        launch(kernel, grid, **arguments)

    monkeypatch.setattr(common, "launch", note)
    return names


@pytest.mark.parametrize("processors, dtype", [(1, BF16), (132, BF16), (132, F32)], ids=str)
def test_split_walks(processors, dtype, started, monkeypatch):
    """However many programs share the bank: right, and the same bits each time."""
    monkeypatch.setattr(common, "processors", lambda device: processors)
    arguments = case(N=150, M=700, C=16, classes=19, dtype=dtype, weighted=True)
    first = assert_right(*arguments)
    assert ("contrast_merge_kernel" in started) == (processors == 132)
    up = torch.randn(150, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for a, b in zip(first, run_kernels(*arguments, up)):
        assert torch.equal(a, b)


def test_few_keys_many_queries(started):
    """The walk over the queries is shared and its parts are summed in fixed order."""
    arguments = case(N=600, M=20, C=48, classes=19, dtype=BF16)
    first = assert_right(*arguments)
    assert "contrast_sum_kernel" in started
    up = torch.randn(600, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(first, run_kernels(*arguments, up)))


# Banks of one tile and banks that are streamed have kernels of their own
BANKS = pytest.mark.parametrize("M", [30, 100], ids=["tile", "streamed"])


@BANKS
@pytest.mark.parametrize("dtype, size", [(F32, 1e-3), (F32, 1.0), (F32, 30.0), (F32, 3e3), (BF16, 1e-3), (BF16, 30.0),
                                         (F16, 30.0)], ids=str)
def test_scores_of_any_size(M, dtype, size):
    """Raw features: scores near zero, of ten thousand, of a hundred million."""
    assert_right(*case(N=70, M=M, C=16, classes=3, dtype=dtype, size=size))


@BANKS
def test_hard_scores_are_the_difference(M):
    """The loss is by how much the closest negative is ahead of the positive: 20,000; and 0 where it is far behind."""
    q, k = torch.zeros(2, 16, device=DEVICE), torch.zeros(M, 16, device=DEVICE)
    q[:, 0], k[0, 0], k[-1, 0] = 1e4, -1, 1
    y, t = torch.tensor([0, 1], device=DEVICE), torch.full((M,), 255, device=DEVICE)
    t[0], t[-1] = 0, 1
    loss, _, dq, stats = kernels.contrast_fwd(q, y, k, t, None, 1.0, 255, True)
    assert loss.tolist() == [2e4, 0] and dq[0, 0] == 2 and not dq[1].any() and stats.isfinite().all()


@BANKS
def test_nobody_counts(M):
    q, y, k, t, _ = case(N=70, M=M, C=16, classes=3)
    up = torch.randn(70, device=DEVICE)
    for labels, names in ((y * 0 + 255, t), (y, t * 0 + 255), (y * 0 - 1, t * 0 - 1), (y + 1000, t)):
        loss, counts, dq, dk = run_kernels(q, labels, k, names, None, up)
        assert not any(x.any() for x in (loss, counts, dq, dk))
    for n, m in ((0, M), (70, 0), (0, 0)):
        loss, counts, dq, dk = run_kernels(q[:n], y[:n], k[:m], t[:m], None, up[:n])
        assert not any(x.any() for x in (loss, counts, dq, dk)) and loss.shape == (n,) and dk.shape == (m, 16)


@BANKS
def test_no_negatives(M):
    """Every key of one class, or every weight 0: queries count, nothing pushes."""
    q, y, k, t, _ = case(N=70, M=M, C=16, classes=3)
    up = torch.randn(70, device=DEVICE)
    for labels, names, w in ((y * 0, t * 0, None), (y, t, torch.zeros(M, device=DEVICE))):
        loss, counts, dq, dk = run_kernels(q, labels, k, names, w, up)
        assert counts.any() and not any(x.any() for x in (loss, dq, dk))


@BANKS
def test_zero_weight_takes_a_key_out(M):
    q, y, k, t, w = case(N=70, M=M, C=16, classes=3, weighted=True)
    w[::3] = 0
    assert_right(q, y, k, t, w)
    assert_right(q, y, k, t, w.to(BF16))


@BANKS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_ignored_vectors_are_not_looked_at(M, dtype):
    q, y, k, t, _ = case(N=70, M=M, C=16, classes=3, dtype=dtype)
    up = torch.randn(70, device=DEVICE)
    want = run_kernels(q, y, k, t, None, up)
    q, k = q.clone(), k.clone()
    q[y == 255], k[t == 255] = math.nan, math.inf
    for a, b in zip(run_kernels(q, y, k, t, None, up), want):
        assert torch.equal(a, b)


@BANKS
@pytest.mark.parametrize("labels", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_labels(M, labels):
    """255 is a class where something else is ignored; large and strided labels; negative ones are ignored."""
    q, y, k, t, _ = case(N=70, M=M, C=16, classes=3)
    far = 10**15 if labels == torch.int64 else 1
    y, t = (torch.where(x == 255, 0, torch.where(x == 2, 255, x * far)).to(labels) for x in (y, t))
    assert_right(q, torch.stack([y, y], 1)[:, 0], k, torch.stack([t, t], 1)[:, 1], ignore=1 * far)
    if labels != torch.uint8:
        assert_right(q, torch.where(y == 0, -5, y).to(labels), k, torch.where(t == 0, -1, t).to(labels), ignore=255)


def test_small_gradients_survive_float16():
    """A mean over many queries sends gradients of a millionth; what float16 is too coarse for is rescaled."""
    for M in (30, 100):
        q, y, k, t, _ = case(N=70, M=M, C=16, classes=3, dtype=F16)
        _, _, _, stats = kernels.contrast_fwd(q, y, k, t, None, 0.1, 255, False)
        up = torch.rand(70, device=DEVICE)
        big, small = (kernels.contrast_bwd(up * s, q, y, k.float(), t, None, stats, 0.1, 255) for s in (1, 2.0**-20))
        half = kernels.contrast_bwd(up * 2.0**-20, q, y, k, t, None, stats, 0.1, 255)
        assert torch.equal(big, small * 2**20)
        # float16's finest step, and its rounding
        assert (half.float() - small).abs().max() <= 2.0**-25 + 2**-9 * small.abs().max()


@BANKS
def test_small_forces_survive_float16(M):
    """Positives far ahead of their negatives: forces of a millionth are below float16's normal numbers."""
    q, k = torch.zeros(50, 16, dtype=F16, device=DEVICE), torch.zeros(M, 16, dtype=F16, device=DEVICE)
    q[:, 0], k[-1, 0], k[0, 1], k[-1, 1] = torch.linspace(11, 12, 50, device=DEVICE), 1, -64, 64
    y, t = torch.ones(50, dtype=torch.long, device=DEVICE), torch.full((M,), 255, device=DEVICE)
    t[0], t[-1] = 0, 1
    _, _, dq, stats = kernels.contrast_fwd(q, y, k, t, None, 1.0, 255, True)
    dk = kernels.contrast_bwd(torch.ones(50, device=DEVICE), q, y, k, t, None, stats, 1.0, 255)
    force = torch.sigmoid(-q[:, 0].double())
    assert (dq[:, 1].double() / (-128 * force) - 1).abs().max() < 2e-3
    assert (dk[0, 0].double() / (force * q[:, 0]).sum() - 1).abs() < 2e-3


def test_loss_alone():
    for arguments in (dict(N=70, M=100, C=16, dtype=BF16, weighted=True), dict(N=20, M=70, C=130)):
        q, y, k, t, w = case(classes=3, **arguments)
        loss, counts, _, stats = kernels.contrast_fwd(q, y, k, t, w, 0.1, 255, True)
        alone = kernels.contrast_fwd(q, y, k, t, w, 0.1, 255, False)
        assert alone[2].shape == (0,) and torch.equal(counts, alone[1])
        assert (loss - alone[0]).abs().max() <= 1e-6 * loss.max()  # blocks may differ, and with them the order of a sum


def test_no_value_is_read_on_the_host(monkeypatch):
    """On the meta device there are no values: what would wait for the device raises."""
    started = []
    monkeypatch.setattr(common, "launch", lambda kernel, grid, **a: started.append(kernel.__name__))
    for N, M, C in ((70, 19, 64), (70, 3800, 64), (70, 3800, 512)):
        (q, y, g), (k, t, w) = ((torch.empty(n, C, device="meta"), torch.empty(n, dtype=torch.long, device="meta"),
                                 torch.empty(n, device="meta")) for n in (N, M))
        _, _, dq, stats = kernels.contrast_fwd(q, y, k, t, w, 0.1, 255, True)
        assert dq.shape == (N, C) and kernels.contrast_bwd(g, q, y, k, t, w, stats, 0.1, 255).shape == (M, C)
    assert len(set(started)) == 5
