"""The call that is refused, for each name that verdicts.toml calls refused.

Each is called with an object of the name's area: a model, its cache or its config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

REFUSED: dict[str, Callable[[Any], Any]] = {}
