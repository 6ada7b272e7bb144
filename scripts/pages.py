"""What MkDocs does to pages beyond its own: links that leave docs/ become the names of files of the repository."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_OUTSIDE = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>(?:\.\./)+[^)#\s]*)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite such links: the site has no page for what is outside."""
    folder = Path(page.file.abs_src_path or "").parent
    root = Path(config.docs_dir).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link["path"]).resolve()
        if not target.exists() or not target.is_relative_to(root):
            raise PluginError(f"{page.file.src_path} links to {link['path']}, which is not in the repository")
        path = target.relative_to(root).as_posix() + ("/" if target.is_dir() else "")
        return f"`{path}`" if link["text"] == path else f"{link['text']} (`{path}` in the repository)"

    return _OUTSIDE.sub(named, markdown)
