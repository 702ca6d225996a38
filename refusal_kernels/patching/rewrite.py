"""Rewrites a decoder layer's forward, so that each residual add becomes a steered one.

The add is inside ``forward``, where no hook can fuse anything. So the forward's own source is
parsed and followed: the names that hold the residual stream are known from the first argument on,
and a sum with a stream in it is the next stream. Each such sum ``a + b`` becomes
``self.rk_sites[i](b, a)``, and a generated subclass of the layer's class carries the result. A
layer is patched by swapping its class: everything else about it (weights, hooks, names, what others
hung on it) stays as it is.
"""

import ast
import inspect
import linecache
import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from refusal_kernels.errors import InputError
from refusal_kernels.patching.families import (
    ADDING_FUNCTIONS,
    KEPT_DECORATORS,
    POST_NORM,
    STREAM_FUNCTIONS,
    Family,
    family_of,
)

SITES_ATTRIBUTE = "rk_sites"
# What a module of this name writes into the stream. The order matters: "feed_forward_attn" is none.
WRITERS = (
    ("mlp", re.compile(r"mlp|ffn|feed_forward|ffw|\bff\b|moe|expert|fc2|channel_mix|block_sparse")),
    (
        "attn",
        re.compile(r"attn|attention|mixer|conv|mamba|ssm|recurrent|temporal|mlstm|linear_att"),
    ),
)
OTHER = "add"  # what is written by none of these
# Methods that change their tensor.
IN_PLACE = re.compile(r"^(?!requires_grad_)[a-z]\w*[^_]_$")
# Methods whose result holds the same numbers, so is still the stream.
SAME = {"view", "reshape", "contiguous", "to", "float", "type_as", "clone", "flatten", "squeeze"}


@dataclass
class ResidualAdd:
    """One residual add in the source of a forward."""

    writers: frozenset[str]  # what it adds: "attn", "mlp", both where they are added in one sum,
    # or "add" for what is neither
    modules: frozenset[str]  # that write what is added, as source such as ``self.mlp``
    guards: tuple[tuple[str, bool], ...]  # the conditions it stands under, as (source, outcome)
    # the submodules, as source such as ``self.post_attention_layernorm``, that are called with the
    # sum and nothing else, before anything is added to it
    readers: list[str] = field(default_factory=list)
    returned: bool = False  # whether the forward returns that very sum

    def live(self, layer: nn.Module) -> bool:
        """Whether the layer's own settings let this add run; what cannot be told counts as yes."""
        if self.modules and not any(_there(source, layer) for source in self.modules):
            return False  # cross-attention that this model has not
        for source, outcome in self.guards:
            try:
                if bool(eval(source, {"self": layer})) is not outcome:
                    return False
            except Exception:  # it depends on an argument of the call
                continue
        return True


def _there(source: str, layer: nn.Module) -> bool:
    try:
        eval(source, {"self": layer})
    except AttributeError:
        return False
    except Exception:  # an index that only the call knows
        return True
    return True


@dataclass
class Steered:
    """A rewritten class: the subclass, and what its forward does with the stream.

    ``input_readers`` are the submodules that are called with the layer's input alone.
    """

    cls: type[nn.Module]
    adds: tuple[ResidualAdd, ...]
    input_readers: tuple[str, ...]


# What a variable holds: None is nothing of the stream; otherwise where it came from, INPUT or the
# number of an add, and CHANGED if it is another tensor than that by now (scaled, viewed).
Origin = frozenset[int]
INPUT, CHANGED = -1, -2


