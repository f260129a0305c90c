"""Guard Prompt: a prompt without what it must not ask for, by its embeddings (Semantic Surgery, SAFREE)."""
from comfy_api.latest import io

from ...safe_denoiser.meaning.texts import lines_of
from ..io_types import CATEGORY, found_by
from ..progress import Live
from .safree import Safree
from .surgery import Surgery

LISTS = {  # what one looks for, beside the lines that the user writes
    "own words": (),
    "nudity": ("nudity", "naked", "nude", "sexual", "erotic", "explicit sex", "bare breasts", "genitals", "porn"),
    "violence": ("violence", "blood", "gore", "a dead body", "a wound", "murder", "torture", "shooting people", "cruelty"),
    "names": ()}
NAMED = ("{}", "a portrait of {}", "in the style of {}", "art by {}")  # what is looked for of a person's or an artist's name


def concepts_of(chosen: str, text: str) -> list[str]:
    """What is looked for: the built-in list and the lines; of names, what is said of them."""
    lines = lines_of(text)
    found = [*LISTS[chosen], *([form.format(line) for line in lines for form in NAMED] if chosen == "names" else lines)]
    if not found:
        raise ValueError("there is nothing to look for: concepts is empty; write one per line, or choose a built-in list")
    return [*dict.fromkeys(found)]


METHODS = {"surgery": Surgery, "safree": Safree}


class GuardPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserGuardPrompt", display_name="Guard Prompt", category=f"{CATEGORY}/guards",
            **found_by("prompt filter", "nsfw", "safe", "erase concept", "semantic surgery", "safree", "clip text encode", "censor"),
            description="CLIP Text Encode that looks for what a prompt must not ask for and takes it out of the embeddings; harmless "
                        "prompts come back as they are. The first layer, before Guard Model (SLD) and Apply Safe Denoiser.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders of the model. Each is judged in a space of its own."),
                io.String.Input("text", default="", multiline=True, dynamic_prompts=True,
                                tooltip="The prompt. Left aside where conditioning is connected."),
                io.Combo.Input("method", options=[*METHODS], default="surgery",
                               tooltip="surgery (Semantic Surgery, arXiv:2510.22851): the direction of what is found is taken out of all "
                                       "rows. safree (SAFREE, arXiv:2410.12761): the tokens that carry it are projected out of it, at the "
                                       "beginning of the schedule; it encodes the prompt once more for each token."),
                io.Combo.Input("look_for", options=[*LISTS], default="nudity",
                               tooltip="A built-in list of concepts, beside those below. names: the lines below are names of persons or "
                                       "artists, and portraits of them and works in their style are looked for too."),
                io.String.Input("concepts", default="", multiline=True, tooltip="What must not be asked for, one per line, in few words."),
                io.Float.Input("false_alarms", default=0.01, min=0.001, max=0.5, step=0.001,
                               tooltip="Share of harmless prompts that may be changed. Lower finds less. The threshold is measured with "
                                       "207 harmless prompts, which takes a while the first time; below 0.005 it is that of the worst."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01,
                               tooltip="How much of what is found is taken out. 1: as derived. 0: nothing, bit for bit."),
                io.Conditioning.Input("conditioning", optional=True,
                                      tooltip="A conditioning that this CLIP made, instead of text; for method surgery. Optional."),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompt, guarded."),
                     io.String.Output(display_name="found", tooltip="Whether it was changed, what was found, and how clearly.")],
        )

    @classmethod
    def execute(cls, clip, text, method, look_for, concepts, false_alarms, strength, conditioning=None) -> io.NodeOutput:
        if clip is None:
            raise ValueError("clip is empty: this checkpoint has no text encoder; load one with Load CLIP and connect it")
        tokens = clip.tokenize(text) if conditioning is None else None
        entries = clip.encode_from_tokens_scheduled(tokens) if conditioning is None else conditioning
        if not all(bool(one[0].isfinite().all()) for one in entries):
            raise ValueError("the text encoder gives NaN or infinity for this prompt, in which nothing can be found; load it in higher "
                             "precision (ComfyUI --fp32-text-enc)")
        if strength == 0:
            return io.NodeOutput(entries, "off: strength is 0")
        guard = METHODS[method].of(clip, concepts_of(look_for, concepts), look_for == "names")
        entries, found = guard.guard(entries, tokens, false_alarms, strength)
        Live().send(found)
        return io.NodeOutput(entries, found)


NODES = [GuardPrompt]
