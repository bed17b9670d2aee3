"""What a model costs before it is timed: its parameters, and the operations of one call, by torch's flop counter.

A multiply-add is two floating-point operations (FLOPs) in torch's counter. Papers mostly print the number of
multiply-adds and call it FLOPs ("4.1 GFLOPs" of ResNet-50 at 224 px are 4.1 G multiply-adds, 8.2 GFLOPs here), so both
are returned, and a table must say which of them it compares.

Counted are products: convolutions, linear layers, matrix products, attention, and the same of a backward pass if
the call makes one. Not counted, as is the custom of published numbers: elementwise work, norms, softmax, pooling over
fixed windows, resizing, sorting, indexing, embedding look-ups. They take time all the same: a count is no forecast of
seconds. What does products or samples a map in an operator that the counter does not know is refused, not left out:
see `UNSEEN`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Operators of torch that do products or sample maps, and have no formula in its counter.
UNSEEN = {
    "mv", "addmv", "dot", "vdot", "addr", "addbmm", "_addmm_activation", "_trilinear", "_cdist_forward",
    "_pdist_forward", "_euclidean_dist", "_int_mm", "_grouped_mm", "_sparse_addmm", "_sparse_sparse_matmul",
    "linalg_inv_ex", "linalg_lu_factor_ex", "linalg_cholesky_ex", "linalg_qr", "_linalg_eigh", "_linalg_svd",
    "_linalg_solve_ex", "_fft_r2c", "_fft_c2c", "_fft_c2r", "mkldnn_rnn_layer", "_cudnn_rnn", "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell", "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_embedding_bag",
    "_embedding_bag_forward_only", "grid_sampler_2d", "_grid_sampler_2d_cpu_fallback", "grid_sampler_3d",
    "cudnn_grid_sampler",
}  # fmt: skip
# Of operators that are not torch's own all are refused, but for what compares and what only names a stretch of time.
HARMLESS = {"torchvision::nms"}
LIBRARIES = {"aten", "prim", "prims", "profiler"}


def parameters(*modules: nn.Module) -> int:
    """How many numbers the modules learn or hold as parameters; what they share counts once, buffers do not."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def cost(call: Callable, *inputs, modules: Iterable[nn.Module] | None = None, **keywords) -> dict:
    """Parameters, and the operations of `call(*inputs, **keywords)`.

    A model and inputs on the `meta` device have shapes and no numbers: nothing is computed or stored, and a model of
    any size is counted in seconds (`with torch.device("meta"): ...` makes both). The call must then not ask for a
    value (`.item()`, a condition or an index that is a mask): torch raises. One that does is counted on the CPU.

    Attention is run as its two products and a softmax, whatever kernel the machine would choose, and the call has
    gradients enabled: fused kernels of either kind are unknown to some releases' counters. A masked or causal
    product counts in full.

    Args:
        call: a module, or a function of modules.
        modules: whose parameters are counted, for a `call` that is not a module; `()` if it has none.

    Returns:
        `parameters`; `flops`, two for a multiply-add; `multiply_adds`; and `by_operator`, the flops of each operator.

    Raises:
        ValueError: for a function without `modules`; for an operator whose work the counter does not see.
    """
    if modules is None:
        if not isinstance(call, nn.Module):
            raise ValueError(
                f"{getattr(call, '__name__', call)} is no module: name those whose parameters count, modules=(...)"
            )
        modules = (call,)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            _Refuse(),
            FlopCounterMode(display=False) as counter,
        ):
            call(*inputs, **keywords)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    flops = counter.get_total_flops()
    return {
        "parameters": parameters(*modules),
        "flops": flops,
        "multiply_adds": flops // 2,
        "by_operator": {
            str(k): n for k, n in sorted(counter.get_flop_counts().get("Global", {}).items(), key=str)
        },
    }


class _Refuse(TorchDispatchMode):
    """Stands below the counter, which takes composite operators apart, and looks at what comes through."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        library, _, operator = name.partition("::")
        if operator in UNSEEN or (library not in LIBRARIES and name not in HARMLESS):
            raise ValueError(
                f"{name} does work that torch's flop counter does not see, so the count would be too small: "
                "count the call without it, or write it as products of matrices (of a vector: with an axis more)"
            )
        return func(*args, **(kwargs or {}))
