"""Records -> Prometheus, on a registry of its own; the only room that knows prometheus_client.

    labels      the closed sets that labels come from, and the buckets
    families    metrics whose children are made once; collectors that read when asked
    recorder    Metrics: what the server, the pipeline and the RPCs tell

Every label comes from a closed set: the served model, the registered clusters and rules, enums.
Every series of those sets exists from the start, so that a rate over it is 0 and not missing.
"""

from monitor.metrics.labels import Component, FailOpen, Outcome, Rejection, RequestKind
from monitor.metrics.recorder import Metrics

__all__ = ["Component", "FailOpen", "Metrics", "Outcome", "Rejection", "RequestKind"]
