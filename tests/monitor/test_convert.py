from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import pytest

from monitor.errors import InvalidRequestError, MonitorError
from monitor.records import (
    ActivationsChunk,
    ActivationsOpen,
    ClusterInfo,
    Decision,
    Message,
    Provenance,
    ScoreRequest,
    ServerInfo,
    Stage,
    StreamOpen,
    StreamUpdate,
)
from monitor.rpc.convert import activations, decisions, enums, registry, requests
from protos.saemonitor.v1 import monitor_pb2 as pb

SEEDS = range(30)
MakeRecord = Callable[[type[Any], int], Any]


@pytest.mark.parametrize(
    ("cls", "to_wire", "from_wire"),
    [
        (Decision, decisions.decision_to_wire, decisions.decision_from_wire),
        (StreamUpdate, decisions.update_to_wire, decisions.update_from_wire),
        (ServerInfo, registry.server_info_to_wire, registry.server_info_from_wire),
        (ClusterInfo, registry.cluster_info_to_wire, registry.cluster_info_from_wire),
        (Provenance, registry.provenance_to_wire, registry.provenance_from_wire),
        (StreamOpen, requests.stream_open_to_wire, requests.stream_open_from_wire),
        (
            ActivationsOpen,
            activations.activations_open_to_wire,
            activations.activations_open_from_wire,
        ),
    ],
)
def test_every_field_survives_the_wire(
    make_record: MakeRecord,
    cls: type[Any],
    to_wire: Callable[[Any], Any],
    from_wire: Callable[[Any], Any],
) -> None:
    for seed in SEEDS:
        record = make_record(cls, seed)
        wire = to_wire(record)
        parsed = type(wire).FromString(wire.SerializeToString())
        assert from_wire(parsed) == record


@pytest.mark.parametrize("kind", ["text", "messages", "token_ids"])
def test_every_field_of_a_request_survives_the_wire(make_record: MakeRecord, kind: str) -> None:
    inputs: dict[str, Any] = {
        "text": "grüße",
        "messages": (Message(role="user", content="hi"),),
        "token_ids": (0, 7, 2**32 - 1),
    }
    for seed in SEEDS:
        only = {name: inputs[name] if name == kind else None for name in inputs}
        request = dataclasses.replace(make_record(ScoreRequest, seed), **only)
        wire = requests.score_request_to_wire(request)
        parsed = pb.ScoreRequest.FromString(wire.SerializeToString())
        assert requests.score_request_from_wire(parsed) == request


@pytest.mark.parametrize(
    "request_record",
    [ScoreRequest(text=""), ScoreRequest(messages=()), ScoreRequest(token_ids=())],
)
def test_an_empty_input_is_still_the_input_that_was_set(request_record: ScoreRequest) -> None:
    wire = requests.score_request_to_wire(request_record)
    parsed = pb.ScoreRequest.FromString(wire.SerializeToString())
    assert requests.score_request_from_wire(parsed) == request_record


def test_what_a_request_leaves_out_gets_its_default() -> None:
    assert requests.score_request_from_wire(pb.ScoreRequest(text="hi")) == ScoreRequest(text="hi")
    opening = pb.ScoreStreamRequest(open=pb.StreamOpen())
    assert requests.stream_open_from_wire(opening) == StreamOpen()


@pytest.mark.parametrize(
    "chunk",
    [
        requests.StreamChunk(start_index=0, token_ids=(1, 2, 3)),
        requests.StreamChunk(start_index=2**40, text="漢字"),
        requests.StreamChunk(start_index=3, token_ids=()),
        requests.StreamChunk(start_index=3, text=""),
    ],
)
def test_a_chunk_survives_the_wire(chunk: requests.StreamChunk) -> None:
    wire = requests.stream_chunk_to_wire(chunk)
    parsed = pb.ScoreStreamRequest.FromString(wire.SerializeToString())
    assert requests.stream_chunk_from_wire(parsed) == chunk


def test_a_chunk_of_activations_survives_the_wire() -> None:
    chunk = ActivationsChunk(tensor=3, start_row=2**40, n_rows=2, data=bytes(range(256)))
    wire = activations.activations_chunk_to_wire(chunk)
    parsed = pb.ScoreActivationsRequest.FromString(wire.SerializeToString())
    assert activations.activations_chunk_from_wire(parsed) == chunk


def test_bad_activations_are_refused_by_field_found_expected() -> None:
    nothing, chunk = pb.ScoreActivationsRequest(), pb.ScoreActivationsRequest()
    chunk.chunk.SetInParent()
    unset, unknown = pb.ScoreActivationsRequest(), pb.ScoreActivationsRequest()
    unset.open.tensors.add(hook_point="blocks.0.hook_resid_post")
    unknown.open.stages.append(pb.STAGE_PROMPT)
    unknown.open.MergeFromString(b"\x3a\x01\x09")  # field 7, packed, varint 9
    opening = activations.activations_open_from_wire
    expected = {
        "first activations message: found none, expected open": lambda: opening(nothing),
        "first activations message: found chunk, expected open": lambda: opening(chunk),
        "tensors[0].dtype: found 0, expected one of ACTIVATION_DTYPE_FLOAT32 (1), "
        "ACTIVATION_DTYPE_BFLOAT16 (2), ACTIVATION_DTYPE_FLOAT16 (3)": lambda: opening(unset),
        "stages[1]: found 9, expected STAGE_UNSPECIFIED (0), _PROMPT (1), _COMPLETION (2)": (
            lambda: opening(unknown)
        ),
        "activations message after the first: found open, expected chunk": (
            lambda: activations.activations_chunk_from_wire(unset)
        ),
    }
    for message, action in expected.items():
        assert _refusal(action) == message


