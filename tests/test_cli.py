"""The command line: every mistake is one line and exit code 2, and leaves nothing half-written."""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protonb.cli import announce, main, open_job, parse
from protonb.dip_net import dip_small
from protonb.weights import save_weights

SIZE = (65, 97)
FAST = ["--net", "dip_small", "--steps", "3", "--batch-size", "2", "--crop-height", "65", "--crop-width", "97",
        "--device", "cpu"]


def write_pair(root, split, name, classes=range(11), size=SIZE, label_size=SIZE):
    """One image of noise and its label: vertical stripes of the classes, wide enough for the feature grid."""
    rng = np.random.default_rng(len(name))
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / f"{split}annot").mkdir(parents=True, exist_ok=True)
    classes = np.array(list(classes), dtype=np.uint8)
    row = classes[np.arange(label_size[1]) * len(classes) // label_size[1]]
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / split / f"{name}.png")
    Image.fromarray(np.broadcast_to(row, label_size).copy()).save(root / f"{split}annot" / f"{name}.png")


@pytest.fixture
def camvid(tmp_path):
    """A small data set in CamVid's layout; every class in every image (the stripes are nearly 9 pixels wide)."""
    root = tmp_path / "camvid"
    for split in ("train", "val"):
        for name in ("a", "bb", "ccc"):
            write_pair(root, split, name, classes=range(5) if name == "bb" else range(5, 11))
    return root


