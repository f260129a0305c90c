"""Clip: embeddings of pictures and texts by open_clip.

open_clip is imported when a model is loaded, never before, and nothing is downloaded here but by `fetch`.
"""
import json
import pickle
import shutil
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from ..bank.cache import LatentCache
from ..bank.encoding import fit_picture
from ..pictures.files import printable
from ..pictures.negation_set import NegationSet
from .clip_files import CONFIG, FITS, check_text, check_weights, read_config, weights_in

PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
BATCH = 32


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model that embeds pictures and texts as unit vectors of one space.

    Args:
        model, tokenize: open_clip's own.
        size, fit: side in pixels to which a picture is brought, and how, see `fit_picture`.
        mean, std: of the pixels, (3,).
        dtype: of the model's inputs.
        ready: called before each use; puts the model onto its device and returns that.
        cache: embeddings found there are not computed again; None keeps none.
    """

    model: torch.nn.Module
    tokenize: Callable
    size: int
    fit: str
    mean: Tensor
    std: Tensor
    dtype: torch.dtype = torch.float32
    ready: Callable[[], torch.device] = lambda: torch.device("cpu")
    cache: LatentCache | None = None

    @property
    def scale(self) -> float:
        """By what the model multiplies a cosine before the softmax over texts."""
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def pixels(self, pictures: Tensor) -> Tensor:
        """Embeddings (B, E), fp32, of a batch of pictures (B, H, W, 3) in [0, 1]."""
        device = self.ready()
        fitted = torch.stack([fit_picture(picture.to(device, torch.float32), (self.size, self.size), self.fit) for picture in pictures])
        fitted = ((fitted - self.mean.to(device)) / self.std.to(device)).movedim(-1, 1).to(self.dtype)
        return F.normalize(self.model.encode_image(fitted).float(), dim=1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (M, E), fp32, on the CPU.

        Raises:
            ValueError: they are not finite.
        """
        found = F.normalize(self.model.encode_text(self.tokenize(list(texts)).to(self.ready())).float(), dim=1).cpu()
        if not bool(found.isfinite().all()):
            raise ValueError("the CLIP model gives NaN or infinity for a text; load it in higher precision")
        return found

    def _path(self, fingerprint: str) -> Path:
        return self.cache.path(fingerprint, (self.size, self.size), self.fit)

    def pictures(self, negation_set: NegationSet, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Embeddings (N, E), fp32, on the CPU; each is computed once and stored at once, so that an interrupt loses nothing.

        Args:
            progress: called as progress(done, total) after each batch; may raise to interrupt.

        Raises:
            ValueError: an item of a saved bank, which holds no picture; a picture that cannot be read any more, or whose
                embedding is not finite.
        """
        found: list[Tensor | None] = [None] * len(negation_set)
        if self.cache:
            for i, fingerprint in enumerate(negation_set.fingerprints):
                found[i] = None if negation_set.changed(i) else self.cache.get(self._path(fingerprint))
        missing = [i for i, embedding in enumerate(found) if embedding is None]
        for start in range(0, len(missing), BATCH):
            rows = missing[start:start + BATCH]
            pictures, fingerprints = zip(*map(negation_set.read, rows))  # by what is read now: a file may be replaced at any time
            embeddings = self.pixels(torch.stack([fit_picture(one, (self.size, self.size), self.fit) for one in pictures])).cpu()
            for i, fingerprint, embedding in zip(rows, fingerprints, embeddings):
                if not bool(embedding.isfinite().all()):
                    raise ValueError(f"the CLIP model gives NaN or infinity for {negation_set.names[i]}; take the picture out of the set")
                found[i] = embedding.clone()  # not a view of the whole batch
                if self.cache:
                    self.cache.put(self._path(fingerprint), found[i])
            if progress:
                progress(len(found) - len(missing) + start + len(rows), len(found))
        if self.cache:
            self.cache.trim()
        return torch.stack(found)


def _open_clip():
    """The library, imported late: it takes seconds."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"open-clip-torch cannot be imported ({error}); install it into ComfyUI's Python: "
                          f"python -m pip install open-clip-torch") from error
    return open_clip


