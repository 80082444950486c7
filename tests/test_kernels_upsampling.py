"""Cross-entropy of upsampled logits: kernels against F.interpolate + F.cross_entropy in float64."""
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from protonb.kernels import common, upsampling  # noqa: E402
from protonb.kernels.upsampling import upsampled_cross_entropy_bwd, upsampled_cross_entropy_fwd  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def counting(y, K, valid=None, ignore_index=255):
    """The pixels that count."""
    keep = (y >= 0) & (y < K) & (y != ignore_index)
    if valid is None:
        return keep
    return keep & valid.expand(len(y), K).gather(1, torch.where(keep, y, 0).flatten(1)).view_as(y)


def plain(z, y, valid=None, ignore_index=255, reduction="mean"):
    """The definition, with the resized logits in memory; in the precision of `z`, but float32 at least."""
    B, K = z.shape[:2]
    z = z if z.dtype == torch.float64 else z.float()
    if z.shape[2:] != y.shape[1:]:
        z = F.interpolate(z, size=y.shape[1:], mode="bilinear", align_corners=True)
    if valid is not None:
        z = z.masked_fill(~valid.expand(B, K)[:, :, None, None], -1e30)
    keep = counting(y, K, valid, ignore_index)
    each = torch.where(keep, F.cross_entropy(z, torch.where(keep, y, 0), reduction="none"), 0)
    return each if reduction == "none" else each.sum() / (keep.sum().clamp(min=1) if reduction == "mean" else 1)


def run(z, y, g=None, valid=None, ignore_index=255, reduction="mean"):
    """Loss, log-sum-exp, count and gradient by the kernels."""
    loss, lse, count = upsampled_cross_entropy_fwd(z, y, valid, ignore_index, reduction)
    g = torch.ones_like(loss) if g is None else g
    return loss, lse, count, upsampled_cross_entropy_bwd(g, z, y, valid, lse, count, ignore_index, reduction)


def want(z, y, g, **how):
    """Loss and gradient by PyTorch, in the type of `z`."""
    z = z.detach().clone().requires_grad_()
    loss = plain(z, y, **how)
    return loss.detach(), torch.autograd.grad(loss, z, g.to(loss.dtype))[0]


def close(got, truth, own):
    """Within twice PyTorch's own error, a millionth, and what storing in a narrow type rounds away."""
    narrow = torch.finfo(got.dtype).eps / 2 if got.dtype in (BF16, FP16) else 0
    most, got, own = truth.abs().max(), got.double(), own.double()
    assert got.isfinite().all()
    assert (got - truth).abs().max() <= 2 * (own - truth).abs().max() + (1e-6 + narrow) * most


def logits(B, K, h, w, dtype=FP32, layout="nchw", size=3.0):
    """Random logits as a user may hold them."""
    if layout == "crop":
        return (size * torch.randn(B, K, h + 1, w + 2, device=DEVICE)).to(dtype)[..., 1:, 2:]
    if layout == "expanded":
        return (size * torch.randn(1, K, h, w, device=DEVICE)).to(dtype).expand(B, -1, -1, -1)
    z = (size * torch.randn(B, K, h, w, device=DEVICE)).to(dtype)
    return z.to(memory_format=torch.channels_last) if layout == "last" else z


def ids(B, K, H, W, dtype=torch.int64):
    """Random labels, a fifth of them ignored."""
    y = torch.randint(0, K, (B, H, W), device=DEVICE)
    return torch.where(torch.rand(B, H, W, device=DEVICE) < 0.2, 255, y).to(dtype)


