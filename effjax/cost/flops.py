"""FLOPs of a function, counted in its jaxpr: exact through scans, remat and custom derivatives.

XLA's own `cost_analysis` counts the body of a loop once; this counter multiplies it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.interpreters import partial_eval

from effjax.cost.primitives import MATRIX, OPAQUE, UNCOUNTED, Equation, elementwise

# A jitted function whose name ends so declares its own FLOPs: its loops need no known trip count.
DECLARED = re.compile(r"_flops_(\d+)$")

# Primitives that run one inner jaxpr once, and the parameters that may hold it. The others they
# hold are derivative rules, which appear inlined in the jaxpr of a derivative.
_CALL_NAMES = """checkpoint closed_call composite core_call core_closed_call custom_jvp_call
custom_jvp_call_jaxpr custom_vjp_call custom_vjp_call_jaxpr custom_vmap_call eval_jaxpr jit
named_call pjit remat remat2 remat_call xla_call"""
CALLS = frozenset(_CALL_NAMES.split())
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")


@dataclass(frozen=True)
class Flops:
    """Work of a program. `total` is exact when `unknown` and `bounded` are empty.

    `total`: FLOPs of matrix products, convolutions, FFTs and factorisations, a multiply-add as
    two. `by_primitive`: the same by primitive; `declared` is what functions named `..._flops_<n>`
    say of themselves. `elementwise`: floating-point operations outside them, counted apart.
    `unknown`: what could not be counted, or only once, and where it stands: `total` is the least.
    `bounded`: conditions whose branches differ; the dearest counts, so `total` is the most.
    """

    total: int = 0
    by_primitive: dict[str, int] = field(default_factory=dict)
    elementwise: int = 0
    unknown: tuple[str, ...] = ()
    bounded: tuple[str, ...] = ()

    def __add__(self, other: "Flops") -> "Flops":
        names = {**self.by_primitive, **other.by_primitive}
        merged = {
            name: self.by_primitive.get(name, 0) + other.by_primitive.get(name, 0) for name in names
        }
        return Flops(
            self.total + other.total,
            merged,
            self.elementwise + other.elementwise,
            tuple(dict.fromkeys(self.unknown + other.unknown)),
            tuple(dict.fromkeys(self.bounded + other.bounded)),
        )

    def times(self, repeats: int) -> "Flops":
        """Gives the work of so many repeats."""
        if not repeats:
            return Flops()
        return Flops(
            self.total * repeats,
            {name: work * repeats for name, work in self.by_primitive.items()},
            self.elementwise * repeats,
            self.unknown,
            self.bounded,
        )


def count(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Flops:
    """Counts the FLOPs of `f(*args, **kwargs)` without running it.

    Arrays may be abstract (`jax.ShapeDtypeStruct`), so the size of a model costs nothing; whatever
    is no array (a number, a string, None) is passed to `f` as it is. What the outputs do not need
    is not counted, because `jax.jit` removes it too. A scan counts its length times its body, remat
    its recomputation, a `cond` its dearest branch, `shard_map` every device, `pallas_call` its
    `cost_estimate`. A `while` that does matrix work is unknown, unless it stands in a jitted
    function whose name ends in `_flops_<n>`: n is taken and the function is not looked into. The
    name knows nothing of a later `vmap`.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def closed(arrays: list[Any]) -> Any:
        filled = dict(zip(traced, arrays, strict=True))
        whole = [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
        positional, named = jax.tree.unflatten(tree, whole)
        return f(*positional, **named)

    jaxpr = jax.make_jaxpr(closed)([leaves[i] for i in traced]).jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _walk(live, "")


def six_nd(parameters: int, tokens: int) -> int:
    """Estimates the FLOPs of training: 6 N D, for N parameters outside the embedding and D tokens.

    It leaves out attention's quadratic part; printed beside a count, never instead of it.

    Source: Kaplan et al. 2020, section 2.1, https://arxiv.org/abs/2001.08361
    """
    return 6 * parameters * tokens


def xla_flops(compiled: Any) -> float | None:
    """Reads XLA's count from a compiled function: a loop's body counts once; None if missing."""
    try:
        analysis = compiled.cost_analysis()
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    if isinstance(analysis, list | tuple):  # one entry per program on some backends
        analysis = analysis[0] if analysis else None
    flops = (analysis or {}).get("flops")
    return None if flops is None or flops < 0 else float(flops)


def _walk(jaxpr: Any, where: str) -> Flops:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # closed or open
    work = Flops()
    for equation in jaxpr.eqns:
        work += _equation(equation, where)
    return work


def _equation(equation: Equation, where: str) -> Flops:
    name = equation.primitive.name
    if name in MATRIX:
        work = MATRIX[name](equation)
        return Flops(work, {name: work})
    if name in _CONTAINERS:
        return _CONTAINERS[name](equation, where)
    if name in CALLS:
        return _call(equation, where)
    if name in UNCOUNTED:
        return Flops(unknown=(f"{name}{_in(where)}: no closed form",))
    if name in OPAQUE:
        return Flops(unknown=(f"{name}{_in(where)}: calls code outside JAX",))
    if work := elementwise(equation):
        return Flops(elementwise=work)
    return _unfamiliar(equation, where)


def _call(equation: Equation, where: str) -> Flops:
    """The function that is called, or the FLOPs its name declares."""
    name = str(equation.params.get("name", ""))
    if declared := DECLARED.search(name):
        work = int(declared[1])
        return Flops(work, {"declared": work})
    inner = next(equation.params[key] for key in _CALLED if _is_jaxpr(equation.params.get(key)))
    return _walk(inner, f"{where}/{name}" if name and where else where or name)


def _scan(equation: Equation, where: str) -> Flops:
    return _walk(equation.params["jaxpr"], where).times(equation.params["length"])


def _while(equation: Equation, where: str) -> Flops:
    """One iteration's element-wise work; matrix work makes the loop unknown."""
    turn = _walk(equation.params["cond_jaxpr"], where) + _walk(equation.params["body_jaxpr"], where)
    if not turn.total and not turn.unknown:
        return turn
    note = f"while{_in(where)}: {turn.total} FLOPs an iteration, trip count unknown"
    return Flops(elementwise=turn.elementwise, unknown=(note, *turn.unknown))


def _cond(equation: Equation, where: str) -> Flops:
    """The dearest branch, because which is taken is known only at run time."""
    branches = [_walk(branch, where) for branch in equation.params["branches"]]
    work = max(branches, key=lambda branch: (branch.total, branch.elementwise))
    least = min(branch.total for branch in branches)
    if least != work.total:
        note = f"cond{_in(where)}: {least} to {work.total} FLOPs, the most is counted"
        work += Flops(bounded=(note,))
    for branch in branches:
        work += Flops(unknown=branch.unknown, bounded=branch.bounded)
    return work


def _shard_map(equation: Equation, where: str) -> Flops:
    """What one device does, times the devices along the axes that the body sees as split."""
    mesh = equation.params["mesh"]
    devices = math.prod(mesh.shape[axis] for axis in equation.params["newly_manual_axes"])
    return _walk(equation.params["jaxpr"], where).times(devices)


def _pallas_call(equation: Equation, where: str) -> Flops:
    """What the kernel's author says; it is element-wise work where the kernel has no product."""
    body = _walk(equation.params["jaxpr"], where)
    matrix = bool(body.total or body.unknown)
    estimate = equation.params.get("cost_estimate")
    if estimate is None:
        note = f"pallas_call{_in(where)}: no cost_estimate"
        return Flops(unknown=(note,)) if matrix else Flops()
    work = int(estimate.flops)
    return Flops(work, {"pallas_call": work}) if matrix else Flops(elementwise=work)


def _linear_solve(equation: Equation, where: str) -> Flops:
    """The solver alone: the matrix-vector products are used by derivatives, which transpose it."""
    return _walk(equation.params["jaxprs"].solve, where)


def _unfamiliar(equation: Equation, where: str) -> Flops:
    """A primitive without a rule: what it holds is counted once, and noted if that matters."""
    work = Flops()
    if equation.primitive.name.startswith(("scatter", "reduce", "sort", "select_and")):
        return work  # they hold the scalar function that they apply
    for value in equation.params.values():
        for inner in value if isinstance(value, list | tuple) else (value,):
            if _is_jaxpr(inner):
                work += _walk(inner, where)
    if not work.total:
        return work
    note = f"{equation.primitive.name}{_in(where)}: unfamiliar, counted once"
    return work + Flops(unknown=(note,))


_CONTAINERS: dict[str, Callable[[Equation, str], Flops]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _pallas_call,
    "custom_linear_solve": _linear_solve,
}


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _in(where: str) -> str:
    return f" in {where}" if where else ""
