"""Functions of tensors as NumPy code.

With one slot a call of torch takes longer than its arithmetic, and NumPy's calls are several times as cheap. What is
computed is still said once, with torch: `as_arrays` runs it, writes its operations down and translates them.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ArrayFunction = Callable[..., tuple[np.ndarray, ...]]
MOST_ON_ONE_THREAD = 400_000
"""Numbers in a matrix from about which NumPy's BLAS shares a product between threads."""
_SAME = 1e-4
"""How far the translation may be from what torch gave."""


def as_arrays(function: Callable[..., Any], inputs: Sequence[Tensor]) -> ArrayFunction | None:
    """A function of tensors as one of arrays, without gradients.

    It is run once, and its operations on what depends on the inputs are written down; all else is kept as it was, the
    weights without a copy. Where a layer norm follows a layer, the mean is taken from the layer's weights, once.

    Examples:
        >>> import torch
        >>> from aime_gym.world_model.array_code import as_arrays
        >>> fast = as_arrays(lambda x: (torch.sigmoid(x) + 1,), [torch.zeros(1, 3)])
        >>> fast(torch.zeros(1, 3).numpy())
        (array([[1.5, 1.5, 1.5]], dtype=float32),)

    Args:
        function: Tensors to a tuple of tensors, all on the CPU and by the same operations for all inputs of these
            shapes.
        inputs: Some inputs.

    Returns:
        The function, or None where an operation cannot be translated.
    """
    if not hasattr(np, "vecdot"):  # before NumPy 2.0, which also takes float32 and a number for float64
        return None
    with torch.inference_mode(False), torch.enable_grad():  # without gradients more is done in place, for torch's sake
        given = [tensor.detach().clone() for tensor in inputs]
        tape = _Tape(given)
        with tape:
            expected = function(*given)
        try:
            translated = tape.translated(expected)
        except _UntranslatableError:
            return None
        arrays = [tensor.detach().numpy() for tensor in inputs]
        for mine, theirs in zip(map(torch.from_numpy, translated(*arrays)), expected, strict=True):
            if mine.dtype != theirs.dtype or not torch.allclose(mine, theirs, _SAME, _SAME, equal_nan=True):
                return None
    return translated


class _UntranslatableError(Exception):
    """An operation that is not known here."""


class _Code(str):
    """A name or a number in the code."""

    __repr__ = str.__str__


