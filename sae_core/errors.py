"""Everything `sae_core` raises on purpose.

    SAECoreError
    ├── HookPointError     a hook point that cannot be parsed, or that the model does not have
    ├── SAEFormatError     an SAE checkpoint that is missing, malformed or not understood
    ├── ShapeError         two shapes that must agree and do not
    ├── ModelLoadError     a language-model folder that is missing, damaged or not supported
    ├── TokenizerError     a tokenizer that cannot be read, or text it cannot render
    ├── TokenError         token ids or positions that the model cannot take
    ├── HeadError          a cluster or dense head that contradicts itself or its SAE
    ├── RankError          a process of a tensor-parallel model is gone or does not answer
    ├── FidelityError      what an SAE is measured against is missing or malformed
    ├── ExportError        what cannot be exported, or an exported graph that is not the right one
    ├── TrainingError      too little data, an impossible setting, a checkpoint of another run
    │   └── TrainingStopped    the user stopped it; what it has done is in its checkpoint
    └── ScorerError        numbers that are not finite where they must be

Messages name the thing, what was found and what was expected.
"""

from __future__ import annotations


class SAECoreError(Exception):
    """Root of the errors of this package; the message fits one line."""


class HookPointError(SAECoreError):
    """A hook point's text cannot be parsed, or the model has no such place."""


class SAEFormatError(SAECoreError):
    """An SAE checkpoint is missing, malformed, or of a kind that is not understood."""


class ShapeError(SAECoreError):
    """Two shapes that must agree do not, such as an SAE's d_in and the model's d_model."""


class ModelLoadError(SAECoreError):
    """A language-model folder is missing, unreadable, damaged, or not of a supported family."""


class TokenizerError(SAECoreError):
    """A tokenizer cannot be read, or a conversation cannot be rendered with it."""


class TokenError(SAECoreError):
    """Token ids outside the vocabulary, or more tokens than the model has positions."""


class RankError(SAECoreError):
    """A process that holds a part of a tensor-parallel model is gone or does not answer."""


class HeadError(SAECoreError):
    """A cluster or dense head contradicts itself, its SAE, or its hook point."""


class FidelityError(SAECoreError):
    """What an SAE's fidelity is to be measured against is missing, malformed, or too small."""


class ExportError(SAECoreError):
    """A model or encoder cannot be exported, or an exported graph is damaged or another one."""


class TrainingError(SAECoreError):
    """Training cannot go on: too little data, a bad setting, a checkpoint of another run."""


class TrainingStopped(TrainingError):
    """Training was asked to stop before its end; the message says how to take it up again."""


class ScorerError(SAECoreError):
    """A residual stream or score is not finite; the message names the first position."""
