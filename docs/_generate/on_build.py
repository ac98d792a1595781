"""What mkdocs runs while it builds: generated pages, and docstrings' roles as plain code.

Listed under ``hooks:`` in mkdocs.yml, which also makes the modules beside this file importable.
"""

from __future__ import annotations

import re
from functools import cache

import cli_reference
import hook_reference
import surface_reference

_ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>~?([^<]*)</code>")


@cache
def _generated(what: str) -> str:
    makers = {
        "hooks": hook_reference.markdown,
        "cli": cli_reference.markdown,
        "surface": surface_reference.markdown,
    }
    return makers[what]()


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put generated text where a page asks for it: ``<!-- generated: hooks -->``."""
    return re.sub(r"<!-- generated: (\w+) -->", lambda match: _generated(match[1]), markdown)


def on_page_content(html: str, **_: object) -> str:
    """Sphinx roles and the ``::`` before an example, which Markdown does not know, plain."""
    return _ROLE.sub(r"<code>\1</code>", html).replace("::</p>", ":</p>")
