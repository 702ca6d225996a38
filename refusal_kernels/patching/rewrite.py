"""Rewrites a decoder layer's forward, so that each residual add becomes a steered one.

The add is inside ``forward``, where no hook can fuse anything. So the forward's own source is
parsed, every ``residual + X`` becomes ``self.rk_sites[i](X, residual)``, and a generated subclass
of the layer's class carries the result. A layer is patched by swapping its class: everything else
about it (weights, hooks, names, what others hung on it) stays as it is.
"""

import ast
import inspect
import linecache
import textwrap

from torch import nn

from refusal_kernels.errors import InputError
from refusal_kernels.patching.families import FAMILIES

RESIDUAL = "residual"
_STEERED: dict[type, type] = {}  # one generated class for each, so that isinstance stays simple


class _Adds(ast.NodeTransformer):
    def __init__(self) -> None:
        self.found = 0

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        sides = (node.left, node.right)
        if not isinstance(node.op, ast.Add) or not all(isinstance(s, ast.Name) for s in sides):
            return node
        residual = [s for s in sides if isinstance(s, ast.Name) and s.id == RESIDUAL]
        branch = [s for s in sides if isinstance(s, ast.Name) and s.id != RESIDUAL]
        if len(residual) != 1 or len(branch) != 1:
            return node
        sites = ast.Attribute(ast.Name("self", ast.Load()), "rk_sites", ast.Load())
        site = ast.Subscript(sites, ast.Constant(self.found), ast.Load())
        self.found += 1
        return ast.copy_location(ast.Call(site, [branch[0], residual[0]], []), node)


def _class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def add_names(layer: nn.Module) -> tuple[str, ...]:
    """Return what each residual add of a layer adds, in order: ("attn", "mlp").

    Raises
    ------
    InputError
        If the layer's class is not a known one.
    """
    path = _class_path(type(layer))
    if path not in FAMILIES:
        known = ", ".join(sorted({name.rsplit(".", 1)[1] for name in FAMILIES}))
        raise InputError(f"no fused patch for layers of the class {path}; there is one for {known}")
    return FAMILIES[path]


def steered_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a decoder layer's class whose residual adds go through ``rk_sites``.

    Raises
    ------
    InputError
        If the source is not there, or does not hold the number of adds that the table says.
    """
    if cls not in _STEERED:
        _STEERED[cls] = _generate(cls)
    return _STEERED[cls]


def _generate(cls: type[nn.Module]) -> type[nn.Module]:
    path, expected = _class_path(cls), len(FAMILIES[_class_path(cls)])
    # some versions of transformers wrap forward for gradient checkpointing; the subclass below is
    # wrapped again in the same way
    forward = inspect.unwrap(cls.forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError) as error:
        raise InputError(f"the source of {path}.forward is not to be had: {error}") from None
    adds = _Adds()
    tree = ast.fix_missing_locations(adds.visit(tree))
    if adds.found != expected:
        raise InputError(
            f"{path}.forward has {adds.found} residual adds where {expected} are expected; "
            "this version of transformers is not supported"
        )
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list, function.returns = [], None
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None  # would be evaluated, for names that only a type checker has
    if arguments.kwarg is not None:
        arguments.kwarg.annotation = None

    # the source is kept where tracebacks, debuggers and inspect.getsource look for it
    source, filename = ast.unparse(tree), f"<refusal_kernels: {path}.forward>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, object] = {}
    exec(compile(source, filename, "exec"), forward.__globals__, namespace)
    body = {
        "forward": namespace["forward"],
        "__module__": cls.__module__,
        "__doc__": f"{cls.__qualname__} with steered residual adds.",
    }
    return type(f"Steered{cls.__name__}", (cls,), body)
