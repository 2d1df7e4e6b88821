from __future__ import annotations

from hypothesis import HealthCheck, settings

# How long an example takes, or its drawing, says something about the machine's load here, not about the code.
# The examples are the same in each run; `--hypothesis-profile search` looks for others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("farpage", settings.get_profile("search"), derandomize=True)
settings.load_profile("farpage")
