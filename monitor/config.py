"""Every setting of the server, with unit and default; the only reader of the environment.

A setting comes from its flag, else from `SAEMONITOR_<NAME>`, else from the YAML config file
(`--config` or `SAEMONITOR_CONFIG`, keys as the field names below), else from its default.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import structlog
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from monitor.errors import SettingsError

ENV_PREFIX = "SAEMONITOR_"

MAX_UNIX_PATH_BYTES = 107
"""sockaddr_un.sun_path on Linux, less its final zero (unix(7))."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where to listen: a TCP host and port, or the path of a unix socket."""

    host: str = ""
    port: int = 0
    """0 asks for a free port."""
    unix_path: str = ""

    def __str__(self) -> str:
        if self.unix_path:
            return f"unix:{self.unix_path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        return bool(self.unix_path) or loopback


def parse_listen(text: str) -> ListenAddress:
    """Reads `HOST:PORT`, `[IPV6]:PORT` or `unix:PATH`; ValueError says what was expected."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path or len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
            raise ValueError(f"expected unix:PATH of 1 to {MAX_UNIX_PATH_BYTES} bytes")
        return ListenAddress(unix_path=path)
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("expected HOST:PORT (port 0 to 65535; 0 takes a free one) or unix:PATH")
    return ListenAddress(host=host, port=int(port))


def default_cache_dir() -> Path:
    """Where converted models are kept: the user's cache (XDG_CACHE_HOME)."""
    return _user_dir("XDG_CACHE_HOME", ".cache")


def default_audit_url() -> str:
    """An SQLite file in the user's state folder (XDG_STATE_HOME)."""
    return f"sqlite:///{_user_dir('XDG_STATE_HOME', '.local/state') / 'audit.db'}"


def _user_dir(variable: str, fallback: str) -> Path:
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / fallback) / "sae-monitor"


