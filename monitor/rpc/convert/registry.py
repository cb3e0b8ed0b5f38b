"""What the server says of itself: what it is and which clusters are registered."""

from __future__ import annotations

from monitor.records import ClusterInfo, LatentInfo, Provenance, ServerInfo, ServerLimits
from monitor.rpc.convert import enums
from protos.saemonitor.v1 import monitor_pb2 as pb


def provenance_to_wire(provenance: Provenance) -> pb.Provenance:
    """Field by field."""
    return pb.Provenance(
        model=provenance.model,
        model_digest=provenance.model_digest,
        tokenizer_fingerprint=provenance.tokenizer_fingerprint,
        bundle=provenance.bundle,
        bundle_digest=provenance.bundle_digest,
        dtype=provenance.dtype,
        backend=provenance.backend,
        server_version=provenance.server_version,
    )


def provenance_from_wire(wire: pb.Provenance) -> Provenance:
    """Field by field."""
    return Provenance(
        model=wire.model,
        model_digest=wire.model_digest,
        tokenizer_fingerprint=wire.tokenizer_fingerprint,
        bundle=wire.bundle,
        bundle_digest=wire.bundle_digest,
        dtype=wire.dtype,
        backend=wire.backend,
        server_version=wire.server_version,
    )


def server_info_to_wire(info: ServerInfo) -> pb.GetServerInfoResponse:
    """Field by field."""
    return pb.GetServerInfoResponse(
        provenance=provenance_to_wire(info.provenance),
        limits=pb.ServerLimits(
            max_message_bytes=info.limits.max_message_bytes,
            max_request_tokens=info.limits.max_request_tokens,
            max_queue_tokens=info.limits.max_queue_tokens,
            max_streams=info.limits.max_streams,
            resume_seconds=info.limits.resume_seconds,
        ),
        policies=info.policies,
        clusters=info.clusters,
        hook_points=info.hook_points,
        vocab_size=info.vocab_size,
        ready=info.ready,
        stale_clusters=info.stale_clusters,
    )


def server_info_from_wire(wire: pb.GetServerInfoResponse) -> ServerInfo:
    """Field by field."""
    return ServerInfo(
        provenance=provenance_from_wire(wire.provenance),
        limits=ServerLimits(
            max_message_bytes=wire.limits.max_message_bytes,
            max_request_tokens=wire.limits.max_request_tokens,
            max_queue_tokens=wire.limits.max_queue_tokens,
            max_streams=wire.limits.max_streams,
            resume_seconds=wire.limits.resume_seconds,
        ),
        policies=tuple(wire.policies),
        clusters=tuple(wire.clusters),
        hook_points=tuple(wire.hook_points),
        vocab_size=wire.vocab_size,
        ready=wire.ready,
        stale_clusters=tuple(wire.stale_clusters),
    )


def cluster_info_to_wire(cluster: ClusterInfo) -> pb.ClusterInfo:
    """Field by field."""
    return pb.ClusterInfo(
        cluster=cluster.cluster,
        title=cluster.title,
        severity=enums.SEVERITIES[cluster.severity],
        stages=[enums.STAGES[stage] for stage in cluster.stages],
        latents=[
            pb.LatentInfo(
                sae=latent.sae,
                latent_id=latent.latent_id,
                weight=latent.weight,
                scale=latent.scale,
                label=latent.label,
                baseline_rate=latent.baseline_rate,
                live_rate=latent.live_rate,
                drift=latent.drift,
            )
            for latent in cluster.latents
        ],
        has_dense_head=cluster.has_dense_head,
        aggregate=cluster.aggregate,
        flag=cluster.flag,
        alert=cluster.alert,
        clear=cluster.clear,
        calibrated=cluster.calibrated,
        stale_reasons=cluster.stale_reasons,
    )


def cluster_info_from_wire(wire: pb.ClusterInfo) -> ClusterInfo:
    """Raises MonitorError where the server is newer than this client."""
    return ClusterInfo(
        cluster=wire.cluster,
        title=wire.title,
        severity=enums.from_wire(enums.SEVERITIES, wire.severity),
        stages=tuple(enums.from_wire(enums.STAGES, stage) for stage in wire.stages),
        latents=tuple(
            LatentInfo(
                sae=latent.sae,
                latent_id=latent.latent_id,
                weight=latent.weight,
                scale=latent.scale,
                label=latent.label,
                baseline_rate=latent.baseline_rate if latent.HasField("baseline_rate") else None,
                live_rate=latent.live_rate if latent.HasField("live_rate") else None,
                drift=latent.drift,
            )
            for latent in wire.latents
        ),
        has_dense_head=wire.has_dense_head,
        aggregate=wire.aggregate,
        flag=wire.flag,
        alert=wire.alert,
        clear=wire.clear,
        calibrated=wire.calibrated,
        stale_reasons=tuple(wire.stale_reasons),
    )