def test_signs_are_no_chunks() -> None:
    flush, end = (
        pb.ScoreStreamRequest(flush=pb.StreamFlush()),
        pb.ScoreStreamRequest(end=pb.StreamEnd()),
    )
    assert requests.stream_chunk_from_wire(flush) is requests.StreamSign.FLUSH
    assert requests.stream_chunk_from_wire(end) is requests.StreamSign.END


def _refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        action()
    return str(caught.value)


def test_bad_requests_are_refused_by_field_found_expected() -> None:
    text_and_ids = ScoreRequest(text="a", token_ids=(1,))
    chunk = requests.StreamChunk(start_index=0)
    tokens_first = pb.ScoreStreamRequest(tokens=pb.StreamTokens(text="a"))
    second_open = pb.ScoreStreamRequest(open=pb.StreamOpen())
    unknown_stage = pb.ScoreRequest(text="a")
    unknown_stage.MergeFromString(b"\x28\x09")  # field 5, varint 9
    expected = {
        "input: found none, expected one of text, messages, token_ids": (
            lambda: requests.score_request_from_wire(pb.ScoreRequest())
        ),
        "input: found text and token_ids, expected exactly one of text, messages, token_ids": (
            lambda: requests.score_request_to_wire(text_and_ids)
        ),
        "token_ids[1]: found -1, expected an id from 0 to 4294967295": (
            lambda: requests.score_request_to_wire(ScoreRequest(token_ids=(1, -1)))
        ),
        "text: found a lone surrogate at character 1, expected text that can be written as UTF-8": (
            lambda: requests.score_request_to_wire(ScoreRequest(text="a\ud800"))
        ),
        "stage: found 9, expected STAGE_PROMPT (1) or STAGE_COMPLETION (2)": (
            lambda: requests.score_request_from_wire(unknown_stage)
        ),
        "first stream message: found tokens, expected open": (
            lambda: requests.stream_open_from_wire(tokens_first)
        ),
        "first stream message: found none, expected open": (
            lambda: requests.stream_open_from_wire(pb.ScoreStreamRequest())
        ),
        "stream message after the first: found open, expected one of tokens, flush, end": (
            lambda: requests.stream_chunk_from_wire(second_open)
        ),
        "tokens.content: found none, expected exactly one of token_ids, text": (
            lambda: requests.stream_chunk_to_wire(chunk)
        ),
        "tokens.content: found none, expected one of token_ids, text": (
            lambda: requests.stream_chunk_from_wire(
                pb.ScoreStreamRequest(tokens=pb.StreamTokens(start_index=1))
            )
        ),
    }
    assert [_refusal(action) for action in expected.values()] == list(expected)


@pytest.mark.parametrize(
    ("table", "wire_enum"),
    [
        (enums.STAGES, pb.Stage),
        (enums.VERDICTS, pb.Verdict),
        (enums.SEVERITIES, pb.Severity),
        (enums.ACTIONS, pb.Action),
        (enums.MODES, pb.Mode),
        (enums.UNSCORED_REASONS, pb.UnscoredReason),
        (activations.DTYPES, pb.ActivationDtype),
    ],
)
def test_every_enum_member_has_its_own_number(table: dict[Any, int], wire_enum: Any) -> None:
    enum: type[StrEnum] = type(next(iter(table)))
    members = list(enum)
    assert list(table) == members
    names = [wire_enum.Name(number) for number in table.values()]
    prefix = wire_enum.Name(0).removesuffix("UNSPECIFIED")
    assert names == [prefix + member.name for member in members]
    assert sorted(table.values()) == sorted(set(wire_enum.values()) - {0})


def test_a_reply_that_a_client_cannot_read_is_an_error_not_a_guess(
    make_record: MakeRecord,
) -> None:
    with pytest.raises(MonitorError, match=r"enum number 0.*pass, flag, alert.*server is newer"):
        decisions.decision_from_wire(pb.Decision())
    with pytest.raises(MonitorError, match="stream reply: found none, expected scores or gap"):
        decisions.update_from_wire(pb.ScoreStreamResponse())
    seed = next(s for s in SEEDS if make_record(Decision, s).tokens)
    ragged = decisions.decision_to_wire(make_record(Decision, seed))
    ragged.tokens.fused.append(1.0)
    with pytest.raises(MonitorError, match=r"reply tokens\.fused: found \d+ entries, expected \d+"):
        decisions.decision_from_wire(ragged)


def test_a_token_of_a_long_reply_takes_few_bytes(make_record: MakeRecord) -> None:
    seed = next(s for s in SEEDS if len(make_record(Decision, s).clusters) == 3)
    decision = make_record(Decision, seed)
    token = dataclasses.replace(
        make_record(Decision, next(s for s in SEEDS if make_record(Decision, s).tokens)).tokens[0],
        stage=Stage.PROMPT,
        text="word",
        token_id=100_000,
        fused=(1.0,) * 3,
        dense=(1.0,) * 3,
        sae=(1.0,) * 3,
    )
    tokens = tuple(dataclasses.replace(token, position=i) for i in range(1000))
    bare = len(
        decisions.decision_to_wire(dataclasses.replace(decision, tokens=())).SerializeToString()
    )
    full = len(
        decisions.decision_to_wire(dataclasses.replace(decision, tokens=tokens)).SerializeToString()
    )
    assert (full - bare) / 1000 < 3 * 3 * 4 + 13  # the logits, and 13 for id, position, text, stage
