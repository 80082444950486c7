"""Lighter outputs of the book, `make export` or python tools/pictures.py NOTEBOOK ...: pictures with at most 256 colours, a third of the bytes; no noise on stderr."""
import base64
import io
import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def stored(path):
    """(cell id, kind, base64 text, size) of every picture in a notebook's outputs, PNG and JPEG."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            for kind in ("image/png", "image/jpeg"):
                if kind in output.get("data", {}):
                    text = "".join(output["data"][kind]).strip()
                    yield cell["id"], kind, text, Image.open(io.BytesIO(base64.b64decode(text))).size


def lighter(raw, colours=256):
    """A PNG with a palette, without dither, which would cost what the palette saves; the same bytes where that is not smaller."""
    im = Image.open(io.BytesIO(raw))
    if im.mode == "P":
        return raw
    paper = Image.new("RGBA", im.size, "white")
    paper.alpha_composite(im.convert("RGBA"))
    out = io.BytesIO()
    paper.convert("RGB").quantize(colours, kmeans=1, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return min(raw, out.getvalue(), key=len)


def is_noise(output):
    """Whether an output tells nothing but the time of one day: a progress bar, or what torch's profiler logs from C++."""
    text = "".join(output.get("text", ""))
    return output.get("name") == "stderr" and ("\r" in text or all(line.startswith("USDT:") for line in text.splitlines()))


def without_noise(text):
    """A notebook's text without such outputs; the same text where there are none."""
    book = json.loads(text)
    for cell in book["cells"]:
        if any(map(is_noise, cell.get("outputs", []))):
            cell["outputs"] = [o for o in cell["outputs"] if not is_noise(o)]
            text = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
    return text


def main(paths):
    """Rewrite the notebooks that have noise, or a picture with more colours."""
    for path in map(Path, paths or sorted((ROOT/"nbs").rglob("*.ipynb"))):
        old = path.read_text(encoding="utf-8")
        new = without_noise(old)
        for _, kind, text, _ in stored(path):
            small = base64.b64encode(lighter(base64.b64decode(text))).decode() if kind == "image/png" else text
            if small != text:
                assert text in new, f"{path}: a picture in several lines; run nbdev_clean first"
                new = new.replace(text, small)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"{path.name}: {len(old)/1e3:.0f} -> {len(new)/1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
