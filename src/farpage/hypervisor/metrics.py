"""The hypervisor's metrics in Prometheus' text format, from the workers' reports at each scrape. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from farpage.definition.model import PAGE_BYTES
from farpage.hypervisor.model import ViosStatus
from farpage.hypervisor.moveinfo import SEEN_SECONDS
from farpage.hypervisor.recovery import RecoveryCounts
from farpage.hypervisor.replacing import ReplacementLeft
from farpage.pager.messages import ClientReport, CounterReport
from farpage.vios.model import CopyStatus
from farpage.volume.state import PathState, ReplicaHealth

COUNTERS = {
    "faults": "Page faults answered",
    "page_in_pages": "Pages read from the volume",
    "page_out_pages": "Pages written to the volume",
    "zero_fill_pages": "Pages filled with zeros at their first touch",
    "zero_evict_pages": "Pages given back without I/O because they held zeros",
    "clean_evict_pages": "Pages given back without I/O because the volume had them",
    "cancelled_pages": "Page-outs made useless by a write meanwhile",
    "read_ahead_pages": "Pages read ahead of a fault",
    "read_ahead_wasted_pages": "Pages read ahead of which nobody is known to have used any",
    "tier_hit_pages": "Pages that came from the RAM tier, without a device",
    "checksum_errors": "Pages that came back with other content than was paged out, or that a scrub found so",
    "scrubbed_pages": "Pages that scrubs compared, once for each replica",
    "poisoned_pages": "Pages lost: every access to them fails",
}


BY_DEVICE = {
    "wrong": "Pages whose replica on a device was not what was paged out",
    "repaired": "Pages whose replica on a device was put right",
}


HANDOVER_STEPS = ("released", "adopted", "started")


@dataclass(frozen=True)
class MoveFigures:
    """What a scrape tells of moves by intermediate clients."""

    steps: Mapping[str, int]
    """How many were begun, finished and cancelled."""
    under_way: Mapping[str, CopyStatus | None]
    """How far each client's is; None where that is not known."""


@dataclass(frozen=True)
class DefinitionFigures:
    """What a scrape tells of the definition."""

    revision: int
    unproven: bool
    repairs: Mapping[str, int]


