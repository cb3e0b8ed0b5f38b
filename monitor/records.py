"""What flows through the service: frozen records, and nothing that knows the network.

A request becomes a `ScoreRequest`, the engine turns it into numbers, the policy into a
`Decision`; the decision goes to the metrics, the audit log and the reply.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Stage(StrEnum):
    """Which side of the conversation a token belongs to; scored apart from each other."""

    PROMPT = "prompt"
    COMPLETION = "completion"


class Verdict(StrEnum):
    """What a policy says of one cluster or one request; ordered by `Verdict.rank`."""

    PASS = "pass"
    FLAG = "flag"
    ALERT = "alert"

    @property
    def rank(self) -> int:
        """0 for pass, 1 for flag, 2 for alert."""
        return ("pass", "flag", "alert").index(self.value)


class Severity(StrEnum):
    """How grave an alert of a cluster is; a property of the cluster, not of the score."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class Action(StrEnum):
    """What the caller should do; `BLOCK` only under a policy whose mode is enforce."""

    ALLOW = "allow"
    FLAG = "flag"
    BLOCK = "block"


class Mode(StrEnum):
    """Whether a policy only observes or may ask the caller to block."""

    MONITOR = "monitor"
    ENFORCE = "enforce"


class AuditLevel(StrEnum):
    """How much of a decision the audit log stores; each holds what those before it hold."""

    NONE = "none"
    METADATA = "metadata"
    """Who, when, which versions, verdicts, counts and timings; no scores."""
    SCORES = "scores"
    """And every score, each token's too, and the attribution of what alerted."""
    TOKENS = "tokens"
    """And the token ids, sealed."""
    CONTENT = "content"
    """And the texts of the tokens, sealed."""

    @property
    def rank(self) -> int:
        """0 for none, rising with what is stored."""
        return ("none", "metadata", "scores", "tokens", "content").index(self.value)


class UnscoredReason(StrEnum):
    """Why a received token got no score; a closed set, used as a metric label."""

    OVERLOAD = "overload"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    INVALID = "invalid"
    ERROR = "error"
    EXCLUDED = "excluded"
    """BOS, template and system tokens: read by the model, left out of scores by role."""
    NOT_READY = "not_ready"


class StepFailure(StrEnum):
    """Why a step of the engine failed; a closed set, used as a metric label."""

    MEMORY = "memory"
    NOT_FINITE = "not_finite"
    INPUT = "input"
    """Ids or lengths that the model cannot take."""
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool; user and tool turns are prompt, assistant is completion."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One thing to score whole. Exactly one of `text`, `messages`, `token_ids` is set."""

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    """Vocabulary ids, taken as they are (no BOS is added)."""
    tokenizer_fingerprint: str | None = None
    """Must equal the server's when `token_ids` is set."""
    stage: Stage = Stage.PROMPT
    """Stage of `text` and `token_ids`; messages bring their own by role."""
    policy: str = "default"
    want_tokens: bool = False
    want_attribution: bool = False
    caller: str | None = None
    """Free-text identity of the caller; hashed before it is stored."""
    model: str | None = None
    """The served model's id; None means the one that is served, another is NotFoundError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamResume:
    """Where the caller of a stream stood when its call broke off."""

    start_index: int = 0
    """The lowest index (tokens, or characters of text) from which it can send again."""
    processed_index: int = 0
    """Of the last update that arrived."""
    n_alerts: int = 0
    """Alerts that arrived in updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOpen:
    """The first message of a stream: what the tokens that follow are."""

    session_id: str = ""
    """The caller's name for the stream, echoed in replies; empty lets the server choose."""
    stage: Stage = Stage.COMPLETION
    policy: str = "default"
    tokenizer_fingerprint: str | None = None
    context_messages: tuple[Message, ...] = ()
    """Turns that precede the stream; scored in their own stages before the first token."""
    want_tokens: bool = False
    want_attribution: bool = False
    caller: str | None = None
    model: str | None = None
    resumable: bool = False
    """Whether the stream waits for its caller where the call breaks off."""
    resume: StreamResume | None = None
    """Reopens the stream `session_id` in place of opening one."""


