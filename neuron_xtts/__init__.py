"""Run coqui-tts's XTTS v2 on AWS Neuron, or faster on the host CPU, without editing coqui-tts."""

from neuron_xtts.api import compile, is_patched, patch, patched, report, speak_many, unpatch
from neuron_xtts.buckets import BucketPlan
from neuron_xtts.errors import (
    ArtifactError,
    FallbackError,
    FrontendMissingError,
    ModelNotReadyError,
    NeuronMissingError,
    NeuronXttsError,
    QueueFullError,
    UnsupportedVersionError,
    VoiceError,
)
from neuron_xtts.guard import Guard
from neuron_xtts.precision import Precision
from neuron_xtts.report import Report
from neuron_xtts.version import __version__
from neuron_xtts.voice import Voice

__all__ = [
    "ArtifactError",
    "BucketPlan",
    "FallbackError",
    "FrontendMissingError",
    "Guard",
    "ModelNotReadyError",
    "NeuronMissingError",
    "NeuronXttsError",
    "Precision",
    "QueueFullError",
    "Report",
    "UnsupportedVersionError",
    "Voice",
    "VoiceError",
    "__version__",
    "compile",
    "is_patched",
    "patch",
    "patched",
    "report",
    "speak_many",
    "unpatch",
]
