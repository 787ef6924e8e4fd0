"Write README.md from nbs/index.ipynb without Quarto; with --check, fail where the two differ."
import re, sys
from pathlib import Path

import nbformat
from execnb.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

cfg = get_config()
prefer = ["text/markdown", "text/html", "image/svg+xml", "image/png", "text/plain"]


def render(path):
    "The notebook at `path` as nbdev hands it to Quarto, in GitHub's markdown."
    nb = read_nb(path)
    # doclinks depend on what is installed, so README has none
    NBProcessor(nb=nb, procs=[p for p in FilterDefaults().procs() if p.__name__ != "add_links"]).process()
    nb = nbformat.reads(nb2str(nb), as_version=4)
    title = re.search(r"^title: (.*)$", nb.cells[0].source, re.M)[1].strip("'\"")
    nb.cells[0] = nbformat.v4.new_markdown_cell(f"# {title}\n")
    for cell in nb.cells:
        if "#| echo: false" in cell.source: cell.metadata.transient = {"remove_source": True}
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    nb.metadata.language_info = {"name": "python"}
    text, resources = MarkdownExporter(display_data_priority=prefer).from_notebook_node(nb)
    if resources["outputs"]: sys.exit("index.ipynb: keep pictures in files, not in outputs")
    text = re.sub(r"^```(\w)", r"``` \1", text, flags=re.M)
    text = re.sub(r"\]\((?!\w+:|#|/)", f"]({cfg.nbs_path.name}/", text)  # README lies one folder above the notebooks
    return re.sub(r"[ \t]+$", "", re.sub(r"\n{3,}", "\n\n", text), flags=re.M).strip() + "\n"


readme, new = cfg.config_path / "README.md", render(cfg.nbs_path / cfg.readme_nb)
if "--check" not in sys.argv: readme.write_text(new, encoding="utf-8")
elif readme.read_text(encoding="utf-8") != new: sys.exit("README.md is not what index.ipynb gives: run .ci/readme.py")