def fails(args, capsys, *words, out=None):
    """Exit code 2 and one line that has the words; the run folder is not there."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    err = capsys.readouterr().err.strip()
    lines = [line for line in err.splitlines() if line.startswith("protonb:")]
    assert len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert str(word) in lines[0], lines[0]
    if out is not None:
        left = sorted(p.name for p in out.rglob("*")) if out.exists() else []
        assert not left, left


def base(root, out, *more):
    return ["train", "source-only", "--source", f"camvid:{root}", "--out", out, *FAST, *more]


def adapt(root, out, *more):
    return ["train", "dip", "--source", f"camvid:{root}", "--target", f"camvid:{root}", "--out", out, *FAST, "--shots", "1", *more]


def test_a_good_run_ends_with_0_and_goes_all_the_way(camvid, tmp_path, capsys):
    assert main([str(a) for a in adapt(camvid, tmp_path / "run", "--val", f"camvid:{camvid}")]) == 0
    assert main(["eval", str(tmp_path / "run"), "--data", f"camvid:{camvid}", "--split", "train"]) == 0
    assert main(["predict", str(tmp_path / "run"), str(camvid / "val"), "--out", str(tmp_path / "seen")]) == 0
    assert main(["report", str(tmp_path / "run"), "--data", f"camvid:{camvid}", "--images", "1"]) == 0
    ids = np.asarray(Image.open(tmp_path / "seen" / "a_trainIds.png"))
    assert ids.shape == SIZE and ids.max() < 11
    assert len(list((tmp_path / "seen").iterdir())) == 9
    assert (tmp_path / "run" / "report.html").stat().st_size > 50_000
    assert "mIoU" in capsys.readouterr().out


def test_the_same_command_again_goes_on(camvid, tmp_path, capsys):
    args = [str(a) for a in base(camvid, tmp_path / "run")]
    assert main(args) == 0
    weights = sorted((tmp_path / "run" / "checkpoints").rglob("net*.safetensors"))[-1]
    before = weights.read_bytes()
    assert main(args) == 0
    assert weights.read_bytes() == before


def test_missing_folder(tmp_path, capsys):
    fails(base(tmp_path / "nowhere", tmp_path / "run"), capsys, tmp_path / "nowhere", out=tmp_path / "run")


def test_no_image_found(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "trainannot").mkdir()
    fails(base(tmp_path, tmp_path / "run"), capsys, "no image", out=tmp_path / "run")


def test_image_without_label(camvid, tmp_path, capsys):
    (camvid / "trainannot" / "bb.png").unlink()
    fails(base(camvid, tmp_path / "run"), capsys, "bb", "label", out=tmp_path / "run")


def test_label_of_another_size(camvid, tmp_path, capsys):
    write_pair(camvid, "train", "bb", label_size=(33, 97))
    fails(base(camvid, tmp_path / "run"), capsys, "bb", "33", "65", out=tmp_path / "run")


def test_unknown_label_ids_are_listed(camvid, tmp_path, capsys):
    write_pair(camvid, "train", "bb", classes=[0, 1, 40, 77])
    fails(base(camvid, tmp_path / "run"), capsys, "bb", "40", "77", out=tmp_path / "run")


@pytest.mark.parametrize("which", ["train", "trainannot"])
def test_truncated_png(camvid, tmp_path, capsys, which):
    path = camvid / which / "bb.png"
    path.write_bytes(path.read_bytes()[:-30])
    fails(base(camvid, tmp_path / "run"), capsys, path, out=tmp_path / "run")


def test_unwritable_output_folder(camvid, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    fails(base(camvid, tmp_path / "file" / "run"), capsys, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_unwritable_output_of_predict(camvid, tmp_path, capsys):
    assert main([str(a) for a in base(camvid, tmp_path / "run")]) == 0
    (tmp_path / "file").write_text("not a folder")
    fails(["predict", tmp_path / "run", camvid / "val", "--out", tmp_path / "file"], capsys, tmp_path / "file")


def test_unreadable_image_folder(camvid, tmp_path, capsys):
    assert main([str(a) for a in base(camvid, tmp_path / "run")]) == 0
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.png").write_bytes(b"not an image")
    fails(["predict", tmp_path / "run", tmp_path / "photos", "--out", tmp_path / "out"], capsys, "x.png", out=tmp_path / "out")
    fails(["predict", tmp_path / "run", tmp_path / "none", "--out", tmp_path / "out"], capsys, "none", out=tmp_path / "out")


def test_support_set_that_lacks_a_class(camvid, tmp_path, capsys):
    for name in ("a", "ccc"):
        write_pair(camvid, "train", name, classes=range(5))
    fails(adapt(camvid, tmp_path / "run"), capsys, "pedestrian", "fence", out=tmp_path / "run")
    with pytest.warns(UserWarning, match="pedestrian"):
        assert main([str(a) for a in adapt(camvid, tmp_path / "run", "--allow-missing")]) == 0


def test_support_list_with_a_lost_image(camvid, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a\nzebra\n")
    fails(adapt(camvid, tmp_path / "run", "--support", tmp_path / "list.txt"), capsys, "zebra", out=tmp_path / "run")


def test_checkpoint_of_another_network(camvid, tmp_path, capsys):
    save_weights(tmp_path / "w.safetensors", dip_small(num_classes=11, width=24))
    fails(base(camvid, tmp_path / "run", "--weights", tmp_path / "w.safetensors"), capsys, "w.safetensors", out=tmp_path / "run")
    torch.save(dict(weight=torch.zeros(3)), tmp_path / "w.pth")
    fails(base(camvid, tmp_path / "run", "--weights", tmp_path / "w.pth"), capsys, "w.pth", out=tmp_path / "run")


def test_resuming_with_other_settings_is_refused(camvid, tmp_path, capsys):
    assert main([str(a) for a in base(camvid, tmp_path / "run")]) == 0
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    fails(base(camvid, tmp_path / "run", "--lr", "0.5"), capsys, "0.5")
    assert there == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize("args, words", [
    (["--steps", "many"], ["--steps is many; expected a whole number from 1"]),
    (["--lr", "fast"], ["--lr is fast; expected a"]),
    (["--stepps", "3"], ["--stepps"]),
    (["--steps", "0"], ["--steps is 0; expected a whole number from 1"]),
    (["--net", "resnet9000"], ["--net is resnet9000; expected one of", "dip_resnet101"]),
    (["--classes", "citiscapes"], ["citiscapes", "camvid"]),
    (["--crop-height", "-4"], ["--crop-height is -4"]),
])
def test_option_of_the_wrong_type(camvid, tmp_path, capsys, args, words):
    fails(base(camvid, tmp_path / "run", *args), capsys, *words, out=tmp_path / "run")


def test_a_crop_that_is_not_8n_plus_1(camvid, tmp_path, capsys):
    fails(adapt(camvid, tmp_path / "run", "--crop-height", "64"), capsys, "crop_height is 64", "8 plus 1")


def test_unknown_commands_and_missing_options(capsys):
    fails(["predcit"], capsys, "predcit")
    fails(["train", "dip"], capsys, "--source")
    fails(["eval", "nowhere", "--data", "x:y"], capsys, "nowhere")
    fails(["adapt", "--source", "a:b", "--traget=images:x", "--out", "z"], capsys, "unknown option --traget, perhaps --target")
    fails(["train", "dip", "--sorce", "gta5:x", "--out", "z"], capsys, "unknown option --sorce, perhaps --source")
    fails(["adapt", "--out", "z"], capsys, "Missing from protonb adapt: --target")


@pytest.mark.parametrize("words, shown", [
    ("adapt", ["--target KIND:PATH", "--out DIR", "--start RUN", "--val KIND:PATH", "--weights FILE", "--size HEIGHTxWIDTH"]), ("predict", [" RUN DIR", "--out DIR", "--at-once INT"]),
    ("report", [" RUN [RUN ...]", "--data KIND:PATH", "--out FILE"]), ("info", [" [RUN]"]), ("compare", [" FILE", "--out DIR"]), ("data check", [" KIND:PATH", "--out DIR"]),
    ("train pbal", ["--source KIND:PATH", "--out RUN", "--val KIND:PATH", "--weights FILE"]), ("train iapc", ["--start RUN"])])
def test_help_says_what_a_value_is(capsys, words, shown):
    with pytest.raises(SystemExit): main([*words.split(), "--help"])
    said = capsys.readouterr().out
    assert all(w in said for w in shown) and not re.search(r"\{None\}|\{,|\bSTR\b|\[\[| PATH\b", said), said


@pytest.mark.parametrize("words, says", [
    ("predict r photos --out FILE", "is a file; expected a folder"), ("train source-only --source x:y --out FILE", "is a file; expected a folder"), ("demo --out FILE", "is a file; expected a folder"),
    ("data check x:y --out FILE", "is a file; expected a folder"), ("data fewshot x:y --shots 1 --out DIR", "is a folder; expected the name of a file"), ("prototypes r --target x:y --out DIR", "is a folder")])
def test_a_file_where_a_folder_is_wanted_and_the_other_way_round(tmp_path, capsys, words, says):
    (tmp_path / "file").write_text("")
    there = dict(FILE=tmp_path / "file", DIR=tmp_path)
    fails([there.get(w, w) for w in words.split()], capsys, "--out " + str(there[words.split()[-1]]), says)


def test_a_folder_where_a_list_is_wanted(tmp_path, capsys):
    fails(few(tmp_path / "x", "--few", tmp_path), capsys, f"--few {tmp_path}: is a folder; expected a text file")


def test_the_console_script_has_exit_code_2_and_no_traceback(tmp_path):
    done = subprocess.run([Path(sys.executable).parent / "protonb", "info", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0 and done.stderr.startswith("protonb: ")


def test_killed_and_started_again_dip_ends_with_the_same_weights(camvid, tmp_path):
    """SIGKILL in the middle of a real DIP run; the same command goes on, bit for bit."""
    def command(out):
        return list(map(str, adapt(camvid, tmp_path / out, "--steps", "30", "--checkpoint-every", "5", "--log-every", "1")))

    assert main(command("whole")) == 0
    running = subprocess.Popen([str(Path(sys.executable).parent / "protonb"), *command("killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=dict(os.environ, OMP_NUM_THREADS="1"))
    points = tmp_path / "killed" / "checkpoints"
    until = time.time() + 120
    while not (points.exists() and any(p.name == "dip-0000010" for p in points.iterdir())):
        assert running.poll() is None and time.time() < until, "ended before it could be killed"
        time.sleep(.01)
    running.kill()
    running.wait()
    assert not (points / "dip-0000030").exists()
    assert main(command("killed")) == 0
    for name in ("checkpoints/dip-0000030/net.safetensors", "metrics.csv", "prototypes.safetensors"):
        whole, killed = (tmp_path / out / name for out in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), name


# ------------------------------------------------------------------------------------------------------ self-training

WINDOW = ["--base-height", "81", "--base-width", "121", "--crop-height", "65", "--crop-width", "97", "--refresh-height", "65",
          "--refresh-width", "97"]


def source_free(start, root, out, *more):
    return ["train", "iapc", "--start", start, "--target", f"camvid:{root}", "--out", out, "--steps", "2", "--batch-size", "2",
            "--device", "cpu", "--scales", "1.0", "--test-height", "None", *WINDOW, *more]


def pbal(root, out, *more):
    sizes = []
    for name in ("warm-up", "bpl", "pst", "distill"):
        sizes += [f"--hyper.{name}.window.base-width", "97", f"--hyper.{name}.window.low", "1.0", f"--hyper.{name}.window.crop-height", "64",
                  f"--hyper.{name}.window.crop-width", "96"]
    return ["train", "pbal", "--source", f"camvid:{root}", "--target", f"camvid:{root}", "--out", out, "--net", "pbal_small",
            "--steps", "1", "--batch-size", "2", "--device", "cpu", *sizes, *more]


def test_source_free_adaptation_from_the_shell(camvid, tmp_path, capsys):
    start = [str(a) for a in base(camvid, tmp_path / "start")]
    start[start.index("dip_small")] = "iapc_small"
    assert main(start) == 0
    (camvid / "trainannot" / "a.png").unlink()          # nobody asks for target labels any more
    for f in (camvid / "trainannot").iterdir():
        f.write_bytes(b"not a label")
    args = [str(a) for a in source_free(tmp_path / "start", camvid, tmp_path / "run")]
    assert main(args) == 0
    assert len(list((tmp_path / "run" / "pseudo").glob("*.png"))) == 6
    wide = ["97000" if a == "97" and b == "--crop-width" else a for b, a in zip(["", *args], args)]
    fails(wide, capsys, "--crop-width", "97000")


def test_source_free_adaptation_refuses_what_it_cannot_start_from(camvid, tmp_path, capsys):
    fails(source_free(tmp_path / "nowhere", camvid, tmp_path / "run"), capsys, "nowhere", "run folder", out=tmp_path / "run")
    assert main([str(a) for a in base(camvid, tmp_path / "dip")]) == 0
    fails(source_free(tmp_path / "dip", camvid, tmp_path / "run"), capsys, "dip_small", "iapc_resnet101", out=tmp_path / "run")


def test_pbal_goes_on_with_a_later_stage(camvid, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([str(a) for a in pbal(camvid, run, "--until", "bpl")]) == 0
    assert not (run / "pseudo").exists()
    assert main([str(a) for a in pbal(camvid, run, "--until", "pst")]) == 0
    stages = {p.name.split("-")[0] for p in (run / "checkpoints").iterdir()}
    assert stages == {"warm_up", "bpl", "pst"} and (run / "pseudo" / "bpl" / "histogram.json").exists()
    assert main(["eval", str(run), "--data", f"camvid:{camvid}"]) == 0
    fails(pbal(camvid, run, "--until", "bql"), capsys, "bql")


TWO_DOMAINS = ["--source", "streets:synthetic,count=4,size=64x128", "--batch-size", "2", "--device", "cpu"]


def weakly(target, out, *more):
    as_they_are = [word for side in ("source-height", "source-width", "base-height", "base-width") for word in (f"--{side}", "0")]
    return ["train", "wdass", *TWO_DOMAINS, "--target", target, "--out", str(out), "--net", "wdass_small", "--warm", "0", *as_they_are,
            "--crop-height", "64", "--crop-width", "128", *more]


def test_weak_labels_from_the_shell(tmp_path, capsys):
    out, target = tmp_path / "weak", "streets:real,count=4,size=64x128"
    command = [*weakly(target, out, "--weak", "fine", "--labels", "point", "--val", target), "--steps", "2"]
    assert main(command) == 0
    scored = capsys.readouterr().out
    assert "road" in scored and (out / "checkpoints" / "wdass-0000002").exists()
    before = (out / "metrics.csv").read_text()
    assert main(command) == 0 and (out / "metrics.csv").read_text() == before      # finished: nothing is trained again
    fails([*weakly(target, out, "--weak", "fine", "--labels", "image"), "--steps", "2"], capsys, "labels", "point", "image")
    fails([*weakly("cityscapes:nowhere", tmp_path / "x"), "--steps", "2"], capsys, "nowhere", out=tmp_path / "x")
    fails([*weakly(target, tmp_path / "x", "--points", "p.yaml"), "--steps", "2"], capsys, "p.yaml", "cityscapes:DIR", out=tmp_path / "x")


def few(out, *more):
    return ["train", "pixda", *TWO_DOMAINS, "--target", "streets:real,count=4,size=64x128", "--out", str(out), "--net", "pixda_small",
            "--steps", "2", "--kd-steps", "1", "--disc-width", "8", "--base-height", "64", "--base-width", "128", *more]


def test_few_labelled_images_from_the_shell(tmp_path, capsys):
    from protonb.datasets import open_dataset
    names = open_dataset("streets:real,count=4,size=64x128").names
    listed = tmp_path / "few.txt"
    listed.write_text(f"{names[2]}\n\n{names[0]}\n")
    out = tmp_path / "few"
    assert main([*few(out, "--few", str(listed)), "--val", "streets:real,count=2,size=64x128"]) == 0
    assert "2 labelled target images" in capsys.readouterr().out
    assert (out / "checkpoints" / "distill-0000001").exists() and not list(out.rglob("*.tmp"))
    assert main(["info", str(out)]) == 0 and "distill with pixda_small" in capsys.readouterr().out
    fails(few(tmp_path / "x"), capsys, "lacks 18 of the 18 few-shot images", "aachen_000082_000019", out=tmp_path / "x")
    fails(few(tmp_path / "x", "--few", "drawn", "--shots", "9"), capsys, "k is 9", out=tmp_path / "x")
    listed.write_text("nobody\n")
    fails(few(tmp_path / "x", "--few", str(listed)), capsys, "nobody", out=tmp_path / "x")


FOLLOW = ["train", "dip", "--source", "streets:synthetic,count=4,size=65x129", "--target", "streets:real,count=4,size=65x129", "--out", "r",
          "--net", "dip_small", "--steps", "4", "--batch-size", "1"]


@pytest.mark.parametrize("recipe", ["fitted", "released"])
@pytest.mark.parametrize("more,want", [
    (["--follow", "gta5"], dict(absent="zero", retry_query=253, retry_support=253, query_classes=2)),
    (["--follow", "cityscapes"], dict(absent="zero", retry_query=1, retry_support=1, query_classes=3)),
    (["--follow", "gta5", "--absent", "skip_both", "--query-classes", "5"], dict(absent="skip_both", retry_query=253, query_classes=5)),
    (["--retry-query", "7", "--follow", "synthia"], dict(retry_query=7, retry_support=253)),
    (["--lr", "0.3", "--follow", "bdd100k", "--retry-support", "None"], dict(lr=.3, retry_support=None, retry_query=1))])
def test_options_win_over_the_source_that_is_followed(capsys, recipe, more, want):
    o = parse([*FOLLOW, "--recipe", recipe, *more])
    assert {k: getattr(o.hyper, k) for k in want} == want
    announce(o)
    told = [line for line in capsys.readouterr().out.splitlines() if "as given" in line]
    given = {"--absent", "--query-classes", "--retry-query", "--retry-support"} & set(more)
    assert len(told) == len(given) and all("--follow" in line for line in told)


def test_who_follows_a_source_without_raw_ids_is_told(tmp_path, capsys):
    o = parse([*FOLLOW, "--follow", "gta5", "--shots", "1", "--allow-missing", "--crop-height", "65", "--crop-width", "129"])
    open_job(o)
    assert "the labels of --source have no raw ids" in capsys.readouterr().out


def test_dip_says_that_its_target_has_no_labels(camvid, tmp_path, capsys):
    out = tmp_path / "r"
    dip = ["train", "dip", "--source", f"camvid:{camvid}", "--out", out, *FAST, "--shots", "1"]
    fails([*dip, "--target", f"images:{camvid / 'train'}"], capsys, "--target images:", "has no labels for its 3 images", out=out)
    for path in (camvid / "trainannot").iterdir():
        Image.fromarray(np.full(SIZE, 11, np.uint8)).save(path)
    fails([*dip, "--target", f"camvid:{camvid}"], capsys, f"--target camvid:{camvid}", "label", out=out)
