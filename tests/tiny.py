"""The command line of every method with networks, images and lengths that take a second: for tests that go through all of them."""
from pathlib import Path

SOURCE, TARGET = "streets:synthetic,count=4,size=64x128", "streets:real,count=4,size=64x128"
SHORT = "--steps 2 --batch-size 2 --checkpoint-every 1 --log-every 1 --device cpu"
STRIDE = dict(pbal=53, proda=53, pixda=29)    # from one write that fails to the next, where there are many


def _windows(names):
    return " ".join(f"--hyper.{n}.base-width 128 --hyper.{n}.low 1.0 --hyper.{n}.high 1.2 --hyper.{n}.crop-height 48 --hyper.{n}.crop-width 96" for n in names.split())


_CROP = "--crop-height 48 --crop-width 96"
_OPTIONS = {
    "source-only": f"--net pbal_small {_CROP}",
    "joint": f"--net pbal_small --few drawn --shots 2 {_CROP}",
    "mixteacher": "--net pbal_small",
    "dip": "--net dip_small --crop-height 65 --crop-width 129 --shots 1 --allow-missing",
    "iapc": "--scales 1.0 --test-height None --base-height 64 --base-width 128 --low 1.0 --crop-height 48 --crop-width 96 --refresh-height 64 --refresh-width 128",
    "pbal": f"--net pbal_small --hyper.warm-up.disc-width 8 --hyper.bpl.disc-width 8 {_windows('warm-up.view bpl.view pst.view distill.weak')}",
    "proda": f"--net proda_small {_windows('warm-up.weak denoise.weak distill.weak')}",
    "wdass": "--net wdass_small --weak fine --warm 0 --source-height 0 --source-width 0 --target-height 0 --target-width 0 --crop-height 64 --crop-width 128",
    "pixda": "--net pixda_small --few drawn --shots 2 --kd-steps 2 --disc-width 8 --height 64 --width 128",
}
METHODS = list(_OPTIONS)


def train(method, out, *more, start="start"):
    """Words of `protonb train METHOD`; what stands in `more` comes last and wins."""
    data = ["--start", str(start)] if method == "iapc" else ["--source", SOURCE]
    data += [] if method == "source-only" else ["--target", TARGET]
    words = ["train", method, *data, "--out", str(out), *_OPTIONS[method].split(), *SHORT.split(), *map(str, more)]
    for option in more[::2]:                                          # an option that is said twice counts once
        if words.count(option) > 1: del words[words.index(option):words.index(option)+2]
    return words


def others(run, out, photos):
    """Commands that write something else than a run: name -> words."""
    data = ["--data", TARGET]
    return {"eval": ["eval", run, *data], "report": ["report", run, *data, "--images", "1", "--out", f"{out}/page.html"],
            "predict": ["predict", run, photos, "--out", f"{out}/predicted"],
            "weaken": ["data", "weaken", TARGET, "--labels", "point", "--out", f"{out}/weak"],
            "check": ["data", "check", TARGET, "--out", f"{out}/looked"],
            "fewshot": ["data", "fewshot", TARGET, "--shots", "1", "--out", f"{out}/few.txt"]}


def bits(folder):
    """What a run or a command leaves, as far as two equal ones must agree: name -> bytes."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    told = ("timing.csv", ".lock", "checkpoint.json", "config.json", "adapt.json", ".html")    # times, folders of the machine
    return {n: p.read_bytes() for n, p in files.items() if not n.endswith(told)}
