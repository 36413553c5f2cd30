"""For all tests: one profile of hypothesis, and the checker of annotations where the import hook looks for it."""

from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest
import tests.typechecker  # noqa: F401

# No deadline: machines are shared. Fixed seeds in CI would only find the same examples again.
hypothesis.settings.register_profile("logitcache", deadline=None, max_examples=60)
hypothesis.settings.load_profile("logitcache")


@pytest.fixture
def unchecked_annotations() -> Iterator[None]:
    """Without the run-time check of annotations: for tests of what our own code says to a wrong argument."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
