"""Does a replay keep the engine as busy as the engine can be?

Gemma 3 270M under the default bundle (or `--bundle`), random texts of mixed lengths. One side hands
token ids straight to the engine, all at once, and looks at nothing that comes back. The other is
the whole replay of the same texts, from a file of JSON lines to parts and manifest: reading,
tokenising, packing, evidence, policy, Parquet, digests. Both take turns within one process and on
one loaded model; the figure is the ratio of their medians, and what is aimed at is 0.9. On a shared
machine look at the ratio of CPU times: it counts as lost what another core did, too.

    python benchmarks/replay.py [--texts N] [--rounds N] [--bundle DIR] [--device D] [--ray 1,2]

`--ray` also replays the texts in so many actors, with a thread each: tokens a second from the first
part on, once every actor has loaded its model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout's own packages win

from engine_parts.measuring import in_turns, machine, paired, ratio, say

from monitor.cli.common import bundle_folder
from monitor.config import default_cache_dir
from monitor.engine import Engine
from monitor.local import UNBOUNDED
from monitor.replay.files import open_file
from monitor.replay.manifest import PartRecord
from monitor.replay.rows import Progress, Segment
from monitor.replay.run import LocalEngine, OnPart, OnRows, replay
from monitor.replay.scorer import Job, Loading
from monitor.run_facts import run_facts
from monitor.served import Served
from monitor.work_queue import Priority
from sae_core.score_cache import OwnForward

STEP_TOKENS = 2048
AIM = 0.9
COMMON = (
    "the of and to in that was his with for you had not but they have said she were which their "
    "would there been when them than then about other only some time could into made over after "
    "first great house people water little world never place found"
)


class Clock:
    """Wall-clock seconds since it was made; keeps the process's CPU seconds of each side too."""

    cpu: ClassVar[dict[str, list[float]]] = {"engine": [], "replay": []}

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self, side: str) -> float:
        """The seconds, after noting the side's CPU time."""
        self.cpu[side].append(time.process_time() - self._cpu)
        return time.perf_counter() - self._wall


class Loaded(LocalEngine):
    """The local engine on a model that is loaded once for all rounds."""

    def __init__(self, loading: Loading, served: Served) -> None:
        super().__init__(loading)
        self._served = served

    def facts(self, job: Job, progress: Progress) -> Mapping[str, Any]:
        """Without loading."""
        assert self._served is not None
        return run_facts(self._served, max_step_tokens=job.max_step_tokens)

    def close(self) -> None:
        """Nothing: the next round needs it."""


def make_texts(n: int) -> list[str]:
    """Words in random order, 4 to 200 a text, so that hardly any two begin alike."""
    chance = random.Random(0)
    words = COMMON.split()
    lengths = [min(200, max(4, round(chance.lognormvariate(3.8, 0.8)))) for _ in range(n)]
    return [" ".join(chance.choices(words, k=length)) for length in lengths]


async def engine_alone(served: Served, token_ids: Sequence[list[int]]) -> float:
    """Seconds of the engine on all of them, tokenised before."""
    engine = Engine(
        served.scorer,
        max_step_tokens=STEP_TOKENS,
        max_queue_tokens=UNBOUNDED,
        reuse_key=served.reuse_key,
    )
    engine.start()

    async def one(ids: list[int]) -> None:
        stream = engine.open_stream()
        await engine.score(OwnForward(stream, ids), priority=Priority.REPLAY)
        engine.close_stream(stream)

    clock = Clock()
    await asyncio.gather(*map(one, token_ids))
    seconds = clock.read("engine")
    engine.stop()
    return seconds


def whole_replay(loading: Loading, served: Served, file: Path, folder: Path, rows: int) -> float:
    """Seconds of a replay into a folder of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        job = Job(inputs=[open_file(file)], out=Path(out) / "out", max_step_tokens=STEP_TOKENS)
        clock = Clock()
        replay(job, Loaded(loading, served), part_rows=rows)
        return clock.read("replay")


def on_ray(loading: Loading, file: Path, folder: Path, actors: int, part_rows: int) -> str:
    """One line: how fast so many actors are once they have begun."""
    from monitor.replay.on_ray import RayEngine

    marks: list[tuple[float, int]] = []

    class Timed(RayEngine):
        def run(
            self, job: Job, segments: Sequence[Segment], on_part: OnPart, on_rows: OnRows
        ) -> None:
            def on_timed_part(part: PartRecord) -> None:
                marks.append((time.perf_counter(), part.summary.tokens))
                on_part(part)

            super().run(job, segments, on_timed_part, on_rows)

    with tempfile.TemporaryDirectory(dir=folder) as out:
        job = Job(inputs=[open_file(file)], out=Path(out) / "out", max_step_tokens=STEP_TOKENS)
        started = time.perf_counter()
        done = replay(job, Timed(loading, actors=actors), part_rows=part_rows)
        whole = time.perf_counter() - started
    begun = marks[actors - 1][0]
    steady = sum(n for _, n in marks[actors:]) / (marks[-1][0] - begun)
    return (
        f"{actors} actors: {steady:.0f} tokens/s from part {actors} on, "
        f"{whole:.0f} s in all with start and loading, {done.manifest.totals().tokens} tokens"
    )


def main() -> None:
    """Parses the flags, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part-rows", type=int, default=100)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ray", default="", help="numbers of actors, by commas")
    options = parser.parse_args()
    facts = machine() | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    facts |= {"transformers": transformers.__version__}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    loading = Loading(
        bundle=bundle_folder(options.bundle).resolve(),
        cache=default_cache_dir(),
        device=options.device,
        dtype=options.dtype,
    )
    texts = make_texts(options.texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        if options.rounds:
            say("loading")
            served = loading.load()
            ids = [served.tokenizer.encode(text) for text in texts]
            n_tokens = sum(map(len, ids))
            sides = {
                "engine": lambda: asyncio.run(engine_alone(served, ids)),
                "replay": lambda: whole_replay(loading, served, file, folder, options.part_rows),
            }
            found = in_turns("replay", sides, rounds=options.rounds, seconds=1800)
            for side, seconds in found.items():
                rates = [n_tokens / s for s in seconds]
                print(
                    f"{side}: {statistics.median(rates):.0f} tokens/s "
                    f"[{min(rates):.0f}, {max(rates):.0f}]"
                )
            share = ratio(found["engine"], found["replay"])
            pairs = paired(found["engine"], found["replay"])
            print(
                f"replay over engine: {share:.3f} (round by round {pairs['min']:.3f} to "
                f"{pairs['max']:.3f}), aimed at {AIM} "
                f"({len(texts)} texts, {n_tokens} tokens)"
            )
            cpu = {side: seconds[1:] for side, seconds in Clock.cpu.items()}  # the first warms up
            share = ratio(cpu["engine"], cpu["replay"])
            print(f"the same in CPU time, as on a single core: {share:.3f}")
        for actors in filter(None, options.ray.split(",")):
            print(on_ray(loading, file, folder, int(actors), options.part_rows))


if __name__ == "__main__":
    main()