class _Collector(Collector):
    def __init__(
        self,
        reports: Sequence[ClientReport],
        vioses: Sequence[ViosStatus],
        alarms: Mapping[str, int],
        pool_bytes: int,
        *,
        definition: DefinitionFigures,
        recovery: RecoveryCounts,
        handovers: Mapping[str, int],
        replacements: Sequence[ReplacementLeft],
        moves: MoveFigures,
        compiled: Mapping[int, bool],
    ) -> None:
        self._moves = moves
        self._compiled = compiled
        self._recovery = recovery
        self._handovers = handovers
        self._replacements = replacements
        self._reports = reports
        self._vioses = vioses
        self._alarms = alarms
        self._pool_bytes = pool_bytes
        self._definition = definition

    def collect(self) -> Iterator[Metric]:
        yield from self._counters()
        yield from self._gauges()
        yield self._paths()
        yield from self._direct_reads()
        yield self._failovers()
        yield from self._replicas()
        yield self._waits()
        up = GaugeMetricFamily("farpage_vios_up", "Whether a VIOS answers", labels=["vios"])
        for vios in self._vioses:
            up.add_metric([vios.name], float(vios.reachable))
        yield up
        alarms = CounterMetricFamily("farpage_alarms", "Alarms raised", labels=["kind"])
        for kind, count in self._alarms.items():
            alarms.add_metric([kind], count)
        yield alarms
        yield from self._definitions()
        yield GaugeMetricFamily("farpage_pool_bytes", "Size of the memory pool", value=self._pool_bytes)
        yield from self._workers()
        yield from self._under_way()
        handovers = CounterMetricFamily(
            "farpage_handovers",
            "Clients released, adopted, and started from what another hypervisor released",
            labels=["step"],
        )
        for step in HANDOVER_STEPS:
            handovers.add_metric([step], self._handovers.get(step, 0))
        yield handovers
        yield from self._device_replacements()

    def _device_replacements(self) -> Iterator[Metric]:
        clients = GaugeMetricFamily(
            "farpage_hypervisor_device_replace_clients_left",
            "Clients that are not off a device that is being replaced",
            labels=["old", "new"],
        )
        missing = GaugeMetricFamily(
            "farpage_hypervisor_device_replace_pages_left",
            "Pages of attached clients that are not on the new device yet",
            labels=["old", "new"],
        )
        replicas = {
            (report.client, replica.device): replica
            for report in self._reports
            for replica in report.replicas
        }
        for left in self._replacements:
            clients.add_metric([left.old, left.new], len(left.clients))
            copies = [replicas.get((client, left.new_device)) for client in left.clients]
            missing.add_metric([left.old, left.new], sum(copy.dirty_pages for copy in copies if copy))
        yield from (clients, missing)

    def _under_way(self) -> Iterator[Metric]:
        steps = CounterMetricFamily(
            "farpage_moves", "Moves of clients by an intermediate client", labels=["step"]
        )
        for step in ("begun", "finished", "cancelled"):
            steps.add_metric([step], self._moves.steps.get(step, 0))
        yield steps
        pages = GaugeMetricFamily(
            "farpage_move_pages", "Pages of a volume that is moved", labels=["client", "which"]
        )
        waiting = GaugeMetricFamily(
            "farpage_move_waiting_commands",
            "Commands of a client that wait for the intermediate client",
            labels=["client"],
        )
        up = GaugeMetricFamily(
            "farpage_move_intermediary_up", "Whether the intermediate client is at work", labels=["client"]
        )
        for client, status in self._moves.under_way.items():
            if status is not None:
                pages.add_metric([client, "present"], status.present_pages)
                pages.add_metric([client, "total"], status.total_pages)
                waiting.add_metric([client], status.waiting_commands)
                seen = status.seen_seconds_ago
                up.add_metric([client], float(seen is not None and seen < SEEN_SECONDS))
        yield from (pages, waiting, up)

    def _workers(self) -> Iterator[Metric]:
        compiled = GaugeMetricFamily(
            "farpage_worker_compiled", "Whether a data worker has the compiled loops", labels=["worker"]
        )
        for worker, has_them in self._compiled.items():
            compiled.add_metric([str(worker)], float(has_them))
        yield compiled
        counts = self._recovery
        yield CounterMetricFamily(
            "farpage_workers_lost", "Data workers that ended or hung", value=counts.workers_lost
        )
        yield CounterMetricFamily(
            "farpage_clients_adopted", "Clients taken over with their data worker", value=counts.adopted
        )
        yield SummaryMetricFamily(
            "farpage_client_recoveries",
            "Clients given to another data worker, and the seconds until it paged them",
            count_value=counts.recovered,
            sum_value=counts.recovery_seconds,
        )

    def _definitions(self) -> Iterator[Metric]:
        figures = self._definition
        yield GaugeMetricFamily(
            "farpage_definition_revision", "Revision that the hypervisor goes by", value=figures.revision
        )
        stored = GaugeMetricFamily(
            "farpage_vios_definition_revision", "Revision that a VIOS stores", labels=["vios"]
        )
        for vios in self._vioses:
            if vios.definition_revision is not None:
                stored.add_metric([vios.name], vios.definition_revision)
        yield stored
        repairs = CounterMetricFamily(
            "farpage_definition_repairs", "Copies of the definition that were put right", labels=["vios"]
        )
        for vios in self._vioses:
            repairs.add_metric([vios.name], figures.repairs.get(vios.name, 0))
        yield repairs
        yield GaugeMetricFamily(
            "farpage_definition_unproven",
            "1 while a newer definition may exist, and nothing is changed",
            value=float(figures.unproven),
        )

    def _counters(self) -> Iterator[Metric]:
        for field, help_text in COUNTERS.items():
            family = CounterMetricFamily(f"farpage_client_{field}", help_text, labels=["client"])
            for report in self._reports:
                family.add_metric([report.client], getattr(report.counters, field))
            yield family
        for what, help_text in BY_DEVICE.items():
            family = CounterMetricFamily(
                f"farpage_client_{what}_pages", help_text, labels=["client", "device"]
            )
            for report in self._reports:
                for device, pages in getattr(report.counters, f"{what}_by_device").items():
                    family.add_metric([report.client, device], pages)
            yield family

    def _gauges(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily(
            "farpage_client_memory_bytes",
            "A client's memory by state of its pages",
            labels=["client", "state"],
        )
        tier = GaugeMetricFamily(
            "farpage_client_ram_tier_bytes",
            "The RAM tier: what it takes of the client's limit, its compressed contents alone, and the pages "
            "that it holds",
            labels=["client", "what"],
        )
        limit = GaugeMetricFamily("farpage_client_limit_bytes", "A client's limit", labels=["client"])
        stalled = GaugeMetricFamily(
            "farpage_client_stalled_faults", "Accesses that wait now", labels=["client"]
        )
        epoch = GaugeMetricFamily("farpage_client_epoch", "Epoch of a client's volume", labels=["client"])
        fenced = GaugeMetricFamily(
            "farpage_client_fenced", "1 for a client that another owner has claimed", labels=["client"]
        )
        without_path = GaugeMetricFamily(
            "farpage_client_without_path", "1 while no path to a client's volume works", labels=["client"]
        )
        full = GaugeMetricFamily(
            "farpage_client_device_full", "1 while no device has room for page-outs", labels=["client"]
        )
        scrub = GaugeMetricFamily(
            "farpage_client_scrub_progress",
            "Share of a client's pages that its scrub has gone through; none without one",
            labels=["client", "state"],
        )
        for report in self._reports:
            if report.scrub:
                share = report.scrub.pages_done / max(report.scrub.pages_total, 1)
                scrub.add_metric([report.client, report.scrub.state], share)
            for state, pages in report.pages_by_state.items():
                memory.add_metric([report.client, state], pages * PAGE_BYTES)
            tier.add_metric([report.client, "taken"], report.tier.taken_bytes)
            tier.add_metric([report.client, "stored"], report.tier.stored_bytes)
            tier.add_metric([report.client, "held"], report.tier.pages * PAGE_BYTES)
            limit.add_metric([report.client], report.limit_pages * PAGE_BYTES)
            stalled.add_metric([report.client], report.stalled_faults)
            epoch.add_metric([report.client], report.epoch)
            fenced.add_metric([report.client], float(bool(report.fenced)))
            without_path.add_metric([report.client], float(report.without_path_seconds is not None))
            full.add_metric([report.client], float(report.device_full))
        yield from (memory, tier, limit, stalled, epoch, fenced, without_path, full, scrub)

    def _paths(self) -> Metric:
        family = GaugeMetricFamily(
            "farpage_path_state", "1 for the state that a path is in", labels=["client", "vios", "state"]
        )
        for report in self._reports:
            for path in report.paths:
                for state in PathState:
                    family.add_metric([report.client, path.vios, state], float(path.state is state))
        return family

    def _direct_reads(self) -> Iterator[Metric]:
        reads = CounterMetricFamily(
            "farpage_path_direct_reads",
            "Reads that the worker has made by itself of what a VIOS has lent",
            labels=["client", "vios"],
        )
        failures = CounterMetricFamily(
            "farpage_path_direct_failures",
            "Direct reads that failed or were late, and were served instead",
            labels=["client", "vios"],
        )
        for report in self._reports:
            for path in report.paths:
                reads.add_metric([report.client, path.vios], path.direct_reads)
                failures.add_metric([report.client, path.vios], path.direct_failures)
        yield from (reads, failures)

    def _replicas(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "farpage_replica_state",
            "1 for what a replica is good for",
            labels=["client", "device", "state"],
        )
        dirty = GaugeMetricFamily(
            "farpage_replica_dirty_pages",
            "Pages that a replica has missed and not got yet",
            labels=["client", "device"],
        )
        rate = GaugeMetricFamily(
            "farpage_replica_resync_bytes_per_second", "Speed of a resync", labels=["client", "device"]
        )
        hedged = CounterMetricFamily(
            "farpage_client_hedged_reads", "Reads repeated because they were late", labels=["client"]
        )
        won = CounterMetricFamily(
            "farpage_client_hedges_won", "Repeated reads that were answered first", labels=["client"]
        )
        for report in self._reports:
            hedged.add_metric([report.client], report.hedged_reads)
            won.add_metric([report.client], report.hedges_won)
            for replica in report.replicas:
                for health in ReplicaHealth:
                    labels = [report.client, replica.name, health.value]
                    state.add_metric(labels, float(replica.health is health))
                dirty.add_metric([report.client, replica.name], replica.dirty_pages)
                rate.add_metric([report.client, replica.name], replica.rate_bytes)
        yield from (state, dirty, rate, hedged, won)

    def _failovers(self) -> Metric:
        family = CounterMetricFamily(
            "farpage_path_losses", "Losses of a path that carried commands", labels=["client", "vios"]
        )
        for report in self._reports:
            for path in report.paths:
                family.add_metric([report.client, path.vios], path.losses)
        return family

    def _waits(self) -> Metric:
        family = HistogramMetricFamily(
            "farpage_client_fault_wait_seconds", "How long accesses waited for their page", labels=["client"]
        )
        for report in self._reports:
            family.add_metric([report.client], _buckets(report.counters), report.counters.wait_seconds)
        return family


def _buckets(counters: CounterReport) -> list[tuple[str, float]]:
    total = 0
    buckets: list[tuple[str, float]] = []
    for power, count in enumerate(counters.wait_buckets[:-1]):
        total += count
        buckets.append((repr(2**power / 1e6), total))
    buckets.append(("+Inf", total + counters.wait_buckets[-1]))
    return buckets


def render(
    reports: Sequence[ClientReport],
    vioses: Sequence[ViosStatus],
    alarms: Mapping[str, int],
    pool_bytes: int,
    *,
    definition: DefinitionFigures,
    recovery: RecoveryCounts,
    handovers: Mapping[str, int],
    moves: MoveFigures,
    compiled: Mapping[int, bool],
    replacements: Sequence[ReplacementLeft] = (),
) -> bytes:
    """Return the text of one scrape; `compiled` tells by their numbers which workers have compiled loops."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(
        _Collector(
            reports,
            vioses,
            alarms,
            pool_bytes,
            definition=definition,
            recovery=recovery,
            handovers=handovers,
            replacements=replacements,
            moves=moves,
            compiled=compiled,
        )
    )
    return generate_latest(registry)
