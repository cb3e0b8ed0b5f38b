"""The service: records in, records out; see `monitor.pipeline` first.

    __main__, cli          the command line
    demo, server, client   what a person starts
    rpc, ops               the two wires: gRPC, and HTTP for operators
    pipeline               one request from start to finish
    engine, policy, metrics, audit_log    the parts it joins, each ignorant of the others
    model_store, bundle, config, records, errors    what they all speak
"""

__version__ = "0.1.0"
