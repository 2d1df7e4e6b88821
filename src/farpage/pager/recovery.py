"""What becomes of the pages of a client whose pager was killed: the rules, by state and presence. No I/O.

The page table says the safer thing first (`farpage.pager.faults`, `farpage.pager.eviction`), so it is right
about each page, or half a step behind. Which of both is seen from whether the page is in memory:

| state | in memory | not in memory |
| --- | --- | --- |
| ZERO | was being filled: DIRTY | ZERO |
| CLEAN | CLEAN, and still protected | was being given back: ON_DEVICE |
| DIRTY | DIRTY | was all zeros and being given back, or the balloon took it: ZERO |
| WRITING, REWRITTEN | REWRITTEN | the balloon took it: REWRITTEN |
| READING | was just brought in, perhaps changed since: DIRTY | ON_DEVICE |
| ON_DEVICE | ON_DEVICE: what the volume has counts, so it is given back | ON_DEVICE |
| POISONED | POISONED | POISONED |

REWRITTEN means here what it always means: an older content of the page may still be on its way to the
volume, so the page must not be written again before that can no longer arrive. Whether the dead pager's
write has, nobody knows for a while (`farpage.volume.predecessors`).

The rules may be applied any number of times: a pager that is killed while it recovers is recovered so too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from farpage.pager.states import (
    CLEAN,
    DIRTY,
    ON_DEVICE,
    POISONED,
    READING,
    REWRITTEN,
    STATE_COUNT,
    WRITING,
    ZERO,
)

_WHEN_ABSENT: Final = {
    ZERO: ZERO,
    CLEAN: ON_DEVICE,
    DIRTY: ZERO,
    WRITING: REWRITTEN,
    REWRITTEN: REWRITTEN,
    READING: ON_DEVICE,
    ON_DEVICE: ON_DEVICE,
    POISONED: POISONED,
}
_WHEN_PRESENT: Final = {
    ZERO: DIRTY,
    CLEAN: CLEAN,
    DIRTY: DIRTY,
    WRITING: REWRITTEN,
    REWRITTEN: REWRITTEN,
    READING: DIRTY,
    ON_DEVICE: ON_DEVICE,
    POISONED: POISONED,
}
_RULES: Final = np.array(
    [[rules[state] for state in range(STATE_COUNT)] for rules in (_WHEN_ABSENT, _WHEN_PRESENT)], np.uint8
)

Pages = npt.NDArray[np.int64]
"""Page numbers, rising."""


@dataclass(frozen=True)
class Recovery:
    """The decision about every page."""

    states: npt.NDArray[np.uint8]
    """The new state of each page."""
    surplus: Pages
    """In memory although their content is on the volume: to be given back before anything is paged in."""
    in_memory: Pages
    """To be entered into the order of eviction."""
    doubtful: Pages
    """REWRITTEN until nothing of the dead pager can arrive any more, then DIRTY."""


def recover(states: npt.NDArray[np.uint8], present: npt.NDArray[np.bool_]) -> Recovery:
    """Decide about every page, from its state and from whether the memfd holds it; changes nothing."""
    decided = _RULES[present.astype(np.uint8), states]
    return Recovery(
        states=decided,
        surplus=np.flatnonzero((decided == ON_DEVICE) & present),
        in_memory=np.flatnonzero((decided == CLEAN) | (decided == DIRTY)),
        doubtful=np.flatnonzero(decided == REWRITTEN),
    )
