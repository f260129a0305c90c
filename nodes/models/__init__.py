"""ComfyUI's models: how they noise, how they are asked, where banks are loaded beside them, and the tiny ones that ship."""
