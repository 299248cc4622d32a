"""A hook of mkdocs: pages may link to files of the repository outside docs/, as they do where they are read as plain Markdown.

Such a file goes into the site at its path in the repository, and so does what a Markdown file among them links to. A link to a
folder becomes plain text, as a site has no page for it. A link to nothing is left as it is, and `mkdocs build --strict` refuses it.

And an underscore is one, not the beginning of emphasis: formulas in docstrings have indices.
"""

import os
import posixpath
import re
from pathlib import Path

from markdown.extensions import Extension
from mkdocs.structure.files import File, InclusionLevel

LINK = re.compile(r"\[([^\]]*)\]\(([^()#\s:]+)((?:#[^()\s]*)?)\)")  # [text](target#anchor), of a target without a scheme


class Indices(Extension):
    """β̃_t = β_t stays as it is."""

    def extendMarkdown(self, md):
        md.delimiters.remove("_")


def on_config(config):
    config.markdown_extensions.append(Indices())


def folders(config):
    """The repository's and the pages'."""
    return Path(config.config_file_path).absolute().parent, Path(config.docs_dir).absolute()


def on_files(files, config):
    """Adds what pages link to."""
    root, docs = folders(config)
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while pages:
        page = pages.pop()
        for _, target, _ in LINK.findall(page.read_text()):
            file = Path(os.path.normpath(page.parent / target))
            if docs in file.parents or root not in file.parents or not file.is_file():
                continue
            place = file.relative_to(root).as_posix()
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(file), inclusion=InclusionLevel.NOT_IN_NAV))
                pages += [file] if file.suffix == ".md" else []
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes a link to such a file one to its place in the site."""
    root, docs = folders(config)
    here = Path(page.file.abs_src_path).parent
    a_page_of_docs = docs == here or docs in here.parents

    def in_site(found):
        text, target, anchor = found.groups()
        file = Path(os.path.normpath(here / target))
        if root not in file.parents or (a_page_of_docs and docs in file.parents):
            return found[0]
        if file.is_dir():
            return text
        place = file.relative_to(docs if docs in file.parents else root).as_posix()
        return f"[{text}]({posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(in_site, markdown)
