from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = "protos/saemonitor/v1/monitor.proto"
STUBS = ("monitor_pb2.py", "monitor_pb2.pyi", "monitor_pb2_grpc.py", "monitor_pb2_grpc.pyi")


def test_regenerated_stubs_equal_the_committed_ones(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            *("-m", "grpc_tools.protoc", "-I."),
            *(f"--python_out={tmp_path}", f"--mypy_out=quiet:{tmp_path}"),
            *(f"--grpc_python_out={tmp_path}", f"--mypy_grpc_out=quiet:{tmp_path}"),
            PROTO,
        ],
        cwd=ROOT,
        check=True,
        env={"PATH": str(Path(sys.executable).parent)},
    )
    made = (tmp_path / PROTO).parent
    assert sorted(path.name for path in made.iterdir()) == sorted(STUBS)
    for name in STUBS:
        committed = (ROOT / PROTO).with_name(name).read_text()
        assert (made / name).read_text() == committed, f"{name} is stale: run `make protos`"


def test_buf_finds_nothing_to_complain_about(buf: Path) -> None:
    done = subprocess.run(
        [buf, "lint"], cwd=ROOT / "protos", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
