"""What can be seen on a GPU only: the GEMMs for real, CUDA graphs, compilation, memory, sizes past 2³¹ elements."""

import pytest
import torch
from sparse24 import dispatch
from sparse24.autograd import MvueKey, SparseWeight, sparse_linear
from sparse24.backends import BACKENDS, split_choice
from sparse24.backends.base import FORWARD, INPUT_GRADIENT, KINDS, WEIGHT_GRADIENT, Operand
from sparse24.dispatch import TOLERANCE, LayerShape, Plan, choose, measure
from sparse24.reference import magnitude_mask, transposable_mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(1024, 512, 384), (1000, 256, 1024), (16, 1024, 512), (1, 128, 128), (4096, 2048, 5504 // 64 * 64)]


@pytest.fixture
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "dense"])
def test_every_variant_is_right_or_refused(name, kind, shape, dtype, gpu):
    check_variants(name, kind, LayerShape(*shape, dtype, transposable=True, mvue=True), gpu)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(BACKENDS))
def test_every_fp8_variant_is_right_or_refused(name, shape, gpu):
    check_variants(name, FORWARD, LayerShape(*shape, torch.bfloat16, transposable=False, mvue=True, fp8=True), gpu)


def check_variants(name, kind, shape, gpu):
    backend, product = BACKENDS[name], shape.product(kind)
    able, reason = backend.supports(product, gpu)
    if not able:
        pytest.skip(reason)
    problem = dispatch._Problem(shape, kind, gpu)
    operand = problem.pack(backend) if kind != WEIGHT_GRADIENT else []
    right = 0
    for variant in backend.variants(product, gpu):
        try:
            result = problem.run(backend, operand, variant)
        except RuntimeError:
            assert name == "cusparselt", variant  # it has fewer algorithms than we try
            continue
        off = problem.error(result)
        if name == "cusparselt" and not off <= TOLERANCE[product.dtype]:
            continue  # known of this library; dispatch finds it too
        assert off <= TOLERANCE[product.dtype], variant
        right += 1
    assert right


