"""ComfyUI Safe Denoiser: sampling away from a folder of pictures, with no training (arXiv:2502.08011)."""

WEB_DIRECTORY = "./web"  # the help pages, and one small script


async def comfy_entrypoint():
    """ComfyUI calls this once, after import. Nothing of ComfyUI is imported before, so the core works without it."""
    from .nodes import SafeDenoiserExtension

    return SafeDenoiserExtension()
