"""A malformed answer is refused, and the server is as it was; `python -m bench.core` tries twenty thousand of them."""

from __future__ import annotations

import pytest

from tests.support.malformed import malformed
from tests.support.storms import one_in


@pytest.mark.parametrize("seed", one_in(2, (0, 1)))
def test_a_malformed_answer_changes_nothing(seed: int) -> None:
    """Each kind of damage, in each codec; afterwards every outstanding task still takes its good answer."""
    figures = malformed(900, seed).figures()
    assert figures == {"malformed_tried": 900, "malformed_accepted": 0, "malformed_raised": 0, "state_changed": 0}
