"""A device of its own kind that computes on the CPU: what mixes it with the CPU fails as it would with a GPU.

    python tests/support/second_device.py SCRIPT ARGUMENT…
    PYTHONPATH=tests python -m pytest -p support.second_device tests/test_gpu.py

In such a process there is ``torch.device("second")``, and it is that which is trained on, and tested. Every
operation on its tensors runs on the CPU tensors inside them, so that results are the CPU's, bit for bit; but tensors of
both devices in one operation, a CPU generator for its random numbers, ``numpy()`` of its tensors and pinned memory on
it are errors. Indices may lie on the CPU, as they may for CUDA. What only CUDA has (streams, events, kernels) it has
not.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
CPU = torch.device("cpu")
_LOWERED = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")
"""What autocast runs in the lower precision; its lists differ for each device, this is what the encoders use."""


class Backend:
    """What torch, transformers and accelerate ask of ``torch.second``."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...  # its random numbers are the CPU's

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    class device:
        def __init__(self, index: int) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *exception: object) -> None: ...


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)


class OnSecondDevice(torch.Tensor):
    """A tensor of the device, around the CPU tensor that holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnSecondDevice:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, dtype=inner.dtype, device=DEVICE)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, *args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:
        return f"second {self.inner}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().inner.__reduce_ex__(protocol)  # files know the CPU only

    def tolist(self) -> Any:
        return self.detach().inner.tolist()

    def data_ptr(self) -> int:
        return self.detach().inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.detach().inner.untyped_storage()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy.")

    __array__ = numpy


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation of torch's, on the tensors inside; what cannot be on this device is an error."""
    flat = tree_flatten((args, kwargs))[0]
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    here = any(isinstance(each, OnSecondDevice) for each in tensors)
    if operation is torch.ops.aten.copy_.default:
        target, source = (each.inner if isinstance(each, OnSecondDevice) else each for each in args[:2])
        target.copy_(source)
        return args[0]
    if operation is torch.ops.aten._local_scalar_dense.default:
        return args[0].inner.item()
    given = kwargs.get("device")
    result_here = here if given is None else torch.device(given).type == NAME
    if operation is not torch.ops.aten._to_copy.default:
        # Numbers, which are tensors without a dimension, may lie on the CPU, and so may indices of what is here.
        by_index = "index" in str(operation) and isinstance(args[0], OnSecondDevice)
        others = [each for each in tensors if each.ndim and not isinstance(each, OnSecondDevice)]
        if here and others and not (by_index and all(each.dtype in (torch.int64, torch.bool) for each in others)):
            where = [(str(each.device), tuple(each.shape)) for each in tensors]
            raise RuntimeError(f"{operation}: expected all tensors to be on the same device, got {where}")
    generator = kwargs.get("generator")
    if result_here and generator is not None and generator.device == CPU:
        raise RuntimeError(f"{operation}: expected a generator of {DEVICE}, got one of the CPU")
    if result_here and kwargs.get("pin_memory"):
        raise RuntimeError(f"{operation}: only the CPU's memory can be pinned")

    def inside(each: Any) -> Any:
        return each.inner if isinstance(each, OnSecondDevice) else CPU if isinstance(each, torch.device) else each

    inner_args, inner_kwargs = tree_map(inside, (args, kwargs))
    out = operation(*inner_args, **inner_kwargs)
    if not result_here:
        return out
    out = tree_map(lambda each: OnSecondDevice(each) if isinstance(each, torch.Tensor) else each, out)
    return return_and_correct_aliasing(operation, args, kwargs, out)


def _lowered(operation: Any) -> Any:
    """``operation`` as autocast has it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        def lower(each: Any) -> Any:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32 and each.device == DEVICE:
                return each.to(torch.get_autocast_dtype(NAME))
            return each

        args, kwargs = tree_map(lower, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*args, **kwargs)

    return call


_EVERYTHING = torch.library.Library("_", "IMPL")
_EVERYTHING.fallback(run, "PrivateUse1")
_EVERYTHING.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
for _name in _LOWERED:
    _ATEN.impl(_name, _lowered(getattr(torch.ops.aten, _name).default), "AutocastPrivateUse1")

# What does not work with devices that are written in Python; each stands for something that a GPU simply has.
torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to leaves parameters what they are
_tensor, _as_tensor, _arange = torch.tensor, torch.as_tensor, torch.arange
_device_constructors()  # remembers torch's own functions: ``with torch.device(…)`` goes by them


def _make_tensor(data: Any, *, dtype: Any = None, device: Any = None, **settings: Any) -> torch.Tensor:
    made = _tensor(data, dtype=dtype, **settings)
    return made if device is None else made.to(device)


def _make_as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    made = data if isinstance(data, torch.Tensor) else _as_tensor(data)
    return made.to(dtype=dtype or made.dtype, device=device or made.device)


def _make_arange(*bounds: Any, device: Any = None, **settings: Any) -> torch.Tensor:
    made = _arange(*bounds, **settings)
    return made if device is None else made.to(device)


class _InferenceMode(torch.no_grad):
    def __new__(cls, mode: Any = True) -> Any:
        return torch.no_grad()(mode) if callable(mode) else super().__new__(cls)

    def __init__(self, mode: bool = True) -> None:
        super().__init__()
        self.mode = mode

    def __call__(self, function: Any) -> Any:
        return super().__call__(function) if self.mode else function

    def __enter__(self) -> None:
        self.prev = torch.is_grad_enabled()
        if self.mode:
            torch.set_grad_enabled(False)


torch.tensor, torch.as_tensor, torch.arange = _make_tensor, _make_as_tensor, _make_arange  # type: ignore
torch.inference_mode = _InferenceMode  # type: ignore


# These come after what they are to find.
os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
import accelerate.accelerator  # noqa: E402
import transformers.training_args  # noqa: E402

accelerate.accelerator.is_bf16_available = lambda *_, **__: True
transformers.training_args.is_torch_bf16_gpu_available = lambda: True

if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
