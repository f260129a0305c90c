"""Checks of a CLIP's files, which may come from anybody: they may hold numbers and names, and nothing that is run or fetches more."""
import json
import re
import zipfile
from pathlib import Path

import torch

from ..pictures.files import printable

CONFIG = "open_clip_config.json"  # beside the weights, in the layout of open_clip's own repositories
FITS = {"shortest": "crop", "longest": "pad", "squash": "stretch"}  # open_clip's words for how a picture is fitted, and ours
# What a stranger's folder may say of its model: plain numbers and names, and nothing that is fetched or run.
SHAPES = set("""width heads layers mlp_ratio ls_init_value pool_type final_ln_after_pool output_tokens act_kwargs norm_kwargs block_type
    qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn scale_fc""".split())
ALLOWED = {
    "model_cfg": set("embed_dim vision_cfg text_cfg multimodal_cfg quick_gelu custom_text init_logit_scale init_logit_bias "
                     "nonscalar_logit_scale".split()),
    "vision_cfg": SHAPES | set("""head_width patch_size image_size patch_dropout attentional_pool attn_pooler_queries attn_pooler_heads
        no_ln_pre pos_embed_type timm_model_name timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop
        timm_drop_path""".split()),
    "text_cfg": SHAPES | set("""context_length vocab_size hf_tokenizer_name tokenizer_mode tokenizer_kwargs embed_cls pad_id eos_id
        no_causal_mask proj_bias proj_type hf_model_name hf_model_pretrained hf_proj_type hf_pooler_type""".split()),
    "multimodal_cfg": SHAPES | set("context_length vocab_size attn_pooler_heads n_queries dim_head".split()),
    "tokenizer_kwargs": {"clean", "strip_sep_token"}, "act_kwargs": {"approximate"}, "norm_kwargs": {"eps"},
    "preprocess_cfg": set("size mode mean std interpolation resize_mode fill_color".split()),
}
MOST, SMALL = 1_000_000, 2**20  # of any number in a configuration, and of the bytes of its file


def read_config(folder: Path) -> dict:
    """The model's part of a folder's configuration, after a check that all of it is allowed.

    Raises:
        ValueError: it is no configuration, or says more than numbers and names.
    """
    def check(value, place: str) -> None:
        if isinstance(value, dict):
            foreign = sorted(set(map(str, value)) - ALLOWED.get(place, set()))
            if foreign:
                raise ValueError(f"its {CONFIG} sets {printable(', '.join(foreign))} in {place}, which may fetch or run something and is "
                                 f"not needed; take that out, or choose another CLIP")
            for key, one in value.items():
                check(one, key)
        elif isinstance(value, list):
            for one in value[:100]:
                check(one, place)
        elif isinstance(value, str):
            if place != "hf_tokenizer_name" and not re.fullmatch(r"[\w.-]{0,60}", value):
                raise ValueError(f"its {CONFIG} names {printable(value)!r} as {place}, and may name what the libraries bring along only")
        elif value is not None and not isinstance(value, bool) and not -MOST <= value <= MOST:
            raise ValueError(f"its {CONFIG} sets {place} to {value}")

    try:
        with (folder / CONFIG).open(encoding="utf-8") as file:
            whole = json.loads(file.read(SMALL))
        for part in ("model_cfg", "preprocess_cfg"):
            check(whole.get(part, {}), part)
        config = whole["model_cfg"]
        if not isinstance(config["vision_cfg"], dict) or not isinstance(config["text_cfg"], dict):
            raise TypeError
        how = whole.get("preprocess_cfg") or {}
        if how.get("resize_mode", "shortest") not in FITS or any(len(how.get(key) or (0, 0, 0)) != 3 for key in ("mean", "std")):
            raise ValueError(f"its {CONFIG} prepares pictures in an unknown way")
        return config
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"its {CONFIG} is no configuration of open_clip; copy it again") from error


def check_text(config: dict, name: str, whole: bool) -> None:
    """Raise where open_clip would go and fetch the text model, or, without a whole folder, the tokenizer."""
    model, tokenizer = (config["text_cfg"].get(key) for key in ("hf_model_name", "hf_tokenizer_name"))
    if model or tokenizer and not whole:
        todo = "choose another CLIP" if model else f"put {CONFIG}, the weights and the tokenizer's files into one folder and choose that"
        raise ValueError(f"the text part of {name!r} needs files from the repository {model or tokenizer!r}, which are not part of the "
                         f"weights; {todo}")


def weights_in(folder: Path) -> Path:
    """The file of weights that open_clip finds in a folder, after a check that no file there brings code along.

    Raises:
        ValueError: there are none, or a tokenizer that is a program.
    """
    for file in (folder / name for name in ("tokenizer_config.json", "config.json")):
        try:
            told = json.loads(file.read_bytes()) if file.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"its {file.name} cannot be read; copy it again") from error
        if "auto_map" in told:
            raise ValueError(f"its {file.name} asks for code of the folder to be run (auto_map), which is never done; choose another CLIP")
    from open_clip.factory import _find_checkpoint_in_dir  # imported late: it takes seconds

    found = _find_checkpoint_in_dir(folder)
    if not found:
        raise ValueError(f"there are no weights beside its {CONFIG}; put open_clip_model.safetensors there")
    return Path(found)


def check_weights(file: Path, config: dict) -> None:
    """Raise where weights are not plain numbers: a program, or a pickle, which is read by running it; or too few for the configuration.

    Raises:
        ValueError: says what they are.
    """
    if not file.is_file():
        raise ValueError("it is not a file")
    if file.suffix != ".safetensors":
        if not zipfile.is_zipfile(file):
            raise ValueError("it is a bare pickle or damaged; save the weights as safetensors")
        with zipfile.ZipFile(file) as archive:
            if any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist()):
                raise ValueError("it is a TorchScript program; save the weights as safetensors")
        try:
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # where this fails open_clip may try again without
        except Exception as error:
            raise ValueError(f"it cannot be read as weights of the architecture: {printable(str(error).partition(chr(10))[0])}") from error
    for part in ("vision_cfg", "text_cfg"):
        layers, width = config[part].get("layers", 0), config[part].get("width", 0)
        if isinstance(layers, int) and isinstance(width, int) and 12 * layers * width**2 > 2 * file.stat().st_size:
            raise ValueError(f"its {part} is of {layers} layers of width {width}, for which there are too few weights; "
                             f"choose the architecture that they were trained as, or copy them again")
