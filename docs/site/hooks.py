"""Add to the site, besides docs/*.md, generated references and copies of the files that a page links to.

mkdocs calls these functions (`hooks` in mkdocs.yml). Nothing generated is committed, so nothing can be stale.
"""

import re
from pathlib import Path
from typing import Final

import api_reference
import cli_reference
import keys_reference
import library_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parents[2]
GENERATED: Final = {
    "reference/pjw.md": cli_reference.pjw,
    "reference/pjwd.md": cli_reference.pjwd,
    "reference/topics.md": cli_reference.topics,
    "reference/keys.md": keys_reference.keys,
    "reference/api.md": api_reference.api,
    "reference/library.md": library_reference.library,
}
# pages of the repository that are pages of the site as well
PAGES: Final = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK: Final = re.compile(r"(?<=\]\()\.\./(?P<path>[^)#]+)")

FOREIGN: Final = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/."""
    pages = files.documentation_pages()
    linked = {link["path"] for page in pages for link in LINK.finditer(page.content_string)}
    for source in sorted(linked - PAGES.keys()):
        # what is not there stays a broken link, which fails the build
        if (ROOT / source).is_file():
            files.append(File.generated(config, _name(source), abs_src_path=str(ROOT / source)))
    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    for source, name in PAGES.items():
        # there, the pages of docs/ are in docs/
        content = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have the links of docs/*.md to the rest of the repository lead to the copies."""
    if page.file.generated_by is not None:
        return markdown
    return LINK.sub(lambda link: _name(link["path"]), markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse what a browser would load from another host: the site is for machines without a network too."""
    if found := FOREIGN.search(output):
        raise PluginError(f"cannot build {page.file.src_uri}: it loads {found[0]}")
    return output


def _name(source: str) -> str:
    return PAGES.get(source, f"source/{source}")
