"""torch.compile of an encoder: the same function in fewer kernels, made at the first call."""

import os
import shutil
from collections.abc import Callable
from typing import Any

from torch import nn

from gigamil.errors import EnvironmentFault


def compile_encoder(backbone: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile an encoder in place, for one shape of chunk; names of modules and parameters do not change.

    The exact step fills the last chunk up (`ExactStep(pad=True)`), so that there are two programs: with a graph, and
    without. Not together with `fold_batchnorm`, whose product of weights the compiler would save with every graph.

    Args:
        backbone: `model.encoder.backbone`.
        backend: of torch.compile; "aot_eager" needs no compiler and gains nothing, for tests.
    Raises:
        EnvironmentFault: there is no C++ compiler, which torch's inductor needs on GPUs too.
    Cost: up to minutes at the first call with and without a graph.
    """
    compilers = [os.environ.get("CXX", "g++"), "c++", "clang++"]
    if backend == "inductor" and not any(shutil.which(name) for name in compilers):
        raise EnvironmentFault(
            f"execution.compile needs a C++ compiler, and none of {compilers} is there. Install one (Debian and Ubuntu: "
            "`apt-get install g++`; or name it in CXX), or set execution.compile to false."
        )
    backbone.compile(dynamic=False, backend=backend)
