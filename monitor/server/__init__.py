"""The server process: builds the parts, starts, reports health, drains, stops.

addresses   TCP ports and unix sockets: free or in use, in one clear line
parts       what is loaded and built behind the wires
wires       the gRPC server and the HTTP server for operators
process     MonitorServer, which joins them, and run_server: one process until it is told to stop
"""

from monitor.server.process import MonitorServer, Ready, run_server

__all__ = ["MonitorServer", "Ready", "run_server"]