class _Tape(TorchDispatchMode):
    """Writes down operations on what depends on the inputs, and translates them."""

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self._kept = list(inputs)  # so that their ids stay their own
        self._names = {id(tensor): _Code(f"x{i}") for i, tensor in enumerate(inputs)}
        self._inputs = ", ".join(self._names.values())
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._steps: list[tuple[str, list[Any], dict[str, Any], list[_Code]]] = []
        self._known: dict[str, Any] = {}  # constants by their names in the code
        self._expanded: dict[str, str] = {}  # what it was before, by what it became
        self._centred: set[str] = set()  # what only a layer norm reads, made without a mean
        self._lines: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it would import it, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(id(leaf) in self._names for leaf in tree_leaves((args, kwargs))):
            return result
        if not isinstance(result, (Tensor, tuple, list)):
            self._steps.append(("a number that is looked at", [], {}, []))
            return result
        results = [result] if isinstance(result, Tensor) else list(result)
        if func._schema.is_mutable and id(results[0]) not in self._names:
            name = "a constant that is written into"
        elif func in _SAME_TENSOR:
            self._names.setdefault(id(results[0]), self._names[id(args[0])])
            self._kept += results
            return result
        else:
            name = str(func).removeprefix("aten.")
        given = [self._code(part) for part in args], {key: self._code(part) for key, part in (kwargs or {}).items()}
        for one in results:
            self._names.setdefault(id(one), _Code(f"y{len(self._names)}"))
            self._shapes[self._names[id(one)]] = tuple(one.shape)
        self._kept += results
        self._steps.append((name, *given, [self._names[id(one)] for one in results]))
        return result

    def _code(self, part: Any) -> Any:
        """An argument as it is written."""
        if isinstance(part, (list, tuple)):
            return [self._code(one) for one in part]
        if isinstance(part, Tensor):
            if id(part) not in self._names:
                return self._code(part.item()) if part.ndim == 0 else self._constant(part.detach().numpy())
            self._shapes[self._names[id(part)]] = tuple(part.shape)
            return self._names[id(part)]
        return _Code(f"float('{part}')") if isinstance(part, float) and not math.isfinite(part) else part

    def _constant(self, array: Any) -> _Code:
        name = _Code(f"c{len(self._known)}")
        self._known[name] = array = np.asarray(array, np.float32 if isinstance(array, (int, float)) else None)
        self._shapes[name] = array.shape
        return name

    def translated(self, results: Sequence[Tensor]) -> ArrayFunction:
        """What was written down, as a function of arrays.

        Raises:
            _UntranslatableError: If an operation is not known.
        """
        if any(id(one) not in self._names for one in results):
            raise _UntranslatableError("a result that does not depend on the inputs")
        given = [self._names[id(one)] for one in results]
        uses = Counter([name for _, args, kwargs, _ in self._steps for name in tree_leaves((args, kwargs))] + given)
        normed = {args[0] for name, args, *_ in self._steps if name.startswith("native_layer_norm")}
        self._normed = {name for name in normed if uses[name] == 1}
        for step in self._steps:
            self._translate(*step)
        ends = ", ".join(name if self._shapes[name] else f"asarray({name})" for name in given)
        needed, lines = set(re.findall(r"\w+", ends)), list[str]()
        for line in reversed(self._lines):
            defined = re.match(r"(y\w+) = ", line)
            if defined is None or defined[1] in needed:
                needed |= {*re.findall(r"\w+", line)}
                lines.append(line)
        body = "".join(f"        {line}\n" for line in reversed(lines))
        source = f"def run({self._inputs}):\n    with errstate(all='ignore'):\n{body}    return {ends},\n"
        names: dict[str, Any] = {**_FUNCTIONS, **self._known}
        exec(compile(source, "<array code>", "exec"), names)
        return names["run"]

    def _translate(self, name: str, args: list[Any], kwargs: dict[str, Any], outs: list[_Code]) -> None:
        """Adds the lines of one operation."""
        if not outs:
            raise _UntranslatableError(name)
        name, _, overload = name.partition(".")
        kwargs = {key: value for key, value in kwargs.items() if key not in ("out", "memory_format", "pin_memory")}
        self._out, self._shape = outs[0], self._shapes[outs[0]]
        in_place = overload == "out" or name.endswith("_")
        self._target = [self._out] if in_place else []  # what a function of numbers writes into
        name = name.removesuffix("_")
        if name in ("split", "split_with_sizes", "unbind"):
            self._part(outs, name == "unbind", *args, **kwargs)
            return
        rule = getattr(self, f"_{name.lstrip('_')}_", None)
        if rule is not None:
            expression = rule(*args, **kwargs)
        elif name in _FUNCTIONS:
            if "alpha" in kwargs:
                args = [args[0], _Code(f"{kwargs['alpha']} * {args[1]}")]
            if name in _IN_PLACE:  # an array takes half the time of a number
                args = [self._constant(one) if type(one) in (int, float) else one for one in args]
                args += self._target
            expression = f"{name}({', '.join(repr(part) for part in args)})"
        else:
            raise _UntranslatableError(name)
        if in_place and expression.endswith(f", {self._out})"):
            self._lines.append(expression)
        elif in_place:
            self._lines.append(f"{self._out}[...] = {expression}")
        elif expression != self._out:
            self._lines.append(f"{self._out} = {expression}")

    def _part(self, outs: list[_Code], unbound: bool, x: str, *args: Any, dim: int = 0) -> None:
        axis = self._axis(x, args[-1] if len(args) > (0 if unbound else 1) else dim)
        sizes = [1 if unbound else self._shapes[out][axis] for out in outs]
        for out, end, size in zip(outs, accumulate(sizes), sizes, strict=True):
            self._lines.append(f"{out} = {x}[{':, ' * axis}{end - 1 if unbound else f'{end - size}:{end}'}]")

    def _axis(self, x: str, axis: int) -> int:
        return axis % max(1, len(self._shapes[x]))

    def _axes(self, x: str, axes: Any) -> tuple[int, ...]:
        axes = range(len(self._shapes[x])) if axes in (None, []) else [axes] if isinstance(axes, int) else axes
        return tuple(self._axis(x, axis) for axis in axes)

    # What follows are operations of torch, by their names, that are no function of single numbers: from arguments as
    # they are written to an expression.

    def _clone_(self, x: str) -> str:
        return f"{x}.copy()"

    def _to_copy_(self, x: str, dtype: torch.dtype = torch.float32) -> str:
        if dtype != torch.float32:
            raise _UntranslatableError(f"to {dtype}")
        return f"{x}.astype('f4')"

    def _copy_(self, x: str, y: Any, *_: Any) -> str:
        return str(y)

    def _t_(self, x: str) -> str:
        return f"{x}.T"

    def _transpose_(self, x: str, first: int, second: int) -> str:
        return f"{x}.swapaxes({first}, {second})"

    def _view_(self, x: str, shape: Sequence[int]) -> str:
        return f"{x}.reshape({tuple(shape)})"

    _unsafe_view_ = _reshape_ = _view_

    def _expand_(self, x: str, shape: Sequence[int]) -> str:
        self._expanded[self._out] = x
        return f"broadcast_to({x}, {self._shape})"

    def _unsqueeze_(self, x: str, axis: int) -> str:
        return f"{x}[{':, ' * (axis % (len(self._shapes[x]) + 1))}None]"

    def _select_(self, x: str, axis: int, index: int) -> str:
        return f"{x}[{':, ' * self._axis(x, axis)}{index}]"

    def _slice_(self, x: str, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> str:
        parts = [start or "", "" if end in (None, sys.maxsize) else end, *([step] if step != 1 else [])]
        return f"{x}[{':, ' * self._axis(x, axis)}{':'.join(map(str, parts))}]"

    def _index_select_(self, x: str, axis: int, index: str) -> str:
        return f"{x}.take({index}, {axis})"

    def _cat_(self, parts: Sequence[str], axis: int = 0) -> str:
        return f"concatenate(({', '.join(parts)},), {axis})"

    def _stack_(self, parts: Sequence[str], axis: int = 0) -> str:
        return f"stack(({', '.join(parts)},), {axis})"

    def _repeat_(self, x: str, times: Sequence[int]) -> str:
        if len(times) == len(self._shapes[x]) and set(times[1:]) <= {1}:
            return f"concatenate(({x},) * {times[0]})"
        return f"tile({x}, {tuple(times)})"

    def _empty_like_(self, x: str, **_: Any) -> str:
        return f"empty_like({x})"

    def _zeros_like_(self, x: str, **_: Any) -> str:
        return f"zeros_like({x})"

    def _sum_(self, x: str, axes: Any = None, keep: bool = False) -> str:
        if len(axes := self._axes(x, axes)) == len(self._shapes[x]) and not keep:
            ones = self._constant(np.ones(math.prod(self._shapes[x]), np.float32))
            return f"{x}.reshape(-1).dot({ones})"
        return f"reduce({x}, {axes if len(axes) > 1 else axes[0]}, None, None, {keep})"

    def _mean_(self, x: str, axes: Any = None, keep: bool = False) -> str:
        return f"{self._sum_(x, axes, keep)} / {math.prod(self._shapes[x][axis] for axis in self._axes(x, axes))}"

    def _std_(self, x: str, axes: Any = None, correction: float = 1, keepdim: bool = False) -> str:
        return f"{x}.std({self._axes(x, axes)}, ddof={correction}, keepdims={keepdim})"

    def _all_(self, x: str, axis: int, keep: bool = False) -> str:
        return f"{x}.all({axis}, keepdims={keep})"

    def _linalg_vector_norm_(self, x: str, order: float = 2, axes: Any = None, keep: bool = False) -> str:
        if order != 2:
            raise _UntranslatableError(f"norm {order}")
        if self._axes(x, axes) != (len(self._shapes[x]) - 1,) or keep:
            raise _UntranslatableError("a norm over other axes than the last")
        return f"sqrt(vecdot({x}, {x}))"

    def _lerp_(self, x: str, y: str, share: str) -> str:
        rest = self._constant(1 - self._known[share]) if share in self._known else _Code(f"(1.0 - {share})")
        return f"{x} * {rest} + {y} * {share}"  # exact at both ends

    def _addcmul_(self, x: str, y: str, z: str) -> str:
        return f"add({', '.join([x, f'{y} * {z}', *self._target])})"

    def _rsub_(self, x: str, y: Any) -> str:
        return f"sub({self._constant(y)}, {x})"

    def _relu_(self, x: str) -> str:
        return f"maximum({', '.join([x, self._constant(0.0), *self._target])})"

    def _pow_(self, x: str, exponent: Any) -> str:
        return f"{x} * {x}" if exponent == 2 else f"{x} ** {exponent}"

    def _sigmoid_(self, x: str) -> str:
        return f"reciprocal({', '.join([self._one_more_than_exp_of_minus(x), *self._target])})"

    def _silu_(self, x: str) -> str:
        return f"div({', '.join([x, self._one_more_than_exp_of_minus(x), *self._target])})"

    def _one_more_than_exp_of_minus(self, x: str) -> str:
        below = _Code(f"{self._out}e")
        self._lines += [
            f"{below} = neg({x})",
            f"exp({below}, {below})",
            f"add({below}, {self._constant(1.0)}, {below})",
        ]
        return below

    def _mm_(self, x: str, weight: str) -> str:
        shape = self._shapes[weight]
        if x in self._expanded and weight in self._known and self._shapes[self._expanded[x]] == (1, shape[1]):
            rows = self._constant(self._known[weight].swapaxes(0, 1).reshape(shape[1], -1))
            return f"{self._mm_(self._expanded[x], rows)}.reshape({(shape[0], 1, shape[2])})"
        if shape[-2] * shape[-1] < MOST_ON_ONE_THREAD:
            return f"matmul({x}, {weight})" if len(shape) > 2 else f"{x}.dot({weight})"
        if weight not in self._known or self._shapes[x][-2] != 1:
            raise _UntranslatableError("a large product")
        rows = self._constant(np.ascontiguousarray(self._known[weight].swapaxes(-1, -2)))
        return f"vecdot({rows}, {x})[..., None, :]"

    _bmm_ = _mm_

    def _mv_(self, weight: str, x: str) -> str:
        return f"{weight}.dot({x})"

    def _addmm_(self, bias: str, x: str, weight: str) -> str:
        if self._out in self._normed and bias in self._known and weight in self._known:
            self._centred.add(self._out)
            bias, weight = (self._constant(_centred(self._known[part])) for part in (bias, weight))
        self._lines.append(f"{self._out} = {self._mm_(x, weight)}")
        self._lines.append(f"add({self._out}, {bias}, {self._out})")
        return self._out

    _baddbmm_ = _addmm_

    def _native_layer_norm_(self, x: str, sizes: Sequence[int], scale: Any, shift: Any, eps: float) -> str:
        if len(sizes) > 1:
            raise _UntranslatableError("a norm over several axes")
        if x in self._centred:
            self._lines.append(f"{self._out} = {x}")
        else:
            self._lines.append(f"{self._out} = {x} - {self._mean_(x, -1, True)}")
        y, row, size = self._out, f"{self._out}r", sizes[0]
        if self._shape[:-1] == (1,):
            self._lines += [f"{row} = {y}.reshape(-1)", f"div({y}, root({row}.dot({row}) / {size} + {eps}), {y})"]
        else:
            total, least = self._constant(float(size)), self._constant(eps)
            squares = f"add(div(vecdot({y}, {y}), {total}), {least})"
            self._lines.append(f"div({y}, sqrt({squares})[..., None], {y})")
        self._lines += [f"mul({y}, {scale}, {y})"] if scale is not None else []
        self._lines += [f"add({y}, {shift}, {y})"] if shift is not None else []
        return y


def _centred(array: np.ndarray) -> np.ndarray:
    """The same less the mean over the last axis."""
    exact = array.astype(np.float64)
    return (exact - exact.mean(-1, keepdims=True)).astype(array.dtype)


def _clamp(x: np.ndarray, low: Any = None, high: Any = None) -> np.ndarray:
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def _softplus(x: np.ndarray, beta: float = 1.0, threshold: float = 20.0) -> np.ndarray:
    return np.logaddexp(x * beta, 0.0) / beta


def _elu(x: np.ndarray, alpha: float = 1.0, scale: float = 1.0, slope: float = 1.0) -> np.ndarray:
    return np.maximum(x, 0.0) * scale + np.expm1(np.minimum(x, 0.0) * slope) * (alpha * scale)


def _leaky_relu(x: np.ndarray, slope: float = 0.01) -> np.ndarray:
    return np.maximum(x, 0.0) + np.minimum(x, 0.0) * slope


_SAME_TENSOR = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)

_IN_PLACE: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "reciprocal": np.reciprocal,
    "abs": np.absolute,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "atan2": np.arctan2,
    "round": np.rint,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "clamp_min": np.maximum,
    "clamp_max": np.minimum,
    "le": np.less_equal,
    "lt": np.less,
    "ge": np.greater_equal,
    "gt": np.greater,
    "bitwise_and": np.bitwise_and,
}
"""Functions of numbers, by their names in torch, that take where to write as their last argument."""

_FUNCTIONS: dict[str, Any] = {
    **_IN_PLACE,
    "clamp": _clamp,
    "softplus": _softplus,
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    **{name: getattr(np, name) for name in ("asarray", "broadcast_to", "concatenate", "empty_like", "errstate")},
    **{name: getattr(np, name) for name in ("matmul", "stack", "tile", "where", "zeros_like")},
    "vecdot": getattr(np, "vecdot", None),
    "reduce": np.add.reduce,
    "root": math.sqrt,
}
