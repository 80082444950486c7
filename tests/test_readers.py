"""Whatever stands in a file: its reader gives a value or an `InputError`, and nothing else. Files that are whole but for a value, a key or a byte are drawn
by hypothesis, always the same ones; `PROTONB_EXAMPLES=5000` draws more."""
import base64
import io
import json
import os
import struct
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from protonb.annotations import read_classes, read_drawings, read_painted, Entry
from protonb.core import InputError
from protonb.datasets import open_dataset
from protonb.evaluation import Scores
from protonb.files import read_list
from protonb.folders import read_stages
from protonb.labels import CITYSCAPES
from protonb.prototypes import load_prototypes
from protonb.pseudo_labels import read_histogram
from protonb.runs import open_any, read_config, read_scores, space_to_dict
from protonb.training import checkpoint_info, read_rows, read_states, save_checkpoint
from protonb.weak_labels import read_points
from protonb.weights import load_into, read_file, read_meta, save_weights

quick = settings(max_examples=int(os.environ.get("PROTONB_EXAMPLES", 60)), derandomize=True, deadline=None, database=None,
                 suppress_health_check=list(HealthCheck))


def value_or_refused(read):
    """Runs a reader; an `InputError` of one line is as good as a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: return read()
        except InputError as e: assert str(e).strip()


# ---- trees that are whole but for some places

def places(tree, at=()):
    """Paths to everything in a tree of dicts and lists."""
    yield at
    for k, v in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else (): yield from places(v, (*at, k))


ODD = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([2**31, 2**63, -2**70, 10**9]), st.floats(), st.text(max_size=6),
                st.sampled_from(["", "\0", "..", "/", "\ud800".encode("utf-8", "replace").decode(), "a"*300, "{", "1e999"]))
VALUES = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)


@st.composite
def spoiled(draw, tree):
    """The tree with one to three places replaced, taken out, or doubled."""
    tree = deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(tree))))
        if not at: return draw(VALUES) if draw(st.integers(0, 9)) == 0 else tree
        holder = tree
        for k in at[:-1]: holder = holder[k]
        how = draw(st.sampled_from(["replace", "replace", "out", "twice"]))
        if how == "out": del holder[at[-1]]
        elif how == "twice" and isinstance(holder, list): holder.append(deepcopy(holder[at[-1]]))
        else: holder[at[-1]] = draw(VALUES)
    return tree


@st.composite
def scratched(draw, data):
    """Bytes of which some are others, some are missing, or some stand there twice."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        a = draw(st.integers(0, max(0, len(data)-1)))
        how = draw(st.sampled_from(["byte", "byte", "cut", "out", "twice"]))
        if how == "byte" and data: data[a] = draw(st.integers(0, 255))
        elif how == "cut": del data[a:]
        elif how == "out": del data[a:a+draw(st.integers(1, 9))]
        else: data[a:a] = data[a:a+draw(st.integers(1, 9))]
    return bytes(data)