def load_clip(weights: str | Path, architecture: str = "", dtype: torch.dtype = torch.float32) -> Clip:
    """A CLIP model from files on this machine; nothing is downloaded.

    Args:
        weights: a folder with `open_clip_config.json` and weights, as open_clip's repositories have them; or a file of weights,
            which is read as safetensors or with weights_only.
        architecture: open_clip's name of it, such as "ViT-B-32", for a file of weights; a folder names its own.
        dtype: fp32, fp16 or bf16.

    Raises:
        FileNotFoundError: no such folder or file.
        ImportError: open_clip is not installed.
        ValueError: an unknown architecture, weights of another one, or one whose tokenizer is not in the folder.
    """
    path, open_clip = Path(weights), _open_clip()
    if not path.exists():
        raise FileNotFoundError(f"CLIP weights {path.name!r} do not exist; put them at {path}")
    whole = path.is_dir()
    name = f"local-dir:{path}" if whole else architecture
    try:
        config = read_config(path) if whole else _known(architecture)
        check_text(config, path.name, whole)
        check_weights(weights_in(path) if whole else path, config)
    except ValueError as error:
        raise ValueError(f"{path.name!r} is not loaded: {error}") from error
    try:
        model = open_clip.create_model(name, None if whole else str(path), precision=PRECISIONS[dtype], weights_only=True,
                                       require_pretrained=True, force_preprocess_cfg=None if whole else _how(open_clip, name))
    except (RuntimeError, AssertionError, KeyError, TypeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        reason = printable(str(error).partition("\n")[0])  # others, or damaged
        raise ValueError(f"{path.name!r} cannot be read as weights of the architecture {CONFIG if whole else name!r} ({reason}); "
                         f"choose the architecture that they were trained as") from error
    how = model.visual.preprocess_cfg
    size = how["size"] if isinstance(how["size"], int) else how["size"][0]
    here_only = dict(trust_remote_code=False, local_files_only=True) if config["text_cfg"].get("hf_tokenizer_name") else {}
    return Clip(model.eval().requires_grad_(False), open_clip.get_tokenizer(name, **here_only), size, FITS[how["resize_mode"]],
                torch.tensor(how["mean"]), torch.tensor(how["std"]), dtype)


def _known(architecture: str) -> dict:
    """Configuration of an architecture in open_clip's list; a link may bring any text, and open_clip would fetch what "hf-hub:" names."""
    open_clip = _open_clip()
    if architecture not in open_clip.list_models():
        raise ValueError(f"architecture {printable(str(architecture))!r} is unknown to open_clip; choose the one that the weights were "
                         f"trained as, or put them into a folder together with their {CONFIG}")
    return open_clip.get_model_config(architecture)


def _how(open_clip, architecture: str, tag: str = "") -> dict:
    """How pictures are prepared for published weights: those of this tag, or the first of the architecture."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = open_clip.get_pretrained_cfg(architecture, tag or tags[0]) if tags else {}
    return {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in known}


def published(architecture: str, tag: str) -> tuple[str, int]:
    """Where open_clip would fetch these weights from, and how many bytes they are. Asks the server for the size only.

    Raises:
        ValueError: open_clip knows no such weights, or they would not do without other files.
    """
    open_clip = _open_clip()
    config, known = _known(architecture), open_clip.get_pretrained_cfg(architecture, tag)
    if not known:
        raise ValueError(f"open_clip knows no weights {tag!r} of {architecture!r}; choose one of "
                         f"{', '.join(open_clip.list_pretrained_tags_by_model(architecture)) or 'another architecture'}")
    check_text(config, architecture, whole=True)
    repository, file = known.get("hf_hub", "").rpartition("/")[::2]
    if not repository:
        with urllib.request.urlopen(urllib.request.Request(known["url"], method="HEAD")) as answer:
            return known["url"], int(answer.headers["Content-Length"])
    from huggingface_hub import HfApi

    sizes = {one.rfilename: one.size for one in HfApi().model_info(repository, files_metadata=True).siblings}
    name = file or open_clip.constants.HF_WEIGHTS_NAME
    safe = open_clip.constants.HF_SAFE_WEIGHTS_NAME if not file else f"{Path(file).stem}.safetensors"  # preferred where there is one
    name = safe if safe in sizes else name
    return f"{repository}/{name}", sizes[name]


def fetch(architecture: str, tag: str, folder: str | Path) -> None:
    """Download weights by open_clip, with the configuration and the tokenizer that go with them, into `folder`, for `load_clip`.

    The folder appears when it is complete, so that an interrupted download is never taken for a model.
    """
    open_clip = _open_clip()
    known, config, folder = open_clip.get_pretrained_cfg(architecture, tag), _known(architecture), Path(folder)
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    file = Path(open_clip.download_pretrained(known, cache_dir=str(part / "download")))
    shutil.move(file.resolve(), part / f"open_clip_model{file.suffix}")
    shutil.rmtree(part / "download", ignore_errors=True)
    if config["text_cfg"].get("hf_tokenizer_name"):
        open_clip.get_tokenizer(architecture).save_pretrained(part)
    model = {**config, "quick_gelu": known.get("quick_gelu", config.get("quick_gelu", False))}
    prepared = {"model_cfg": model, "preprocess_cfg": _how(open_clip, architecture, tag)}
    (part / CONFIG).write_text(json.dumps(prepared, indent=1), encoding="utf-8")
    part.rename(folder)
