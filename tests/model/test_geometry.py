from __future__ import annotations

import pytest

from tl_looped import LayerIndexError, LoopGeometry

LOOP = LoopGeometry(p=2, k=3, c=1, R=4)


def test_effective_layers_are_counted_in_the_order_of_the_run() -> None:
    assert LOOP.n_layers == 2 + 3 * 4 + 1
    assert LOOP.labels()[:6] == ["prelude.0", "prelude.1", "r0.l0", "r0.l1", "r0.l2", "r1.l0"]
    assert LOOP.labels()[-2:] == ["r3.l2", "coda.0"]


def test_index_and_locate_are_inverse() -> None:
    for r in range(4):
        for layer in range(3):
            assert LOOP.locate(LOOP.index(r, layer)) == ("core", r, layer)
    assert LOOP.locate(1) == ("prelude", None, 1)
    assert LOOP.locate(14) == ("coda", None, 0)
    assert LOOP.prelude_index(1) == 1
    assert LOOP.coda_index(0) == 14


def test_negative_numbers_count_from_the_end() -> None:
    assert LOOP.index(-1, -1) == LOOP.index(3, 2) == 13
    assert LOOP.locate(-1) == LOOP.locate(14)
    assert LOOP.resolve(-15) == 0


@pytest.mark.parametrize(
    ("call", "valid"),
    [
        (lambda: LOOP.index(4, 0), "recurrence 4 .* 0..3"),
        (lambda: LOOP.index(-5, 0), "recurrence -5 .* 0..3"),
        (lambda: LOOP.index(0, 3), "core layer 3 .* 0..2"),
        (lambda: LOOP.locate(15), "effective layer 15 .* 0..14"),
        (lambda: LOOP.coda_index(1), "coda layer 1 .* 0..0"),
        (lambda: LoopGeometry(0, 3, 0, 4).prelude_index(0), "prelude layer 0 .* none"),
    ],
)
def test_out_of_range_names_the_value_and_the_valid_range(call, valid: str) -> None:
    with pytest.raises(LayerIndexError, match=valid):
        call()
    with pytest.raises(IndexError):
        call()
