"""Content hashes of what ComfyUI passes around, for cache keys that survive a restart."""
import hashlib

import torch

WHOLE, SAMPLES = 2**20, 2**12  # larger tensors are sampled: two different weight files differ in far more than the rest


def _update(digest, value) -> None:
    """Feed any nest of dicts, lists, tensors and plain values; objects of other types by their type only."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1)
        picked = (flat if flat.numel() <= WHOLE else flat[:: flat.numel() // SAMPLES]).float().cpu()
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode() + picked.numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(digest, item)
    elif hasattr(value, "weights"):  # a LoRA or other weight adapter
        _update(digest, value.weights)
    else:
        digest.update((repr(value) if isinstance(value, (str, bytes, int, float, bool, type(None))) else type(value).__name__).encode())


def fingerprint(*values) -> str:
    digest = hashlib.sha256()
    _update(digest, values)
    return digest.hexdigest()


def fingerprint_weights(patcher) -> str:
    """Hash of a ModelPatcher's weights and patches, the same whether or not they are loaded."""
    weights = patcher.model.state_dict()
    weights.update({key: backup.weight for key, backup in patcher.backup.items()})  # patched in place: what was there before
    return fingerprint(type(patcher.model).__name__, weights, patcher.patches)


def fingerprint_prompt(parts: list[tuple[torch.Tensor | None, torch.Tensor | None]]) -> str:
    """Hash of a prompt from the (context, pooled) tensors of its conditioning; "zeros" for one of zeros only, of whatever size."""
    if not any(tensor is not None and bool(tensor.any()) for part in parts for tensor in part):
        return "zeros" if parts else "none"
    return fingerprint(parts)