def toml(value):
    """A value as TOML, tables in line."""
    if isinstance(value, dict): return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list): return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and value != value: return "nan"
    return "''" if value is None else str(value) if isinstance(value, float) else json.dumps(value)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a picture and its label, and what the readers are given."""
    home = tmp_path_factory.mktemp("readers")
    for name in ("images", "labels"): (home / name).mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (8, 12, 3), dtype=np.uint8)).save(home / "images" / "a.png")
    Image.fromarray(rng.integers(0, 2, (8, 12), dtype=np.uint8)).save(home / "labels" / "a.png")
    return home


def png(value=255):
    out = io.BytesIO()
    Image.fromarray(np.full((2, 3), value, np.uint8)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


# ---- descriptions, lists, points

TOML = dict(name="two", images=dict(train="images", val=["images"]), labels=dict(train="labels"), classes=dict(road=[128, 64, 128], sky=[[0, 0, 1], [0, 0, 2]]),
            ids={"0": "road", "1": "sky", "7": "ignore"}, lists=dict(train="list.txt"), label_ending="", channel=0, nearest=3, ignore_colours=[[9, 9, 9]])


def opened(path):
    ds = open_dataset(f"folder:{path}", "train")
    return ds[0] if len(ds) else ds.space


@quick
@given(tree=spoiled({k: v for k, v in TOML.items() if k not in ("lists", "channel", "label_ending")}) | spoiled(TOML))
def test_toml(home, tree):
    path = home / "set.toml"
    path.write_text("\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in tree.items()) if isinstance(tree, dict) else str(tree), encoding="utf-8", errors="replace")
    value_or_refused(lambda: opened(path))


@quick
@given(data=scratched(b'images = {train = "images"}\nlabels = {train = "labels"}\nclasses = {road = [128, 64, 128], sky = [0, 0, 1]}\n[ids]\n0 = "road"\n'))
def test_toml_bytes(home, data):
    (home / "set.toml").write_bytes(data)
    value_or_refused(lambda: opened(home / "set.toml"))


@quick
@given(data=scratched("# names\na.png\n\"b\"\n\nfolder/c.png\td\n".encode()) | st.binary(max_size=20))
def test_lists(home, data):
    (home / "list.txt").write_bytes(data)
    value_or_refused(lambda: read_list(home / "list.txt"))
    (home / "set.toml").write_text('space = "cityscapes"\nimages = {train = "images"}\nlists = {train = "list.txt"}\n')
    value_or_refused(lambda: open_dataset(f"folder:{home / 'set.toml'}", "train", labelled=False)[0])


POINTS = [dict(image="ulm_0.png", size=[8, 12, 3], points=[dict(x=1, y=2, c=7), dict(x=3, y=2, c=8)]), dict(image="ulm_1.png", size=[8, 12], points=[])]


@quick
@given(tree=spoiled(POINTS), data=scratched(yaml.safe_dump(POINTS).encode()))
def test_points(home, tree, data):
    for content in (yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "replace"), data):
        (home / "points.yaml").write_bytes(content)
        value_or_refused(lambda: read_points(home / "points.yaml"))


@pytest.mark.parametrize("text", ["&a [*a]", "a: &a [*a, *a]", "[" * 5000, "- " * 3000 + "x", "!!python/object/apply:os.system [ls]", "? [a]\n: b", "2020-99-99",
                                  "- {image: a, size: [8, 12], points: [{x: 0x1, y: 1e3, c: .inf}]}", "!!binary |\n  ==", "!!timestamp x", "!!int x", "<<: 3"])
def test_points_of_another_kind(home, text):
    (home / "points.yaml").write_text(text)
    assert value_or_refused(lambda: read_points(home / "points.yaml")) is None


# ---- annotations

RING = [[0, 0], [5.5, 0], [5, 6]]
LABELME = dict(version="5", imageHeight=8, imageWidth=12, shapes=[dict(label="road", shape_type="polygon", points=RING), dict(label="sky", shape_type="circle",
    points=[[3, 3], [4, 4]]), dict(label="sky", shape_type="rectangle", points=[[1, 1], [4, 4]]), dict(label="road", shape_type="mask", points=[[1, 1], [3, 2]], mask=png())])
CITY = dict(imgHeight=8, imgWidth=12, objects=[dict(label="road", polygon=RING), dict(label="skygroup", polygon=RING, deleted=0)])
SUPERVISELY = dict(size=dict(height=8, width=12), objects=[dict(geometryType="polygon", classTitle="road", points=dict(exterior=RING, interior=[RING])),
    dict(geometryType="bitmap", classTitle="sky", bitmap=dict(origin=[1, 2], data=png())), dict(geometryType="rectangle", classTitle="sky", points=dict(exterior=[[1, 1], [4, 5]]))])
COCO = dict(images=[dict(id=1, file_name="a.png", height=8, width=12)], categories=[dict(id=1, name="road")], annotations=[
    dict(id=1, image_id=1, category_id=1, segmentation=[[0, 0, 5, 0, 5, 6]]), dict(id=2, image_id=1, category_id=1, segmentation=dict(size=[8, 12], counts=[10, 20, 66]))])
CVAT = """<annotations><meta><task><labels><label><name>road</name><color>#804080</color><type>polygon</type></label></labels></task></meta>
<image id="0" name="a.png" width="12" height="8"><polygon label="road" points="0,0;5.5,0;5,6" z_order="0"/><box label="road" xtl="1" ytl="1" xbr="4" ybr="4" z_order="1"/>
<ellipse label="road" cx="3" cy="3" rx="2" ry="1"/><mask label="road" rle="1,3,2" left="1" top="1" width="3" height="2"/></image></annotations>"""
IDS = dict(road=0, sky=1)


@quick
@given(kind=st.sampled_from(["labelme", "cityscapes", "supervisely"]), data=st.data())
def test_drawings(home, kind, data):
    tree = data.draw(spoiled(dict(labelme=LABELME, cityscapes=CITY, supervisely=SUPERVISELY)[kind]))
    (home / "a.json").write_text(json.dumps(tree))
    value_or_refused(lambda: read_painted(home / "a.json", format=kind, ids=IDS))


@quick
@given(tree=spoiled(COCO))
def test_coco(home, tree):
    pytest.importorskip("pycocotools")
    (home / "coco.json").write_text(json.dumps(tree))
    read_drawings.cache_clear()
    for name in value_or_refused(lambda: read_drawings(home / "coco.json", "coco")) or ():
        value_or_refused(lambda: read_painted(Entry(home / "coco.json", name), format="coco", ids=IDS))


@quick
@given(data=scratched(CVAT.encode()) | st.sampled_from([CVAT.replace(a, b).encode() for a in ("0,0;5.5,0;5,6", "1,3,2", '"12"', '"8"', '"1"', '"2"', "a.png", "#804080", "polygon")
                                                       for b in ("", "nan", "inf", "1e99", "-5", "99999999", "x", "0,0", '"0"', "&lt;")]))
def test_cvat(home, data):
    (home / "a.xml").write_bytes(data)
    read_drawings.cache_clear()
    value_or_refused(lambda: read_classes(home / "a.xml"))
    for name in value_or_refused(lambda: read_drawings(home / "a.xml", "cvat")) or ():
        value_or_refused(lambda: read_painted(Entry(home / "a.xml", name), format="cvat", ids=IDS))


@quick
@given(tree=spoiled(dict(classes=[dict(title="road", color="#804080", shape="polygon"), dict(title="sky", color="#0000ff")])),
       data=scratched(b"# label:color_rgb:parts:actions\nroad:128,64,128::\n70 130 180 sky\nperson, 220 20 60\n"))
def test_tables_of_classes(home, tree, data):
    (home / "meta.json").write_text(json.dumps(tree))
    (home / "labelmap.txt").write_bytes(data)
    for name in ("meta.json", "labelmap.txt"): value_or_refused(lambda: read_classes(home / name))


# ---- what a run leaves

SMALL = dict(net="iapc_small", space=space_to_dict(CITYSCAPES), hyper=dict(lr=.1, absent="skip_both"), feed=dict(height=None, width=None, input="", enlarge="aligned", scale=20.))


@pytest.fixture(scope="module")
def run(home):
    """A run folder of one checkpoint, whose configuration builds a small network."""
    from protonb.runs import NETWORKS
    torch.manual_seed(0)
    meta = dict(train=dict(steps=1, seed=0), config=SMALL, effective_batch=2, versions={})
    (home / "run").mkdir()
    (home / "run" / "config.json").write_text(json.dumps(dict(source_only=meta)))
    save_checkpoint(home / "run" / "checkpoints" / "source_only-0000001", dict(net=NETWORKS["iapc_small"](num_classes=19)), dict(stage="source_only", step=1, **meta))
    return home / "run"


@quick
@given(data=st.data())
def test_config_json(run, data):
    path = run / "config.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps(data.draw(spoiled(json.loads(whole)))))
        for read in (read_stages, read_config, open_any): value_or_refused(lambda: read(run))
        path.write_bytes(data.draw(scratched(whole.encode())))
        value_or_refused(lambda: read_config(run))
    finally: path.write_text(whole)


@quick
@given(data=st.data())
def test_checkpoints(run, data):
    folder = run / "checkpoints" / "source_only-0000001"
    path = folder / data.draw(st.sampled_from(["checkpoint.json", "state.json"]))
    whole = path.read_text()
    try:
        path.write_text(json.dumps(data.draw(spoiled(json.loads(whole)))))
        for read in (checkpoint_info, read_states): value_or_refused(lambda: read(folder))
        info = json.loads((folder / "checkpoint.json").read_text())
        if isinstance(info, dict) and path.name == "state.json":                      # a file of before had no checksums
            kept = {k: v for k, v in info.items() if k not in ("sha256", "own_sha256", "bytes")}
            (folder / "checkpoint.json").write_text(json.dumps(kept | dict(bytes={})))
            value_or_refused(lambda: read_states(folder))
            (folder / "checkpoint.json").write_text(json.dumps(info))
    finally: path.write_text(whole)


SCORES = {"a val": dict(Scores(torch.eye(19, dtype=torch.long), CITYSCAPES, "zero").to_dict(), of=dict(stage="source_only", step=1, weights="x"))}
HISTOGRAM = dict(bins=256, names=["a"], counts=[[0]*256]*19, classes=list(CITYSCAPES.classes))


@quick
@given(scores=spoiled(SCORES), histogram=spoiled(HISTOGRAM), log=scratched(b"stage,step,loss\nsource_only,1,0.5\nsource_only,2,nan\n"))
def test_scores_histograms_and_logs(run, scores, histogram, log):
    for name, content, read in (("scores.json", json.dumps(scores).encode(), read_scores), ("histogram.json", json.dumps(histogram).encode(), read_histogram),
                                ("metrics.csv", log, lambda run: read_rows(run / "metrics.csv"))):
        (run / name).write_bytes(content)
        try: value_or_refused(lambda: read(run))
        finally: (run / name).unlink()


# ---- weights

def tensors_with(header, data=b"\0"*64):
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HEADER = {"__metadata__": {"meta": json.dumps(dict(net="x"))}, "weight": dict(dtype="F32", shape=[2, 3], data_offsets=[0, 24]), "bias": dict(dtype="F32", shape=[2], data_offsets=[24, 32]),
          "n": dict(dtype="I64", shape=[], data_offsets=[32, 40])}


@quick
@given(header=spoiled(HEADER), data=scratched(tensors_with(HEADER)), length=st.integers(0, 2**64-1))
def test_safetensors(home, header, data, length):
    for content in (tensors_with(header), data, struct.pack("<Q", length) + tensors_with(HEADER)[8:]):
        path = home / "w.safetensors"
        path.write_bytes(content)
        for read in (read_file, read_meta, load_prototypes): value_or_refused(lambda: read(path))
        value_or_refused(lambda: load_into(torch.nn.Linear(3, 2), read_file(path), path))


@quick
@given(header=spoiled(dict(matrix=dict(dtype="F32", shape=[2, 3], data_offsets=[0, 24]), counts=dict(dtype="F32", shape=[2], data_offsets=[24, 32]),
                           __metadata__=dict(meta='{"classes": ["road", "sky"], "k": 3}'))))
def test_prototypes(home, header):
    (home / "p.safetensors").write_bytes(tensors_with(header, b"\0\0\x80\x3f"*8))
    value_or_refused(lambda: load_prototypes(home / "p.safetensors"))


@pytest.fixture(scope="module")
def torch_files():
    out = []
    for old in (False, True):
        f = io.BytesIO()
        torch.save(dict(state_dict=dict(weight=torch.zeros(2, 3), bias=torch.zeros(2)), epoch=3), f, _use_new_zipfile_serialization=not old)
        out.append(f.getvalue())
    return out


@quick
@given(data=st.data())
def test_torch_files(home, torch_files, data):
    path = home / "w.pth"
    path.write_bytes(data.draw(scratched(data.draw(st.sampled_from(torch_files)))))
    value_or_refused(lambda: load_into(torch.nn.Linear(3, 2), read_file(path), path))
