"""The source that shapes the program of a graph, and its digest: an artifact of another source is another artifact.

That is the class of the graph, what traces it, and every function, class and constant that these use, as far as it
belongs to ``neuron_xtts.graphs``; without docstrings, comments and types, and without methods that shape no program.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap

from neuron_xtts.backends.neuron.tracing import trace
from neuron_xtts.graphs.catalogue import CATALOGUE
from neuron_xtts.graphs.operators import Graph

_GRAPHS = "neuron_xtts.graphs."
# Methods: of inputs a recipe has names, types and shapes; of layers the digest of weights has settings.
_SHAPES_NOTHING = {"example", "example_state", "extra_repr", "use"}


@functools.cache
def source_digest(graph: str) -> str:
    """SHA-256 of the source that shapes the program of a graph, which is given by name."""
    lines = (f"{name} = {source}" for name, source in sorted(shaping_source(graph).items()))
    return hashlib.sha256("\0".join(lines).encode()).hexdigest()


def shaping_source(graph: str) -> dict[str, str]:
    """The source that shapes the program of a graph, by the name of what it defines."""
    found: dict[str, str] = {}
    waiting: list[tuple[str, object]] = [(root.__name__, root) for root in (CATALOGUE[graph].graph, trace)]
    while waiting:
        name, value = waiting.pop()
        if name in found:
            continue
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            if type(value).__module__.startswith(_GRAPHS):  # an object made of a class there
                waiting.append((type(value).__name__, type(value)))
            else:
                found[name] = repr(value)
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
        known = vars(sys.modules[value.__module__])
        waiting += _parts(tree, known)
        bare = _Bare().visit(tree)
        found[name] = ast.unparse(bare)
        waiting += _used(bare, known)
    return found


def _parts(tree: ast.AST, known: dict[str, object]) -> list[tuple[str, object]]:
    """The graphs that others are made of, which their constructors name as types alone."""
    types = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation]
    names = [node.id for type_ in types for node in ast.walk(type_) if isinstance(node, ast.Name)]
    values = ((name, known.get(name)) for name in names)
    return [(name, value) for name, value in values if isinstance(value, type) and issubclass(value, Graph)]


def _used(tree: ast.AST, known: dict[str, object]) -> list[tuple[str, object]]:
    """What a source uses of ``neuron_xtts.graphs``: functions and classes defined there, and constants."""
    names = (node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in known)
    return [(name, known[name]) for name in names if _is_of_graphs(known[name])]


def _is_of_graphs(value: object) -> bool:
    home = getattr(value, "__module__", None)
    constant = home is None and not inspect.ismodule(value)
    return constant or str(home).startswith(_GRAPHS)


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
