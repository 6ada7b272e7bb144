"""Run coqui-tts's XTTS v2 on AWS Neuron, or faster on the host CPU, without editing coqui-tts."""

from neuron_xtts.api import is_patched, patch, patched, report, unpatch
from neuron_xtts.buckets import BucketPlan
from neuron_xtts.errors import (
    FallbackError,
    FrontendMissingError,
    ModelNotReadyError,
    NeuronXttsError,
    UnsupportedVersionError,
)
from neuron_xtts.report import Report
from neuron_xtts.version import __version__

__all__ = [
    "BucketPlan",
    "FallbackError",
    "FrontendMissingError",
    "ModelNotReadyError",
    "NeuronXttsError",
    "Report",
    "UnsupportedVersionError",
    "__version__",
    "is_patched",
    "patch",
    "patched",
    "report",
    "unpatch",
]
