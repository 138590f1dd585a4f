from __future__ import annotations

import pytest

from everos_engine.errors import BadFile
from everos_engine.text import markdown


def test_the_place_of_a_bad_byte_is_right_behind_a_byte_order_mark() -> None:
    with pytest.raises(BadFile) as refused:
        markdown.decode(b"\xef\xbb\xbfone\ntwo \xfe")
    assert str(refused.value).startswith("line 2, column 5: byte 0xfe")
