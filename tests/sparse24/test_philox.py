"""Random numbers: Philox's published answers, and independence of how a batch is cut."""

import pytest
import torch
from sparse24.philox import ROUNDS, philox_4x32, uniform24

# Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, result
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def slow_philox(counter, key, rounds):
    """Second formulation, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    counter, key, answer = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), tuple(key), rounds=10)
    assert [word.item() for word in words] == answer
    assert slow_philox(counter, key, 10) == answer


def test_uniform24_is_what_it_says():
    seed, step, layer, first_token = 0x9ABCDEF012345678, 5, 3, 44
    out = uniform24(seed, step, layer, tokens=26, features=3, first_token=first_token)
    assert out.dtype == torch.float32
    assert out.shape == (7, 3)
    for g in range(7):
        for f in range(3):
            group = first_token // 4 + g
            words = slow_philox((f, group // 4, step, layer), (seed % 2**32, seed >> 32), ROUNDS)
            assert out[g, f].item() == (words[group % 4] >> 8) / 2**24


@pytest.mark.parametrize("first_token", [0, 4, 8, 12, 16, 1000])
def test_draws_do_not_depend_on_how_the_batch_is_cut(first_token):
    whole = uniform24(1, 2, 3, 1200, 6)
    groups = first_token // 4
    for tokens in (4, 20, 64):
        part = uniform24(1, 2, 3, tokens, 6, first_token)
        assert torch.equal(part, whole[groups : groups + tokens // 4])
        tensors = uniform24(1, torch.tensor(2), 3, tokens, 6, torch.tensor(first_token))
        assert torch.equal(part[:, 2:5], uniform24(1, 2, 3, tokens, 3, first_token, first_feature=2))
        assert torch.equal(part, tensors)


def test_every_argument_matters():
    base = uniform24(1, 2, 3, 64, 16)
    for other in [
        uniform24(2, 2, 3, 64, 16),
        uniform24(1 + 2**32, 2, 3, 64, 16),
        uniform24(1, 3, 3, 64, 16),
        uniform24(1, 2, 4, 64, 16),
        uniform24(1, 2, 3, 64, 16, first_token=64),
    ]:
        assert (other == base).float().mean() < 0.01


def test_numbers_look_uniform():
    out = uniform24(11, 1, 0, 4096, 256).double()  # 262144 numbers
    assert out.min() >= 0
    assert out.max() < 1
    assert abs(out.mean() - 0.5) < 4.5 * (1 / 12 / out.numel()) ** 0.5
    counts = torch.histc(out.float(), bins=256, min=0, max=1)
    chi_squared = ((counts - 1024) ** 2 / 1024).sum()
    assert abs(chi_squared - 255) < 4.5 * (2 * 255) ** 0.5
    neighbours = torch.corrcoef(torch.stack([out[:-1].flatten(), out[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 4.5 / out.numel() ** 0.5


def test_no_tokens_no_numbers():
    assert uniform24(1, 2, 3, 0, 6).shape == (0, 6)
    assert uniform24(1, torch.tensor(2), 3, 0, 6, torch.tensor(8)).shape == (0, 6)


@pytest.mark.parametrize("first_token", [-4, 6])
def test_a_wrong_first_token_is_refused(first_token):
    with pytest.raises(ValueError, match=f"multiple of 4; found {first_token}"):
        uniform24(1, 2, 3, 8, 8, first_token)
