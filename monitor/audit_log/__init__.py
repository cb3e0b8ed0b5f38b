"""The audit log: what the monitor decided, in a chain that shows when it was changed.

    chain      canonical bytes and hashes; the whole format in one page, with test vectors
    record     levels, and decisions -> audit records; no text and no token ids in this version
    schema     the tables, their version, and the engines that open them
    store      the one writer of a chain: lock, tail check on opening, commits
    queue      the bounded queue between the event loop and the writing thread
    committer  the thread that commits in groups, and tries again
    writer     AuditLog, which joins them: what the server opens and the pipeline appends to
    reader     pages of stored rows, for whoever only reads
    verify     proves a log record by record, or names the first that does not hold
    query      stored decisions by time, verdict, cluster or id

The only room that imports SQLAlchemy. It reads no clock but the one it is given, and knows nothing
of requests beyond their `Decision`.
"""
