"""The service: records in, records out; see `monitor.pipeline` first.

Rooms, from what a person starts down to what everybody speaks:

    __main__, cli                   the command line
    demo                            the main job on the embedded default
    client, server, local, report   what a program or a person starts, and how it reads
    rpc, ops                        the two wires: gRPC, and HTTP for operators
    pipeline, stream_session, live_stream, activation_uploads, draft, stream_scoring
                                    one request, stream or upload from start to finish
    inputs, served, evidence        tokens with stages; the loaded bundle; running scores
    activations                     what a caller's own forward pass made, checked
    sae_pins, sae_store             what sealing writes of SAEs elsewhere; where they are here
    engine, policy, metrics, audit_log, model_store, coverage   parts ignorant of each other
    engine_steps, work_queue        one step, tried smaller where it fails; what waits, whose turn
    hub, hash_cache, sae_releases   the hub's files; their hashes; published SAEs by name
    bundle, config, records, errors   what they all speak
"""

__version__ = "0.1.0"
