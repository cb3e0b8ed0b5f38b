"""TCP ports and unix sockets to listen on; SettingsError in one line for those that are taken."""

from __future__ import annotations

import errno
import socket
import stat
from pathlib import Path

from monitor.config import ListenAddress
from monitor.errors import SettingsError


def bind_tcp(address: ListenAddress, setting: str) -> socket.socket:
    """A bound and listening socket.

    Raises:
        SettingsError: the port is taken, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, name = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise _refused(address, setting, error) from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(name)
        bound.listen(128)
    except OSError as error:
        bound.close()
        raise _refused(address, setting, error) from None
    return bound


def make_free(address: ListenAddress, setting: str) -> None:
    """Proves that gRPC will be able to listen here, and removes what a dead server left.

    gRPC takes the socket of a live server at the same path without a word, and says why a port
    cannot be had in its own log only.

    Raises:
        SettingsError: somebody listens here, or nobody can.
    """
    if not address.unix_path:
        bind_tcp(address, setting).close()
        return
    path = Path(address.unix_path)
    if not path.parent.is_dir():
        raise SettingsError(f"{setting}: found no folder {path.parent} for {address}")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SettingsError(f"{setting}: found a file that is no socket at {path}, expected none")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise _refused(address, setting, error) from None
    raise SettingsError(f"{setting}: {address} is in use, expected a free address")


def _refused(address: ListenAddress, setting: str, error: OSError) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        return SettingsError(f"{setting}: {address} is in use, expected a free address")
    reason = error.strerror or str(error)
    return SettingsError(f"{setting}: cannot listen on {address}: {reason}")
