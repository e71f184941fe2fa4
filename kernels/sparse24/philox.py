"""Counter-based random numbers: a draw depends only on what it is for, never on what was drawn before it.

Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64 tensor
arithmetic, so it gives the same bits on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al., table 2)


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Philox-4x32 bijection of four 32-bit counter words under two 32-bit key words.

    Args:
        counter: four int64 tensors with values in [0, 2³²); shapes may broadcast against each other.
        key: two ints in [0, 2³²).
        rounds: 10 in the published test vectors, `ROUNDS` here.

    Returns:
        four int64 tensors with values in [0, 2³²), of the broadcast shape once `rounds` >= 3.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(rounds):
        # 32 x 32 -> 64 bit products. The sign that int64 wraps into is only in bits which are masked off
        # below; odd words stay unmasked between rounds, as nothing but their low half is ever used.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1).bitwise_xor_(key0).bitwise_and_(MASK32)
        c2 = ((product0 >> 32) ^ c3).bitwise_xor_(key1).bitwise_and_(MASK32)
        c1, c3 = product1, product0
        key0, key1 = (key0 + KEY_STEPS[0]) & MASK32, (key1 + KEY_STEPS[1]) & MASK32
    return c0, c1 & MASK32, c2, c3 & MASK32


def uniform24(
    seed: int,
    step: int | Tensor,
    layer: int | Tensor,
    tokens: int,
    features: int,
    first_token: int | Tensor = 0,
    first_feature: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """One uniform number for each group of four consecutive tokens and each feature.

    The draw is a pure function of (seed, step, layer, absolute group of tokens, feature), hence independent
    of how a batch is cut into micro-batches and ranks: with g the absolute group, the key is `seed`, the
    counter is (feature, g // 4, step, layer), and word g % 4 of Philox-4x32-7 gives (word >> 8)·2⁻²⁴.

    Args:
        seed: 64 bits are used; negative values wrap.
        step: optimizer step; its low 32 bits are used. A 0-dim int64 tensor on `device` does as well as an
            int, and is never read by the host.
        layer: index of the layer, likewise.
        tokens: number of tokens, any.
        features: number of features.
        first_token: absolute position of the first token, a multiple of 4 and below 2³⁶; int or 0-dim int64
            tensor (not checked then, so as not to wait for the device).
        first_feature: absolute index of the first feature, where a layer's features are spread over devices; likewise.
        device: of the result.

    Returns:
        (ceil(tokens / 4), features) float32 in [0, 1), 24 random bits each.

    Raises:
        ValueError: `first_token` is an int that is negative or not a multiple of 4.
    """
    groups = -(-tokens // 4)
    first_group = torch.as_tensor(first_token, device=device) // 4
    if isinstance(first_token, int):
        if first_token < 0 or first_token % 4:
            raise ValueError(f"first_token must be a non-negative multiple of 4; found {first_token}")
        spare = first_token // 4 % 4
    else:
        spare = 3  # how far into a block of four the first group lies is not known here
    blocks = -(-(groups + spare) // 4)

    block = (torch.arange(blocks, device=device) + first_group // 4) & MASK32
    counter = (
        torch.arange(features, device=device) + torch.as_tensor(first_feature, device=device),
        block[:, None],
        torch.as_tensor(step, device=device) & MASK32,
        torch.as_tensor(layer, device=device) & MASK32,
    )
    words = torch.stack(philox_4x32(counter, (seed & MASK32, (seed >> 32) & MASK32), ROUNDS), dim=1)
    uniform = (words >> 8).float().mul_(2.0**-24).reshape(4 * blocks, features)
    if spare:
        uniform = uniform.index_select(0, torch.arange(groups, device=device) + first_group % 4)
    return uniform[:groups]
