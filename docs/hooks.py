"""What mkdocs does not do by itself: pages from elsewhere in the repository, and a navigation that is never stale."""

import posixpath
import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# a file of the repository -> the page that it is
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "extend.md",
    "training/README.md": "runs.md",
    "benchmarks/README.md": "benchmarks.md",
}
SOURCES = {page: source for source, page in PAGES.items()}


@event_priority(50)  # before mkdocstrings reads where the package is
def on_config(config):
    """The navigation without pages that are not there, and with those that it does not name; the package to read."""
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} | SOURCES.keys()
    config.extra["coming"] = sorted(set(named(config.nav)) - there)
    config.nav = pruned(config.nav, there)
    more = sorted(there - set(named(config.nav)))
    config.nav += [{"More": more}] if more else []
    # as it is installed: the pipelines below the package, where a checkout has them beside it
    site = Path(tempfile.mkdtemp())
    skip = shutil.ignore_patterns("__pycache__", "checkpoints", "samples")
    shutil.copytree(ROOT / "cxr_diffusers", site / "cxr_diffusers", ignore=skip)
    shutil.copytree(ROOT / "pipelines", site / "cxr_diffusers" / "pipelines", ignore=skip)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(site)]
    config.extra["package"] = str(site)
    return config


def on_post_build(config):
    shutil.rmtree(config.extra["package"], ignore_errors=True)


def pruned(nav, there):
    """A navigation without the pages that are not `there`, nor sections that are empty then."""
    kept = []
    for item in nav:
        if isinstance(item, str):
            kept += [item] if item in there else []
            continue
        [(title, value)] = item.items()
        value = value if isinstance(value, str) else pruned(value, there)
        kept += [{title: value}] if value and (value in there if isinstance(value, str) else True) else []
    return kept


def named(nav):
    """Every page of a navigation."""
    for item in nav:
        value = item if isinstance(item, str) else next(iter(item.values()))
        yield from [value] if isinstance(value, str) else named(value)


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as on GitHub -> links of the site: to the page that a file is, or to the file in the repository."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def moved(match):
        target, hash_, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        found = address(target, source, here, config.extra)
        return f"{match[1]}({found}{hash_}{anchor})"

    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)  # code is left alone
    return "".join(re.sub(r"(\])\(([^()\s]+)\)", moved, part) if part[:1] != "`" else part for part in parts)


def address(target, source, here, extra):
    """Where the link `target` of the file `source` leads from the page `here`."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    page = PAGES.get(path, path.removeprefix("docs/"))
    if page != path and page not in extra["coming"]:
        return posixpath.relpath(page, posixpath.dirname(here) or ".")
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{extra['repository']}/{kind}/main/{path}"