# small, big, and why this pair
SIZES = {
    "1x1": ((1, 1), (1, 1)), "1x1-17x33": ((1, 1), (17, 33)),  # no neighbour at all
    "same": ((3, 5), (3, 5)),                                  # its own backward kernel
    "x4": ((5, 9), (17, 33)), "x4-few": ((2, 3), (5, 9)),      # the exact grid of a network's stride
    "x8": ((9, 17), (65, 129)),                                # 8 rows at once, two blocks of columns and of cells
    "odd": ((2, 7), (31, 19)), "x3.7": ((7, 11), (29, 40)),    # uneven intervals
    "x1.1": ((3, 33), (3, 36)),                                # more cells than a program takes; one axis grows
    "x12": ((8, 7), (85, 73)),                                 # rounded positions fall short of the grid lines
    "tall": ((2, 2), (70, 5)),                                 # the rows of an interval go to several programs
    "wide": ((2, 3), (3, 300)),                                # its columns do not fit into one step
}
CASES = [  # size, B, K, dtype, layout, valid, reduction
    ("1x1", 3, 19, FP32, "nchw", None, "mean"), ("1x1-17x33", 1, 2, FP32, "nchw", None, "sum"),
    ("1x1-17x33", 2, 19, BF16, "last", "B", "none"), ("same", 2, 19, FP32, "nchw", "K", "none"),
    ("same", 1, 150, BF16, "last", None, "mean"), ("same", 2, 2, FP16, "crop", "B", "sum"),
    ("x4", 2, 19, FP32, "nchw", None, "mean"), ("x4-few", 1, 150, BF16, "last", "B", "sum"),
    ("x4", 3, 2, FP32, "expanded", None, "none"), ("x4-few", 2, 19, FP16, "last", "K", "mean"),
    ("x8", 1, 19, FP32, "crop", None, "mean"), ("odd", 2, 1, FP32, "nchw", None, "none"),
    ("odd", 2, 19, FP32, "last", "K", "mean"), ("x3.7", 1, 19, FP16, "crop", "B", "none"),
    ("x3.7", 2, 2, BF16, "nchw", None, "sum"), ("x1.1", 1, 19, FP32, "nchw", None, "mean"),
    ("x12", 1, 2, FP32, "nchw", None, "none"), ("tall", 1, 2, FP32, "nchw", None, "sum"),
    ("wide", 1, 5, FP32, "nchw", None, "mean"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).removeprefix("torch.") for v in c))
def test_is_resize_then_cross_entropy(case):
    name, B, K, dtype, layout, valid, reduction = case
    (h, w), size = SIZES[name]
    torch.manual_seed(0)
    z, y = logits(B, K, h, w, dtype, layout), ids(B, K, *size)
    if valid:
        valid = torch.rand((B, K) if valid == "B" else (K,), device=DEVICE) < 0.7
    how = dict(valid=valid, reduction=reduction)
    g = torch.randn(size[1], B, size[0], device=DEVICE).permute(1, 2, 0)
    g = g if reduction == "none" else g[0, 0, 0]
    got, lse, count, dz = run(z, y, g, **how)
    truth, own = want(z.double(), y, g, **how), want(z, y, g, **how)
    close(got, truth[0], own[0])
    close(dz, truth[1], own[1])
    assert got.dtype == lse.dtype == count.dtype == FP32 and got.shape == truth[0].shape and lse.shape == y.shape
    assert dz.dtype == dtype and dz.stride() == torch.empty_like(z).stride()
    assert count == counting(y, K, valid).sum() and lse.isfinite().all()


@pytest.mark.parametrize("size", [1e-3, 30.0, 3000.0])
def test_small_and_large_logits(size):
    torch.manual_seed(0)
    z, y, g = logits(1, 19, 3, 4, size=size), ids(1, 19, 9, 13), torch.randn((), device=DEVICE)
    loss, _, _, dz = run(z, y, g)
    truth, own = want(z.double(), y, g), want(z, y, g)
    close(loss, truth[0], own[0])
    if size < 1000:  # beyond, the log-sum-exp itself is rounded to more than a millionth of a probability
        close(dz, truth[1], own[1])
    assert dz.isfinite().all() and (dz.sum(1).abs() <= 1e-3 * dz.abs().max()).all()


def test_equal_sizes_and_corners_are_exact():
    torch.manual_seed(0)
    z, y = logits(1, 19, 5, 7), torch.randint(0, 19, (1, 25, 43), device=DEVICE)
    fine, lse, _ = upsampled_cross_entropy_fwd(z, y, None, 255, "none")
    same, lse_same, _ = upsampled_cross_entropy_fwd(z, y[:, ::6, ::7].contiguous(), None, 255, "none")
    assert torch.equal(fine[:, ::24, ::42], same[:, ::4, ::6])
    assert torch.equal(lse[:, ::24, ::42], lse_same[:, ::4, ::6])
    assert not run(z[:, :1], torch.zeros_like(y))[0].any()  # one class: nothing to lose, to the bit


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["same", "x4-few"])
def test_what_does_not_count_has_no_loss_and_no_gradient(name, reduction):
    torch.manual_seed(0)
    (h, w), size = SIZES[name]
    z, y = logits(2, 3, h, w), ids(2, 3, *size)
    nobody = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    for labels, valid in ((torch.full_like(y, 255), None), (y, nobody)):
        loss, _, count, dz = run(z, labels, valid=valid, reduction=reduction)
        assert not loss.any() and count == 0 and not dz.any()
    y[1] = 255
    g = torch.full_like(y, float("nan"), dtype=FP32).masked_fill(y != 255, 1.0) if reduction == "none" else None
    loss, _, _, dz = run(z, y, g, reduction=reduction)
    assert not dz[1].any()
    if name == "same":
        assert torch.equal((dz == 0).all(1), y == 255)
    if reduction == "none":
        assert torch.equal(loss == 0, y == 255)
    dz = run(z, y, g, valid=torch.tensor([True, False, True], device=DEVICE), reduction=reduction)[3]
    assert not dz[:, 1].any() and dz[0, ::2].any()


