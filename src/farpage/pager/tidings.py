"""What a client's volume tells, passed on to the control process, and the epoch that outlives the worker."""

from __future__ import annotations

from farpage.log import get_logger
from farpage.pager.control import ControlLink
from farpage.pager.messages import (
    AlarmRaised,
    EpochRaised,
    Nothing,
    RecordReplicas,
    ViosDoubted,
)
from farpage.pager.statefile import StateFile
from farpage.volume.ownership import Ownership
from farpage.volume.recorder import States

log = get_logger()


class Tidings:
    """Passes what a client's volume has to tell on to the control process."""

    def __init__(self, control: ControlLink, client: str, owner: str) -> None:
        self._control = control
        self._client = client
        self._owner = owner

    def epoch_raised(self, epoch: int) -> None:
        """Writes go out under a new epoch from now on."""
        raised = EpochRaised(client=self._client, epoch=epoch, owner=self._owner)
        self._control.tell("epoch_raised", raised)

    def vios_doubted(self, vios: str) -> None:
        """The path that carries the commands has failed or does not answer: its VIOS may answer nobody."""
        self._control.tell("vios_doubted", ViosDoubted(client=self._client, vios=vios))

    async def record_replicas(self, epoch: int, states: States) -> None:
        """Have the states of all replicas stored durably.

        :raise FarpageError: they may not be stored.
        """
        record = RecordReplicas(client=self._client, owner=self._owner, epoch=epoch, states=states)
        await self._control.call("record_replicas", record, Nothing)

    def alarm(self, kind: str, message: str) -> None:
        """Something happened that an operator should look at."""
        log.warning("alarm", client=self._client, kind=kind, message=message)
        self._control.tell("alarm", AlarmRaised(client=self._client, kind=kind, message=message))


class StoredOwnership(Ownership):
    """Keeps the epoch in the state file before anything is opened under it, for who recovers the client."""

    def __init__(self, owner: str, epoch: int, state: StateFile) -> None:
        self._state = state
        super().__init__(owner, epoch)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "epoch":
            self._state.epoch = self.epoch
