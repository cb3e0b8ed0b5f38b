"""Decisions made again, without a network: an audit log or files of requests in, Parquet out.

    rows        what is replayed, and the classes that a comparison ends in
    files       JSON lines and Parquet files of requests
    log         an audit log's decisions, with their tokens opened
    compare     what was decided then against what is decided now, and what differs between the two
    parts       rows -> one Parquet part with its digest, written whole or not at all
    manifest    what a folder of parts was made of, and which of them count
    summary     counts over parts, for a person and for the manifest
    scorer      ReplayScorer: segments of an input -> parts, through the pipeline that serves
    run         plans, resumes and drives the work in this process
    on_ray      the same scorer in a pool of Ray Data's actors

Imports nothing of gRPC, and Ray only where it is asked for.
"""
