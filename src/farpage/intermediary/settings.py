"""What an intermediate client is started with."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from farpage.definition.model import Name


class IntermediarySettings(BaseModel):
    """Settings of `farpage intermediary run`; addresses as `farpage.address` spells them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: Name
    """Whose volume is moved."""
    vioses: dict[Name, str] = Field(min_length=2)
    """Control addresses, as this host reaches them."""
    listen: str
    """Where the relay listens, as the first VIOS reaches it."""
    control: tuple[str, ...] = ()
    """Where metrics and status are served; nowhere by default."""
    tls: Path | None = None
    """Folder of certificates for control addresses that are TCP ports."""