def test_labels_of_any_type_value_and_layout():
    torch.manual_seed(0)
    z, y = logits(1, 3, 3, 5), ids(1, 3, 9, 17)
    loss, _, count, dz = run(z, y)

    def as_before(labels, ignore_index=255):
        got = run(z, labels, ignore_index=ignore_index)
        return torch.equal(got[0], loss) and torch.equal(got[2], count) and torch.equal(got[3], dz)

    assert as_before(y.to(torch.uint8)) and as_before(y.to(torch.int16)) and as_before(y.to(torch.int32), -100)
    odd = torch.full_like(y, -1)
    odd[:, ::2] = 2**32 + 1                                        # 1, if only the low half were read
    odd[:, :, ::3] = 3
    assert as_before(torch.where(y == 255, odd, y)) and as_before(torch.where(y == 255, -100, y), -100)
    wide = torch.full((1, 20, 38), 7, device=DEVICE)
    wide[:, 1:19:2, 2:36:2] = y
    assert as_before(wide[:, 1:19:2, 2:36:2]) and as_before(y.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    left = torch.where(y == 1, 255, y)
    assert torch.equal(run(z, y, ignore_index=1)[3], run(z, left)[3])  # an id that is a class may be ignored too
    one = torch.zeros(1, 1, 1, dtype=torch.int64, device=DEVICE).expand(1, 9, 17)
    assert torch.equal(run(z, one)[3], run(z, one.contiguous())[3])


@pytest.mark.parametrize("name", ["same", "x4-few", "odd"])
def test_two_runs_agree_to_the_bit(name):
    torch.manual_seed(0)
    (h, w), size = SIZES[name]
    z, y = logits(2, 5, h, w), ids(2, 5, *size)
    for a, b in zip(run(z, y), run(z, y)):
        assert torch.equal(a, b)


def test_what_is_stored_in_between(monkeypatch):
    started = {}
    monkeypatch.setattr(common, "launch", lambda kernel, grid, **a: started.update({kernel.__name__: a}))
    z = torch.empty(2, 19, 65, 129, device="meta", dtype=BF16)
    y = torch.empty(2, 513, 1025, device="meta", dtype=torch.int64)
    loss, lse, count = upsampled_cross_entropy_fwd(z, y, None, 255, "mean")
    upsampled_cross_entropy_bwd(loss, z, y, None, lse, count, 255, "mean")
    assert started["upsampled_cross_entropy_fwd_kernel"]["sums"].numel() <= 2 * 2 * 65 * 9
    assert started["upsampled_cross_entropy_bwd_kernel"]["parts"].numel() <= 2.3 * z.numel()  # full size would be 62


@pytest.mark.parametrize("n_in, n_out", [(1, 7), (2, 2), (7, 85), (13, 145), (33, 70), (29, 31), (2, 200)])
def test_every_row_lies_in_one_interval(n_in, n_out):
    z = torch.stack([torch.zeros(n_in, device=DEVICE), torch.arange(n_in, device=DEVICE)])[None, :, :, None]
    y = torch.zeros(1, n_out, 1, dtype=torch.int64, device=DEVICE)
    loss, _, count = upsampled_cross_entropy_fwd(z, y, None, 255, "none")
    close(loss, plain(z.double(), y, reduction="none"), plain(z, y, reduction="none"))
    assert count == n_out


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_partial_sums_of_many_programs(reduction):
    P, each = 10_001, reduction == "none"
    sums = torch.stack([torch.rand(P), torch.randint(0, 9, (P,)).float()]).to(DEVICE)
    loss, count = torch.full((), 7.0, device=DEVICE), torch.empty((), device=DEVICE)
    common.launch(
        upsampling.upsampled_cross_entropy_sum_kernel, (1,), sums=sums, loss=loss, count=count, P=P, EACH=each,
        MEAN=reduction == "mean", BLOCK=4096, num_warps=8)
    total, n = sums.double().sum(1)
    assert count == n
    assert loss == 7 if each else (loss - total / (n if reduction == "mean" else 1)).abs() <= 1e-6 * total
