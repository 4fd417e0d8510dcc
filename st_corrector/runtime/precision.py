"""In which precision what is computed: search and correction in float32, whatever the training loop has."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def warn_of_rounded_weights(model: nn.Module) -> None:
    """Say of weights that are trained in 16 bits that most of what they would learn is rounded away."""
    trained = {each.dtype for each in model.parameters() if each.requires_grad}
    for dtype in sorted(trained & {torch.bfloat16, torch.float16}, key=str):
        logger.warning(
            "Weights in %s are trained, in which most updates smaller than 1/%d of a weight are lost: load the model "
            "in float32 (model_kwargs={'dtype': 'float32'}) and set bf16=True. Adapters alone can be made float32: "
            "for each in model.transformers_model.parameters(): if each.requires_grad: each.data = each.data.float()",
            dtype,
            round(1 / torch.finfo(dtype).eps * 2),
        )


def in_float32(method: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Disable the caller's autocast and TF32 during ``method``, on the device of its first tensor.

    The trainers put only the encoder under autocast. A training loop with the whole loss under autocast would
    accumulate learnt state in 8 bits of precision and mix dtypes in matrix products. TF32, which ``tf32=True`` and
    ``torch_compile=True`` allow on GPUs, has 10 bits: a search with it is not exact. This setting applies to the whole
    process, including other threads.
    """

    @functools.wraps(method)
    def outside(*args: Given.args, **settings: Given.kwargs) -> Returned:
        device = next((each.device.type for each in (*args, *settings.values()) if isinstance(each, Tensor)), "cpu")
        with torch.autocast(device, enabled=False), _without_tf32():
            return method(*args, **settings)

    return outside


@contextmanager
def _without_tf32() -> Iterator[None]:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        # If the value was inherited from the global setting, keep it inherited.
        inherited = torch.backends.fp32_precision  # type: ignore[attr-defined]  # made by torch at run time
        products.fp32_precision = "none" if before == inherited else before
