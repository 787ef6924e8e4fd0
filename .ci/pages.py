"nbdev's documentation step without Quarto, on a copy of the tree in FOLDER: a page of every notebook, no error in a cell."
import json, os, re, shutil, subprocess, sys
from pathlib import Path


def copy_tree(folder):
    "What git has or would have, without what it ignores."
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, check=True, text=True).stdout
    for file in map(Path, filter(None, files.split("\0"))):
        if not file.exists() and not file.is_symlink(): continue  # deleted, not yet committed
        (folder/file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, folder/file, follow_symlinks=False)


def troubles(page):
    "Cells of a page that failed without stopping the step: nbdev prints such errors, and the page lacks what they should show."
    for n, cell in enumerate(json.loads(page.read_text(encoding="utf-8"))["cells"]):
        outputs, source = cell.get("outputs", []), "".join(cell.get("source", ""))
        shown = any("text/markdown" in out.get("data", {}) for out in outputs)
        failed = any(out["output_type"] == "error" for out in outputs)
        if failed or "show_doc(" in source and not shown: yield f"{page.name}, cell {n} has no documentation: {source}"


def main(folder):
    # the command nbdev_proc_nbs does nothing and exits with 0 where Quarto is missing, so its function is called
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    from nbdev.serve import proc_nbs
    if any(part.startswith(".") for part in folder.parts): sys.exit(f"{folder}: nbdev skips what lies below a folder with a dot")
    copy_tree(folder)
    os.chdir(folder)
    nbs = get_config().nbs_path
    names = [re.sub(r"^\d+[a-z]*_", "", Path(f).name) for f in nbglob(nbs)]
    if twice := {name for name in names if names.count(name) > 1}: sys.exit(f"one page of several notebooks, as numbers are dropped: {', '.join(twice)}")
    made = proc_nbs(n_workers=2)
    missing = [str(f) for f in nbglob(nbs) if not (made/Path(f).relative_to(nbs)).exists()]
    if missing: sys.exit(f"no page of {', '.join(missing)}")
    found = [text for page in sorted(made.rglob("*.ipynb")) for text in troubles(page)]
    if found: sys.exit("\n".join(found))
    print(f"{len(nbglob(nbs))} pages in {made}")


if __name__ == "__main__": main(Path(sys.argv[1]).resolve())
