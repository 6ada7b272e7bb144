"""The source that shapes the program of a graph, and its digest: an artifact of another source is another artifact.

That is the class of the graph, what makes it ready and traces it, and every function, class and constant that these
use, as far as it belongs to ``neuron_xtts.graphs``; of operators those that the graph calls. Docstrings, comments,
types and methods that shape no program are left out. The text is what Python makes of it, so another version of Python
may find another digest.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from neuron_xtts.backends.neuron.tracing import trace, traceable
from neuron_xtts.graphs.catalogue import CATALOGUE
from neuron_xtts.graphs.operators import PLAIN, Graph

_GRAPHS = "neuron_xtts.graphs."
# Methods: of inputs a recipe has names, types and shapes; of layers the digest of weights has settings; the rest is
# not compiled.
_SHAPES_NOTHING = {"example", "examples", "_example", "given", "arrange", "expected", "extra_repr", "use"}


@functools.cache
def source_digest(graph: str, *, fill: bool) -> str:
    """SHA-256 of the source that shapes the program of a graph.

    Args:
        graph: its name.
        fill: as for `traceable`; it only matters to graphs that are made ready in a way of their own.
    """
    lines = [f"{name} = {source}" for name, source in sorted(shaping_source(graph).items())]
    if CATALOGUE[graph].graph.lowerable is not Graph.lowerable:
        lines.append(f"fill = {fill}")
    return hashlib.sha256("\0".join(lines).encode()).hexdigest()


def shaping_source(graph: str) -> dict[str, str]:
    """The source that shapes the program of a graph, by the full name of what it defines."""
    found: dict[str, str] = {}
    waiting = [_Definition.of(root) for root in (CATALOGUE[graph].graph, traceable, trace)]
    while waiting:
        definition = waiting.pop()
        if definition.name in found:
            continue
        if not (inspect.isclass(definition.value) or inspect.isroutine(definition.value)):
            found[definition.name] = repr(definition.value)
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(definition.value)))
        known = vars(sys.modules[definition.value.__module__])
        waiting += _parts(tree, known)
        bare = _Bare().visit(tree)
        found[definition.name] = ast.unparse(bare)
        waiting += _used(bare, known)
    return found


class _Definition(NamedTuple):
    name: str
    value: object

    @classmethod
    def of(cls, value: object) -> _Definition:
        """The definition of a function or a class."""
        return cls(f"{value.__module__}.{getattr(value, '__qualname__', '')}", value)


def _parts(tree: ast.AST, known: dict[str, object]) -> Iterator[_Definition]:
    """The graphs that others are made of, which their constructors name as types alone."""
    for argument in ast.walk(tree):
        if isinstance(argument, ast.arg) and argument.annotation:
            for node in ast.walk(argument.annotation):
                value = known.get(node.id) if isinstance(node, ast.Name) else None
                if isinstance(value, type) and issubclass(value, Graph):
                    yield _Definition.of(value)


def _used(tree: ast.AST, known: dict[str, object]) -> Iterator[_Definition]:
    """What a source uses of ``neuron_xtts.graphs``: functions, classes, constants, and the operators that it calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "operators":
            yield _Definition.of(getattr(type(PLAIN), node.attr))
        elif isinstance(node, ast.Name) and node.id in known:
            value = known[node.id]
            if inspect.isclass(value) or inspect.isroutine(value):
                if value.__module__.startswith(_GRAPHS):
                    yield _Definition.of(value)
            elif isinstance(value, (bool, int, float, str, tuple)):
                yield _Definition(f"{known['__name__']}.{node.id}", value)
            elif value is not PLAIN and _home(value).startswith(_GRAPHS):
                raise TypeError(f"{node.id}, a {type(value).__name__}, cannot be told apart by its source")


def _home(value: object) -> str:
    """The module that a value belongs to, or is; where it does not say, it may be one of graphs."""
    return value.__name__ if inspect.ismodule(value) else str(getattr(value, "__module__", _GRAPHS))


class _Bare(ast.NodeTransformer):
    """Takes docstrings, types and methods that shape no program out of a source."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = [
            child
            for child in _without_docstring(node.body)
            if not (isinstance(child, ast.FunctionDef) and child.name in _SHAPES_NOTHING)
        ]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body, node.returns = _without_docstring(node.body), None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        body = body[1:]
    return body or [ast.Pass()]
