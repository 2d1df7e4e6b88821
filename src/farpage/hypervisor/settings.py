"""What a hypervisor is started with."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from farpage.definition.model import Name
from farpage.hypervisor.workercpus import ANY, WorkerCpus, parse_worker_cpus
from farpage.kernel.affinity import own_cpus
from farpage.pager.launch import worker_count
from farpage.pager.limit import DEFAULT_TIER_PERCENT, LARGEST_TIER_PERCENT


class HypervisorSettings(BaseModel):
    """Settings of `farpage hypervisor run`; addresses as `farpage.address` spells them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    state_dir: Path
    control: tuple[str, ...] = Field(min_length=1)
    """Addresses of the control API; TCP ports need `tls`."""
    tls: Path | None = None
    """Folder of the certificates, as `farpage.api.tls` describes it, also for VIOSes at TCP ports."""
    attach: str
    """UNIX socket at which regions ask to be paged."""
    vioses: dict[Name, str] = Field(min_length=1)
    """Control address of every VIOS, by name."""
    workers: int | None = Field(default=None, ge=1)
    """Data workers; None for one per core."""
    worker_cpus: str = ANY
    """Where data workers run, as `farpage.hypervisor.workercpus` spells it."""
    run_dir: Path | None = None
    """Folder of what the next process of this hypervisor needs when this one is killed; None for one in
    `state_dir`."""
    worker_timeout_seconds: float = Field(default=2.0, gt=0)
    """A data worker that does not answer for so long is killed and replaced."""
    path_timeout_seconds: float = Field(default=1.0, gt=0)
    no_path_timeout_seconds: float | None = Field(default=None, gt=0)
    """After so long without a path waiting accesses are answered with poison; None for never."""
    resync_bytes_per_second: int = Field(default=100 << 20, gt=0)
    """The most that is copied to a replica which has missed something, for each client."""
    direct_reads: bool = True
    """Workers read what VIOSes on this host lend without them."""
    default_limit_bytes: int | None = Field(default=None, gt=0)
    """Limit of a client that asks for none."""
    ram_tier_percent: int = Field(default=DEFAULT_TIER_PERCENT, ge=0, le=LARGEST_TIER_PERCENT)
    """Share of a client's limit that compressed pages may take."""
    pool_size_bytes: int | None = Field(default=None, gt=0)
    """Size of the memory pool; None for all of the host's memory."""

    @property
    def run_folder(self) -> Path:
        """The run folder, also when none is named."""
        return self.run_dir or self.state_dir / "run"

    @property
    def worker_count(self) -> int:
        """Data workers to start."""
        return worker_count(self.workers, self.placement.listed)

    @property
    def placement(self) -> WorkerCpus:
        """What `worker_cpus` means for this process.

        :raise InvalidInput: it means nothing, or none of the CPUs that this process may use.
        """
        return parse_worker_cpus(self.worker_cpus, own_cpus())
