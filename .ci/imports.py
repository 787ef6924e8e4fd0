"Modules import only those that come before them in the order of the notebooks; other packages only what users have."
import ast, re, sys
from pathlib import Path

top = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
below_all, anywhere = ["safe", "runs"], {"__init__", "_modidx"}
faults = []


def notebook_order():
    "The modules in the order of their notebooks' numbers."
    names = []
    for file in sorted((top/"nbs").glob("*.ipynb")):
        names += re.findall(r"#\| *default_exp +(\w+)", file.read_text(encoding="utf-8"))
    return below_all + [n for n in names if n not in below_all]


def imported(node):
    "The dotted names of what an import statement needs, ours as `bild_nb.module`."
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    if not node.level and node.module != "bild_nb": return [node.module]
    if node.module and node.level: return [f"bild_nb.{node.module}"]
    return [f"bild_nb.{a.name}" for a in node.names]  # from . import trace


def names_of(file):
    "What a module has at its top."
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)): found |= {(a.asname or a.name).split(".")[0] for a in node.names}
        else: found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def check(file, position):
    "Every import of one module, also those inside functions."
    name = file.stem
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        for full in imported(node):
            package, _, rest = full.partition(".")
            where, module = f"{file}, line {node.lineno}: {name} imports {full}", rest.split(".")[0]
            if name == "reference": pass  # it works inside nbdev
            elif package in ("nbdev", "execnb") or package == "fastcore" and full not in ("fastcore.basics", "fastcore.meta"):
                faults.append(f"{where}, which is for notebooks only")
            if package != "bild_nb" or module in ("__version__", "_modidx"): continue
            if module not in position: faults.append(f"{where}: name the module that has it")
            elif position[module] > position[name]: faults.append(f"{where}, which comes later")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").removeprefix("bild_nb.") == module:
                lost = {a.name for a in node.names} - {"*"} - names_of(top/"bild_nb"/f"{module}.py")
                if lost: faults.append(f"{where}, which has no {', '.join(sorted(lost))}")


order = notebook_order()
position = {name: i for i, name in enumerate(order)}
for file in sorted((top/"bild_nb").glob("*.py")):
    if file.stem in position: check(file, position)
    elif file.stem not in anywhere: faults.append(f"{file}: no notebook exports it")
print("\n".join(faults) or f"{len(order)} modules: {' < '.join(order)}")
sys.exit(bool(faults))
