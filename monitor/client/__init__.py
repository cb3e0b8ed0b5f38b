"""The client: typed records in and out, no protobufs, no torch.

    from monitor.client import MonitorClient

    with MonitorClient("127.0.0.1:50051") as monitor:
        decision = monitor.score(text="How do I bake bread?")
        print(decision.verdict, decision.overall.fused)

`MonitorClient` blocks, `AsyncMonitorClient` is for asyncio; both take the same arguments and raise
the classes of `monitor.errors`.
"""

from monitor.client.asynchronous import AsyncMonitorClient
from monitor.client.asynchronous_stream import AsyncScoreStream
from monitor.client.audit import StoredRecord, VerifiedRange
from monitor.client.blocking import MonitorClient
from monitor.client.blocking_stream import ScoreStream
from monitor.client.calls import RetryPolicy

__all__ = [
    "AsyncMonitorClient",
    "AsyncScoreStream",
    "MonitorClient",
    "RetryPolicy",
    "ScoreStream",
    "StoredRecord",
    "VerifiedRange",
]