class ActivationDtype(StrEnum):
    """Floating-point type of given activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def n_bytes(self) -> int:
        """Size of one number."""
        return 4 if self is ActivationDtype.FLOAT32 else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationTensor:
    """The raw activations of one hook point, as Hugging Face's model has them."""

    hook_point: str
    dtype: ActivationDtype
    width: int
    """Numbers in a row; a row is a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationsOpen:
    """One thing to score whole, from activations that the caller's own forward pass made."""

    model_digest: str
    """Of the model that made them; must be the served one's."""
    n_tokens: int
    """Rows of every tensor."""
    tensors: tuple[ActivationTensor, ...]
    """One for each hook point that the bundle reads."""
    token_ids: tuple[int, ...] | None = None
    """None where they are not known; every row is then scored unless `stages` says otherwise."""
    tokenizer_fingerprint: str | None = None
    """Must equal the server's when `token_ids` is set."""
    stage: Stage = Stage.PROMPT
    stages: tuple[Stage | None, ...] = ()
    """In place of `stage`, one a row; None is left out of scores."""
    policy: str = "default"
    want_tokens: bool = False
    want_attribution: bool = False
    caller: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationsChunk:
    """Consecutive rows of one tensor."""

    tensor: int
    """Index in the tensors of the opening."""
    start_row: int
    n_rows: int
    data: bytes
    """Little-endian, row after row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """The scores of one token, emitted in order of position; logits, one per cluster."""

    position: int
    """Index in the request, from 0, BOS and template tokens included."""
    token_id: int | None
    """None where activations were given without ids."""
    text: str
    """The token's own text; empty where the tokenizer gives none."""
    stage: Stage | None
    """None where the token is excluded from scores by its role."""
    fused: tuple[float, ...]
    dense: tuple[float, ...]
    sae: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentContribution:
    """One latent's exact share of a cluster's score, summed over the tokens that made it."""

    sae: str
    latent_id: int
    label: str
    contribution: float
    """Logit units; all contributions, `dense`, `bias` and `gate` sum to the score."""
    positions: tuple[int, ...]
    """Tokens at which the latent was active inside the window that made the score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """Why a cluster's score is what it is: terms that sum to the score within 1e-5 relative."""

    latents: tuple[LatentContribution, ...]
    """Largest share first; every latent with a non-zero share is present."""
    dense: float
    bias: float
    gate: float
    """What the evidence gate took off (0 when the score is not capped); never positive."""
    window_start: int
    """First position of the window that made the score."""
    window_stop: int
    """One past its last position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterResult:
    """One cluster's view of one request; aggregated logits."""

    cluster: str
    fused: float
    dense: float
    sae: float
    verdict: Verdict
    severity: Severity
    stage: Stage | None
    """The stage whose score is the higher one; None when no token was scored for the cluster."""
    first_crossing: int | None
    """First position at which the running score reached the flag threshold."""
    calibrated: bool
    """False where no calibration artefact covers this exact model, SAE, dtype and backend."""
    stale: bool = False
    """True where the cluster has left the bounds of its canaries or of its calibration."""
    benign_p: float | None = None
    """Share of benign calibration texts that score at least this high; None without calibration."""
    attribution: Attribution | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overall:
    """The policy's one number from each score source: 0 at flag, 1 at alert, larger is riskier.

    NaN where the source scored nothing.
    """

    fused: float
    dense: float
    sae: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """How unusual a text is for the SAEs: spreads above the mean of benign texts of its length.

    Informational; nothing is decided on them. None where not measured.
    """

    registered_l0: float | None
    """Active registered latents a token."""
    distance: float | None
    """Of the registered latents' mean activations from those of benign texts."""
    l0: float | None
    """Active latents of the whole SAE a token, where this text was sampled."""
    fvu: float | None
    """Fraction of variance unexplained, where this text was sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Tokens received, scored, and not scored by reason; received == scored + sum(unscored)."""

    received: int = 0
    scored: int = 0
    unscored: dict[UnscoredReason, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds spent in each stage of one request, and in total."""

    tokenize_seconds: float = 0.0
    queue_seconds: float = 0.0
    forward_seconds: float = 0.0
    encode_seconds: float = 0.0
    """SAE encoding and heads."""
    score_seconds: float = 0.0
    """Aggregation and policy."""
    audit_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Which exact artefacts made a decision."""

    model: str
    model_digest: str
    tokenizer_fingerprint: str
    bundle: str
    """name@version."""
    bundle_digest: str
    dtype: str
    """Of the forward pass, or of given activations."""
    backend: str
    """What ran the forward pass; `caller` where activations were given."""
    server_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleResult:
    """A joint rule that fired."""

    rule: str
    severity: Severity


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One cluster (or rule) that reached its alert threshold in one request or stream."""

    decision_id: str
    cluster: str
    """Cluster id, or `rule:<id>` for a joint rule."""
    severity: Severity
    stage: Stage | None
    score: float
    position: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The whole answer to one request or one stream."""

    decision_id: str
    verdict: Verdict
    action: Action
    mode: Mode
    policy: str
    overall: Overall
    clusters: tuple[ClusterResult, ...]
    rules: tuple[RuleResult, ...]
    alerts: tuple[Alert, ...]
    coverage: Coverage
    timings: Timings
    provenance: Provenance
    tokens: tuple[TokenScores, ...] = ()
    anomaly: Anomaly | None = None
    """How unusual the text is; None without a calibration baseline."""
    session_id: str = ""
    """The stream's name; empty for a unary request."""
    sequence: int | None = None
    """The audit record's sequence number; None where nothing is recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Tokens of a stream that were not scored, and why; the stream goes on."""

    start_index: int
    stop_index: int
    reason: UnscoredReason
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamUpdate:
    """A coalesced reply inside a stream: everything scored since the last one."""

    decision_id: str
    session_id: str
    start_index: int
    """First position this update speaks of."""
    processed_index: int
    """One past the last position scored so far; the caller's watermark."""
    verdict: Verdict
    action: Action
    overall: Overall
    clusters: tuple[ClusterResult, ...]
    """Running results of every cluster up to `processed_index`."""
    new_alerts: tuple[Alert, ...]
    tokens: tuple[TokenScores, ...]
    coverage: Coverage
    gap: Gap | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentInfo:
    """A registered latent as the registry shows it."""

    sae: str
    latent_id: int
    weight: float
    scale: float
    label: str
    baseline_rate: float | None = None
    """Share of benign calibration tokens on which it fires; None without a baseline."""
    live_rate: float | None = None
    """The same of the last window of traffic; None before the first has ended."""
    drift: int = 0
    """1 where it fires more than twice as often in the last window of traffic, -1 less than half
    as often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterInfo:
    """A registered cluster as the registry shows it."""

    cluster: str
    title: str
    severity: Severity
    stages: tuple[Stage, ...]
    latents: tuple[LatentInfo, ...]
    has_dense_head: bool
    aggregate: str
    flag: float
    alert: float
    clear: float
    calibrated: bool
    stale_reasons: tuple[str, ...] = ()
    """Why it has left its bounds; none where it is within them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What one request may ask for."""

    max_message_bytes: int
    max_request_tokens: int
    max_queue_tokens: int
    max_streams: int
    resume_seconds: float = 0.0
    """How long a resumable stream waits to be reopened; 0 where none is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What the server is, for clients and for the registry page."""

    provenance: Provenance
    limits: ServerLimits
    policies: tuple[str, ...]
    clusters: tuple[str, ...]
    hook_points: tuple[str, ...]
    vocab_size: int
    ready: bool
    stale_clusters: tuple[str, ...] = ()
    """Ids of the clusters that have left their bounds."""
