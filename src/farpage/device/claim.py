"""Who may write to a volume: claims, and the rule by which one replaces another. No I/O.

All who serve a volume keep the same claims in the same order, so they all come to the same owner.
"""

from __future__ import annotations

from typing import Final, NamedTuple

_ORDERED_MAX: Final = (1 << 32) - 1
"""Claims at higher epochs are not told apart by their tokens, but by what was claimed on the device."""


class Claim(NamedTuple):
    """An epoch, and the token of the owner who has it; an empty one for an owner who has given none."""

    epoch: int = 0
    owner: str = ""


def new_owner(epoch: int, salt: str) -> str:
    """Return the token of the owner who claims a volume at `epoch`; `salt` is 8 random hexadecimal digits."""
    return f"{min(epoch, _ORDERED_MAX):08x}{salt}"


def _claimed_before(owner: str, other: str) -> bool:
    """Tell whether `owner` is known to have claimed the volume before `other`, going by their tokens.

    Owners are made one after the other, by compare-and-swap of the definition, each at a higher epoch.
    """
    first, second = (int(token[:8], 16) if token else 0 for token in (owner, other))
    return 0 < first < second


class Claims:
    """The claims of a volume, oldest first: the present one, and the owners that others have replaced."""

    def __init__(self) -> None:
        self.current = Claim()
        self._replaced: set[str] = set()

    def refuses(self, claim: Claim) -> bool:
        """Tell whether `claim` may not write.

        That is so for an older epoch, for the present epoch under another owner, and for an owner who was
        replaced, whatever epoch it has come to: it can only be somebody who has not heard of it. An owner
        from before the present one was replaced even if it never had this volume, on this device.
        """
        if claim.epoch <= self.current.epoch:
            return claim != self.current
        return claim.owner in self._replaced or _claimed_before(claim.owner, self.current.owner)

    def of_another(self, claim: Claim) -> bool:
        """Tell whether somebody else has the volume, and not `claim`'s own owner under a newer epoch."""
        return claim.owner != self.current.owner

    def add(self, claim: Claim) -> bool:
        """Take a claim unless it is refused; returns whether it is the present one now."""
        if self.refuses(claim):
            return False
        if self.current.owner and self.current.owner != claim.owner:
            self._replaced.add(self.current.owner)
        self.current = claim
        return True
