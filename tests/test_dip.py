"""DIP's acceptance tests: episodes, loss, optimisation, offline prototypes, and each oddity of the released code that is mended."""
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from protonb import dip
from protonb.core import InputError, rng_for
from protonb.datasets import Cached, open_dataset, resized, take
from protonb.dip_net import dip_small
from protonb.evaluation import Scores, confusion_matrix, label_map
from protonb.feeding import Feed, segmenter
from protonb.labels import CITYSCAPES, GTA5_IDS, SYNTHIA_IDS, label_table, map_ids
from protonb.prototypes import class_prototypes, greedy_support, image_prototypes
from protonb.sampling import batches
from protonb.source_only import upsampled_cross_entropy
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.training import Train
from protonb.transforms import Augment

CROP = Augment(crop_height=65, crop_width=129)
CFG = dip.DIP(augment=CROP, freeze=())


@pytest.fixture(scope="module")
def source():
    return Streets(SYNTHETIC, 10, size=(65, 129))


@pytest.fixture(scope="module")
def target():
    return Streets(REAL, 40, size=(65, 129), seed=1)


class Pairs:
    """A few fixed images and labels as a data set."""

    def __init__(self, labels):
        self.labels, self.space = labels, CITYSCAPES
        self.names = [f"{i}" for i in range(len(labels))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return torch.full((3, *self.labels[i].shape), 100, dtype=torch.uint8), self.labels[i]


def stripes(*classes, size=(65, 129)):
    """Vertical stripes of the given train ids."""
    ids = torch.tensor(classes)
    return ids[torch.arange(size[1]) * len(ids) // size[1]].expand(size).clone()


@pytest.fixture
def prepared(monkeypatch, source, target):
    """What `dip.train` hands to the loop for a network: optimizer and schedule."""
    def parts(net, cfg, steps):
        monkeypatch.setattr(dip, "fit", lambda step, feed, parts, run, **kw: parts)
        made = dip.train(source, target, net, replace(cfg, augment=CROP), Train(steps=steps, device="cpu"), run_dir="unused")
        return made["opt"], made["sched"]
    return parts


# ------------------------------------------------------------------------------------------------------------- episodes

def test_the_grid_of_an_episode_is_every_eighth_pixel_bit_for_bit():
    label = torch.randint(0, 19, (1025, 257), generator=torch.Generator().manual_seed(0))
    for c in (0, 7):
        mask = F.interpolate((label == c).float()[None, None], (129, 33), mode="bilinear", align_corners=True)[0, 0]
        assert torch.equal(mask, (label[::8, ::8] == c).float())
    kept = dip.episode_classes(label, 19)
    assert torch.equal(kept, torch.unique(label[::8, ::8]))


def test_every_class_is_tested_also_those_that_follow_a_dropped_one():
    label = stripes(0, 1, 2, 3)
    label[(label == 0) | (label == 1)] = 3
    label[1, 1], label[3, 3] = 0, 1       # both off the grid, one after the other
    assert dip.episode_classes(label, 19).tolist() == [2, 3]


def test_remap_query_only_is_ignored_support_only_keeps_its_entry():
    entries = dip.remap(stripes(0, 5, 11), torch.tensor([5, 8, 11]))
    assert set(entries.unique().tolist()) == {0, 2, 255}
    assert (entries[:, 0] == 255).all() and (entries[:, 64] == 0).all() and (entries[:, -1] == 2).all()


def test_the_support_alone_decides_the_classes(source):
    support = Pairs([stripes(2, 16)])
    for position in range(4):
        ep = dip.episodes(source, support, CFG)(position)
        assert ep["classes"][ep["valid"]].tolist() == [2, 16]
        assert set(ep["labels"].unique().tolist()) <= {0, 1, 255}


def test_episodes_belong_to_their_position_and_differ(source, target):
    make = dip.episodes(source, target, CFG, seed=3)
    a, b, c = make(7), dip.episodes(source, target, CFG, seed=3)(7), make(8)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["images"], c["images"])


def test_query_and_support_that_share_nothing_are_an_error_not_a_nan():
    with pytest.raises(InputError, match="50 support crops"):
        dip.episodes(Pairs([stripes(0, 1)]), Pairs([stripes(2, 3)]), CFG)(0)


def test_a_support_crop_of_one_class_is_drawn_again():
    support = Pairs([stripes(0), stripes(0, 10)])
    make = dip.episodes(Pairs([stripes(0, 10)]), support, CFG)
    assert all(make(p)["valid"].sum() == 2 for p in range(12))


def test_a_query_with_too_few_classes_is_passed_over_at_the_end_of_the_list_too():
    query = Pairs([stripes(0, 1)] + [stripes(4)] * 6)
    for position in range(14):
        label = dip.draw_query(query, position, CFG, rng_for(0, position), seed=0)[1]
        assert len(label.unique()) == 2
    with pytest.raises(InputError, match="2 classes"):
        dip.draw_query(Pairs([stripes(4)] * 3), 0, CFG, rng_for(0), seed=0)


def test_crops_other_than_8n_plus_1_are_refused(source, target):
    with pytest.raises(InputError, match="crop_width is 128"):
        dip.episodes(source, target, replace(CFG, augment=Augment(crop_height=65, crop_width=128)))


# ------------------------------------------------------------------------------------------------------- loss and update

def literal_losses(features, labels, K, cfg):
    """One episode word by word: prototypes and cosines class by class."""
    (f_q, f_s), (y_q, y_s) = features, labels
    protos = []
    for k in range(K):
        m = F.interpolate((y_s == k).to(features)[None, None], f_s.shape[-2:], mode="bilinear", align_corners=True)[0, 0]
        protos.append((m * f_s).sum((1, 2)) / (m.sum() + cfg.pool_eps))

    def loss(f, y):
        z = torch.stack([cfg.scale * F.cosine_similarity(f, p[:, None, None], dim=0, eps=1e-8) for p in protos])
        z = F.interpolate(z[None], y.shape, mode="bilinear", align_corners=True)
        return F.cross_entropy(z, y[None], ignore_index=255)
    return loss(f_q, y_q), loss(f_s, y_s)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_head_equals_the_literal_one_in_value_and_gradient(source, target, dtype, tol):
    make = dip.episodes(source, target, CFG)
    ep = [make(p) for p in (0, 1, 2)]
    torch.manual_seed(0)
    feats = torch.randn(6, 24, 9, 17, dtype=dtype, requires_grad=True)
    labels, valid = (torch.stack([e[k] for e in ep]) for k in ("labels", "valid"))
    got = dip.episode_losses(feats, labels, valid, CFG)
    sums, counts = [0., 0.], [0, 0]
    for b in range(3):
        pair = literal_losses(feats[[b, 3 + b]], labels[b], int(valid[b].sum()), CFG)
        for j in range(2):
            n = (labels[b, j] != 255).sum()
            sums[j], counts[j] = sums[j] + pair[j] * n, counts[j] + n
    want = [s / n for s, n in zip(sums, counts)]
    for a, b in zip(got, want):
        assert abs(a - b) <= tol * abs(b)
    g, h = (torch.autograd.grad(x[0] + .2 * x[1], feats)[0] for x in (got, want))
    assert (g - h).abs().max() <= 10 * tol * h.abs().max()


def test_all_pixels_ignored_is_a_loss_of_zero():
    feats = torch.randn(2, 8, 9, 17, requires_grad=True)
    labels = torch.full((1, 2, 65, 129), 255)
    q, s = dip.episode_losses(feats, labels, torch.arange(19)[None] < 2, CFG)
    (q + s).backward()
    assert q == 0 and s == 0 and not feats.grad.any()
    assert upsampled_cross_entropy(torch.randn(1, 3, 2, 2), torch.full((1, 9, 9), 255)) == 0


def test_learning_rate_of_every_group_runs_from_almost_0_01_to_0(prepared):
    opt, sched = prepared(dip_small(), dip.DIP(), steps=50)
    rates = []
    for _ in range(50):
        rates.append({g["lr"] for g in opt.param_groups})
        opt.step()
        sched.step()
    assert all(len(r) == 1 for r in rates)
    rates = [r.pop() for r in rates]
    assert rates[0] == pytest.approx(.01 * (1 - 1 / 50) ** .9) and rates[-1] == 0
    assert all(a > b for a, b in zip(rates, rates[1:]))
    group = opt.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (.9, 1e-4, False)


@pytest.mark.parametrize("freeze_bn", [False, True])
def test_frozen_parts_keep_their_weights_and_their_batch_norm_follows_the_data_unless_told(source, target, freeze_bn, prepared):
    net = dip_small()
    opt, sched = prepared(net, replace(CFG, freeze=("layer0", "layer1"), freeze_bn=freeze_bn), steps=5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    batch = next(iter(batches(dip.episodes(source, target, CFG), steps=1, batch_size=1)))
    dip.step(net, opt, sched, batch, CFG)
    after = net.state_dict()
    same = {k for k in before if torch.equal(before[k], after[k])}
    frozen = [k for k in before if k.startswith(("layer0.", "layer1.")) and k.endswith(("weight", "bias"))]
    assert set(frozen) <= same and "layer2.0.conv1.weight" not in same
    means = [k for k in before if k.startswith("layer0.") and k.endswith("running_mean")]
    assert all((k in same) == freeze_bn for k in means)


def test_step_learns_and_reports_both_terms(source, target, prepared):
    torch.manual_seed(0)
    net = dip_small()
    opt, sched = prepared(net, replace(CFG, lr=.05), steps=30)
    logs = [dip.step(net, opt, sched, b, CFG) for b in batches(dip.episodes(source, target, CFG), steps=12, batch_size=2)]
    for log in logs:
        assert log["loss"] == pytest.approx((log["query"] + .2 * log["support"]).item(), rel=1e-5)
    assert sum(x["loss"] for x in logs[-4:]) < sum(x["loss"] for x in logs[:4])


# ----------------------------------------------------------------------------------------- offline prototypes, inference

def test_at_most_k_contributions_in_scan_order(target):
    net = dip_small().eval()
    p = class_prototypes(net, target, k=2)
    assert p.counts.max() == 2
    road = [image_prototypes(net, *target[i], 19)[0][0] for i in range(2)]
    assert torch.allclose(p.matrix[0], sum(road) / 2, atol=1e-6)
    turned = class_prototypes(net, take(target, range(len(target) - 1, -1, -1)), k=2)
    assert not torch.allclose(turned.matrix[0], p.matrix[0], atol=1e-6)


def test_the_kept_images_alone_give_the_same_prototypes(target):
    net, chosen = dip_small().eval(), greedy_support(target, 2)
    kept, every = class_prototypes(net, take(target, chosen.indices), k=2), class_prototypes(net, target, k=2)
    assert torch.equal(kept.matrix, every.matrix) and kept.counts.tolist() == every.counts.tolist() == chosen.counts.tolist()


def test_a_missing_class_is_left_out_with_a_warning_and_never_predicted():
    net = dip_small().eval()
    with pytest.warns(UserWarning, match="train"):
        p = class_prototypes(net, Pairs([stripes(0, 10, 13)]), k=5)
    assert p.matrix.isfinite().all() and p.valid.sum() == 3 and not p.matrix[16].any()
    seen = label_map(segmenter(net, Feed(scale=20.), p), torch.randint(0, 255, (3, 70, 131), dtype=torch.uint8))
    assert set(seen.unique().tolist()) <= {0, 10, 13}


def test_a_class_without_a_pure_cell_does_not_count():
    label = stripes(0, 10)
    label[:, 64:66] = 5                    # a pole, thinner than a cell
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert class_prototypes(dip_small(), Pairs([label]), k=1).counts[5] == (label[::8, ::8] == 5).any()


def test_one_shot_choice_is_part_of_the_five_shot_choice_and_a_seed_changes_it(target):
    one, five, other = greedy_support(target, 1), greedy_support(target, 5), greedy_support(target, 5, seed=4)
    assert set(one.indices) <= set(five.indices) and five.indices != other.indices
    assert greedy_support(target, 5, seed=4).indices == other.indices


def test_the_published_lists_hang_together():
    five = dip.CITYSCAPES_5SHOT
    assert [five.index(s) for s in dip.CITYSCAPES_1SHOT] == [0, 1, 2, 9, 16, 23, 28]
    assert five[0] == "tubingen_000114_000019" and five[-1] == "hanover_000000_007342"
    assert {k: len(set(v)) for k, v in dip.LISTS.items()} == dict(
        cityscapes_1shot=7, cityscapes_5shot=33, cityscapes_krefeld=27, bdd100k_5shot=39)


# ------------------------------------------------------------------------------------------------- labels, score, presets

def test_motorcycles_stay_motorcycles_when_poles_are_about():
    raw = np.array([[32, 33, 17, 7]], dtype=np.uint8)
    assert map_ids(raw, label_table(GTA5_IDS, CITYSCAPES)).tolist() == [[17, 18, 5, 0]]


def test_lane_markings_of_synthia_are_ignored_here():
    assert map_ids(np.array([[22, 3]], dtype=np.uint8), label_table(SYNTHIA_IDS, CITYSCAPES)).tolist() == [[255, 0]]


def test_mean_iou_from_sums_equals_the_confusion_matrix_with_absent_classes_as_zero():
    g = torch.Generator().manual_seed(0)
    truth, guess = (torch.randint(0, 17, (3, 50, 60), generator=g) for _ in range(2))
    truth[:, :5] = 255
    inter, union = torch.zeros(19), torch.zeros(19)
    for t, p in zip(truth, guess):
        for c in range(19):
            a, b = (t == c), (p == c) & (t != 255)
            inter[c], union[c] = inter[c] + (a & b).sum(), union[c] + (a | b).sum()
    scores = Scores(confusion_matrix(guess, truth, 19), CITYSCAPES, dip.DIP().absent)
    assert scores.miou == pytest.approx((inter / (union + 1e-10)).mean().item(), abs=1e-6)
    assert replace(scores, absent=dip.clean().absent).miou > scores.miou


def test_the_crop_rule_sees_the_raw_id_that_the_table_ignores():
    table = dip.mark_raw(label_table(GTA5_IDS, CITYSCAPES))
    label = torch.from_numpy(map_ids(np.array([[1, 7, 0]], dtype=np.uint8), table)).long()
    assert label.tolist() == [[253, 0, 255]]
    assert dip.remap(label, torch.tensor([0])).tolist() == [[255, 0, 255]]
    wide = stripes(0, 10, size=(65, 1041))
    wide[60:, 900:] = 253                  # a bonnet at the far right: crops lean towards it
    calm = Augment(crop_height=65, crop_width=129, scale_low=1., scale_high=1., rotate_p=0., flip_p=0., blur_p=0.)
    support = Pairs([stripes(0, 10)])
    at = {}
    for name, cfg in (("clean", dip.DIP(augment=calm)), ("released", replace(dip.released("gta5"), augment=calm))):
        make = dip.episodes(Pairs([wide]), support, cfg)
        at[name] = np.mean([(make(p)["labels"][0, 62] == 255).float().mean() for p in range(20)])
    assert at["released"] > 2 * at["clean"] + .1


# ----------------------------------------------------------------------------------------- other sizes, networks, data sets

@pytest.mark.parametrize("size,grid", [((64, 96), (8, 12)), ((66, 100), (9, 13)), ((65, 129), (9, 17)), ((40, 41), (6, 6))])
def test_prototypes_of_a_grid_that_does_not_divide_are_those_of_resized_masks(size, grid):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (1, 2, -(-size[0]//5), -(-size[1]//5)), generator=g).repeat_interleave(5, 2).repeat_interleave(5, 3)
    labels = labels[..., :size[0], :size[1]].clone()
    labels[labels == 3] = 255
    features = torch.randn(2, 6, *grid, generator=g, dtype=torch.float64)
    hot = torch.stack([labels[:, 1] == k for k in range(3)], 1).double()
    masks = F.interpolate(hot, grid, mode="bilinear", align_corners=True)
    protos = torch.einsum("bkhw,bchw->bkc", masks, features[1:]) / (masks.sum((2, 3)) + CFG.pool_eps)[..., None]
    logits = CFG.scale * torch.einsum("bchw,kc->bkhw", F.normalize(features, dim=1), F.normalize(protos[0], dim=1))
    big = F.interpolate(logits, size, mode="bilinear", align_corners=True)
    want = F.cross_entropy(big, labels.transpose(0, 1)[:, 0], ignore_index=255, reduction="none")
    got = dip.episode_losses(features, labels, torch.ones(1, 3, dtype=torch.bool), CFG)
    for i in (0, 1):
        known = labels[0, i] != 255
        assert got[i].item() == pytest.approx(want[i][known].mean().item(), rel=1e-4)


@pytest.mark.parametrize("promised,freeze,want", [((), None, set()), (("layer0",), None, {"layer0"}), (("layer0",), (), set()),
                                                  ((), ("layer1", "ppm"), {"layer1", "ppm"})])
def test_what_is_frozen_is_what_the_network_names_unless_told(prepared, promised, freeze, want):
    net = dip_small()
    net.frozen_prefixes = promised
    prepared(net, replace(CFG, freeze=freeze), steps=5)
    assert {n.split(".")[0] for n, p in net.named_parameters() if not p.requires_grad} == want


def test_a_part_that_the_network_lacks_cannot_be_frozen(prepared):
    with pytest.raises(InputError, match="freeze: the network has no part 'layer9', expected some of layer0, layer1, "):
        prepared(dip_small(), replace(CFG, freeze=("layer0", "layer9")), steps=5)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: resized(d, (4, 6)), Cached, lambda d: Cached(resized(take(d, [0]), (4, 6)))])
def test_the_raw_id_is_kept_however_a_data_set_is_wrapped(tmp_path, wrap):
    for name in ("images", "labels"): (tmp_path/name).mkdir()
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path/"images"/"00001.png")
    Image.fromarray(np.repeat([[1, 7], [0, 23]], 4, 0).repeat(6, 1).astype(np.uint8)).save(tmp_path/"labels"/"00001.png")
    bare = open_dataset(f"gta5:{tmp_path}")
    data = wrap(bare)
    data[0]                                              # a cache that has read it already
    assert dip.keep_raw(data)
    assert bare[0][1].unique().tolist() == [0, 10, 253, 255]
    assert data[0][1].unique().tolist() == [0, 10, 253, 255]


def test_a_drawn_data_set_has_no_raw_ids(target):
    assert not dip.keep_raw(target) and not dip.keep_raw(Cached(resized(target, (33, 65))))
    assert (target[0][1] != 253).all()
