"""gRPC: records in and out of protobuf, errors to codes, and the servicers.

convert        protobuf <-> records, both directions, for the server and the client
status         errors <-> gRPC status, both directions
serving        the pipeline that answers now, if any, and whether the server drains
interceptors   the edge that every RPC goes through: metrics, and where errors end
servicers      MonitorService, InfoService, RegistryService
audit          AuditService
stream         the two directions of one ScoreStream
"""
