"""nbs/images/demo.png from what `make demo` left: python tools/demo_picture.py [--out demo]"""
import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from protonb.evaluation import label_map
from protonb.pages import Demo, demo_data, demo_runs
from protonb.pictures import show_image, show_label, style
from protonb.runs import open_run

SCENES = (0, 1, 2)     # of the 60 that the demo scores
FILE = Path(__file__).resolve().parents[1]/"nbs"/"images"/"demo.png"


def columns(out):
    """The data, and title -> opened run of the demo's first seed; what is finished is not trained again."""
    o = Demo(out)
    data = demo_data(o)
    folders, n = demo_runs(o, 0, data), len(data["support"])
    wanted = {"source only": "source only", "half and half": f"half and half, {n} labels"}
    return data, {wanted.get(t, t): open_run(f) for t, f in folders.items() if t in wanted or t.startswith("MixTeacher")}


def draw(data, runs, scenes=SCENES):
    """A row for each scene: image, truth, what the runs make of it."""
    n, (H, W) = 2 + len(runs), data["val"][0][0].shape[1:]
    fig = Figure(figsize=(12.8, 12.8*len(scenes)*(H/W + .015)/n + .26), dpi=100)
    axs = fig.subplots(len(scenes), n, squeeze=False)
    for row, i in zip(axs, scenes):
        image, truth = data["val"][i]
        show_image(image, row[0])
        for ax, label in zip(row[1:], (truth, *(label_map(run.segment, image) for run in runs.values()))):
            show_label(label, data["val"].space, ax)
    for ax, title in zip(axs[0], ("target image", "truth", *runs)): ax.set_title(title, fontsize=11)
    fig.subplots_adjust(left=.003, right=.997, bottom=.008, top=1 - .26/fig.get_figheight(), wspace=.03, hspace=.05)
    return fig


def main():
    """Read or make the runs, write the picture."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path, default=Path("demo"), help="folder of the demo")
    words.add_argument("--scenes", type=int, nargs="+", default=SCENES, help="which of the scored scenes")
    words.add_argument("--file", type=Path, default=FILE)
    said = words.parse_args()
    torch.set_grad_enabled(False)
    with style(False):
        draw(*columns(said.out), said.scenes).savefig(said.file)
    print(f"{said.file.name}: {said.file.stat().st_size/1e3:.0f} kB")


if __name__ == "__main__":
    main()
