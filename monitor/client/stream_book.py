"""One stream's bookkeeping on the caller's side, for both clients."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from monitor.errors import InvalidRequestError, MonitorError, NotReadyError
from monitor.records import Decision, StreamOpen, StreamResume, StreamUpdate
from monitor.rpc.convert import decisions, requests
from protos.saemonitor.v1 import monitor_pb2 as pb

MAX_HELD = 262_144
"""Tokens, or characters of text, that a resumable stream keeps to send again: more than a server
takes by default."""

RESEND_PIECE = 65_536
"""Tokens or characters in one message where they are sent again: within a server's 4 MiB."""


class StreamBook:
    """Where one stream stands on the caller's side: what was sent, what came back.

    A resumable one keeps the last `MAX_HELD` tokens or characters, to send them again.
    """

    def __init__(self, opening: StreamOpen) -> None:
        self.session_id = ""
        self.summary: Decision | None = None
        self.error: MonitorError | None = None
        """Why the server ended the stream."""
        self.ended = False
        """Whether the caller has ended the input."""
        self.n_resumed = 0
        """Times that the stream went on where it had broken off."""
        self.n_restarted = 0
        """Times that it was sent anew from its beginning, under another decision."""
        self._opening = opening
        self._n_sent = 0
        self._kind: str | None = None
        self._held: deque[Sequence[int] | str] = deque()
        self._n_held = 0
        self._processed_index = 0
        self._n_alerts = 0

    def opening(self, *, resume: bool = False) -> pb.ScoreStreamRequest:
        """The first message of a call: of the first one, or of one that reopens the stream."""
        opening = self._opening
        if self.session_id:
            opening = replace(opening, session_id=self.session_id)
        if not resume:
            return requests.stream_open_to_wire(opening)
        stands = StreamResume(
            start_index=self._n_sent - self._n_held,
            processed_index=self._processed_index,
            n_alerts=self._n_alerts,
        )
        return requests.stream_open_to_wire(replace(opening, resume=stands))

    def may_resume(self, error: MonitorError) -> bool:
        """Whether the stream can go on after a call that ended so."""
        return self._opening.resumable and isinstance(error, NotReadyError)

    def restart(self) -> bool:
        """Forgets what came back, to send everything anew; False where it is not all held."""
        if self._n_held < self._n_sent:
            return False
        self._processed_index = self._n_alerts = 0
        return True

    def reopened(self, next_index: int, *, resumed: bool) -> list[pb.ScoreStreamRequest]:
        """What a call that reopened the stream has to send again."""
        self.summary = None  # of a server that drained
        self.n_resumed += resumed
        self.n_restarted += not resumed
        held = self._all_held()
        first = self._n_sent - len(held)
        again = [
            _chunk(index, held[index - first : index - first + RESEND_PIECE])
            for index in range(next_index, self._n_sent, RESEND_PIECE)
        ]
        return [*again, END] if self.ended else again

    def chunk(self, token_ids: Sequence[int] | None, text: str | None) -> pb.ScoreStreamRequest:
        """The next piece, with its start index."""
        if self.error is not None:
            raise self.error
        if self.summary is not None and not self._opening.resumable:
            raise InvalidRequestError("send", "a stream that has its summary", "an open stream")
        wire = requests.stream_chunk_to_wire(
            requests.StreamChunk(
                start_index=self._n_sent,
                token_ids=None if token_ids is None else tuple(token_ids),
                text=text,
            )
        )
        kind = "text" if text is not None else "token_ids"
        if self._kind not in (None, kind):
            raise InvalidRequestError("send", f"{kind} after {self._kind}", "one kind a stream")
        self._kind = kind
        piece: Sequence[int] | str = text if text is not None else tuple(token_ids or ())
        self._n_sent += len(piece)
        if self._opening.resumable:
            self._hold(piece)
        return wire

    def reply(self, wire: pb.ScoreStreamResponse) -> StreamUpdate | None:
        """The update in a reply; `opened` and `summary` are kept here."""
        kind = wire.WhichOneof("reply")
        if kind == "opened":
            self.session_id = wire.opened.session_id
            return None
        if kind == "summary":
            self.summary = decisions.decision_from_wire(wire.summary)
            return None
        update = decisions.update_from_wire(wire)
        self._processed_index = update.processed_index
        self._n_alerts += len(update.new_alerts)
        return update

    def decision(self) -> Decision:
        """The summary; the reason where the stream ended without one."""
        if self.summary is not None:
            return self.summary
        raise self.error or MonitorError("stream: ended without a summary")

    def _all_held(self) -> Sequence[int] | str:
        if self._kind == "text":
            return "".join(str(piece) for piece in self._held)
        return [int(token_id) for piece in self._held for token_id in piece]

    def _hold(self, piece: Sequence[int] | str) -> None:
        self._held.append(piece)
        self._n_held += len(piece)
        while self._n_held > MAX_HELD:
            self._n_held -= len(self._held.popleft())


def _chunk(start_index: int, piece: Sequence[int] | str) -> pb.ScoreStreamRequest:
    return requests.stream_chunk_to_wire(
        requests.StreamChunk(
            start_index=start_index,
            token_ids=None if isinstance(piece, str) else tuple(piece),
            text=piece if isinstance(piece, str) else None,
        )
    )


FLUSH = pb.ScoreStreamRequest(flush=pb.StreamFlush())
END = pb.ScoreStreamRequest(end=pb.StreamEnd())
