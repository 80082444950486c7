"""`protonb demo` with two steps: its rows, what each of them may see, and that a stopped or repeated one trains nothing twice."""
from dataclasses import replace

import pytest
import torch

from protonb import pages
from protonb.core import InputError
from protonb.labels import IGNORE
from protonb.runs import build_net, open_run

SMALL = pages.Demo(start=2, steps=2, oracle=True, height=65, width=129)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A demo of 69 scenes."""
    for k, v in dict(train=6, support=60, val=3).items(): monkeypatch.setitem(pages.DEMO, k, v)
    return replace(SMALL, out=tmp_path/"demo")


def trained(o):
    """The weights that there are, and when they were written."""
    return {p.relative_to(o.out): p.stat().st_mtime_ns for p in o.out.rglob("net.safetensors")}


def test_a_stopped_demo_goes_on_and_a_finished_one_trains_nothing(small, monkeypatch, capsys):
    train = pages.train

    def stopped(job):
        if job.run_dir.name == "mixteacher": raise KeyboardInterrupt
        return train(job)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(pages, "train", stopped)
        pages.demo(small)
    before = trained(small)
    assert {p.parts[1] for p in before} == {"start", "half_and_half", "dip"}
    assert pages.demo(small) == 0
    after = trained(small)
    assert {p.parts[1] for p in after} == {"start", "half_and_half", "dip", "mixteacher", "mixteacher_labels", "oracle"}
    assert before.items() <= after.items()
    page, head = (small.out/"report.html").read_text(), capsys.readouterr().out
    assert pages.demo(small) == 0 and trained(small) == after
    n = len(pages.demo_data(small)["support"])
    titles = ["source only", "AdaBN", "half and half", "DIP", "MixTeacher, no labels", f"MixTeacher, {n} labels", "oracle"]
    line = next(line for line in head.splitlines() if line.startswith("IoU"))
    assert line.split("  ")[0] == "IoU" and [t for t in map(str.strip, line.split("  ")) if t] == ["IoU", *titles, "gain"]
    assert sorted(titles, key=page.index) == titles and f"Before: {titles[0]}" in page


def test_every_run_sees_what_its_title_says(small):
    data = pages.demo_data(small)
    rows, n = pages.demo_rows(small, data), len(data["support"])
    labels = lambda ds: sum((ds[i][1] != IGNORE).any().item() for i in range(len(ds)))
    seen = {title: (len(row[3]), labels(row[3])) for title, row in rows.items() if row[3] is not None}
    assert seen == {"half and half": (n, n), "DIP": (n, n), "MixTeacher, no labels": (60, 0), f"MixTeacher, {n} labels": (60, n)}
    assert rows["oracle"][2] is data["target"] and 0 < n < 60


@pytest.mark.parametrize("side, low", [("height", 33), ("width", 65)])
def test_the_smallest_scene_can_be_drawn(small, side, low):
    assert len(pages.demo_data(replace(small, **{side: low}))["val"][0][0]) == 3
    with pytest.raises(InputError, match=f"{side} is {low-8}; expected a whole number from {low} to 2,049"): replace(small, **{side: low-8})


def test_adabn_changes_statistics_and_nothing_else(small):
    data = pages.demo_data(small)
    start, K = small.out/"start", data["source"].space.num_classes
    pages.demo_job(small, 0, "source-only", start, build_net("dip_small", K), data["source"])
    one, moved = open_run(start), pages.with_statistics_of(start, data["target"])
    was, now = one.net.state_dict(), moved.net.state_dict()
    differ = {k for k in was if not torch.equal(was[k], now[k])}
    assert differ and all(k.rsplit(".", 1)[1] in ("running_mean", "running_var", "num_batches_tracked") for k in differ)
    assert not moved.dir.exists() and open_run(start).id == one.id
