from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
name = cfg["lib_name"]
low, high = (int(cfg[k].split(".")[1]) for k in ("min_python", "max_python"))

setup(
    name=name, version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=cfg["author"], url=cfg["git_url"], license=cfg["license"], license_files=["LICENSE", "NOTICE"],
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Natural Language :: English",
                 "Operating System :: POSIX :: Linux", "Operating System :: MacOS",
                 *(f"Programming Language :: Python :: 3.{minor}" for minor in range(low, high + 1))],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split(), "bench": cfg["bench_requirements"].split()},
    packages=find_packages(include=[name, f"{name}.*"]),
    package_data={name: ["*.json", "*.c", "shipped/**/*", "hub/**/*.py"]},
    include_package_data=False, zip_safe=False,
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{name}={name}._modidx:d"]},
)
