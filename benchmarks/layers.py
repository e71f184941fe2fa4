"""The FFN and the whole transformer block in training: forward and backward, with everything a step adds to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from sparse24.dispatch import Plan
from sparse24.timing import median_ms
from torch import Tensor, nn

from benchmarks import peer_torch, shapes
from benchmarks.bench import Arm, Bench, Case, free, relative_error
from benchmarks.shapes import Model
from benchmarks.timing import Call, sets_needed
from sparse_pretrain.models.blocks import Attention, Block, FeedForward
from sparse_pretrain.paths import config_dir
from sparse_pretrain.sparsity import SparseLinear, SparseTraining, load_recipe, sparsify
from sparse_pretrain.sparsity.products import apply_plans, choose_plans

FFN, BLOCK = "ffn", "block"
# of a chain of products in this dtype; what MVUE pruned is compared loosely: its draws turn on the last bit of dY
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float32: 1e-3}
MVUE_TOLERANCE = 0.35
ALWAYS_PACKED = 1000  # micro-batches of a step whose packing costs nothing: inference


def ffn_cases(device: torch.device, rehearse: bool) -> list[Case]:
    if rehearse:
        return [
            _case(FFN, shapes.TINY_GATED, shapes.TINY_TOKENS),
            _case(FFN, shapes.TINY, shapes.TINY_TOKENS),
            _inference(shapes.TINY, 16),
        ]
    if device.type != "cuda":
        return [_case(FFN, m, shapes.CPU_TOKENS, 20) for m in (shapes.CPU_10M, shapes.CPU_30M)]
    few = [_inference(m, n) for m in (shapes.LLAMA_7B, shapes.GPT2_124M) for n in shapes.FEW_TOKENS]
    few += [_case(FFN, m, n, 25) for m in (shapes.LLAMA_7B, shapes.GPT2_124M) for n in (128,)]
    return [_case(FFN, m, shapes.TOKENS, 30) for m in shapes.MODELS] + few


def block_cases(device: torch.device, rehearse: bool) -> list[Case]:
    if rehearse:
        return [_case(BLOCK, shapes.TINY_GATED, shapes.TINY_TOKENS)]
    if device.type != "cuda":
        return [_case(BLOCK, shapes.CPU_30M, shapes.CPU_TOKENS, 30)]
    return [_case(BLOCK, m, shapes.TOKENS, 40) for m in shapes.MODELS]


def recipes() -> list[str]:
    """The recipes whose speed differs, most valuable first; those that are not shipped are left out."""
    return [name for name in ("fst", "s_ste", "ste") if (config_dir() / "recipe" / f"{name}.yaml").is_file()]


def _case(part: str, model: Model, tokens: int, seconds: float = 5) -> Case:
    name = f"{model.name} ({model.d_model}, {model.d_ff}), {tokens} tokens"
    return Case(part, name, partial(_training, part, model, tokens, name), seconds)


def _inference(model: Model, tokens: int) -> Case:
    name = f"{model.name} ({model.d_model}, {model.d_ff}), {tokens} tokens, forward only"
    return Case(FFN, name, partial(_forward_only, model, tokens, name), 15)


class _Net(nn.Module):
    """An FFN or a block, under the name that recipes look for."""

    def __init__(self, part: str, model: Model) -> None:
        super().__init__()
        cfg = model.config()
        if part == FFN:
            self.ffn = FeedForward(cfg)
        else:
            self.block = Block(cfg, Attention(cfg, causal=True))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x) if hasattr(self, "ffn") else self.block(x)


def new_net(bench: Bench, part: str, model: Model) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(bench.device):
        return _Net(part, model)


def autocast(bench: Bench) -> AbstractContextManager:
    """As in training: fp32 weights, products in `bench.dtype`; weights are cast anew in every step, also in a graph."""
    if bench.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(bench.device.type, bench.dtype, cache_enabled=False)


def make_sparse(
    bench: Bench, net: nn.Module, recipe_name: str, tokens: int, dense_products: bool = False, micro_batches: int = 1
) -> SparseTraining:
    """Sparsify in place, with the fastest products for this many tokens; ready for step 0."""
    recipe = load_recipe(recipe_name)
    sparsify(net, recipe)
    if dense_products:
        plans = {name: Plan() for name, layer in net.named_modules() if isinstance(layer, SparseLinear)}
    else:
        rows = {name: tokens for name, layer in net.named_modules() if isinstance(layer, SparseLinear)}
        plans, _ = choose_plans(net, rows, bench.dtype, bench.device, micro_batches, "auto", bench.cache)
    apply_plans(net, plans, bench.dtype)
    training = SparseTraining(net, recipe, total_steps=1_000_000, seed=1)
    training.prepare(0)
    return training


def plans_of(net: nn.Module) -> str:
    """The choices of a module's sparse layers, each once."""
    plans = {tuple(layer.plan) for layer in net.modules() if isinstance(layer, SparseLinear)}
    return "; ".join(" / ".join(plan) for plan in sorted(plans))


