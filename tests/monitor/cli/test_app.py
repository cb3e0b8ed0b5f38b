from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [["--help"], ["health", "127.0.0.1:1"], ["bundle", "--help"]])
def test_quick_commands_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['sae-monitor', *{arguments!r}]\n"
        "from monitor.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "print('torch' in sys.modules, code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    loaded, exit_code = done.stdout.splitlines()[-1].split()
    assert loaded == "False"
    assert exit_code == ("1" if arguments[0] == "health" else "0")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "ACTIVE 2000"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE None"),
    ],
)
def test_openmp_is_told_how_to_wait_before_torch_is_there(
    given: dict[str, str], expected: str
) -> None:
    code = (
        "import os, sys\n"
        "sys.argv = ['sae-monitor', '--help']\n"
        "from monitor.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "found = map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'))\n"
        "print('torch' in sys.modules, *found)\n"
    )
    command = ["env", "-u", "GOMP_SPINCOUNT", "-u", "OMP_WAIT_POLICY"]
    command += [*(f"{name}={value}" for name, value in given.items()), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == f"False {expected}"
