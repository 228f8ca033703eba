"""What mkdocs is told about this repository: pages that are made, and links between them.

docs/*.md are written to be read in the repository. On the site

- a link to a file outside docs/ leads to a page of it, made here (tables of results, scripts);
- `ds.sample` in text leads to its entry of the API pages, and a heading there has that name;
- an arXiv number leads to the paper;
- notebooks are pages: the executed ones of build/notebooks (`make notebooks`), else as they are;
- the gallery has every picture of the pages, each with a link to its page.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests read the pages without the site's builder
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = "docs"
API = "api"
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")  # pages of their own
EXECUTED = "build/notebooks"  # by `make notebooks`

_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"(?<![`\[])`ds\.([A-Za-z_][\w.]*)((?:\([^`]*\))?)`(?!`|\])")
_PAPER = re.compile(
    r"(?<![\w/\[`.:-])(?:arXiv:)?((?:0[7-9]|1\d|2\d)(?:0[1-9]|1[0-2])\.\d{4,5})(?![\w\]`])"
)
_PICTURE = re.compile(r"!\[([^\]]*)\]\((plots/[\w-]+\.png)\)")
_ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)


# -- where a file of the repository is on the site


def site_path(name: str) -> str:
    """The site's source path of a file of the repository, "docs/ddim.md" -> "ddim.md"."""
    if name.startswith(DOCS + "/"):
        return name.removeprefix(DOCS + "/")
    return name if name.endswith(".md") else name + ".md"


def repository_path(source: str) -> str:
    """The reverse, for a page whose links are to be read."""
    return f"{DOCS}/{source}" if (ROOT / DOCS / source).exists() else source


def links(text: str, name: str) -> Iterator[tuple[str, str]]:
    """(link as written, file of the repository) of the relative links of a page."""
    for match in _LINK.finditer(text):
        target = match[1].split("#")[0]
        if target and "://" not in target and not target.startswith("mailto:"):
            yield match[1], posixpath.normpath(posixpath.join(posixpath.dirname(name), target))


def outside(pages: list[str]) -> list[str]:
    """Files outside docs/ that pages link to, directly or through each other."""
    found: dict[str, None] = {}
    queue = list(pages)
    while queue:
        name = queue.pop()
        if name.endswith(".md"):
            for _, target in links((ROOT / name).read_text(encoding="utf-8"), name):
                inside = target.startswith((DOCS + "/", "../")) or target in found
                if not inside and (ROOT / target).is_file():
                    found[target] = None
                    queue.append(target)
    return list(found)


def with_links(text: str, source: str) -> str:
    """A page with its links as they are on the site."""
    name = repository_path(source)
    here = posixpath.dirname(source)
    for written, target in dict(links(text, name)).items():
        anchor = written[len(written.split("#")[0]) :]
        if not (ROOT / target).is_file():
            continue  # a folder, or made for the site
        own = target.startswith(DOCS + "/") and not target.endswith(".md")
        there = target.removeprefix(DOCS + "/") if own else site_path(target)
        text = text.replace(f"]({written})", f"]({posixpath.relpath(there, here or '.')}{anchor})")
    return text


# -- the API pages


def entries() -> dict[str, str]:
    """{"sample": "api/ds.md#diffsamp.sampling.sample"}: what `ds.` names on the API pages."""
    found = {}
    for page in sorted((ROOT / DOCS / API).glob("*.md")):
        text = page.read_text(encoding="utf-8")
        prefix = heading(text)
        if prefix:
            found[prefix.removeprefix("ds").removeprefix(".")] = f"{API}/{page.name}"
            for path in _ENTRY.findall(text):
                name = f"{prefix}.{path.rpartition('.')[2]}".removeprefix("ds.")
                found[name] = f"{API}/{page.name}#{path}"
    found.pop("", None)
    return found


def heading(text: str) -> str:
    """What names of an API page begin with: "ds.search", or "" where it is no one module."""
    match = re.match(r"# `(ds[\w.]*)`$", text, re.MULTILINE)
    return match[1] if match else ""


def with_headings(text: str) -> str:
    """An API page whose entries are called as users call them."""
    prefix = heading(text) or "diffsamp"

    def option(match: re.Match[str]) -> str:
        path = match[1]
        shown = path if prefix == "diffsamp" else f"{prefix}.{path.rpartition('.')[2]}"
        return f'{match[0]}\n    options:\n      heading: "{shown}"'

    return _ENTRY.sub(option, text)


def prose(text: str, change: Callable[[str], str]) -> str:
    """`change` of everything but fenced code."""
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def with_references(text: str, source: str, known: dict[str, str]) -> str:
    """Code such as `ds.sample(..)` in text leads to the API."""
    here = posixpath.dirname(source) or "."

    def entry(match: re.Match[str]) -> str:
        if match[1] not in known:
            return match[0]
        return f"[{match[0]}]({posixpath.relpath(known[match[1]], here)})"

    # headings stay plain: a link there would be a link in the table of contents
    lines = re.compile(r"^(?!#).*$", re.MULTILINE)
    return prose(text, lambda part: lines.sub(lambda line: _CODE.sub(entry, line[0]), part))


