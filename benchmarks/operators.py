"""Operators on weights, activations and gradients, against the floor that their bytes set and PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sparse24 import reference
from sparse24.fragments import Fragments, from_fragments
from sparse24.packing import Packed, unpack
from torch import Tensor

from benchmarks import shapes
from benchmarks.bench import TOLERANCE, Arm, Bench, Case, exact, free, relative_error
from benchmarks.products import random_mask
from benchmarks.timing import Call, sets_needed

PART = "operators"
PACKED = 1 + 1 / 8  # bytes of a packed 16-bit matrix per dense element: half the values, and two bits for each of them
WEIGHTS = ((4096, 11008), (768, 3072))
TOKENS = shapes.TOKENS
FEATURES = (4096, 768)
HIDDEN = ((TOKENS, 11008), (TOKENS, 3072))
SEED = 1234


def cases(device: torch.device, rehearse: bool) -> list[Case]:
    if device.type != "cuda" and not rehearse:
        return []  # kernels are for GPUs
    weights, hidden, grads = list(WEIGHTS), list(HIDDEN), [(TOKENS, features) for features in FEATURES]
    if rehearse:
        weights, hidden, grads = [(128, 256)], [(16, 64)], [(64, 128)]
    found = []
    for i in range(len(weights)):
        found += [
            make_case("prune by magnitude and pack", _prune_pack, *weights[i]),
            make_case("transposable search and packing both ways", _transposable, *weights[i]),
            make_case("packing both ways under a mask", _pack_both, *weights[i]),
            make_case("MVUE of dY and packing", _mvue, *grads[i]),
            make_case("soft threshold and packing", _soft_threshold, *weights[i]),
            make_case("refresh of a mask", _refresh, *weights[i]),
            make_case("AdamW with masked decay", _adamw, *weights[i]),
            make_case("activations, forward", _activations, *hidden[i]),
            make_case("activations, backward", _activation_gradients, *hidden[i]),
            make_case("squared ReLU pruned to 2:4", _relu2, *hidden[i]),
            make_case("fp8 scaling with amax", _fp8, *hidden[i]),
        ]
    return found


def make_case(title: str, run: Callable[..., None], rows: int, cols: int, *more: object, seconds: float = 6) -> Case:
    name = f"{title}, {rows}x{cols}"
    return Case(PART, name, lambda bench: run(bench, name, rows, cols, *more), seconds)


class _Sets:
    """Weights of one shape in fp32, as many as it takes for none to be found in the cache; and a mask."""

    def __init__(self, bench: Bench, rows: int, cols: int) -> None:
        self.sets = sets_needed(4 * rows * cols, bench.device)
        self.weights = [bench.randn(rows, cols, dtype=torch.float32, seed=i) for i in range(self.sets)]
        self.mask = random_mask(rows, cols, bench.generator())
        self.dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float16  # interpreted bf16 is wrong
        self.size = rows * cols

    def halves(self) -> list[Tensor]:
        return [weight.to(self.dtype) for weight in self.weights]


def _as_matrix(packed: Packed | Fragments) -> Tensor:
    return unpack(from_fragments(packed) if isinstance(packed, Fragments) else packed)


def timed(bench: Bench, case: str, arms: list[Arm], baseline: str, sets: int) -> None:
    bench.compare(PART, case, arms, baseline, sets)
    free(bench.device)


def _peer_compress(inputs: _Sets) -> Arm:
    """What cuSPARSELt takes to compress a weight that is pruned already."""

    def make() -> Call:
        pruned = [(w * inputs.mask).to(inputs.dtype) for w in inputs.weights]
        return lambda i: torch._cslt_compress(pruned[i])

    return Arm("torch _cslt_compress, pruned before", make, bytes=inputs.size * (2 + PACKED), ours=False)


def _peer_tile(inputs: _Sets, name: str, use_cutlass: bool) -> Arm:
    def make() -> Call:
        halves = inputs.halves()
        return lambda i: torch._sparse_semi_structured_tile(halves[i], algorithm="", use_cutlass=use_cutlass)

    return Arm(f"torch tile, {name}, greedy", make, bytes=inputs.size * (2 + 2 * PACKED), ours=False)


# --- weights ---


def _prune_pack(bench: Bench, case: str, rows: int, cols: int) -> None:
    inputs = _Sets(bench, rows, cols)
    mask, dtype = reference.magnitude_mask(inputs.weights[0]), inputs.dtype
    expected = (inputs.weights[0] * mask).to(dtype)

    def arm(name: str, fragments: bool) -> Arm:
        def make() -> Call:
            from sparse24.prune import prune_pack

            return lambda i: prune_pack(inputs.weights[i], "magnitude", dtype, fragments=fragments)

        check = lambda call: exact(_as_matrix(call(0)) + 0.0, expected + 0.0)  # noqa: E731
        return Arm(name, make, check, 0.0, bytes=inputs.size * (4 + PACKED))

    peer = _peer_compress(inputs)
    timed(bench, case, [peer, arm("row-major", False), arm("fragment order", True)], peer.name, inputs.sets)


def _transposable(bench: Bench, case: str, rows: int, cols: int) -> None:
    inputs = _Sets(bench, rows, cols)
    mask, dtype = reference.transposable_mask(inputs.weights[0]), inputs.dtype
    expected = (inputs.weights[0] * mask).to(dtype)

    def arm(name: str, fragments: bool) -> Arm:
        def make() -> Call:
            from sparse24.transposable import pack_both

            return lambda i: pack_both(inputs.weights[i], "transposable", dtype, fragments=fragments)

        def check(call: Call) -> float:
            straight, transpose = call(0)
            return max(
                exact(_as_matrix(straight) + 0.0, expected + 0.0),
                exact(_as_matrix(transpose) + 0.0, expected.t().contiguous() + 0.0),
            )

        return Arm(name, make, check, 0.0, bytes=inputs.size * (4 + 2 * PACKED))

    cutlass, cusparselt = _peer_tile(inputs, "CUTLASS", True), _peer_tile(inputs, "cuSPARSELt", False)
    arms = [cutlass, cusparselt, arm("row-major", False), arm("fragment order", True)]
    timed(bench, case, arms, cutlass.name, inputs.sets)


def _pack_both(bench: Bench, case: str, rows: int, cols: int) -> None:
    inputs = _Sets(bench, rows, cols)
    dtype = inputs.dtype
    expected = (inputs.weights[0] * inputs.mask).to(dtype)

    def ours() -> Call:
        from sparse24.transposable import pack_both

        return lambda i: pack_both(inputs.weights[i], "mask", dtype, mask=inputs.mask, fragments=True)

    def check(call: Call) -> float:
        straight, transpose = call(0)
        return max(
            exact(_as_matrix(straight) + 0.0, expected + 0.0),
            exact(_as_matrix(transpose) + 0.0, expected.t().contiguous() + 0.0),
        )

    def library() -> Call:
        def call(i: int) -> object:
            pruned = torch.mul(inputs.weights[i], inputs.mask, out=torch.empty_like(expected))
            return torch._cslt_compress(pruned), torch._cslt_compress(pruned.t().contiguous())

        return call

    peer = Arm("torch mask, transpose, two _cslt_compress", library, bytes=inputs.size * (5 + 2 * PACKED), ours=False)
    arms = [peer, Arm("fragment order", ours, check, 0.0, bytes=inputs.size * (5 + 2 * PACKED))]
    timed(bench, case, arms, peer.name, inputs.sets)


def _soft_threshold(bench: Bench, case: str, rows: int, cols: int) -> None:
    inputs = _Sets(bench, rows, cols)
    scale = reference.soft_threshold_scale(inputs.weights[0])
    expected = (scale * reference.soft_threshold(inputs.weights[0])).to(inputs.dtype)

    def make() -> Call:
        from sparse24.prune import prune_pack

        return lambda i: prune_pack(inputs.weights[i], "soft_threshold", inputs.dtype, scale=scale)

    check = lambda call: relative_error(_as_matrix(call(0)), expected)  # noqa: E731
    arm = Arm("row-major", make, check, TOLERANCE[inputs.dtype], bytes=inputs.size * (4 + PACKED))
    timed(bench, case, [arm], "", inputs.sets)


def _refresh(bench: Bench, case: str, rows: int, cols: int) -> None:
    inputs = _Sets(bench, rows, cols)

    def arm(name: str, module: str, function: str, expected: Callable[[Tensor], Tensor]) -> Arm:
        def make() -> Call:
            from importlib import import_module

            update = getattr(import_module(f"sparse24.{module}"), function)
            mask = inputs.mask.clone()
            flips = torch.zeros((), dtype=torch.int64, device=bench.device)

            def call(i: int) -> tuple[Tensor, Tensor]:
                update(inputs.weights[i], mask, flips)
                return mask, flips

            return call

        def check(call: Call) -> float:
            new = expected(inputs.weights[0])
            mask, flips = call(0)
            wrong = (mask != new).float().mean().item()
            return wrong + float(flips.item() != (new != inputs.mask).sum().item())

        return Arm(name, make, check, 0.0, bytes=inputs.size * (4 + 2))

    arms = [
        arm("magnitude, counting flips", "prune", "update_mask", reference.magnitude_mask),
        arm("transposable, counting flips", "transposable", "transposable_mask_", reference.transposable_mask),
    ]
    timed(bench, case, arms, "", inputs.sets)


def _adamw(bench: Bench, case: str, rows: int, cols: int) -> None:
    """A list of parameters of this shape, as many as a model has; two sets of gradients, in turns."""
    tensors = 2 if bench.rehearse else max(2, min(24, 2**28 // (rows * cols)))
    size = tensors * rows * cols
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    decay = 0.1
    mask = random_mask(rows, cols, bench.generator())
    draw = partial(bench.randn, rows, cols, dtype=torch.float32)
    grads = [[draw(seed=100 * i + j + 100) for j in range(tensors)] for i in range(2)]

    def by_torch() -> Call:
        weights = [torch.nn.Parameter(draw(seed=i)) for i in range(tensors)]
        optimizer = torch.optim.AdamW(weights, fused=True, **settings)

        def call(i: int) -> None:
            for weight, grad in zip(weights, grads[i], strict=True):
                weight.grad = grad
            optimizer.step()

        return call

    def make(place: str) -> Call:
        from sparse24.optim import TensorTable, adamw_step

        weights = [draw(seed=i) for i in range(tensors)]
        means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        steps = [torch.zeros((), device=bench.device)] * tensors
        tables = [TensorTable(), TensorTable()]

        def call(i: int) -> list[Tensor]:
            adamw_step(
                weights, grads[i], means, squares, steps, [mask] * tensors, decay_factor=decay, decay_place=place,
                table=tables[i], **settings,
            )  # fmt: skip
            return weights

        return call

    def check(place: str, call: Call) -> float:
        """After a step with either set of gradients, against the formula on the last of the weights."""
        call(0)
        w = draw(seed=tensors - 1).double()
        pruned = ~mask
        (beta1, beta2), lr = settings["betas"], settings["lr"]
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t, grad in ((1, grads[0][-1]), (2, grads[1][-1])):
            term = decay * pruned * w
            g = grad.double() + (term if place == "gradient" else 0)
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            w = w - (lr * term if place == "weight" else 0) - lr * settings["weight_decay"] * w
            w = w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + settings["eps"])
        return relative_error(call(1)[-1], w)

    plain = Arm("torch fused AdamW, no masks", by_torch, bytes=size * 28.0, ours=False)
    arms = [plain]
    for place in ("gradient", "weight"):
        arms.append(Arm(f"decay in {place}", partial(make, place), partial(check, place), 1e-6, bytes=size * 29.0))
    timed(bench, case, arms, plain.name, 2)


# --- activations and their gradients ---


def _mvue(bench: Bench, case: str, rows: int, cols: int) -> None:
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float16
    sets = sets_needed(2 * rows * cols, bench.device)
    grads = [bench.randn(rows, cols, dtype=dtype, seed=i) for i in range(sets)]
    position = torch.tensor([3, 0, 1, 0], device=bench.device)
    expected = reference.mvue24(grads[0], reference.uniform24(SEED, 3, 1, rows, cols, device=bench.device))

    def arm(name: str, fragments: bool | None) -> Arm:
        def make() -> Call:
            from sparse24 import mvue

            if fragments is None:
                return lambda i: mvue.mvue_prune(grads[i], SEED, position)
            return lambda i: mvue.mvue_pack(grads[i], SEED, position, dtype, fragments=fragments)

        def check(call: Call) -> float:
            result = call(0)
            if fragments is None:
                return relative_error(result, expected)
            return relative_error(_as_matrix(result)[:, :rows], expected.t())

        moved = 4.0 if fragments is None else 2 + PACKED
        return Arm(name, make, check, 1e-3, bytes=rows * cols * moved)

    arms = [
        arm("packed transpose, fragment order", True),
        arm("packed transpose, row-major", False),
        arm("dense", None),
    ]
    timed(bench, case, arms, "", sets)


def _inputs(bench: Bench, rows: int, cols: int, count: int) -> tuple[list[list[Tensor]], int]:
    """`count` matrices, in as many sets as it takes."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float16
    sets = sets_needed(2.0 * count * rows * cols, bench.device)
    draw = partial(bench.randn, rows, cols, dtype=dtype)
    return [[draw(seed=count * i + j) for j in range(count)] for i in range(sets)], sets


