"""The proxy: a wrapt FunctionWrapper in a module's ``__dict__``, installed, removed, copied and pickled."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import wrapt
from torch import nn

logger = logging.getLogger(__name__)

_ABSENT = object()


class RouteProxy(wrapt.FunctionWrapper):  # type: ignore[type-arg]  # not subscriptable before wrapt 2.1
    """Stands for a bound method of one module and hands its calls to a route.

    It lives in the instance's ``__dict__``, so the class and every other instance stay as they are. A copy or a
    pickle of the module gets the wrapped method instead: what it would have had without a patch.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # copy.deepcopy binds the method to the copied module, which is in memo before its __dict__ is copied.
        return copy.deepcopy(self.__wrapped__, memo)

    def __copy__(self) -> Any:
        return self.__wrapped__

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Not a function of ours: the pickle must load where this library is not installed.
        return copy.copy, (self.__wrapped__,)


class Installation:
    """One proxy on one method of one module, and the way back."""

    def __init__(self, module: nn.Module, method: str, handler: Callable[..., Any]) -> None:
        """Install the proxy.

        Args:
            module: the module whose method is routed.
            method: its name.
            handler: ``handler(wrapped, args, kwargs)``, called instead of the method.
        """
        self.module = module
        self.method = method
        self.enabled = True
        self.previous = module.__dict__.get(method, _ABSENT)

        def wrapper(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return handler(wrapped, args, kwargs) if self.enabled else wrapped(*args, **kwargs)

        self.proxy = RouteProxy(getattr(module, method), wrapper)
        # Not setattr: nn.Module.__setattr__ looks at types, and a proxy answers for the type it stands for.
        module.__dict__[method] = self.proxy

    @property
    def live(self) -> bool:
        """Whether a call of the method still arrives here, directly or through a wrapper put on top."""
        return self.enabled and self.method in self.module.__dict__

    def remove(self) -> None:
        """Put back what was there before. Whatever somebody put on top stays, and finds the proxy switched off."""
        self.enabled = False
        current = self.module.__dict__.get(self.method, _ABSENT)
        if current is self.proxy:
            if self.previous is _ABSENT:
                del self.module.__dict__[self.method]
            else:
                self.module.__dict__[self.method] = self.previous
        elif current is not _ABSENT:
            logger.warning(
                "%s.%s was wrapped again after patch(): that wrapper stays, and neuron_xtts underneath it is off. "
                "Unpatch in the reverse order of patching to have both gone.",
                type(self.module).__name__,
                self.method,
            )