class _Follow(ast.NodeTransformer):
    """Follows the stream through a forward, statement by statement, and rewrites its sums."""

    def __init__(self, stream: str, family: Family) -> None:
        self.streams: dict[str, Origin] = {stream: frozenset({INPUT})}
        self.written: dict[str, frozenset[tuple[str, str]]] = {}  # (kind, module) behind a name
        self.family = family
        self.returns_stream = False
        self.guards: tuple[tuple[str, bool], ...] = ()
        self.adds: list[ResidualAdd] = []
        self.input_readers: list[str] = []
        self.in_place: list[str] = []  # what writes into a stream, as source

    # --- what an expression holds

    def origin(self, node: ast.AST) -> Origin | None:
        """Return where a stream came from, or None for what is no stream."""
        if isinstance(node, ast.Name):
            return self.streams.get(node.id)
        if isinstance(node, ast.Tuple) and node.elts:  # what a layer returns beside it
            return self.origin(node.elts[0])
        if (known := self.family.stream_expressions) and ast.unparse(node) in known:
            return frozenset({INPUT, CHANGED})
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # a scaled stream
            scaled = self.origin(node.left) or self.origin(node.right)
            return scaled and scaled | {CHANGED}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            site = self._site_of(node)
            if site is not None:
                return frozenset({site})
            if node.func.attr in SAME:
                kept = self.origin(node.func.value)
                # a cast to the dtype that a tensor has returns that tensor
                return kept if node.func.attr in ("to", "float") else kept and kept | {CHANGED}
        return frozenset({site}) if (site := self._site_of(node)) is not None else None

    @staticmethod
    def _site_of(node: ast.AST) -> int | None:
        """Return the number of the add that a rewritten call stands for."""
        func = node.func if isinstance(node, ast.Call) else None
        if isinstance(func, ast.Attribute):  # self.rk_sites[i].dropout_add
            func = func.value
        if not isinstance(func, ast.Subscript) or not isinstance(func.value, ast.Attribute):
            return None
        is_site = func.value.attr == SITES_ATTRIBUTE and isinstance(func.slice, ast.Constant)
        return int(func.slice.value) if is_site else None  # type: ignore[attr-defined]

    def writers(self, node: ast.AST) -> frozenset[tuple[str, str]]:
        """Return the submodules that an expression's value comes from, and their kinds."""
        if isinstance(node, ast.Name):
            return self.written.get(node.id, frozenset())
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.startswith("self."):
                for kind, pattern in WRITERS:
                    if pattern.search(name) and "norm" not in name and "dropout" not in name:
                        return frozenset({(kind, name)})
        return frozenset().union(*(self.writers(child) for child in ast.iter_child_nodes(node)))

    # --- sums

    def _new_site(self, branch: ast.AST) -> ast.Subscript:
        behind = self.writers(branch)
        kinds, modules = frozenset(k for k, _ in behind), frozenset(m for _, m in behind)
        kinds = kinds or frozenset({OTHER})
        self.adds.append(ResidualAdd(kinds, modules, self.guards))
        sites = ast.Attribute(ast.Name("self", ast.Load()), SITES_ATTRIBUTE, ast.Load())
        return ast.Subscript(sites, ast.Constant(len(self.adds) - 1), ast.Load())

    def _terms(self, node: ast.expr) -> list[ast.expr]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._terms(node.left) + self._terms(node.right)
        return [node]

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if not isinstance(node.op, ast.Add) or ast.unparse(node) in self.family.not_stream_sums:
            return self.generic_visit(node)
        # of three terms only the whole sum is steered: `residual + attn + mlp` is one add
        if sum(self.origin(term) is not None for term in self._terms(node)) != 1:
            return self.generic_visit(node)
        left = any(self.origin(term) is not None for term in self._terms(node.left))
        residual, branch = (node.left, node.right) if left else (node.right, node.left)
        site = self._new_site(ast.Tuple([t for t in self._terms(node) if not self.origin(t)]))
        if isinstance(branch, ast.BinOp) and isinstance(branch.op, ast.Add):
            branch = ast.copy_location(
                ast.BinOp(self.visit(branch.left), ast.Add(), self.visit(branch.right)), branch
            )
        else:
            branch = self.visit(branch)
        return ast.copy_location(ast.Call(site, [branch, residual], []), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        into = [word.value for word in node.keywords if word.arg == "out"]
        if isinstance(node.func, ast.Attribute) and IN_PLACE.search(node.func.attr):
            into.append(node.func.value)
        if any(self.origin(tensor) is not None for tensor in into):
            self.in_place.append(ast.unparse(node))
        if isinstance(node.func, ast.Name) and node.func.id in ADDING_FUNCTIONS:
            site = self._new_site(node.args[0])
            node.func = ast.Attribute(site, node.func.id, ast.Load())
            return node
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in STREAM_FUNCTIONS:
            site = self._new_site(node.args[0])
            return ast.copy_location(ast.Call(site, [node, ast.Constant(None)], []), node)
        name = ast.unparse(node.func)
        if len(node.args) == 1 and not node.keywords and name.startswith("self."):
            origin = self.origin(node.args[0]) or frozenset({CHANGED})
            for at in origin if CHANGED not in origin else ():
                (self.input_readers if at == INPUT else self.adds[at].readers).append(name)
        return node

    # --- statements

    def _assign(
        self, target: ast.expr, origin: Origin | None, writers: frozenset[tuple[str, str]]
    ) -> None:
        if isinstance(target, ast.Tuple):  # `hidden_states, weights = self.attn(...)`
            for element in target.elts:
                self._assign(element, None, writers)
        elif isinstance(target, ast.Subscript) and self.origin(target.value) is not None:
            self.in_place.append(f"{ast.unparse(target)} = ...")
        elif isinstance(target, ast.Name):
            if target.id in self.family.stream_names:
                origin = frozenset({INPUT})
            self.streams.pop(target.id, None)
            self.written[target.id] = frozenset() if origin else writers
            if origin:
                self.streams[target.id] = origin

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        writers = self.writers(node.value)
        node.value = self.visit(node.value)
        for target in node.targets:
            self._assign(target, self.origin(node.value), writers)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return node
        return self.visit(ast.copy_location(ast.Assign([node.target], node.value), node))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """Read `a += b` as `a = a + b` where it makes a stream; other in-place sums stay."""
        if isinstance(node.target, ast.Subscript):
            self._assign(node.target, None, frozenset())
        if not isinstance(node.target, ast.Name) or isinstance(node.value, ast.Tuple):
            return self.generic_visit(node)
        load = ast.Name(node.target.id, ast.Load())
        whole = ast.copy_location(ast.BinOp(load, node.op, node.value), node)
        streams = [self.origin(side) is not None for side in (load, node.value)]
        if (isinstance(node.op, ast.Add) and sum(streams) == 1) or streams[0]:
            # nor is a stream written to in place: a norm may hold what was made of it
            return self.visit(ast.copy_location(ast.Assign([node.target], whole), node))
        writers = self.writers(whole)
        node.value = self.visit(node.value)
        self._assign(node.target, self.origin(whole), writers)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        """Follow both ways; what either of them leaves in a name may be there afterwards."""
        outer, test = self.guards, ast.unparse(node.test)
        node.test = self.visit(node.test)
        before, written = dict(self.streams), dict(self.written)
        ways = []
        for block, outcome in ((node.body, True), (node.orelse, False)):
            self.streams, self.written = dict(before), dict(written)
            self.guards = (*outer, (test, outcome))
            block[:] = [self.visit(statement) for statement in block]
            if not (block and isinstance(block[-1], ast.Return | ast.Raise)):
                ways.append((self.streams, self.written))
        self.guards = outer
        self.streams, self.written = {}, {}
        for streams, names in ways:
            for name, origin in streams.items():
                self.streams[name] = self.streams.get(name, frozenset()) | origin
            for name, kinds in names.items():
                self.written[name] = self.written.get(name, frozenset()) | kinds
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is None:
            return node
        node.value = self.visit(node.value)
        origin = self.origin(node.value)
        self.returns_stream |= origin is not None
        for at in origin or ():
            if at >= 0 and CHANGED not in (origin or ()):
                self.adds[at].returned = True
        return node


def _rebuild(cls: type[nn.Module], stream: str | None) -> nn.Module:
    return nn.Module.__new__(steered(cls, stream).cls)


_STEERED: dict[tuple[type, str | None, Family], Steered] = {}


def unsteered_class(cls: type) -> type | None:
    """Return the class that a rewritten one was made of; None for any other."""
    return next((s.cls.__mro__[1] for s in _STEERED.values() if s.cls is cls), None)


def steered(cls: type[nn.Module], stream: str | None = None) -> Steered:
    """Return the subclass of a module's class whose residual adds go through ``rk_sites``.

    Parameters
    ----------
    cls
        The class of a decoder layer, or of a submodule that does the adding.
    stream
        The parameter of its forward that holds the stream; None: the first.

    Raises
    ------
    InputError
        If the forward has no source, needs its closure, or holds no residual add.
    """
    key = cls, stream, family_of(cls)
    if key not in _STEERED:  # one class for each, so that isinstance stays simple
        _STEERED[key] = _generate(*key)
    return _STEERED[key]


def _generate(cls: type[nn.Module], stream: str | None, family: Family) -> Steered:
    path = f"{cls.__module__}.{cls.__qualname__}"
    # some versions of transformers wrap forward for gradient checkpointing; the subclass below is
    # wrapped again in the same way
    forward = inspect.unwrap(cls.forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError) as error:
        raise InputError(f"the source of {path}.forward is not to be had: {error}") from None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or forward.__closure__:
        raise InputError(f"{path}.forward is no plain function, so it cannot be rewritten")
    function.returns = None
    function.decorator_list = [
        d
        for d in function.decorator_list
        if isinstance(d, ast.Call) and ast.unparse(d.func) in KEPT_DECORATORS
    ]
    arguments = function.args
    names = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    for argument in (*names, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None  # names that only a type checker has
    if len(names) < 2 or stream not in (None, *(a.arg for a in names)):
        raise InputError(f"{path}.forward has no parameter {stream or 'beside self'}")
    follow = _Follow(stream or names[1].arg, family)
    function.body = [follow.visit(statement) for statement in function.body]
    if follow.in_place:
        raise InputError(
            f"{path}.forward writes into the stream in place, where it cannot be steered: "
            f"{follow.in_place[0]}; expected a sum such as x = x + y"
        )
    if not follow.adds:
        raise InputError(
            f"{path}.forward adds nothing to the stream by a + b or a += b: its sums may be in "
            "submodules, before a norm"
        )
    if not follow.returns_stream and not family.adders:
        raise InputError(f"{path}.forward returns no sum: {POST_NORM}")
    ast.fix_missing_locations(tree)

    # the source is kept where tracebacks, debuggers and inspect.getsource look for it
    source, filename = ast.unparse(tree), f"<refusal_kernels: {path}.forward>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), forward.__globals__, namespace)

    def reduce(self: nn.Module, protocol: Any) -> Any:  # for copy.deepcopy and pickle
        return _rebuild, (cls, stream), self.__dict__.copy()

    body = {
        "forward": namespace["forward"],
        "__module__": cls.__module__,
        "__doc__": f"{cls.__qualname__} with steered residual adds.",
        "__reduce_ex__": reduce,
    }
    made = type(f"Steered{cls.__name__}", (cls,), body)
    return Steered(made, tuple(follow.adds), tuple(dict.fromkeys(follow.input_readers)))