def refresh_ms(bench: Bench, training: SparseTraining) -> float:
    """What a refresh of the masks adds to a step, spread over the steps that it is for."""
    if not training.layers:
        return 0.0
    once = median_ms(training.refresh, bench.device, 1 if bench.rehearse else 5, 1)
    return once / training.recipe.schedule.refresh_every


@contextmanager
def memory(bench: Bench, into: dict[str, float]) -> Iterator[None]:
    """Adds the most that was allocated within, above what there was before, as `peak_memory_gb`."""
    if bench.device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()
    into["peak_memory_gb"] = into.get("held_gb", 0.0) + (torch.cuda.max_memory_allocated() - before) / 1e9


def held_gb(bench: Bench) -> float:
    return torch.cuda.memory_allocated() / 1e9 if bench.device.type == "cuda" else 0.0


def _training(part: str, model: Model, tokens: int, case: str, bench: Bench) -> None:
    base = new_net(bench, part, model)
    batch = (tokens,) if part == FFN else (max(1, tokens // model.seq_len), min(tokens, model.seq_len))
    # the residual stream of a block is fp32 under autocast
    dtype = bench.dtype if part == FFN else torch.float32
    sets = min(4, sets_needed(2 * tokens * model.d_model * dtype.itemsize, bench.device))
    xs = [bench.randn(*batch, model.d_model, dtype=dtype, seed=i).requires_grad_() for i in range(sets)]
    dys = [bench.randn(*batch, model.d_model, dtype=dtype, seed=100 + i) for i in range(sets)]
    expected: dict[str, list[Tensor]] = {}

    def call_of(net: nn.Module) -> Call:
        layers = [layer for layer in net.modules() if isinstance(layer, SparseLinear)]
        parameters = list(net.parameters())

        def call(i: int) -> list[Tensor]:
            for layer in layers:
                layer.project()
            with autocast(bench):
                y = net(xs[i])
            return [y, *torch.autograd.grad(y, [xs[i], *parameters], dys[i].to(y.dtype))]

        return call

    def reference(recipe: str) -> list[Tensor]:
        if recipe not in expected:
            net = copy.deepcopy(base)
            if recipe != "dense":
                make_sparse(bench, net, recipe, tokens, dense_products=True)
            expected[recipe] = [t.detach() for t in call_of(net)(0)]
        return expected[recipe]

    def arm(name: str, recipe: str, compiled: bool) -> Arm:
        def make() -> Call:
            before = held_gb(bench)
            net = copy.deepcopy(base)
            if recipe != "dense":
                training = make_sparse(bench, net, recipe, tokens)
                made.added_ms = refresh_ms(bench, training)
                made.extra |= {"products": plans_of(net), "refresh_ms": made.added_ms}
            made.extra["held_gb"] = held_gb(bench) - before
            if compiled:
                net.compile()
            return call_of(net)

        def check(call: Call) -> float:
            call(0)
            with memory(bench, made.extra):
                result: list[Tensor] = call(0)
            return _error(result, reference(recipe), list(base.state_dict()), recipe)

        flop = model.ffn_flop(tokens) / _work(recipe) if part == FFN else 0
        made = Arm(name, make, check, TOLERANCE[bench.dtype], flop=flop, ours=recipe != "dense")
        return made

    compiles = bench.device.type == "cuda"
    arms = [arm("dense", "dense", False)]
    if compiles:
        arms.append(arm("dense, compiled", "dense", True))
    for recipe in recipes():
        arms.append(arm(recipe, recipe, False))
        if compiles:
            arms.append(arm(f"{recipe}, compiled", recipe, True))
    if part == FFN and bench.device.type == "cuda":
        arms.append(_peer(bench, base, call_of))
    bench.compare(part, case, arms, arms[1].name if compiles else arms[0].name, sets)
    expected.clear()
    free(bench.device)


def _work(recipe: str) -> float:
    """Dense products of a training step / what is left of them if sparse ones cost half."""
    cfg = load_recipe(recipe)
    sparse = (cfg.projection != "none") + (cfg.projection == "transposable") + (cfg.weight_gradient == "mvue")
    return 3 / (3 - sparse / 2)


def _error(result: list[Tensor], expected: list[Tensor], names: list[str], recipe: str) -> float:
    """The largest relative error of y, dx and the weights' gradients; one that rests on MVUE of a dY which is rounded
    differently counts only if it is beyond `MVUE_TOLERANCE`."""
    mvue = load_recipe(recipe).weight_gradient == "mvue"
    worst = 0.0
    for name, a, b in zip(["y", "dx", *names], result, expected, strict=True):
        error = relative_error(a, b)
        if mvue and name.endswith(("up.weight", "gate.weight")) and error <= MVUE_TOLERANCE:
            continue
        worst = max(worst, error) if error == error else error
        if worst != worst:
            return worst
    return worst


def _peer(bench: Bench, base: nn.Module, call_of: Callable[[nn.Module], Call]) -> Arm:
    """PyTorch's own training path: prunes at every step, dW dense."""

    def make() -> Call:
        before = held_gb(bench)
        net = copy.deepcopy(base)
        peer_torch.swap(net, bench.dtype)
        errors.extend(peer_torch.check(m) for m in net.modules() if isinstance(m, peer_torch.PeerLinear))
        made.extra["held_gb"] = held_gb(bench) - before
        return call_of(net)

    def check(call: Call) -> float:
        call(0)
        with memory(bench, made.extra):
            result: list[Tensor] = call(0)
        finite = all(t.isfinite().all().item() for t in result)
        return max(errors) if finite else float("nan")

    errors: list[float] = []
    made = Arm("torch SparseSemiStructuredTensor", make, check, 1e-2, ours=False)
    return made


def _forward_only(model: Model, tokens: int, case: str, bench: Bench) -> None:
    base = new_net(bench, FFN, model).requires_grad_(False)
    weights = (3 if model.gated else 2) * model.d_model * model.d_ff
    sets = min(8, sets_needed(weights * bench.dtype.itemsize, bench.device))
    xs = [bench.randn(tokens, model.d_model, dtype=bench.dtype, seed=i) for i in range(sets)]
    references: dict[str, Tensor] = {}

    def arm(recipe: str, compiled: bool) -> Arm:
        def make() -> Call:
            # as many copies as it takes, so that no weight is found in the cache
            nets = [copy.deepcopy(base) for _ in range(sets)]
            for net in nets:
                if recipe == "dense":
                    net.to(bench.dtype)
                    continue
                make_sparse(bench, net, recipe, tokens, micro_batches=ALWAYS_PACKED)
                made.extra["products"] = plans_of(net)
            if compiled:
                for net in nets:
                    net.compile()

            @torch.no_grad()
            def call(i: int) -> Tensor:
                with autocast(bench) if recipe != "dense" else nullcontext():
                    return nets[i](xs[i])

            return call

        def check(call: Call) -> float:
            if recipe not in references:
                net = copy.deepcopy(base)
                if recipe != "dense":
                    make_sparse(bench, net, recipe, tokens, dense_products=True)
                with torch.no_grad(), autocast(bench):
                    references[recipe] = net(xs[0])
            return relative_error(call(0), references[recipe])

        share = 1.0 if recipe == "dense" else 9 / 16
        name = f"{recipe}, compiled" if compiled else recipe
        made = Arm(
            name, make, check, TOLERANCE[bench.dtype], bytes=share * weights * bench.dtype.itemsize,
            flop=2.0 * tokens * weights, ours=recipe != "dense",
        )  # fmt: skip
        return made

    compiles = bench.device.type == "cuda"
    # a transposable mask or not makes no difference to the forward pass
    arms = [arm("dense", False), *([arm("dense", True)] if compiles else []), arm("ste", False)]
    arms += [arm("ste", True)] if compiles else []
    bench.compare(FFN, case, arms, arms[1].name if compiles else arms[0].name, sets)
    free(bench.device)
