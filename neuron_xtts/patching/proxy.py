"""The proxy: a wrapt FunctionWrapper in a module's ``__dict__``, installed, removed, copied and pickled."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Collection
from typing import Any

import wrapt
from torch import nn

logger = logging.getLogger(__name__)

_ABSENT = object()

Handler = Callable[..., Any]


class RouteProxy(wrapt.FunctionWrapper):  # type: ignore[type-arg]  # not subscriptable before wrapt 2.1
    """Stands for a bound method of one module and hands its calls to a route.

    It lives in the instance's ``__dict__``, so the class and every other instance stay as they are. A copy or a
    pickle of the module gets the wrapped method instead: what it would have had without a patch.

    Attributes:
        _self_owner: kept alive.
        _self_previous: what was in the ``__dict__`` in its place. Held here and not by `Installation`, because bound
            methods lead back to the module.
    """

    _self_owner: object = None
    _self_previous: Any = _ABSENT

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        # copy.deepcopy binds the method to the copied module, which is in memo before its __dict__ is copied.
        return copy.deepcopy(self.__wrapped__, memo)

    def __copy__(self) -> object:
        return self.__wrapped__

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Not a function of ours: the pickle must load where this library is not installed.
        return copy.copy, (self.__wrapped__,)


class Installation:
    """A proxy on one method of one module, and the way back. It does not keep the module alive.

    Args:
        module: the module whose method is to be routed.
        method: its name.

    Raises:
        AttributeError: there is no such method.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        if not hasattr(module, method):
            raise AttributeError(f"a {type(module).__name__} without {method}() cannot be patched")
        self._module = weakref.ref(module)
        self._proxy: weakref.ref[RouteProxy] | None = None
        self.method = method
        self.enabled = False

    def install(self, handler: Handler, owner: object = None, over: Installation | None = None) -> Installation:
        """Put the proxy in place.

        Args:
            handler: ``handler(wrapped, args, kwargs)``, called instead of the method.
            owner: kept alive as long as the proxy is.
            over: whose proxy gives way, at once, if nobody has put anything on top. Who got hold of that before goes on
                to call its handler.

        Returns:
            itself.
        """
        module = self._module()
        if module is None:
            raise ReferenceError(f"the module whose {self.method} is to be routed is gone")

        def wrapper(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return handler(wrapped, args, kwargs) if self.enabled else wrapped(*args, **kwargs)

        former = None if over is None else over._on_top(module)
        if over is not None and former is None:
            over.remove()
        proxy = RouteProxy(getattr(module, self.method) if former is None else former.__wrapped__, wrapper)
        proxy._self_owner = owner
        proxy._self_previous = module.__dict__.get(self.method, _ABSENT) if former is None else former._self_previous
        self._proxy = weakref.ref(proxy)
        self.enabled = True
        # Not setattr: nn.Module.__setattr__ looks at types, and a proxy answers for the type it stands for.
        module.__dict__[self.method] = proxy
        return self

    def _on_top(self, module: nn.Module) -> RouteProxy | None:
        """The proxy, if it is on a module and nothing on it."""
        proxy = self._proxy() if self._proxy is not None and self._module() is module else None
        return proxy if proxy is not None and module.__dict__.get(self.method) is proxy else None

    def is_on(self, modules: Collection[int]) -> bool:
        """Whether a module, by its ``id``, has the method, and a call of it arrives here, or through a wrapper."""
        module = self._module()
        return self.enabled and id(module) in modules and self.method in vars(module)

    def remove(self) -> None:
        """Put back what was there before. Whatever somebody put on top stays, and finds the proxy switched off."""
        self.enabled = False
        module = self._module()
        if module is None or self._proxy is None:
            return
        proxy = self._proxy()
        current = module.__dict__.get(self.method, _ABSENT)
        if current is _ABSENT:
            return
        if current is not proxy:
            logger.warning(
                "%s.%s was wrapped again after patch(): that wrapper stays, and neuron_xtts underneath it is off. "
                "Unpatch in the reverse order of patching to have both gone.",
                type(module).__name__,
                self.method,
            )
        elif proxy is None or proxy._self_previous is _ABSENT:
            del module.__dict__[self.method]
        else:
            module.__dict__[self.method] = proxy._self_previous