def _activation(kind: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """The formula in fp32."""
    x = up.float() if gate is None else gate.float()
    if kind == "relu2":
        return F.relu(x).square()
    value = F.silu(x) if kind == "swiglu" else F.gelu(x, approximate="tanh")
    return value if gate is None else value * up.float()


def _by_torch(inputs: list[list[Tensor]], compiled: bool) -> Call:
    def swiglu(up: Tensor, gate: Tensor) -> Tensor:
        return F.silu(gate) * up

    function = torch.compile(swiglu) if compiled else swiglu
    return lambda i: function(inputs[i][0], inputs[i][1])


def _activations(bench: Bench, case: str, rows: int, cols: int) -> None:
    from sparse24.activations import GATED, KINDS

    inputs, sets = _inputs(bench, rows, cols, 2)

    def make(kind: str) -> Call:
        from sparse24.gated import gated_forward

        return lambda i: gated_forward(kind, inputs[i][0], inputs[i][1] if kind in GATED else None)

    def check(kind: str, call: Call) -> float:
        up, gate = inputs[0]
        return relative_error(call(0), _activation(kind, up, gate if kind in GATED else None))

    gated, plain = 6.0 * rows * cols, 4.0 * rows * cols
    arms = [Arm("torch, swiglu, eager", partial(_by_torch, inputs, False), bytes=gated, ours=False)]
    if bench.device.type == "cuda":
        arms.append(Arm("torch, swiglu, compiled", partial(_by_torch, inputs, True), bytes=gated, ours=False))
    for kind in KINDS:
        bytes = gated if kind in GATED else plain
        arms.append(Arm(kind, partial(make, kind), partial(check, kind), TOLERANCE[torch.bfloat16], bytes=bytes))
    timed(bench, case, arms, arms[0].name, sets)


def _activation_gradients(bench: Bench, case: str, rows: int, cols: int) -> None:
    from sparse24.activations import GATED, KINDS

    inputs, sets = _inputs(bench, rows, cols, 3)  # dy, up, gate

    def make(kind: str) -> Call:
        from sparse24.gated import gated_backward

        return lambda i: gated_backward(kind, inputs[i][0], inputs[i][1], inputs[i][2] if kind in GATED else None)

    def check(kind: str, call: Call) -> float:
        dy, *leaves = (t.float().requires_grad_() for t in (inputs[0] if kind in GATED else inputs[0][:2]))
        y = _activation(kind, leaves[0], leaves[1] if kind in GATED else None)
        expected = torch.autograd.grad(y, leaves, dy)
        results = [t for t in call(0) if t is not None]
        return max(relative_error(a, b) for a, b in zip(results, expected, strict=True))

    def by_torch() -> Call:
        def gradients(dy: Tensor, up: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
            return dy * F.silu(gate), torch.ops.aten.silu_backward(dy * up, gate)

        function = torch.compile(gradients) if bench.device.type == "cuda" else gradients
        return lambda i: function(*inputs[i])

    gated, plain = 10.0 * rows * cols, 6.0 * rows * cols
    arms = [Arm("torch, swiglu, compiled", by_torch, bytes=gated, ours=False)]
    for kind in KINDS:
        bytes = gated if kind in GATED else plain
        arms.append(Arm(kind, partial(make, kind), partial(check, kind), TOLERANCE[torch.bfloat16], bytes=bytes))
    timed(bench, case, arms, arms[0].name, sets)


def _relu2(bench: Bench, case: str, rows: int, cols: int) -> None:
    inputs, sets = _inputs(bench, rows, cols, 2)  # x, dy
    x = inputs[0][0]
    h = F.relu(x.float()).square().to(x.dtype)
    mask = reference.magnitude_mask(h)

    def forward() -> Call:
        from sparse24.gated import relu2_prune_pack

        return lambda i: relu2_prune_pack(inputs[i][0])

    def backward() -> Call:
        from sparse24.gated import relu2_prune_backward

        return lambda i: relu2_prune_backward(inputs[i][1], inputs[i][0])

    def check_backward(call: Call) -> float:
        expected = 2 * F.relu(x.float()) * inputs[0][1].float() * mask
        return relative_error(call(0), expected)

    check = lambda call: relative_error(_as_matrix(call(0)), h * mask)  # noqa: E731
    tolerance, size = TOLERANCE[torch.bfloat16], rows * cols
    arms = [
        Arm("forward and packing", forward, check, tolerance, bytes=size * (2 + PACKED)),
        Arm("backward", backward, check_backward, tolerance, bytes=size * 6.0),
    ]
    timed(bench, case, arms, "", sets)


def _fp8(bench: Bench, case: str, rows: int, cols: int) -> None:
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float16
    sets = sets_needed(2 * rows * cols, bench.device)
    xs = [bench.randn(rows, cols, dtype=dtype, seed=i) for i in range(sets)]
    fp8 = torch.float8_e4m3fn

    def by_torch(i: int) -> tuple[Tensor, Tensor]:
        scale = (xs[i].abs().amax().float() / torch.finfo(fp8).max).clamp(min=2.0**-126)
        return (xs[i].float() * (1 / scale)).clamp(-448, 448).to(fp8), scale

    def make(transposed: bool) -> Call:
        from sparse24.fp8 import quantize

        return lambda i: quantize(xs[i], fp8, transposed=transposed)

    def check(call: Call) -> float:
        result, expected = call(0), by_torch(0)
        q, scale = result[0], result[-1]
        return relative_error(q.float() * scale, expected[0].float() * expected[1])

    size = rows * cols
    arms = [
        Arm("torch, eager", lambda: by_torch, bytes=size * 5.0, ours=False),
        Arm("e4m3", partial(make, False), check, 1e-3, bytes=size * 5.0),
        Arm("e4m3 and its transpose", partial(make, True), check, 1e-3, bytes=size * 6.0),
    ]
    timed(bench, case, arms, "torch, eager", sets)
