"""Blocks of an encoder from its input to its output: what stays fixed, and which layers learn slower.

An encoder has an attribute `block_names`: for each block, the names of its parameters or submodules, as `named_parameters`
of the encoder gives them. A parameter belongs to the block that has the longest beginning of its name.
"""

from collections.abc import Sequence

from torch import nn

from gigamil.errors import ConfigError


def block_numbers(backbone: nn.Module, wanted_by: str) -> dict[str, int]:
    """Block of each parameter, 0 at the input.

    Args:
        backbone: the encoder.
        wanted_by: the key that asks, for the message.
    Raises:
        ConfigError: the encoder has no `block_names`, or they leave a parameter out.
    """
    names = _block_names(backbone, wanted_by)
    owner = {name: number for number, block in enumerate(names) for name in block}
    numbers = {}
    for parameter, _ in backbone.named_parameters():
        parts = parameter.split(".")
        beginnings = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        found = next((owner[name] for name in beginnings if name in owner), None)
        if found is None:
            raise ConfigError(
                f"{wanted_by}: parameter '{parameter}' of {type(backbone).__name__} is in none of its `block_names`"
            )
        numbers[parameter] = found
    return numbers


def freeze_blocks(backbone: nn.Module, num_frozen: int) -> None:
    """Keep the first blocks as they are: their parameters want no gradient, so that autograd saves nothing for them.

    To be called before an engine takes the model: an optimiser that already has a parameter would go on to move it.

    Args:
        num_frozen: so many, or -k: all but the last k.
    Raises:
        ConfigError: more blocks than there are, or an encoder whose blocks are not known.
    """
    if not num_frozen:
        return
    key = f"science.encoder.freeze_blocks={num_frozen}"
    num_blocks = len(_block_names(backbone, key))
    if abs(num_frozen) > num_blocks:
        raise ConfigError(f"{key}: the encoder has {num_blocks} blocks; use -{num_blocks} to {num_blocks}")
    num_frozen = num_blocks + num_frozen if num_frozen < 0 else num_frozen
    numbers = block_numbers(backbone, key)
    for name, parameter in backbone.named_parameters():
        if numbers[name] < num_frozen:
            parameter.requires_grad_(False)


def parameters_by_rate(backbone: nn.Module, layer_decay: float) -> dict[float, list[nn.Parameter]]:
    """Trainable parameters by their share of the encoder's learning rate, the smallest share first.

    Block b of B has the share decay^(B - 1 - b). Without decay there is one share, 1; of an encoder that is fixed, none.

    Raises:
        ConfigError: decay for an encoder whose blocks are not known.
    Source: Clark et al. 2020 (ELECTRA), arXiv:2003.10555; Bao et al. 2021 (BEiT), arXiv:2106.08254.
    """
    trainable = [(name, parameter) for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    if not trainable:
        return {}
    if layer_decay == 1:
        return {1.0: [parameter for _, parameter in trainable]}
    key = f"science.optim.layer_decay={layer_decay}"
    numbers = block_numbers(backbone, key)
    last = len(_block_names(backbone, key)) - 1
    shares: dict[float, list[nn.Parameter]] = {}
    for name, parameter in sorted(trainable, key=lambda pair: numbers[pair[0]]):  # stable: names keep their order
        shares.setdefault(layer_decay ** (last - numbers[name]), []).append(parameter)
    return shares


def _block_names(backbone: nn.Module, wanted_by: str) -> Sequence[Sequence[str]]:
    names: Sequence[Sequence[str]] | None = getattr(backbone, "block_names", None)
    if not names:
        raise ConfigError(
            f"{wanted_by} needs the blocks of the encoder, and {type(backbone).__name__} does not tell them. Give it an "
            "attribute `block_names`: from input to output, a list of the names of each block's parameters or "
            "submodules (docs/extending.md)."
        )
    return names
