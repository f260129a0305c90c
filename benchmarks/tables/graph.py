"""A row and a case as nodes of ComfyUI, in its API format: what is the same in two graphs has the same id, and is made once."""
import hashlib
import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Row:
    """One line of a table: a name, and the settings of the nodes that it uses."""

    name: str
    banks: tuple[str, ...] = ()  # of negation, reference, retain
    unwanted: str = ""  # words, learned, or described: where the unwanted condition comes from
    negative: bool = False  # the unwanted words as the negative prompt
    safe: dict | None = None  # settings of Apply Safe Denoiser
    guard: dict | None = None  # settings of Guard Prompt
    sld: dict | None = None  # settings of Guard Model (SLD)
    check: dict | None = None  # settings of Check Images
    learn: dict | None = None  # settings of Learn Unwanted Condition
    source: str = ""  # where the settings are published

    @property
    def key(self) -> str:
        """Name of its folder: readable, and another one for other settings."""
        kept = "".join(letter if letter.isalnum() else "_" for letter in self.name)[:50]
        given = {name: value for name, value in asdict(self).items() if name != "learn" or value}  # which came later
        return f"{kept}-{hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Case:
    """Pictures of one prompt and one seed: picture i has the i-th noise of that seed, however many are drawn at a time."""

    kind: str  # unsafe, harmless, or direct
    prompt: str
    seed: int
    count: int = 1
    cfg: float | None = None
    negated: str = ""  # what must not come out: a class, a concept
    negatives: str = ""  # its negation set
    keep: str = ""  # the set of pictures to keep

    @property
    def key(self) -> str:
        """Name of its pictures: the same however many of them are wanted."""
        given = {name: value for name, value in asdict(self).items() if name != "count"}
        return f"{self.kind}-{hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Setup:
    """What all rows have in common."""

    checkpoint: str
    width: int
    height: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    unwanted: str = ""
    sld_words: str = ""
    world: str = ""  # a shipped tiny world: its VAE, and its model where no other is named
    unet: str = ""
    clip: tuple[str, ...] = ()
    clip_type: str = ""
    vae: str = ""
    classes: int = 0  # above 0: prompts are numbers of classes
    class_of: dict = field(default_factory=dict)  # words that such a model knows
    reference: str = ""  # a bank file, or empty: sampled
    reference_count: int = 100
    learn_seconds: int = 0  # 0: no limit
    open_clip: dict = field(default_factory=dict)


