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
