"Write README.md from nbs/index.ipynb without Quarto, and llms.txt from the sidebar; with --check, fail where they differ."
import re, sys
from pathlib import Path

import nbformat, yaml
from execnb.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

cfg = get_config()
prefer = ["text/markdown", "text/html", "image/svg+xml", "image/png", "text/plain"]


def render(path):
    "The notebook at `path` as nbdev hands it to Quarto, in GitHub's markdown."
    nb = read_nb(path)
    # doclinks depend on what is installed, so README has none
    NBProcessor(nb=nb, procs=[p for p in FilterDefaults().procs() if p.__name__ != "Links"]).process()
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


def described(name):
    "The line of a page for programs that read: its title, its address, what it is about."
    first = nbformat.read(cfg.nbs_path / name, 4).cells[0].source
    title, about = (re.search(rf"^{mark} (.*)$", first, re.M)[1].strip() for mark in ("#", ">"))
    page = re.sub(r"(^|/)\d+[a-z]*_", r"\1", name).replace(".ipynb", ".html")  # nbdev drops numbers
    return f"- [{title}]({cfg.doc_host}{cfg.doc_baseurl}/{page}): {about}"


def llms():
    "llms.txt: every page, in the order of the sidebar, which must have each once."
    sections = yaml.safe_load((cfg.nbs_path / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [name for section in sections for name in section["contents"]]
    there = {str(Path(f).relative_to(cfg.nbs_path)) for f in nbglob(cfg.nbs_path)}
    if wrong := sorted(there ^ set(listed)) or len(listed) - len(set(listed)):
        sys.exit(f"nbs/sidebar.yml and the notebooks differ: {wrong}")
    parts = [f"# {cfg.title}\n\n> {cfg.description}\n"]
    parts += [f"## {s['section']}\n\n" + "\n".join(map(described, s["contents"])) + "\n" for s in sections]
    return "\n".join(parts)


made = {cfg.config_path / "README.md": render(cfg.nbs_path / cfg.readme_nb), cfg.nbs_path / "llms.txt": llms()}
for file, new in made.items():
    if "--check" not in sys.argv: file.write_text(new, encoding="utf-8")
    elif not file.exists() or file.read_text(encoding="utf-8") != new: sys.exit(f"{file.name} is not what the notebooks give: run .ci/readme.py")