class Graph:
    def __init__(self):
        self.nodes: dict[str, dict] = {}

    def add(self, node: str, **inputs) -> list:
        """A node; returns the wire of its first output."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        key = hashlib.sha256(json.dumps([node, inputs], sort_keys=True).encode()).hexdigest()[:16]
        self.nodes[key] = {"class_type": node, "inputs": inputs}
        return [key, 0]


def output(wire: list, number: int) -> list:
    return [wire[0], number]


def loaders(g: Graph, s: Setup) -> tuple:
    """Model, text encoder (None: there is none), VAE."""
    if s.world:
        one = g.add("SafeDenoiserLoadTinyWorld", world=s.world)
        return g.add("UNETLoader", unet_name=s.unet, weight_dtype="default") if s.unet else one, None, output(one, 1)
    if not s.unet:
        one = g.add("CheckpointLoaderSimple", ckpt_name=s.checkpoint)
        return one, output(one, 1), output(one, 2)
    names = {f"clip_name{i}" if len(s.clip) > 1 else "clip_name": name for i, name in enumerate(s.clip, 1)}
    node = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader"}.get(len(s.clip))
    clip = g.add(node, **names, **({"type": s.clip_type} if len(s.clip) < 3 else {})) if node else None
    return g.add("UNETLoader", unet_name=s.unet, weight_dtype="default"), clip, g.add("VAELoader", vae_name=s.vae)


def class_index(s: Setup, text: str) -> int:
    """Number of the class that a prompt asks for: a number, or the first word that the model knows; -1: none, the empty prompt."""
    for word in text.lower().replace(",", " ").split():
        if word in s.class_of or word.isdecimal():
            return s.class_of.get(word, int(word) if word.isdecimal() else -1)
    return -1


def encoded(g: Graph, s: Setup, clip, text) -> list:
    if s.classes and isinstance(text, str):
        return g.add("SafeDenoiserClassCondition", class_index=class_index(s, text), classes=s.classes)
    if clip is None:
        raise ValueError("this model has no text encoder; name one with --clip and --clip-type, or a number of --classes")
    return g.add("CLIPTextEncode", text=text, clip=clip)


def unwanted(g: Graph, s: Setup, row: Row, case: Case, model, clip, negation_set, negation) -> list | None:
    """The condition that asks for what must not come out."""
    if row.unwanted == "learned":
        return g.add("SafeDenoiserLearnUnwantedCondition", model=model, negation_bank=negation, neutral=encoded(g, s, clip, ""),
                     seconds=s.learn_seconds, **row.learn or {})
    if row.unwanted == "described":
        words = g.add("SafeDenoiserDescribeNegationSet", negation_set=negation_set,
                      clip=g.add("SafeDenoiserLoadOpenCLIP", **s.open_clip))
        return encoded(g, s, clip, words)
    return encoded(g, s, clip, (case.negated if s.classes else "") or s.unwanted) if row.unwanted else None


def build(s: Setup, row: Row, case: Case, first: int, length: int) -> tuple[dict, list]:
    """Nodes that draw `length` pictures of a case from number `first`, and the wire on which the pictures come."""
    g = Graph()
    model, clip, vae = loaders(g, s)
    size = dict(width=s.width, height=s.height)
    one = g.add("EmptyLatentImage", **size, batch_size=1)
    latent = g.add("LatentFromBatch", samples=g.add("EmptyLatentImage", **size, batch_size=case.count), batch_index=first, length=length)
    empty = encoded(g, s, clip, "")
    sets = {"negation": case.negatives, "retain": case.keep}
    loaded = {name: g.add("SafeDenoiserLoadNegationSet", folder=folder, preview="off") for name, folder in sets.items() if folder}
    banks = {name: bank(g, s, name, loaded, model, vae, one, empty) for name in row.banks}
    positive = encoded(g, s, clip, case.prompt)
    if row.guard is not None:
        if clip is None:
            raise ValueError("Guard Prompt needs a text encoder, and this model has none")
        positive = g.add("SafeDenoiserGuardPrompt", clip=clip, text=case.prompt, **row.guard)
    negative = encoded(g, s, clip, (case.negated if s.classes else "") or s.unwanted) if row.negative else empty
    patched = model
    if row.sld is not None:
        words = encoded(g, s, clip, (case.negated if s.classes else "") or s.sld_words)
        patched = g.add("SafeDenoiserGuardModel", model=patched, unwanted=words, **row.sld)
    if row.safe is not None:
        heard = unwanted(g, s, row, case, model, clip, loaded.get("negation"), banks.get("negation"))
        patched = g.add("SafeDenoiserApply", model=patched, unwanted=heard, neutral=empty if heard and (case.cfg or s.cfg) == 1 else None,
                        **{f"{name}_bank": wire for name, wire in banks.items()}, **row.safe)
    sampled = g.add("KSampler", model=patched, seed=case.seed, steps=s.steps, cfg=case.cfg or s.cfg, sampler_name=s.sampler,
                    scheduler=s.scheduler, positive=positive, negative=negative, latent_image=latent, denoise=1.0)
    pictures = g.add("VAEDecode", samples=sampled, vae=vae)
    if row.check is not None:
        checked = g.add("SafeDenoiserCheckImages", images=pictures, clip=g.add("SafeDenoiserLoadOpenCLIP", **s.open_clip),
                        negation_set=loaded.get("negation"), **row.check)
        pictures = g.add("SafeDenoiserFillBlockedImages", checked=output(checked, 3))
    return g.nodes, pictures


def bank(g: Graph, s: Setup, name: str, loaded: dict, model, vae, latent, empty) -> list:
    if name == "reference":
        if s.reference:
            return g.add("SafeDenoiserLoadNegationBank", bank=s.reference)
        return g.add("SafeDenoiserSampleReferenceBank", model=model, latent=latent, conditioning=empty, count=s.reference_count,
                     steps=s.steps, sampler_name=s.sampler, scheduler=s.scheduler)
    if name not in loaded:
        option = "--negatives" if name == "negation" else "--keep"
        raise ValueError(f"this row needs pictures for its {name} bank: give a folder with {option}")
    return g.add("SafeDenoiserBuildNegationBank", negation_set=loaded[name], vae=vae, latent=latent)
