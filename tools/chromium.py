"""The browser of `make test-browser`: one that is there, or a fresh one. Prints its path."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    """Path of a Chromium, or None. PROTONB_CHROMIUM names another one."""
    named = os.environ.get("PROTONB_CHROMIUM")
    if named:
        return named
    there = next(filter(None, map(shutil.which, NAMES)), None)
    if there:
        return there
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        own = Path(p.chromium.executable_path)
    return str(own) if own.exists() else None


def install():
    """From the system's packages where we may, else playwright's own build."""
    if shutil.which("apt-get") and os.geteuid() == 0:
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", *command], check=True, env=env, stdout=subprocess.DEVNULL)
    else:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)


def main():
    """Find or install it."""
    if not find():
        print("no Chromium here: installing one", flush=True)
        install()
    path = find()
    print(path or "no Chromium: install one, or name it in PROTONB_CHROMIUM")
    sys.exit(not path)


if __name__ == "__main__":
    main()
