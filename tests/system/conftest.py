"""What tests of the system share."""

import pytest


@pytest.fixture(scope="module")
def shared_programs():
    """Runs of the same settings on the same devices take one compiled step, as they would from the cache on disk."""
    # Here, as absl's log keeps the stderr of its first import, which is not to be the one that pytest starts with.
    from tests.system.shared_steps import shared

    with shared():
        yield
