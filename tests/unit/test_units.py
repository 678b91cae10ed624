"""Amounts as people read them."""

import pytest

from gigamil.units import format_bytes


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (7, "7 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (1500, "1.5 kB"),
        (999_400, "999 kB"),
        (999_900, "1 MB"),  # not 1e+03 kB
        (2.5e9, "2.5 GB"),
        (1.2e13, "12 TB"),
        (4e15, "4,000 TB"),
    ],
)
def test_bytes_are_written_in_the_unit_that_suits_them(number: float, text: str) -> None:
    assert format_bytes(number) == text
