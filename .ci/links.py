"Links of the pages in FOLDER, which .ci/pages.py made, and of the Markdown files beside them resolve."
import json, re, sys
from pathlib import Path
from urllib.parse import unquote

CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|<(?:a|img)\b[^>]*?\b(?:href|src)=[\"']([^\"']+)|^\[[^\]\n]+\]:\s*(\S+)", re.M)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.M)
SITE = "https://bild-nb.github.io/bild_nb/"
GIVEN = re.compile(r"\{[^}\n]*#([\w.-]+)[^}\n]*\}|\bid=[\"']([^\"']+)")


def texts(file):
    "Everything in a page that is read as Markdown or HTML."
    if file.suffix == ".md": return [file.read_text(encoding="utf-8")]
    found = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown": found.append("".join(cell.get("source", "")))
        for out in cell.get("outputs", []):
            found += ["".join(out.get("data", {}).get(kind, "")) for kind in ("text/markdown", "text/html")]
    return [t for t in found if t]


def anchors(file):
    "The ids that one can link to: those given, and those that Quarto makes of headings."
    seen, names = {}, set()
    for text in texts(file):
        names |= {a or b for a, b in GIVEN.findall(text)}
        for heading in HEADING.findall(re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)):
            plain = re.sub(r"\{[^}]*\}\s*$", "", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)).lower()
            name = re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain).strip())) or "section"
            seen[name] = seen.get(name, -1) + 1
            names.add(f"{name}-{seen[name]}" if seen[name] else name)
    return names


def site_fault(link):
    "What is wrong with a link that nbdev makes of a name in backticks, or None."
    page, _, anchor = link.partition(".html#")
    if page not in names: return "no such page"
    if anchor not in names[page]: return "no such name on that page"


def fault(file, link):
    "What is wrong with a link of `file`, or None."
    if link.startswith(SITE): return site_fault(link.removeprefix(SITE))
    if re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.I): return None
    path, _, anchor = unquote(link).partition("#")
    target = file.parent/path if path else file
    if path.startswith("/"): return "a path from the root, which the site does not have"
    if not target.exists(): return "link the .ipynb: pages lose their number" if path.endswith(".html") else "no such file"
    if anchor and target.suffix in (".ipynb", ".md") and anchor not in anchors(target): return "no such heading"


folder = Path(sys.argv[1])
pages = sorted((folder/"_proc").rglob("*.ipynb"))
files = pages + [f for f in sorted(folder.rglob("*.md")) if "_proc" not in f.relative_to(folder).parts]
names = {re.sub(r"(^|/)\d+[a-z]*_", r"\1", str(p.relative_to(folder/"_proc").with_suffix(""))): anchors(p) for p in pages}
count, found = 0, []
for file in files:
    for link in ("".join(groups) for text in texts(file) for groups in LINK.findall(CODE.sub("", text))):
        count += 1
        if why := fault(file, link): found.append(f"{file.relative_to(folder)}: {link}: {why}")
print("\n".join(found) or f"{count} links in {len(pages)} pages and {len(files) - len(pages)} Markdown files")
sys.exit(bool(found) or not pages)
