"""gRPC: records in and out of protobuf, errors to codes, and the servicers.

convert.py        protobuf <-> records, both directions, for the server and the client
status.py         errors <-> gRPC status, both directions
interceptors.py   what every RPC goes through: metrics, the door, the edge where errors end
monitor_service.py, info_service.py, registry_service.py   one servicer each
"""
