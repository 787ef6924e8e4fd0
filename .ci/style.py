"What nbdev's documentation step and its readers need: imports in their own cells, methods by @patch, no wide exported lines, no style of a whole page."
import ast, json, re, sys
from pathlib import Path

top = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
IMPORT, EXPORT = (ast.Import, ast.ImportFrom), re.compile(r"^#\|\s*export[si]?\b", re.M)
WIDE = 88  # columns; the site cuts wider lines


def parse(source):
    "The cell's statements; its magics and shell lines left out."
    return ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M)).body


def mixes_imports(source, body):
    "The documentation step runs every cell in which it sees an import, and with it all that stands there."
    alone = [isinstance(node, IMPORT) for node in body]
    inside = any(isinstance(node, IMPORT) for statement in body for node in ast.walk(statement))
    seen = any(alone) if EXPORT.search(source) else inside  # an exported cell runs anyway: its functions may import
    return seen and not all(alone)


def attaches_methods(body):
    "`Class.method = _method`, which help() and the documentation do not find."
    for node in body:
        if not isinstance(node, ast.Assign): continue
        targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
        values = getattr(node.value, "elts", [node.value])
        on_class = any(isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id[0].isupper() for t in targets)
        if on_class and any(isinstance(v, ast.Name) and v.id.startswith("_") for v in values): return True


def styles_page(cell):
    "A style of `body` or `:root` in an output: it would hold for the whole page of the site."
    shown = ["".join(out.get("data", {}).get("text/html", "")) for out in cell.get("outputs", [])]
    return any(re.search(r"<style[^>]*>[^<]*(:root|\bbody)\b[^<]*{", html) for html in shown)


def faults(file):
    "One line for each fault of a notebook."
    for n, cell in enumerate(json.loads(file.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "nbdev_export()" in source: continue
        where, body = f"{file}, cell {n}", parse(source)
        if mixes_imports(source, body): yield f"{where} mixes imports with other code"
        if attaches_methods(body): yield f"{where} attaches a method to a class: use @patch"
        if styles_page(cell): yield f"{where} shows a style that is for a whole page: show it in a frame"
        wide = [len(line) for line in source.split("\n") if len(line) > WIDE]
        if wide and EXPORT.search(source): yield f"{where} exports a line of {max(wide)} columns"


files = sorted(f for f in (top/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)
found = [fault for file in files for fault in faults(file)]
print("\n".join(found) or f"{len(files)} notebooks")
sys.exit(bool(found))