class ServeSettings(BaseSettings):
    """What `sae-monitor serve` can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    bundle: str = "default"
    """Folder of the bundle, or `default` for the one that comes with the package."""
    model: Path | None = None
    """Folder of the language model, in place of the one that the bundle names."""
    cache_dir: Path = Field(default_factory=default_cache_dir)
    """Where converted models, and the hashes of SAEs, are kept."""

    listen: Annotated[tuple[str, ...], NoDecode] = ("127.0.0.1:50051",)
    """gRPC addresses, HOST:PORT or unix:PATH, several separated by commas; port 0 is a free one."""
    ops_listen: str = "127.0.0.1:9464"
    """HTTP address of /metrics, /livez and /readyz; `off` for none."""
    reflection: bool = True
    """Whether gRPC reflection is served."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Floating-point type of the forward pass; auto is float32 on CPU, bfloat16 on CUDA."""
    backend: Literal["torch"] = "torch"
    """What runs the forward pass."""
    fidelity: Literal["gate", "warn", "off"] = "gate"
    """What happens when an SAE does not fit the stream it reads: the server does not become ready,
    says so and serves, or does not look."""

    audit: str = Field(default_factory=default_audit_url)
    """URL of the audit log, sqlite:///PATH."""
    audit_level: Literal["none", "metadata", "scores"] = "scores"
    """What an audit record holds; none keeps no log."""
    on_full: Literal["block", "drop"] = "block"
    """What happens when the audit log cannot keep up: requests wait, or records are dropped."""
    audit_caller_key_file: Path | None = None
    """File with the secret under which callers are hashed; without it callers are not stored."""

    max_message_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Largest gRPC message, bytes."""
    max_request_tokens: int = Field(default=32_768, ge=1)
    """Longest request or stream, tokens."""
    max_step_tokens: int = Field(default=2048, ge=1)
    """Most new tokens in one forward pass."""
    max_queue_tokens: int = Field(default=65_536, ge=1)
    """Most tokens that may wait for the engine, all requests together."""
    max_cache_bytes: int = Field(default=2 * 1024**3, ge=0)
    """Most memory for keys and values between steps, bytes; what is dropped is recomputed."""
    prefix_reuse: bool = True
    """Whether texts that begin alike share what was computed; a caller can tell by the time."""
    max_streams: int = Field(default=256, ge=1)
    """Most streams open at the same time."""
    stream_reply_interval_ms: float = Field(default=20.0, ge=0.0)
    """Shortest time between two replies of a stream, milliseconds; alerts do not wait for it."""
    grace_seconds: float = Field(default=30.0, ge=0.0)
    """Longest time that running requests get when the server is told to stop, seconds."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message of the operational log (standard error)."""
    log_json: bool = True
    """Whether that log is JSON lines, or text for a person."""

    @field_validator("listen", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("listen")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected at least one address")
        for address in value:
            parse_listen(address)
        return value

    @field_validator("ops_listen")
    @classmethod
    def _ops_address(cls, value: str) -> str:
        if value != "off" and parse_listen(value).unix_path:
            raise ValueError("expected HOST:PORT or off")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_request_tokens > self.max_queue_tokens:
            raise ValueError(
                f"max_request_tokens: found {self.max_request_tokens}, expected at most"
                f" max_queue_tokens ({self.max_queue_tokens}): a longer request could never wait"
            )
        fixed = [a for a in (*self.listen, self.ops_listen) if not a.endswith(":0")]
        twice = sorted({address for address in fixed if fixed.count(address) > 1})
        if twice:
            raise ValueError(f"listen, ops_listen: found {twice[0]} twice, expected once")
        return self

    def listen_addresses(self) -> tuple[ListenAddress, ...]:
        """`listen`, parsed."""
        return tuple(parse_listen(address) for address in self.listen)

    def ops_address(self) -> ListenAddress | None:
        """`ops_listen`, parsed; None where it is off."""
        return None if self.ops_listen == "off" else parse_listen(self.ops_listen)


def load_settings(
    flags: Mapping[str, object] | None = None, config: Path | None = None
) -> ServeSettings:
    """Joins flags, environment, config file and defaults.

    Args:
        flags: by field name; None means that the flag was not given.
        config: the YAML file; SAEMONITOR_CONFIG where it is None.

    Raises:
        SettingsError: one line for each impossible value: the setting, where it came from, what
            was found, what was expected; unknown keys of the config file among them.
    """
    if config is None and os.environ.get(f"{ENV_PREFIX}CONFIG"):
        config = Path(os.environ[f"{ENV_PREFIX}CONFIG"])
    from_file = {} if config is None else _read_yaml(config)
    from_environment = EnvSettingsSource(ServeSettings)()
    from_flags = {name: value for name, value in (flags or {}).items() if value is not None}
    origins = {
        **dict.fromkeys(from_file, str(config)),
        **{name: f"{ENV_PREFIX}{name.upper()}" for name in from_environment},
        **{name: f"--{name.replace('_', '-')}" for name in from_flags},
    }
    values: dict[str, Any] = {**from_file, **from_environment, **from_flags}
    try:
        return ServeSettings(**values)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(error, values, origins))) from None


def unknown_variables() -> list[str]:
    """SAEMONITOR_* variables that no setting reads.

    Not an error: Kubernetes sets such names itself for a Service called saemonitor.
    """
    known = {f"{ENV_PREFIX}{name.upper()}" for name in ServeSettings.model_fields}
    known.add(f"{ENV_PREFIX}CONFIG")
    return sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"config {path}: cannot be read: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"config {path}: found {type(content).__name__}, expected a mapping")
    unknown = [key for key in content if key not in ServeSettings.model_fields]
    if unknown:
        known = ", ".join(ServeSettings.model_fields)
        raise SettingsError(f"config {path}: found unknown key {unknown[0]!r}, expected {known}")
    return content


def _explain(
    error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]
) -> list[str]:
    lines = []
    for problem in error.errors():
        expected = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            lines.append(expected)
            continue
        name = str(problem["loc"][0])
        expected = expected.replace("Input should be", "expected").removeprefix("expected ")
        found = repr(values.get(name))
        origin = origins.get(name, "default")
        lines.append(f"{name} ({origin}): found {found:.120}, expected {expected}")
    return lines


def configure_logging(level: str, as_json: bool) -> None:
    """Sends this process's operational log to standard error; standard output is for results.

    Call once, at the start of the process. Events carry ids and counts, never text of requests:
    so tracebacks come without local variables.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if as_json:
        last: list[structlog.typing.Processor] = [
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            structlog.processors.JSONRenderer(),
        ]
    else:
        last = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "uvicorn", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
