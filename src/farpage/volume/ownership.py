"""An owner's right to write to one client's volume, as its replicas and paths share it. No I/O.

Two things make it up: the epoch, which rises with every takeover and so keeps the owner's own older
commands out, and the token of the claim, which tells two owners apart who both come to the same epoch.
"""

from __future__ import annotations

from collections.abc import Callable


class Ownership:
    """One claim of a client's volume; every replica and path of the client shares the one object.

    `owner` is the claim's random token, empty for a tool that has made none. `epoch` is the highest
    that any of the replicas has been opened with, or is about to be.
    """

    def __init__(self, owner: str, epoch: int) -> None:
        self.owner = owner
        self.epoch = epoch
        self.fenced = ""
        """Why this owner may not write any more, for users; empty while it may."""
        self._on_fenced: list[Callable[[], None]] = []

    def raise_epoch(self) -> int:
        """Begin a new epoch and return it."""
        self.epoch += 1
        return self.epoch

    def raise_above(self, written_epoch: int) -> int:
        """Return an epoch above `written_epoch`; a new one only if there is none yet.

        An epoch that nobody has written under serves for the next try too. So an owner whom no server answers
        never comes, try after try, to an epoch above that of somebody who has claimed the volume meanwhile.
        """
        return self.epoch if self.epoch > written_epoch else self.raise_epoch()

    def learn(self, epoch: int) -> None:
        """Take note that a server has this owner at `epoch`."""
        self.epoch = max(self.epoch, epoch)

    def fence(self, reason: str) -> None:
        """Give up for good: another owner has the volume. Only the first reason counts."""
        if self.fenced:
            return
        self.fenced = reason
        for callback in tuple(self._on_fenced):
            callback()

    def when_fenced(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back once, when `fence` is called; returns what takes that back."""
        self._on_fenced.append(callback)

        def forget() -> None:
            if callback in self._on_fenced:
                self._on_fenced.remove(callback)

        return forget

    def export_name(
        self, volume: str, epoch: int, lease: str = "", device: str = "", source: str = ""
    ) -> str:
        """Return the name that this owner asks a VIOS for: `VOLUME[/DEVICE[<SOURCE]]@EPOCH[:OWNER[:LEASE]]`.

        `device` is the identifier of the replica's device: the VIOS may reach several replicas. `source`
        is that of the device from which the VIOS gets what is not on `device` yet.
        """
        place = f"{device}<{source}" if source else device
        name = f"{volume}/{place}@{epoch}" if place else f"{volume}@{epoch}"
        if self.owner:
            name += f":{self.owner}"
            if lease:
                name += f":{lease}"
        return name
