"""Packaging. Every fact comes from settings.ini; `kernels/` is installed as `protonb.kernels`."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


def words(key):
    return cfg.get(key, "").split()


readme = here / "README.md"
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    python_requires=">=" + cfg["min_python"],
    # The stub protonb/kernels/ only serves a checkout; an installed package gets the real folder.
    packages=find_packages(include=["protonb", "protonb.*"], exclude=["protonb.kernels*"]) + ["protonb.kernels"],
    package_dir={"protonb.kernels": "kernels"},
    package_data={"protonb": ["lists/*.csv"]},
    install_requires=words("requirements"),
    extras_require={
        "dev": words("dev_requirements") + words("triton_requirements") + words("backbones_requirements") + words("coco_requirements")
        + words("site_requirements") + words("browser_requirements"),
        "backbones": words("backbones_requirements"),
        "coco": words("coco_requirements"),
        "site": words("site_requirements"),
        "explorer": words("explorer_requirements"),
        "foundation": words("foundation_requirements"),
        "triton": words("triton_requirements"),
    },
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
