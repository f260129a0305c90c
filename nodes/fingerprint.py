"""Content hashes of what ComfyUI passes around, for cache keys that survive a restart."""
import dataclasses
import enum
import functools
import hashlib
import types
import uuid
import weakref

import comfy.model_patcher
import numpy as np
import torch

WHOLE, SAMPLES = 2**20, 2**12  # larger tensors are sampled: two different weight files differ in far more than the rest
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.Size)
SHAPED_BY = ("model_options", "wrappers", "callbacks", "injections", "hook_patches", "forced_hooks", "additional_models", "attachments",
             "weight_wrapper_patches")  # beside weights and patches
NAMED = (type, types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def fingerprint(*values) -> str:
    """Of any nest of dicts, lists, tensors, modules, plain values, functions and objects, each with its type and length, so that no two
    nests share a key. A function is its code and what it closes over, an object is its attributes. What shows neither is like nothing
    else: then the key is another each time, and nothing is taken for what it may not be.
    """
    return _digest(values, ()).hex()


def _digest(value, above: tuple[int, ...]) -> bytes:
    if id(value) in above:  # it holds itself
        return _hash(f"{above.index(id(value))} above", b"", [])
    kind, own, children = _apart(value)
    found = [_digest(child, (*above, id(value))) for child in children]
    return _hash(kind, own, sorted(found) if kind in ("dict", "set") else found)


def _hash(kind: str, own: bytes, children: list[bytes]) -> bytes:
    return hashlib.sha256(f"{kind} {len(own)} {len(children)}:".encode() + own + b"".join(children)).digest()


def _apart(value) -> tuple[str, bytes, list]:
    """What a value is, the bytes that are its own, and the values that it is made of."""
    kind = type(value).__name__
    if isinstance(value, PLAIN):
        return kind, repr(value).encode("utf-8", "surrogatepass"), []
    if isinstance(value, torch.Tensor):
        return _tensor_apart(value)
    if isinstance(value, np.ndarray):
        return f"{kind} {value.shape} {value.dtype}", value.tobytes(), []
    if isinstance(value, torch.nn.Module):
        plain = {key: one for key, one in vars(value).items() if isinstance(one, PLAIN)}
        return kind, b"", [plain, dict(value.named_parameters()), dict(value.named_buffers())]
    if isinstance(value, comfy.model_patcher.ModelPatcher):
        return "model", b"", _model_apart(value)
    if isinstance(value, dict):
        return "dict", b"", [*value.items()]
    if isinstance(value, (set, frozenset)):
        return "set", b"", [*value]
    if isinstance(value, (list, tuple)):
        return "list", b"", [*value]
    if isinstance(value, NAMED):
        return "named", f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', value)}".encode(), []
    if isinstance(value, enum.Enum):
        return kind, value.name.encode(), []
    if isinstance(value, (torch.device, weakref.ref)):  # where something is does not change what it is
        return kind, b"", []
    return _code_apart(value) or _object_apart(value)


def _tensor_apart(value: torch.Tensor) -> tuple[str, bytes, list]:
    kind = type(value).__name__
    if hasattr(value, "_qdata"):  # ComfyUI's quantised weights: what is stored, and its scales
        return kind, b"", [vars(value)]
    flat = value.detach().as_subclass(torch.Tensor).reshape(-1)
    picked = (flat if flat.numel() <= WHOLE else flat[:: flat.numel() // SAMPLES]).cpu()
    numbers = picked.float().numpy().tobytes() if picked.is_floating_point() else picked.numpy().tobytes()
    others = {} if type(value) in (torch.Tensor, torch.nn.Parameter) else vars(value)  # other loaders' quantised weights (GGUF)
    return f"tensor {tuple(value.shape)} {value.dtype}", numbers, [kind, others] if others else []


def _code_apart(value) -> tuple[str, bytes, list] | None:
    if isinstance(value, types.CodeType):
        return "code", value.co_code, [value.co_consts, value.co_names]
    if isinstance(value, types.MethodType):
        return "method", b"", [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return "partial", b"", [value.func, value.args, value.keywords]
    if isinstance(value, types.FunctionType):
        closed = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        defaults = value.__defaults__, value.__kwdefaults__
        return "function", f"{value.__module__} {value.__qualname__}".encode(), [value.__code__, defaults, closed]
    return None


def _object_apart(value) -> tuple[str, bytes, list]:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if dataclasses.is_dataclass(value):
        return kind, b"", [{field.name: getattr(value, field.name) for field in dataclasses.fields(value)}]
    if hasattr(value, "__dict__"):
        return kind, b"", [vars(value)]
    return kind, uuid.uuid4().bytes, []


def _tensors(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters, and buffers but those that are filled while the module runs."""
    kept = module.state_dict().keys()
    buffers = {key: one for key, one in module.named_buffers() if key in kept}
    return {prefix + key: one for key, one in {**dict(module.named_parameters()), **buffers}.items()}


def fingerprint_model(patcher) -> str:
    """Hash of a ModelPatcher: of its weights and of all that changes what it predicts (patches of weights and of objects, options, which
    hold the patches of attention and blocks, wrappers, hooks, and the models that it brings along). The same wherever they are, and
    whichever of its clones is loaded now.
    """
    return fingerprint(patcher)


def fingerprint_weights(patcher) -> str:
    """Hash of the weights of a ModelPatcher by themselves, whatever patches, LoRAs and options are on them."""
    return fingerprint(type(patcher.model).__name__, _weights(patcher))


def _model_apart(patcher) -> list:
    weights = _weights(patcher)
    for name in patcher.object_patches:
        weights = _without(weights, name)
    more = {name: _kept(getattr(patcher, name, None)) for name in SHAPED_BY}
    return [type(patcher.model).__name__, weights, patcher.patches, patcher.object_patches, more]


def _weights(patcher) -> dict[str, torch.Tensor]:
    """By name, as they are without patches, whichever of its clones is loaded now."""
    weights = _tensors(patcher.model)
    for backup in (patcher.backup, getattr(patcher, "hook_backup", {})):  # patched in place: what was there before
        weights |= {key: one.weight if hasattr(one, "weight") else one[0] for key, one in backup.items()}
    for name, original in patcher.object_patches_backup.items():  # such as model_sampling
        weights = _without(weights, name) | (_tensors(original, f"{name}.") if isinstance(original, torch.nn.Module) else {})
    return weights


def _kept(value):
    """Without what is empty: releases differ in the empty places that they hold ready."""
    if not isinstance(value, dict):
        return value
    kept = {key: _kept(one) for key, one in value.items()}
    return {key: one for key, one in kept.items() if one is not None and not (isinstance(one, (dict, list)) and not one)}


def _without(weights: dict, name: str) -> dict:
    return {key: one for key, one in weights.items() if key != name and not key.startswith(f"{name}.")}
