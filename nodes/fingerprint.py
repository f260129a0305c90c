"""Content hashes of what ComfyUI passes around, for cache keys that survive a restart."""
import dataclasses
import hashlib

import torch

WHOLE, SAMPLES = 2**20, 2**12  # larger tensors are sampled: two different weight files differ in far more than the rest
PLAIN = (str, bytes, int, float, bool, type(None), torch.dtype)


def _update(digest, value) -> None:
    """Feed any nest of dicts, lists, tensors, modules and plain values, each with its type and length, so that no two nests feed the
    same bytes; objects of other types by their type only.
    """
    def feed(kind: str, data: bytes = b"", count: int = 0) -> None:
        digest.update(f"{kind} {count} {len(data)}:".encode() + data)

    if isinstance(value, torch.Tensor):
        if hasattr(value, "_qdata"):  # ComfyUI's quantised weights: what is stored, and its scales
            return _update(digest, (type(value).__name__, vars(value)))
        flat = value.detach().as_subclass(torch.Tensor).reshape(-1)
        picked = (flat if flat.numel() <= WHOLE else flat[:: flat.numel() // SAMPLES]).float().cpu()
        return feed(f"tensor {tuple(value.shape)} {value.dtype}", picked.numpy().tobytes())
    if isinstance(value, torch.nn.Module):
        plain = {key: one for key, one in vars(value).items() if isinstance(one, PLAIN)}
        return _update(digest, (type(value).__name__, plain, dict(value.named_parameters()), dict(value.named_buffers())))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _update(digest, (type(value).__name__, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}))
    if hasattr(value, "weights"):  # a LoRA or other weight adapter
        return _update(digest, (type(value).__name__, value.weights))
    if isinstance(value, dict):
        feed("dict", count=len(value))
        for key in sorted(value, key=str):
            _update(digest, key)
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        feed("list", count=len(value))
        for item in value:
            _update(digest, item)
    else:
        feed(type(value).__name__, repr(value).encode() if isinstance(value, PLAIN) else b"")


def fingerprint(*values) -> str:
    digest = hashlib.sha256()
    _update(digest, values)
    return digest.hexdigest()


def _tensors(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters, and buffers but those that are filled while the module runs."""
    kept = module.state_dict().keys()
    buffers = {key: one for key, one in module.named_buffers() if key in kept}
    return {prefix + key: one for key, one in {**dict(module.named_parameters()), **buffers}.items()}


def fingerprint_weights(patcher) -> str:
    """Hash of a ModelPatcher's weights and patches, the same wherever they are, and whichever of its clones is loaded now."""
    weights = _tensors(patcher.model)
    for backup in (patcher.backup, getattr(patcher, "hook_backup", {})):  # patched in place: what was there before
        weights |= {key: one.weight if hasattr(one, "weight") else one[0] for key, one in backup.items()}
    for name, original in patcher.object_patches_backup.items():  # such as model_sampling
        weights = _without(weights, name) | (_tensors(original, f"{name}.") if isinstance(original, torch.nn.Module) else {})
    for name in patcher.object_patches:
        weights = _without(weights, name)
    return fingerprint(type(patcher.model).__name__, weights, patcher.patches, patcher.object_patches)


def _without(weights: dict, name: str) -> dict:
    return {key: one for key, one in weights.items() if key != name and not key.startswith(f"{name}.")}
