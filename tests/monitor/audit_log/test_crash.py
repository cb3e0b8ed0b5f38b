"""A writer killed with SIGKILL, again and again, on one log.

SAEMONITOR_TEST_KILLS says how often; a hundred times takes some minutes.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from monitor.audit_log.query import query
from monitor.audit_log.verify import verify

KILLS = int(os.environ.get("SAEMONITOR_TEST_KILLS", "6"))  # noqa: TID251  # no setting of ours
ROOT = Path(__file__).resolve().parents[3]

WRITER = """
import asyncio, itertools, os, sys
sys.path.insert(0, {folder!r})
from conftest import make_decision
from monitor.audit_log.writer import AuditLog
from monitor.records import Verdict

async def caller(log, name):
    for number in itertools.count():
        await log.append_decision(make_decision(f"{{name}}-{{number}}"), input_digest=None)
        alert = f"{{name}}-alert-{{number}}"
        sequence = await log.append_decision(
            make_decision(alert, Verdict.ALERT), input_digest=None
        )
        os.write(1, f"{{alert}} {{sequence}}\\n".encode())

async def main():
    log = AuditLog.open(sys.argv[1], checkpoint_records=32)
    log.start()
    await asyncio.gather(*(caller(log, f"{{sys.argv[2]}}-{{place}}") for place in range(8)))

asyncio.run(main())
"""


@pytest.mark.timeout(60 + 30 * KILLS)
def test_every_acknowledged_alert_survives_sigkill_and_the_chain_verifies(url: str) -> None:
    chance = random.Random(7)
    script = WRITER.format(folder=str(Path(__file__).parent))
    acknowledged: dict[str, int] = {}
    for life in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", script, url, f"life{life}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(chance.randint(1, 200))]
        process.kill()
        lines += process.stdout.readlines()
        process.stdout.close()
        process.wait()
        complete = [line.split() for line in lines if line.endswith(b"\n")]
        assert complete
        acknowledged |= {name.decode(): int(sequence) for name, sequence in complete}

        if life + 1 < KILLS and life % max(1, KILLS // 10):  # the whole log is read each time
            continue
        stored = [(record["decision_id"], record["sequence"]) for record in query(url)]
        assert verify(url).records == len(stored)
        assert len(dict(stored)) == len(stored)
        assert acknowledged.items() <= set(stored)
