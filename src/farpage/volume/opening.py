"""Opens a volume over its paths under its owner's epoch, and learns from a refusal who has it."""

from __future__ import annotations

from collections.abc import Callable

from farpage.errors import FarpageError
from farpage.volume.errors import ClientFenced
from farpage.volume.link import PathLink
from farpage.volume.ownership import Ownership
from farpage.volume.refusal import RefusalKind, refusal_of


class Opening:
    """How one volume is opened on one device."""

    def __init__(
        self,
        volume: str,
        size_bytes: int,
        ownership: Ownership,
        timeout_seconds: float,
        *,
        lost: Callable[[PathLink, Exception], None],
        fenced: Callable[[PathLink], None],
    ) -> None:
        """`lost` is told of an open path that is lost, `fenced` of one whose server knows another owner."""
        self.epoch = ownership.epoch
        """What the volume is opened with; the ownership's may be higher, by another replica's takeover."""
        self._volume = volume
        self._size_bytes = size_bytes
        self._ownership = ownership
        self._timeout = timeout_seconds
        self._lost = lost
        self._fenced = fenced

    def raise_above(self, written_epoch: int) -> None:
        """Open under an epoch above any that was written under, so that whoever wrote is fenced by it."""
        self.epoch = self._ownership.raise_above(written_epoch)

    async def open(self, path: PathLink) -> None:
        """Open the volume over a path under the present epoch.

        :raise FarpageError: when the server cannot be reached, or refuses.
        :raise OSError: when it gives no lease.
        """
        await self._once(path)
        while path.epoch < self.epoch:
            # Another path took over meanwhile. Only under its epoch does this server fence what it held.
            path.disconnect()
            await self._once(path)

    async def _once(self, path: PathLink) -> None:
        try:
            await path.open(self._volume, self._size_bytes, self.epoch, self._timeout, self._lost)
        except FarpageError as error:
            self._refused(path, error)
            raise
        if self._ownership.fenced:
            path.disconnect()
            raise ClientFenced(self._volume, self._ownership.fenced)

    def _refused(self, path: PathLink, error: FarpageError) -> None:
        refusal = refusal_of(error)
        if refusal is None:
            return
        if refusal.kind is RefusalKind.STALE_EPOCH:
            self._ownership.learn(refusal.epoch)
            self.epoch = max(self.epoch, refusal.epoch)
        elif not self._ownership.fenced:
            self._ownership.fence(f"another owner has the volume at epoch {refusal.epoch}")
            self._fenced(path)

    async def probe(self, path: PathLink) -> None:
        """Read the volume's first bytes over a path.

        :raise OSError: when the server answers with an error or the connection is lost.
        :raise TimeoutError: when no answer comes in time.
        """
        await path.probe(self._size_bytes, self._timeout)
