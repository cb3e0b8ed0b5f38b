"""The audit log: what the monitor decided, in a chain that shows when it was changed.

    chain       canonical bytes and hashes; the whole format in one page, with test vectors
    trace       every token's scores in a few bytes, with a stated error
    sealing     what people wrote, encrypted under one of several named keys
    merkle      the tree over a chain's records (RFC 6962), and paths in it
    record      decisions -> audit records, at one of five levels
    checkpoint  signed statements of where a chain stood
    migrations  the layouts that a log has had, and the steps between them
    locks       why a chain has one writer
    schema      the tables as they are now, and the engines that open them: SQLite or PostgreSQL
    reader      pages of stored rows, for whoever only reads
    verify      proves a log record by record, or names the first that does not hold
    linking     records at their places in a chain, as the rows that store them
    store       the one writer of a chain: lock, tail check on opening, commits, checkpoints
    queue       the bounded queue between the event loop and the writing thread
    committer   the thread that commits in groups, and tries again
    writer      AuditLog, which joins them: what the server opens and the pipeline appends to
    query       stored decisions by time, verdict, severity, cluster, caller or id
    proof       that one decision is in the log, for somebody who has only a checkpoint
    retention   old periods deleted on purpose, with their proof kept
    export      decisions as a Parquet table
    export_schema, export_columns    the table's layout, and how its columns are made
    logged_traces, exported_traces   the numbers of many traces at once, from the log or an export

The only room that imports SQLAlchemy. It reads no clock but the one it is given, and knows nothing
of requests beyond their `Decision`.
"""
