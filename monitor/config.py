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
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from monitor.errors import SettingsError
from monitor.records import AuditLevel

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


def quiet_ray() -> None:
    """Keeps a Ray that is started here from reporting its use to its makers, unless told to."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def check_backend(
    backend: str,
    dtype: str,
    graph: Path | None,
    *,
    device: str = "auto",
    gpus: int = 1,
    tensor_parallel: int = 1,
) -> None:
    """ValueError where a backend cannot have this dtype, graph, or number of devices."""
    dtypes = {"torch": ("float32", "bfloat16"), "onnx": ("float32", "int8")}
    if backend not in dtypes:
        raise ValueError(f"backend: found {backend!r}, expected torch or onnx")
    if dtype not in ("auto", *dtypes[backend]):
        expected = " or ".join(dtypes[backend])
        raise ValueError(f"dtype: found {dtype!r} with backend {backend}, expected {expected}")
    if graph is not None and backend != "onnx":
        raise ValueError(f"onnx: found {graph} with backend {backend}, expected backend onnx")
    found = f"gpus, tensor_parallel: found {gpus} and {tensor_parallel}"
    if gpus > 1 and tensor_parallel > 1:
        raise ValueError(
            f"{found}, expected 1 for one of them: blocks are spread over devices, or each is split"
        )
    if backend == "onnx" and (gpus > 1 or tensor_parallel > 1):
        raise ValueError(f"{found} with backend onnx, expected 1 of both")
    if gpus > 1 and device == "cpu":
        raise ValueError(f"gpus: found {gpus} with device cpu, expected 1")


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
    """Where the model runs; auto takes CUDA where there is one, but the CPU under onnx."""
    gpus: int = Field(default=1, ge=1)
    """CUDA devices that one process spreads the model's blocks over, one after the other."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Processes that every block is split over, one a CUDA device; the server is one of them."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Type of the model's weights. auto is bfloat16 where the hardware multiplies in it and the
    SAEs still fit, else float32, as always under onnx. int8 is onnx's alone, and must give the
    verdicts of float32 on the bundle's own texts."""
    backend: Literal["torch", "onnx"] = "torch"
    """What runs the forward pass."""
    onnx: Path | None = None
    """Folder of `export-onnx` for the backend onnx; without it the cache's, exported once."""
    fidelity: Literal["gate", "warn", "off"] = "gate"
    """What happens when an SAE does not fit the stream it reads: the server does not become ready,
    says so and serves, or does not look."""

    canary_seconds: float = Field(default=60.0, ge=0.0)
    """Time from one run of the bundle's canaries to the next, seconds; 0 never runs them."""
    canary_readiness: bool = False
    """Whether a server whose canaries fail, or have not run yet, is not ready."""

    drift_window: int = Field(default=1000, ge=100)
    """Decisions after which live traffic is compared with the calibration's."""
    drift_sample_share: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of the work on whose first 256 tokens the whole SAEs are run, for FVU and L0."""

    audit: str = Field(default_factory=default_audit_url)
    """URL of the audit log, sqlite:///PATH or postgresql://USER@HOST/DATABASE."""
    audit_chain: str = Field(default="main", min_length=1, max_length=128)
    """Name of this server's chain; of servers that write to one PostgreSQL each needs its own."""
    audit_level: AuditLevel = AuditLevel.SCORES
    """The most that an audit record holds, and what it holds where a policy names no level: none,
    metadata, scores, tokens or content; none keeps no log."""
    on_full: Literal["block", "drop"] = "block"
    """What happens when the audit log cannot keep up: requests wait, or records are dropped."""
    audit_queue_records: int = Field(default=8192, ge=1)
    """Most records that may wait to be written to the audit log."""
    audit_queue_bytes: int = Field(default=256 * 1024**2, ge=1)
    """About the most memory that they may take together, bytes; one alone may take more."""
    audit_hash_key_file: Path | None = None
    """File with the secret under which callers and inputs are hashed; without it callers are not
    stored."""
    audit_keys_file: Path | None = None
    """File of keys, NAME:BASE64 a line, that seal token ids and texts; the first one seals."""
    audit_keys: SecretStr | None = None
    """The same in the setting itself, for secrets that come by environment."""
    audit_signing_key_file: Path | None = None
    """Ed25519 key (PEM) that signs the log's checkpoints."""
    audit_rpc: Literal["local", "on", "off"] = "local"
    """Whether AuditService reads the log to callers: where every address is of this machine,
    always, never."""
    audit_checkpoint_records: int = Field(default=1000, ge=1)
    """Records after which the log gets a checkpoint, at the latest."""
    audit_checkpoint_seconds: float = Field(default=60.0, gt=0.0)
    """Seconds after which unproven records get a checkpoint."""

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
    resume_seconds: float = Field(default=60.0, ge=0.0)
    """How long a resumable stream waits to be reopened when its call breaks off; 0 keeps none."""
    max_detached_streams: int = Field(default=256, ge=1)
    """Most streams that wait so; beyond that the one that has waited for longest ends."""
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
    def _backend_can(self) -> Self:
        check_backend(
            self.backend,
            self.dtype,
            self.onnx,
            device=self.device,
            gpus=self.gpus,
            tensor_parallel=self.tensor_parallel,
        )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_request_tokens > self.max_queue_tokens:
            raise ValueError(
                f"max_request_tokens: found {self.max_request_tokens}, expected at most"
                f" max_queue_tokens ({self.max_queue_tokens}): a longer request could never wait"
            )
        if self.audit_keys is not None and self.audit_keys_file is not None:
            raise ValueError("audit_keys, audit_keys_file: found both, expected one of them")
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


def wait_briefly() -> None:
    """Has OpenMP's idle threads wait some microseconds, then sleep; before torch is imported.

    Those of torch's builds for Linux (libgomp) stay awake for milliseconds after each operation, on
    a core that the event loop needs; and where several threads of the process have used torch,
    they sleep at once, and every operation waits for them to wake. Asked to wait actively, they
    spin 1,000 times in the second case, and as often as is said in the first
    (benchmarks/LOG.md, 2026-12-01). Where the environment says how they wait, nothing is changed.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ |= {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "2000"}
