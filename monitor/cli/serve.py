"""`sae-monitor serve`, `demo` and `health`; each imports what it needs of torch when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from monitor.cli.common import EXIT_FAILED, bundle_folder, exit_on_error, out, progress_bar
from monitor.client import MonitorClient
from monitor.config import default_cache_dir, load_settings
from monitor.errors import MonitorError

Model = Annotated[Path | None, typer.Option(help="The model's folder, in place of the bundle's.")]


def serve(
    bundle: Annotated[str | None, typer.Option(help="A bundle's folder, or default.")] = None,
    model: Model = None,
    listen: Annotated[
        str | None,
        typer.Option(help="gRPC: HOST:PORT or unix:PATH, several by commas; port 0 is a free one."),
    ] = None,
    ops_listen: Annotated[
        str | None, typer.Option(help="HTTP for /metrics, /livez, /readyz: HOST:PORT, or off.")
    ] = None,
    audit: Annotated[
        str | None, typer.Option(help="Audit log: sqlite:///PATH or postgresql://....")
    ] = None,
    audit_chain: Annotated[str | None, typer.Option(help="This server's chain in it.")] = None,
    audit_level: Annotated[
        str | None, typer.Option(help="none, metadata, scores, tokens or content.")
    ] = None,
    on_full: Annotated[str | None, typer.Option(help="Audit queue full: block or drop.")] = None,
    audit_hash_key_file: Annotated[
        Path | None, typer.Option(help="Secret under which callers and inputs are hashed.")
    ] = None,
    audit_keys_file: Annotated[
        Path | None, typer.Option(help="Keys that seal tokens and texts.")
    ] = None,
    audit_signing_key_file: Annotated[
        Path | None, typer.Option(help="Ed25519 key that signs checkpoints.")
    ] = None,
    audit_rpc: Annotated[
        str | None, typer.Option(help="Who may read the audit log: local, on or off.")
    ] = None,
    audit_queue_records: Annotated[
        int | None, typer.Option(help="Audit records that may wait to be written.")
    ] = None,
    audit_queue_bytes: Annotated[
        int | None, typer.Option(help="Memory that they may take together.")
    ] = None,
    audit_checkpoint_records: Annotated[
        int | None, typer.Option(help="Most records between checkpoints.")
    ] = None,
    audit_checkpoint_seconds: Annotated[
        float | None, typer.Option(help="Most seconds between checkpoints.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="CUDA devices to spread the model's blocks over.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Processes to split every block over, one a device.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or int8.")] = None,
    backend: Annotated[str | None, typer.Option(help="torch or onnx.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="An export-onnx folder to run.")] = None,
    fidelity: Annotated[
        str | None, typer.Option(help="An SAE that does not fit: gate, warn or off.")
    ] = None,
    canary_seconds: Annotated[
        float | None, typer.Option(help="Time between two runs of the canaries; 0 for none.")
    ] = None,
    canary_readiness: Annotated[
        bool | None, typer.Option(help="Not ready while the canaries fail.")
    ] = None,
    drift_window: Annotated[
        int | None, typer.Option(help="Decisions that are compared with calibration at a time.")
    ] = None,
    drift_sample_share: Annotated[
        float | None, typer.Option(help="Share of texts whose FVU and whole L0 are measured.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where converted models are.")] = None,
    reflection: Annotated[bool | None, typer.Option(help="Serve gRPC reflection.")] = None,
    max_message_bytes: Annotated[int | None, typer.Option(help="Largest gRPC message.")] = None,
    max_request_tokens: Annotated[int | None, typer.Option(help="Longest request.")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Tokens of one forward.")] = None,
    max_queue_tokens: Annotated[int | None, typer.Option(help="Tokens that may wait.")] = None,
    max_cache_bytes: Annotated[
        int | None, typer.Option(help="Memory for keys and values between steps.")
    ] = None,
    prefix_reuse: Annotated[
        bool | None, typer.Option(help="Share what texts that begin alike have in common.")
    ] = None,
    max_streams: Annotated[int | None, typer.Option(help="Streams open at once.")] = None,
    resume_seconds: Annotated[
        float | None, typer.Option(help="How long a broken resumable stream is kept.")
    ] = None,
    max_detached_streams: Annotated[
        int | None, typer.Option(help="Broken streams kept at once.")
    ] = None,
    stream_reply_interval_ms: Annotated[
        float | None, typer.Option(help="Shortest time between a stream's replies.")
    ] = None,
    grace_seconds: Annotated[float | None, typer.Option(help="Time to finish on SIGTERM.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error.")] = None,
    log_json: Annotated[bool | None, typer.Option(help="JSON lines or text on stderr.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of these settings.")] = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C; prints one JSON line on stdout when ready.

    Every flag has a SAEMONITOR_* variable and a key of the same name in the config file. Keys of
    the audit log may come as SAEMONITOR_AUDIT_KEYS, which has no flag: others would see it.
    """
    flags = {name: value for name, value in locals().items() if name != "config"}
    from monitor.server import run_server

    with exit_on_error(), progress_bar() as progress:
        settings = load_settings(flags, config)
        run_server(settings, bundle_folder(settings.bundle), progress)


def demo(
    bundle: Annotated[str, typer.Option(help="A bundle's folder, or default.")] = "default",
    model: Model = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server up until Ctrl-C.")] = False,
) -> None:
    """The main job on the embedded default: a server, a client, real text, alerts, metrics."""
    from monitor.bundle import load_bundle
    from monitor.demo import run_demo
    from monitor.model_store import find_model
    from monitor.sae_store import find_saes

    with exit_on_error():
        with progress_bar() as progress:
            # Brings model and SAEs here on the first run, where a person sees the progress.
            loaded, cache = load_bundle(bundle_folder(bundle)), default_cache_dir()
            find_model(loaded, override=model, cache=cache, progress=progress)
            find_saes(loaded, cache=cache, progress=progress)
        arguments = [] if model is None else ["--model", str(model)]
        run_demo(bundle=bundle, console=out, keep=keep, arguments=arguments)


def health(
    address: Annotated[str, typer.Argument(help="HOST:PORT or unix:PATH.")] = "127.0.0.1:50051",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Asks a server for its health; exit code 1 unless it serves."""
    try:
        with MonitorClient(address) as client:
            serving = client.health()
            detail = ""
    except MonitorError as error:
        serving, detail = False, str(error)
    if as_json:
        sys.stdout.write(json.dumps({"address": address, "serving": serving}) + "\n")
    else:
        out.print(f"{address}: {'serving' if serving else 'not serving'} {detail}".rstrip())
    if not serving:
        raise typer.Exit(EXIT_FAILED)
