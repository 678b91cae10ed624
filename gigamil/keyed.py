"""Counter-based random numbers: a draw depends on a key and a position, never on what was drawn before.

Dropout masks and augmentations are functions of (seed, step, slide, tile, layer). So they are the same when a chunk
is encoded a second time, for any chunk size, any order, and any number of ranks.

The generator is the finaliser of SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2714064.2660195) over int64
tensors, whose products wrap modulo 2**64 on every device: bits are equal on CPU and GPU.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: odd, 2**64 / golden ratio
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def text_key(text: str) -> int:
    """A stable 64-bit number for a name, as a signed integer (Python's `hash` changes between processes)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """Derive new keys from keys and values, elementwise with broadcasting.

    Args:
        key: int64 keys, any shape.
        value: int64 tensor on the key's device, or an integer, that tells the new key from its siblings (a tile number,
            a layer).
    Returns:
        int64 keys of the broadcast shape; order matters: fold(fold(k, a), b) differs from fold(fold(k, b), a).
    """
    if isinstance(value, Tensor):
        return _mix(_mix(key + _GOLDEN) ^ (value.to(torch.int64) * _GOLDEN + _MIX_1))
    # An integer stays one: as a tensor on a GPU it would be copied there, and the CPU would wait for that.
    return _mix(_mix(key + _GOLDEN) ^ _wrap(int(value) * _GOLDEN + _MIX_1))


def root_key(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The key of a run, a scalar int64 tensor."""
    return fold(torch.zeros((), dtype=torch.int64, device=device), seed)


def uniform(key_n: Tensor, num: int) -> Tensor:
    """Draw `num` numbers in [0, 1) for each key.

    Returns:
        float32 of shape (*key_n.shape, num), on the key's device; 24 random bits each.
    """
    counter = torch.arange(1, num + 1, dtype=torch.int64, device=key_n.device) * _GOLDEN
    bits = _mix(key_n[..., None] + counter)
    return _shift_right(bits, 40).to(torch.float32) * (1.0 / (1 << 24))


def _wrap(number: int) -> int:
    """What int64 arithmetic makes of a number: modulo 2**64, with a sign."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # Logical shift: int64 shifts copy the sign, so the copied bits are masked away.
    return (x >> bits) & ((1 << (64 - bits)) - 1)
