"""A stand-in for an accelerator that is not CUDA, as the device "npu:0". Its tensors lie in the memory of the CPU, and
operations are computed there. As on a real device, an operation that takes tensors of both devices is an error.

It changes torch for the whole process: use it in a process of its own.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


COPIES = ("_to_copy", "copy_")  # operations between devices
entered = []  # the devices that were made the current one


class DeviceModule(_DummyBackendModule):
    """What torch.cuda is for CUDA."""

    class device:
        def __init__(self, device):
            self.device = torch.device(device)

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            pass

    def is_bf16_supported(self):
        return True


class FarTensor(torch.Tensor):
    """A tensor of the device. `near` is the tensor of the CPU with its values."""

    @staticmethod
    def __new__(cls, near):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device="npu:0",
        )
        made.near = near
        return made

    def tolist(self):
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, *args, **(kwargs or {}))


def compute(operation, *args, **kwargs):
    """Runs an operation on the CPU. Raises RuntimeError if it takes tensors of both devices."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = {id(tensor.near): tensor for tensor in tensors if isinstance(tensor, FarTensor)}
    near = [tensor for tensor in tensors if not isinstance(tensor, FarTensor) and tensor.ndim]
    name = operation.__name__.split(".")[0]
    if far and near and name not in COPIES:
        raise RuntimeError(f"{operation}: got tensors of npu:0 and of cpu")
    target = kwargs.get("device")
    to_near = (name == "_to_copy" and target is not None and torch.device(target).type == "cpu") or (
        name == "copy_" and not isinstance(args[0], FarTensor)
    )

    def unwrap(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value.near if isinstance(value, FarTensor) else value

    def wrap(value):
        if to_near or not isinstance(value, torch.Tensor):
            return value
        return far[id(value)] if id(value) in far else FarTensor(value)  # operations in place return their argument

    return tree_map(wrap, operation(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


class MakeFar(TorchFunctionMode):
    """`torch.tensor(..., device="npu")`, which torch does not pass to the operations of a backend."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "npu":
            del kwargs["device"]
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


def install() -> torch.library.Library:
    """Makes the device. The operations exist as long as the library that is returned."""
    _setup_privateuseone_for_python_backend("npu", DeviceModule())
    torch.__future__.set_swap_module_params_on_conversion(True)
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")
    MakeFar().__enter__()
    return library