@pytest.mark.parametrize("features", [256, 40], ids=["fp8 tensor cores", "emulated"])
def test_fp8_gives_what_it_does_on_a_cpu(features, gpu):
    results = []
    for device in (torch.device("cpu"), gpu):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(n, features, generator=generator).to(device) for n in (64, 128))
        dy = torch.randn(64, 128, generator=generator).bfloat16().to(device)
        sparse = weight * magnitude_mask(weight)
        x, weight = x.bfloat16().requires_grad_(), weight.requires_grad_()
        key = MvueKey(1, 2, torch.tensor([3, 0], device=device))
        y = sparse_linear(x, weight, sparse, None, key, fp8=True)
        y.backward(dy)
        results.append([t.detach().float().cpu() for t in (y, x.grad, weight.grad)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert (on_gpu - on_cpu).norm() <= TOLERANCE[torch.float8_e4m3fn] * on_cpu.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_of_tokens_than_measured(kind, gpu):
    """A last micro-batch, validation: whatever `supports` was asked about, a choice serves any number of tokens."""
    product = LayerShape(1024, 512, 256, torch.bfloat16, transposable=True, mvue=True).product(kind)
    able = [b for b in BACKENDS.values() if b.supports(product, gpu)[0]]
    for tokens in (1, 7, 77, 1000):
        shape = LayerShape(tokens, 512, 256, torch.bfloat16, transposable=True, mvue=True)
        problem = dispatch._Problem(shape, kind, gpu)
        for backend in able:
            operand = problem.pack(backend) if kind != WEIGHT_GRADIENT else []
            off = problem.error(problem.run(backend, operand, ""))
            assert off <= TOLERANCE[torch.bfloat16], (backend.name, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_results_repeat_bit_for_bit(kind, gpu):
    shape = LayerShape(2048, 1024, 1024, torch.bfloat16, transposable=True, mvue=True)
    problem = dispatch._Problem(shape, kind, gpu)
    for name, backend in BACKENDS.items():
        product = shape.product(kind)
        if not backend.supports(product, gpu)[0] or name == "cusparselt":
            continue
        operand = problem.pack(backend) if kind != WEIGHT_GRADIENT else []
        for variant in backend.variants(product, gpu):
            first = problem.run(backend, operand, variant)
            assert all(torch.equal(first, problem.run(backend, operand, variant)) for _ in range(5)), (name, variant)


def test_dispatch_is_never_slower_than_dense(gpu):
    for tokens, out_features, in_features in [(8192, 4096, 1024), (64, 4096, 1024), (100, 72, 40)]:
        shape = LayerShape(tokens, out_features, in_features, torch.bfloat16, transposable=True, mvue=True)
        plan, rows = choose(shape, gpu)
        for kind in KINDS:
            step = {row.choice: row.step_ms(1) for row in rows if row.kind == kind and row.product_ms is not None}
            chosen = step[getattr(plan, kind)]
            assert chosen == min(step.values()) or chosen == step["dense"] <= min(step.values()) / (1 - dispatch.MARGIN)


def packed(gpu, out_features=1024, in_features=512, only=None):
    """only: name of the backend to use where it can be; else the first sparse one."""
    weight = torch.randn(out_features, in_features, device=gpu)
    mask = transposable_mask(weight)
    choices = {}
    for kind in KINDS:
        rows = measure(LayerShape(2048, out_features, in_features, torch.bfloat16, True, True), kind, gpu, only)
        sparse = [row.choice for row in rows if row.product_ms is not None and row.choice != "dense"]
        choices[kind] = sparse[0] if sparse else "dense"
    operand, _ = split_choice(choices[FORWARD])[0].pack_weight(weight, mask, None, torch.bfloat16, True, False)
    _, operand_t = split_choice(choices[INPUT_GRADIENT])[0].pack_weight(weight, mask, None, torch.bfloat16, False, True)
    sparse = SparseWeight(
        Operand(choices[FORWARD], operand), Operand(choices[INPUT_GRADIENT], operand_t), choices[WEIGHT_GRADIENT]
    )
    return weight, (weight * mask).bfloat16(), sparse


def gradients(function, weight, sparse, gpu):
    generator = torch.Generator(gpu).manual_seed(0)
    x = torch.randn(2048, weight.shape[1], device=gpu, dtype=torch.bfloat16, generator=generator).requires_grad_()
    dy = torch.randn(2048, weight.shape[0], device=gpu, dtype=torch.bfloat16, generator=generator)
    w = weight.clone().requires_grad_()
    key = MvueKey(1, torch.tensor(0, device=gpu), torch.tensor([3, 0], device=gpu))
    y = function(x, w, sparse, None, key)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("compiled", [False, True])
def test_the_layer_against_dense_products(compiled, gpu):
    weight, dense, sparse = packed(gpu)
    torch._dynamo.reset()
    function = torch.compile(sparse_linear, fullgraph=True) if compiled else sparse_linear
    for found, expected in zip(
        gradients(function, weight, sparse, gpu), gradients(sparse_linear, weight, dense, gpu), strict=True
    ):
        assert (found.float() - expected.float()).norm() / expected.float().norm() < 1e-2


def test_the_layer_in_a_cuda_graph(gpu):
    weight, _, sparse = packed(gpu)
    x = torch.randn(2048, weight.shape[1], device=gpu, dtype=torch.bfloat16).requires_grad_()
    w = weight.clone().requires_grad_()
    counter = torch.tensor([3, 0], device=gpu)
    key = MvueKey(1, torch.tensor(0, device=gpu), counter)

    def step():
        x.grad = w.grad = None
        sparse_linear(x, w, sparse, None, key).square().mean().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = x.grad, w.grad
    for steps in (5, 6):  # the counter moves on in place: other random numbers
        counter[0] = steps
        graph.replay()
        found = [t.clone() for t in captured]
        step()
        for a, b in zip(found, (x.grad, w.grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


def test_the_optimizer_in_a_cuda_graph(gpu):
    """Recorded with the addresses of a step before; with others it would replay those of memory given back."""
    from sparse24.optim import TensorTable, adamw_step

    def tensors():
        generator = torch.Generator(gpu).manual_seed(0)
        new = [[torch.randn(n, device=gpu, generator=generator) for n in (1000, 4096)] for _ in range(3)]
        return (
            *new,
            [torch.rand(n, device=gpu, generator=generator) for n in (1000, 4096)],
            [torch.zeros((), device=gpu)],
        )

    def step(params, grads, moments, squares, steps, table):
        adamw_step(
            params, grads, moments, squares, steps * 2, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
            table=table,
        )  # fmt: skip

    table, captured, eager = TensorTable(), tensors(), tensors()
    step(*captured, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured, table)
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            step(*captured, TensorTable())
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        step(*eager, TensorTable())
    for a, b in zip(captured, eager, strict=True):
        for found, expected in zip(a, b, strict=True):
            assert torch.equal(found, expected)


def test_a_step_needs_no_more_memory_than_dense(gpu):
    """Forward and backward of one layer: activations and temporaries; the packed weight beside a bf16 dense one."""

    def peak(sparse, key):
        torch.cuda.empty_cache()
        x = torch.randn(16384, 1024, device=gpu, dtype=torch.bfloat16).requires_grad_()
        dy = torch.randn(16384, 4096, device=gpu, dtype=torch.bfloat16)
        w = weight.clone().requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sparse_linear(x, w, sparse, None, key).backward(dy)
        return torch.cuda.max_memory_allocated() - before

    weight, dense, sparse = packed(gpu, 4096, 1024, only="gluon")  # libraries hold dense copies of the gradient
    key = MvueKey(1, torch.tensor(0, device=gpu), torch.tensor([3, 0], device=gpu))
    sparse_peak, dense_peak = peak(sparse, key), peak(dense, None)
    # MVUE holds the pruned gradient packed: 9/16 of dY for a moment
    assert sparse_peak <= dense_peak + 16384 * 4096 * 2 * 9 / 16 * 1.05


def test_a_matrix_of_more_than_two_to_the_31_elements(gpu):
    if torch.cuda.get_device_properties(gpu).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GB of device memory")
    from sparse24.prune import prune_pack, unpack_dense

    rows, cols = 2**16 + 128, 2**15
    weight = torch.randn(rows, cols, device=gpu, dtype=torch.bfloat16)
    packed_weight = prune_pack(weight, "magnitude", torch.bfloat16, fragments=True)
    dense = unpack_dense(packed_weight)
    for part in (slice(0, 64), slice(rows - 64, rows)):
        assert torch.equal(dense[part], weight[part] * magnitude_mask(weight[part]))


def test_dense_only_where_nothing_else_fits(gpu):
    shape = LayerShape(177, 36, 20, torch.bfloat16, transposable=True, mvue=True)
    assert choose(shape, gpu)[0] == Plan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pruned_activations_are_those_of_a_cpu(dtype, gpu):
    from sparse24.activations import pruned_relu2

    x = torch.randn(130, 264).to(dtype)
    dy = torch.randn(130, 264).to(dtype)
    results = []
    for device in ("cpu", gpu):
        leaf = x.to(device).requires_grad_()
        h = pruned_relu2(leaf)
        h.backward(dy.to(device))
        results.append((h.detach().cpu(), leaf.grad.cpu()))
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)
