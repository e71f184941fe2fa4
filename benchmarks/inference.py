"""Generating text: prefill of prompts and decoding with a key-value cache, dense weights against packed ones."""

from __future__ import annotations

import copy
from functools import partial

import torch
from sparse24.backends import BACKENDS
from sparse24.backends.base import FORWARD, Product
from torch import Tensor

from benchmarks import shapes
from benchmarks.bench import Arm, Bench, Case, Unavailable, free, relative_error
from benchmarks.layers import autocast
from benchmarks.shapes import Model
from benchmarks.timing import Call
from sparse_pretrain.models.blocks import Block, KeyValueCache
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.sparsity import load_recipe, sparsify
from sparse_pretrain.sparsity.packed import ROW_MAJOR, TOKEN_STEP, PackedLinear, choose_backends
from sparse_pretrain.sparsity.represent import represent, round_weights, weight_bytes

PART = "inference"
# of logits at the end of a model, through products that round differently
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float32: 1e-3}
RECIPE = "ste"  # of the masks: the FFN of every block
TINY_VOCAB = 64  # of a few layers out of many, where an output layer would count for too much
HALVE_WORK = ("gluon", "cusparselt", "cutlass")  # sparse tensor cores
LIBRARIES = ("cusparselt", "cutlass")


def cases(device: torch.device, rehearse: bool) -> list[Case]:
    if rehearse:
        return [_case(shapes.TINY_GATED, 2, 16, False), _case(shapes.TINY, 3, 16, True)]
    if device.type != "cuda":
        one, few = _case(shapes.CPU_30M, 1, 128, True, 5), _case(shapes.CPU_30M, 8, 128, True, 5)
        return [_case(shapes.CPU_30M, 4, 128, False, 10), one, few]
    found = []
    for model, layers in ((shapes.LLAMA_7B, 1), (shapes.GPT2_124M, None), (shapes.LLAMA_1B, 4)):
        longest = model.seq_len
        found += [_case(model, batch, longest, True, 10, layers) for batch in (1, 8, 64)]
        found += [_case(model, 1, longest, False, 10, layers), _case(model, 8, 512, False, 10, layers)]
        found += [_case(model, batch, 512, True, 10, layers) for batch in (1, 64)]
    return found


def _case(model: Model, batch: int, tokens: int, decode: bool, seconds: float = 2, n_layer: int | None = None) -> Case:
    layers = f"{n_layer} of {model.n_layer} layers, no output" if n_layer else f"{model.n_layer} layers"
    what = "decode" if decode else "prefill"
    name = f"{model.name}, {layers}: {what}, {batch} x {tokens}"
    return Case(PART, name, partial(_run, model, n_layer, batch, tokens, decode, name), seconds)


def _run(model: Model, n_layer: int | None, batch: int, tokens: int, decode: bool, case: str, bench: Bench) -> None:
    """Prefill: `batch` prompts of `tokens` tokens each. Decode: a new token for each text, the last of `tokens`."""
    vocab = TINY_VOCAB if n_layer else model.vocab_size
    torch.manual_seed(0)
    with torch.device(bench.device):
        base = GPT(model.config(n_layer), vocab).eval().requires_grad_(False)
    prompt = torch.randint(vocab, (batch, tokens), generator=bench.generator(), device=bench.device)
    new = prompt[:, -1:] if decode else prompt
    caches = _filled(bench, base, batch, tokens) if decode else []
    cache_bytes = sum(2 * cache.contents()[0].numel() * bench.dtype.itemsize for cache in caches)
    ffn = ffn_weights(base)
    rest = sum(p.numel() for block in base.blocks for p in block.parameters()) - ffn
    expected: list[Tensor] = []

    def call_of(net: GPT) -> Call:
        @torch.no_grad()
        def call(_: int) -> Tensor:
            for cache in caches:
                cache.length = tokens - 1  # the token of the call before is forgotten
            with autocast(bench):
                return net.head(net.hidden(new, caches or net.make_caches(tokens))[:, -1])

        return call

    def arm(name: str) -> Arm:
        def make() -> Call:
            net = _represented(bench, base, name, new.numel())
            held, _ = weight_bytes(net)
            made.bytes = held + cache_bytes if decode else 0
            made.extra |= {"tokens": new.numel(), "weights_mb": held / 1e6, "products": _products(net)}
            return call_of(net)

        def check(call: Call) -> float:
            if not expected:
                expected.append(call_of(_represented(bench, base, "masked", new.numel()))(0))
            return relative_error(call(0), expected[0])

        work = ffn / 2 if name in HALVE_WORK else ffn
        made = Arm(
            name, make, None if name == "dense" else check, TOLERANCE[bench.dtype],
            flop=2.0 * new.numel() * (work + rest),
            ours=name != "dense" and name not in LIBRARIES,
            blame="" if name == "dense" else f"{'triton' if name == ROW_MAJOR else name}/{FORWARD}/",
        )  # fmt: skip
        return made

    backends = [name for name in BACKENDS if name not in ("dense", "triton")]  # triton's form is the row-major one
    bench.compare(PART, case, [arm(name) for name in ("dense", ROW_MAJOR, *backends)], "dense")
    expected.clear()
    free(bench.device)


def _represented(bench: Bench, base: GPT, how: str, tokens: int) -> GPT:
    """`base` with its dense weights, with masked ones as dense tensors (`masked`), or packed for a backend, in
    `bench.dtype`.

    Raises:
        Unavailable: the backend cannot serve a layer here.
    """
    net = copy.deepcopy(base)
    if how != "dense":
        rows = sparsify(net, load_recipe(RECIPE))
        choices: dict[str, str] = {}
        if how in BACKENDS:
            for row in rows:
                product = Product(FORWARD, TOKEN_STEP, row.out_features, row.in_features, bench.dtype)
                able, reason = BACKENDS[how].supports(product, bench.device)
                if row.sparse and not able:
                    raise Unavailable(reason)
            choices, _ = choose_backends(net, tokens, bench.dtype, bench.device, how, bench.cache)
        represent(net, "dense" if how == "masked" else "packed", bench.dtype, choices)
    round_weights(net, bench.dtype)
    return net


def _products(net: GPT) -> str:
    return ", ".join(sorted({layer.choice for layer in net.modules() if isinstance(layer, PackedLinear)}))


def ffn_weights(net: GPT) -> int:
    """Weights of the FFNs."""
    return sum(p.numel() for name, p in net.named_parameters() if ".ffn." in name and p.dim() == 2)


def _filled(bench: Bench, net: GPT, batch: int, tokens: int) -> list[KeyValueCache]:
    """Caches for `tokens` tokens, which hold random keys and values of all but the last."""
    caches = net.make_caches(tokens)
    for i, (cache, block) in enumerate(zip(caches, net.blocks, strict=True)):
        assert isinstance(block, Block)
        size = (batch, block.attn.n_kv_head, tokens - 1, block.attn.head_dim)
        cache.append(*(bench.randn(*size, dtype=bench.dtype, seed=2 * i + j) for j in range(2)))
    return caches
