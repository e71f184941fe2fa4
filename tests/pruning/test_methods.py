"""The pruning methods on single layers, against the same in numpy (`by_hand`)."""

import math
import re
from pathlib import Path

import pytest
import torch

from sparse_pretrain.errors import UserError
from sparse_pretrain.pruning.oats import compression, oats, rank, rank_share
from sparse_pretrain.pruning.patterns import keep_number, parse
from sparse_pretrain.pruning.sparsegpt import sparsegpt
from sparse_pretrain.pruning.wanda import magnitude, wanda
from tests.pruning import by_hand

PATTERNS = [(2, 4), (1, 4), (4, 8), (2, 6), 0.5, 0.75, 0.3]


def layer(out: int = 12, columns: int = 48, tokens: int = 200, seed: int = 0, outliers: float = 1.0):
    """A weight and correlated inputs, some of them `outliers` times larger, in fp64."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=draw, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=draw, dtype=torch.float64) / math.sqrt(columns)
    x = torch.randn(tokens, columns, generator=draw, dtype=torch.float64) @ (torch.eye(columns) + mixing)
    x[:, torch.randperm(columns, generator=draw)[: columns // 16]] *= outliers
    return weight, x


def relative_error(weight, x, *parts) -> float:
    """Of the layer's output."""
    approximation = sum(part.double() for part in parts)
    return float((x @ (weight - approximation).T).norm() / (x @ weight.T).norm())


def assert_pattern(weight: torch.Tensor, pattern, share_of) -> None:
    zero = weight == 0
    if isinstance(pattern, tuple):
        kept, size = pattern
        assert (zero.unflatten(1, (-1, size)).sum(-1) == size - kept).all()
    else:
        for part in share_of(zero):
            assert part.sum() == int(pattern * part.numel())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_magnitude_keeps_the_largest(pattern):
    weight, _ = layer()
    pruned = magnitude(weight, pattern)
    assert_pattern(pruned, pattern, lambda zero: [zero])  # a share is of the whole layer
    kept = pruned != 0
    assert torch.equal(pruned[kept], weight[kept])
    if isinstance(pattern, float):
        assert weight[~kept].abs().max() < weight[kept].abs().min()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_is_the_papers(pattern):
    weight, x = layer(outliers=5)
    pruned = wanda(weight.float(), x.float().square().sum(0), pattern)
    assert_pattern(pruned, pattern, lambda zero: zero)  # a share is of each output
    assert torch.equal(pruned, torch.from_numpy(by_hand.wanda(weight.float().numpy(), x.numpy(), pattern)))


def test_wanda_prefers_small_weights_with_large_inputs():
    pruned = wanda(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([100.0, 25.0, 1.0, 1.0]), (2, 4))
    assert pruned.tolist() == [[1.0, 2.0, 0.0, 0.0]]


@pytest.mark.parametrize("block", [128, 16, 13])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_is_optimal_brain_surgeon_column_by_column(pattern, block):
    weight, x = layer(outliers=5)
    pruned = sparsegpt(weight.float(), (x.T @ x).float(), pattern, block_size=block)
    width = block if isinstance(pattern, float) else block // pattern[1] * pattern[1]
    assert_pattern(pruned, pattern, lambda zero: zero.split(width, dim=1))
    by_obs = torch.from_numpy(by_hand.obs_sparsegpt(weight.numpy(), x.numpy(), pattern, damping=0.01, block=block))
    assert torch.equal(pruned != 0, by_obs != 0)
    torch.testing.assert_close(pruned.double(), by_obs, rtol=1e-3, atol=1e-4)


def test_sparsegpt_undoes_what_can_be_undone():
    # Input 3 is the sum of inputs 4 and 5: the weight that goes is given to these two, and nothing is lost.
    x = torch.randn(100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 4] + x[:, 5]
    weight = torch.tensor([[5.0, 5.0, 5.0, 1.0, 2.0, 3.0, 9.0, 9.0]], dtype=torch.float64)
    pruned = sparsegpt(weight.float(), (x.T @ x).float(), 1 / 8, damping=1e-6)
    torch.testing.assert_close(pruned, torch.tensor([[5.0, 5.0, 5.0, 0.0, 3.0, 4.0, 9.0, 9.0]]), rtol=1e-3, atol=1e-3)
    assert relative_error(weight, x, pruned) < 1e-4


