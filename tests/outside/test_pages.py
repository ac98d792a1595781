"""The pages about outside code run with that code."""

from __future__ import annotations

import pytest
from pages import DOCS, run_page

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("as_it_was")]

PAGES = sorted(f"howto/outside/{page.name}" for page in DOCS.glob("howto/outside/*.md"))


@pytest.mark.filterwarnings("default")  # of other people's libraries
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_page(page, capsys)
