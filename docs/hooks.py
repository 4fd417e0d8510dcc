"""MkDocs hooks: the measurements' own pages are pages of this site, and links are those of the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_ALSO = (
    "benchmarks/README.md",
    "benchmarks/results/**/README.md",
    "benchmarks/results/**/*.png",
    "benchmarks/results/*.json",
    "model_cards/**/README.md",
    "model_cards/**/*.png",
    "SECURITY.md",
)
_LINK = re.compile(r"(?<=\]\()(?P<path>(?![a-z]+:|/|#)[^\s)#]+)(?P<anchor>#[^\s)]*)?(?=[\s)])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in what :data:`_ALSO` names, under its path in the repository."""
    for path in sorted({path for pattern in _ALSO for path in ROOT.glob(pattern)}):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between files of the repository at where these are on the site."""
    here = page.file.src_uri
    in_repository = here if (ROOT / here).is_file() else f"docs/{here}"

    def on_site(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), found["path"]))
        if (ROOT / target / "README.md").is_file():
            target += "/README.md"
        target = "index.md" if target == "README.md" else target.removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            return found[0]  # which MkDocs warns of
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (found["anchor"] or "")

    return _LINK.sub(on_site, markdown)