def test_inputs_that_are_always_zero_are_pruned_first():
    weight, x = layer()
    x[:, [5, 6]] = 0
    gram = (x.T @ x).float()
    for pruned in (
        sparsegpt(weight.float(), gram, (2, 4)),
        wanda(weight.float(), gram.diagonal(), (2, 4)),
        oats(weight.float(), gram.diagonal(), (2, 4), iterations=5)[0],
    ):
        assert (pruned[:, [5, 6]] == 0).all()
        assert (pruned[:, [4, 7]] != 0).all()
        assert pruned.isfinite().all()
    nothing = torch.zeros_like(gram)
    assert sparsegpt(weight.float(), nothing, (2, 4)).isfinite().all()


def test_a_gram_matrix_without_full_rank_is_no_obstacle():
    weight, x = layer(tokens=10)
    assert sparsegpt(weight.float(), (x.T @ x).float(), (2, 4)).isfinite().all()


@pytest.mark.parametrize(
    ("pattern", "rank_ratio"), [((2, 4), 0.25), ((2, 4), 0.4), ((2, 8), 0.5), (0.5, 0.25), (0.3, 0.2)]
)
def test_oats_is_the_papers(pattern, rank_ratio):
    weight, x = layer(24, 48, outliers=20)
    sparse, left, right = oats(weight, x.square().sum(0), pattern, rank_ratio, iterations=80)
    if isinstance(pattern, tuple):
        rho, kept = 1 - pattern[0] / pattern[1] / (1 - rank_ratio), pattern
        assert_pattern(sparse, pattern, None)
    else:
        rho, kept = pattern, math.floor((1 - rank_ratio) * (1 - pattern) * 48)
        assert ((sparse != 0).sum(1) == kept).all()
    r = math.floor(rank_ratio * (1 - rho) * 24 * 48 / (24 + 48))
    assert r > 1
    assert left.shape == (24, r)
    assert right.shape == (r, 48)
    their_sparse, their_left, their_right = by_hand.oats(weight.numpy(), x.numpy(), r, kept, iterations=80)
    torch.testing.assert_close(sparse, torch.from_numpy(their_sparse), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(left @ right, torch.from_numpy(their_left @ their_right), rtol=1e-6, atol=1e-8)


def test_oats_in_fp32_is_as_good():
    weight, x = layer(24, 48, outliers=20)
    exact = relative_error(weight, x, *in_parts(oats(weight, x.square().sum(0), (2, 4))))
    single = relative_error(weight, x, *in_parts(oats(weight.float(), x.float().square().sum(0), (2, 4))))
    assert single == pytest.approx(exact, rel=0.02)


def in_parts(factors):
    sparse, left, right = factors
    return sparse, left @ right


def test_oats_sizes():
    assert compression((2, 4), 0.25) == pytest.approx(1 / 3)
    assert compression((2, 8), 0.5) == pytest.approx(0.5)
    assert compression(0.6, 0.3) == 0.6
    # κ(1 − ρ) = 1/6 of the weights of a 576 x 1536 layer, as rank: 576 · 1536 / (6 · 2112)
    assert rank(576, 1536, rank_share((2, 4), 0.25)) == 69
    assert rank(4, 4, 0.01) == 1
    # whole numbers do not suffer from rounding
    assert rank(100, 100, rank_share(0.3, 0.2)) == 7
    assert (oats(torch.randn(4, 50), torch.ones(50), 0.3, 0.2, iterations=1)[0] != 0).sum(1).tolist() == [28] * 4
    assert (wanda(torch.randn(4, 100), torch.ones(100), 0.29) == 0).sum(1).tolist() == [29] * 4


def test_oats_with_randomised_svd():
    weight, x = layer(96, 128, tokens=500, outliers=20)
    squares = x.float().square().sum(0)
    exact = relative_error(weight, x, *in_parts(oats(weight.float(), squares, (2, 4))))
    before = torch.random.get_rng_state()
    random = oats(weight.float(), squares, (2, 4), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert relative_error(weight, x, *in_parts(random)) < 1.02 * exact
    assert all(torch.equal(*pair) for pair in zip(random, oats(weight.float(), squares, (2, 4), seed=1), strict=True))


@pytest.mark.parametrize(
    ("pattern", "rank_ratio", "theirs"),
    [((2, 4), 0.25, (4, 6)), ((2, 8), 0.5, (2, 4)), ((3, 8), 0.25, (2, 4)), (0.5, 0.25, (2, 4)), (0.5, 0.25, 0.5)],
)
def test_oats_beats_sparsegpt_where_inputs_have_outliers(pattern, rank_ratio, theirs):
    """Equal compression: SparseGPT keeps at least as many numbers as OATS has in S, U and V together. Four inputs are 100 times the others, and singular values fall as k^-½, as trained ones do."""
    draw = torch.Generator().manual_seed(3)
    u, _, v = torch.linalg.svd(torch.randn(128, 120, generator=draw, dtype=torch.float64), full_matrices=False)
    weight = 10 * (u * torch.arange(1, 121) ** -0.5) @ v
    mixing = 0.3 * torch.randn(120, 120, generator=draw, dtype=torch.float64) / math.sqrt(120)
    x = torch.randn(4000, 120, generator=draw, dtype=torch.float64) @ (torch.eye(120) + mixing)
    x[:, [7, 30, 64, 99]] *= 100
    x, held_out = x.split(2000)
    gram = (x.T @ x).float()
    sparse, left, right = oats(weight.float(), gram.diagonal(), pattern, rank_ratio)
    other = sparsegpt(weight.float(), gram, theirs)
    numbers = int((sparse != 0).sum()) + left.numel() + right.numel()
    assert numbers <= int((other != 0).sum()) < 1.03 * numbers
    scale = gram.diagonal().double().sqrt()

    def scaled_error(approximation):
        return float(((weight - approximation.double()) * scale).norm())

    assert scaled_error(sparse + left @ right) < 0.95 * scaled_error(other)
    for inputs in (x, held_out):
        assert relative_error(weight, inputs, sparse, left @ right) < 0.95 * relative_error(weight, inputs, other)


def test_ties_keep_the_lower_index():
    ones = torch.ones(2, 8)
    first = torch.tensor([[1.0, 1, 0, 0] * 2] * 2)
    assert torch.equal(magnitude(ones, (2, 4)), first)
    assert torch.equal(wanda(ones, torch.ones(8), (2, 4)), first)
    assert wanda(ones, torch.ones(8), 0.5).tolist() == [[1.0] * 4 + [0.0] * 4] * 2
    assert magnitude(ones, 0.5).tolist() == [[1.0] * 8, [0.0] * 8]
    scores = torch.tensor([[1.0, 2, 1, 2, 1]])
    assert keep_number(scores, 3).tolist() == [[True, True, False, True, False]]
    assert not keep_number(scores, 0).any()
    assert keep_number(scores, 5).all()


def test_patterns():
    assert parse("2:4") == (2, 4)
    assert parse("1:16") == (1, 16)
    assert parse("0.5") == 0.5
    for wrong in ("4:2", "0:4", "2:4:8", "1.5", "0", "1", "half", "nan", "-0.5"):
        with pytest.raises(UserError, match="pattern: found"):
            parse(wrong)


@pytest.mark.parametrize(
    "prune", [magnitude, lambda w, p: wanda(w, torch.ones(6), p), lambda w, p: sparsegpt(w, torch.eye(6), p)]
)
def test_groups_must_fit(prune):
    with pytest.raises(ValueError, match="in_features must be a multiple of 4; found 6"):
        prune(torch.ones(2, 6), (2, 4))


def test_the_code_in_the_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(code, "docs/pruning.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert names["left"].shape == (64, 7)
