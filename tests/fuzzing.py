"""How many mutated files a fuzz test reads: FMCLIP_FUZZ=20 reads twenty times as many, other ones each time."""

import os

from hypothesis import HealthCheck, settings

_TIMES = int(os.environ.get("FMCLIP_FUZZ", "1"))


def fuzz(examples: int) -> settings:
    """Settings for so many files; with FMCLIP_FUZZ, for that many times as many."""
    return settings(
        max_examples=_TIMES * examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
