"""Links of a repository page as links of the site.

Pages are written for readers of the repository, with links to its files. On the site a link to a
technique's file leads to the technique's page, one to another page of the repository to its copy,
and one to any other file becomes plain text.
"""

import posixpath
import re
from collections.abc import Iterable, Mapping

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_IMAGE = re.compile(r'(<img[^>]* src=")([^"]+)(")')
_FENCE = re.compile(r"(^```.*?^```)", flags=re.M | re.S)


def rewritten(text: str, source: str, page: str, pages: Mapping[str, str]) -> str:
    """``text`` of the repository file ``source`` as the site's page ``page``.

    ``pages``: repository path -> page or file of the site. Code blocks are left alone.
    """

    def image(match: re.Match[str]) -> str:
        return match[1] + (address(match[2], source, page, pages) or match[2]) + match[3]

    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        place = address(target, source, page, pages)
        return words if place is None else f"{mark}[{words}]({place})"

    parts = _FENCE.split(text)
    parts[::2] = [_IMAGE.sub(image, _LINK.sub(link, part)) for part in parts[::2]]
    return "".join(parts)


def address(target: str, source: str, page: str, pages: Mapping[str, str]) -> str | None:
    """Where a link of ``source`` leads from ``page``; None where the site has no such page."""
    path, mark, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if path not in pages:
        return None
    return posixpath.relpath(pages[path], posixpath.dirname(page) or ".") + mark + anchor


def same_place(paths: Iterable[str]) -> dict[str, str]:
    """Files of ``docs/``, which keep their names on the site."""
    return {f"docs/{path}": path for path in paths}