def with_papers(html: str) -> str:
    """HTML whose arXiv numbers lead to the papers, but in code and in links."""
    parts, inside = [], 0
    for part in re.split(r"(<[^>]*>)", html):
        tag = re.match(r"<(/?)(a|code|pre)\b", part)
        inside += 0 if tag is None else -1 if tag[1] else 1
        if not inside and not part.startswith("<"):
            part = _PAPER.sub(r'<a href="https://arxiv.org/abs/\1">\g<0></a>', part)
        parts.append(part)
    return "".join(parts)


# -- pages that are made


def listing(name: str) -> str:
    """A page with the text of a file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    kind = {"py": "python", "toml": "toml", "json": "json"}.get(name.rpartition(".")[2], "text")
    fence = "`" * (3 + max((len(m) for m in re.findall(r"`{3,}", text)), default=0))
    top = "---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n"
    return f"{top}\n# {PurePosixPath(name).name}\n\n`{name}`\n\n{fence}{kind}\n{text}{fence}\n"


def notebook(name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by the path they have on the site."""
    executed = ROOT / EXECUTED / PurePosixPath(name).name
    path = executed if executed.exists() else ROOT / name
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    stem = PurePosixPath(name).stem
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(f"```python\n{source}\n```")
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                words = output.get("text", data.get("text/plain", ""))
                if "image/png" in data:
                    picture = f"notebooks/{stem}-{len(pictures)}.png"
                    pictures[picture] = base64.b64decode("".join(data["image/png"]))
                    parts.append(f"![A picture of this notebook]({posixpath.basename(picture)})")
                elif output.get("name") != "stderr" and "".join(words).strip():
                    parts.append(f"```text {{ .output }}\n{''.join(words).rstrip()}\n```")
    run = f"`{name}`, as it runs from top to bottom."
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n{run}\n{rest}\n", pictures


def gallery() -> str:
    """Every picture of the pages."""
    lines = ["---", "hide:", "  - toc", "---", "", "# Gallery", ""]
    lines += ["Every picture of these pages. Each leads to the page that says what it shows.", ""]
    lines += ['<div class="grid cards gallery" markdown>', ""]
    seen = set()
    for page in sorted((ROOT / DOCS).glob("*.md")):
        text = page.read_text(encoding="utf-8")
        title = re.search(r"^# (.*)$", text, re.MULTILINE)
        for words, picture in _PICTURE.findall(text):
            if picture not in seen and page.name != "README.md":
                seen.add(picture)
                name = title[1] if title else page.stem
                lines += [f"-   [![{words}]({picture})]({page.name})", ""]
                lines += [f"    [{name}]({page.name}): {words}", ""]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        source = site_path(f"notebooks/{path.name}")
        text, pictures = notebook(f"notebooks/{path.name}")
        for picture in pictures:
            name = text.splitlines()[0].lstrip("# ")
            lines += [f"-   [![]({picture})]({source})", "", f"    [{name}]({source})", ""]
    return "\n".join([*lines, "</div>", ""])


# -- what mkdocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the notebooks in the navigation."""
    names = [f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for section in config["nav"]:
        if "Notebooks" in section:
            section["Notebooks"] = [site_path(name) for name in names]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made."""
    from mkdocs.structure.files import File

    def add(source: str, content: str | bytes) -> None:
        files.append(File.generated(config, source, content=content))

    pages = [f"{DOCS}/{f.src_uri}" for f in files if f.src_uri.endswith(".md")]
    for name in sorted({*PROJECT, *outside([*pages, *PROJECT])}):
        if name.endswith(".md"):
            add(site_path(name), (ROOT / name).read_text(encoding="utf-8"))
        elif name.endswith(".ipynb"):
            continue  # all of them are pages
        else:
            add(site_path(name), listing(name))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = notebook(f"notebooks/{path.name}")
        add(site_path(f"notebooks/{path.name}"), text)
        for source, content in pictures.items():
            add(source, content)
    add("gallery.md", gallery())
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes a page for the site."""
    source = page.file.src_uri
    if source.startswith(("benchmarks/", "CHANGELOG")):
        page.meta.setdefault("search", {"boost": 0.3})  # after what explains and documents
    markdown = re.sub(r"^```(\w+) [\w-]+$", r"```\1", markdown, flags=re.MULTILINE)
    if source.startswith(f"{API}/"):
        markdown = with_headings(markdown)
    if source != "gallery.md":
        markdown = with_links(markdown, source)
    return with_references(markdown, source, entries())


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links the papers."""
    return html if page.file.src_uri.startswith("benchmarks/") else with_papers(html)
