from __future__ import annotations

from hypothesis import settings

# How long an example takes says something about the machine's load here, not about the code.
settings.register_profile("farpage", deadline=None)
settings.load_profile("farpage")
