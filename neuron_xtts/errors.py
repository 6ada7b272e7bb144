"""Errors: each says what was found, what was expected and the remedy."""

from __future__ import annotations


class NeuronXttsError(Exception):
    """Base class of every error this library raises on its own account."""


class UnsupportedVersionError(NeuronXttsError, ImportError):
    """An installed package is outside the range this library was written for."""


class ModelNotReadyError(NeuronXttsError, ValueError):
    """The object is of a known type, but holds no XTTS model that can synthesize."""


class FrontendMissingError(NeuronXttsError, ImportError):
    """No XLA frontend is installed to lower graphs with."""


class ExtraMissingError(NeuronXttsError, ImportError):
    """What an optional extra of this library installs is not there."""


class NeuronMissingError(NeuronXttsError, RuntimeError):
    """Neuron's packages, its driver or a device are not there."""


class ArtifactError(NeuronXttsError, RuntimeError):
    """A compiled graph in the store cannot be used."""


class VoiceError(NeuronXttsError, ValueError):
    """A voice cannot be spoken with: its file holds none, or it was made by other weights."""


class QueueFullError(NeuronXttsError, RuntimeError):
    """As many calls decode and wait as may."""

    def __init__(self, slots: int, queue: int) -> None:
        self._made_of = slots, queue
        super().__init__(
            f"{slots} rows decode and as many calls wait as may, {queue}. Call again later, or let more of them wait: "
            "patch(model, queue=...)"
        )

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[int, int]]:
        return type(self), self._made_of


class FallbackError(NeuronXttsError, RuntimeError):
    """Raised with ``strict=True`` where a route would have fallen back to coqui-tts.

    Attributes:
        route: the route, such as ``GPT.generate``.
        reason: why its graphs could not serve the call.
    """

    def __init__(self, route: str, reason: str) -> None:
        super().__init__(
            f"{route} cannot run on compiled graphs: {reason}. "
            "Change the call, or patch with strict=False to let coqui-tts serve such calls."
        )
        self.route = route
        self.reason = reason

    def __reduce__(self) -> tuple[type[FallbackError], tuple[str, str]]:
        return type(self), (self.route, self.reason)


class Fallback(Exception):  # noqa: N818 - a signal between a route and the dispatcher, never seen by users
    """Says that coqui's own method must serve this call, and why."""


class NotFinite(Fallback):
    """A graph gave numbers that are not finite: its inputs have such, or something is wrong where it runs."""


def describe(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
