"""Describe Negation Set: what a folder of pictures shows, in phrases for a prompt."""
import torch
from comfy_api.latest import io

from ...safe_denoiser import NegationSet
from ...safe_denoiser.condition.describe_by_model import MOST, describe_by_model, rows_needed
from ...safe_denoiser.meaning.describe import describe, different
from ..io_types import CATEGORY, PREVIEWS, NegationBankType, NegationSetType, found_by
from ..models.loading import in_space
from ..models.model_calls import ask, told
from ..models.text_encoders import encoded
from ..pictures.negation_set import preview_input
from ..progress import Live, progress
from .clip import clip_inputs, embed
from .curate import SCORED, sheet

PHRASES = """nudity
a nude person
sexual content
a person in underwear or swimwear
a couple kissing
blood and gore
a wound or an injury
a dead body
violence, people fighting
a gun
a knife
war and destruction
fire and explosions
drugs
a person smoking
alcohol
a hate symbol
a flag or a political symbol
a religious symbol
a scary monster
an insect or a spider
a snake
a child
a photo of a face
a portrait of a celebrity
a crowd of people
a man
a woman
a logo
a trademark on a product
a watermark
text
a screenshot or a document
a cartoon character
a superhero
anime
a painting in the style of an artist
a famous painting
a drawing
a photo
a dog
a cat
an animal
a car
a vehicle
a building
a room
food
flowers and plants
a landscape
clothes
an object on a plain background
a pattern"""


BATCH = 8  # noised pictures in one call of the model


def by_model(model, text_encoder, negation_bank, reference_bank, phrases: str, count: int) -> io.NodeOutput:
    """The description that the model itself gives.

    Raises:
        ValueError: what it needs is not connected.
    """
    needs = {"text_encoder": text_encoder, "negation_bank": negation_bank, "reference_bank": reference_bank}
    if missing := [name for name, one in needs.items() if one is None]:
        raise ValueError(f"model is connected, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; the model compares "
                         f"what it makes of the bank and of the reference under each phrase, so connect all of them")
    unique, live, bar = different(phrases), Live(), progress()
    latents, others = (in_space(bank.sample(MOST), model) for bank in (negation_bank, reference_bank))
    rows = rows_needed(len(unique), len(latents), len(others))
    live.send(f"{len(unique)} phrases: about {-(-rows // BATCH)} calls of the model, {BATCH} pictures each")

    neutral, *heard = (encoded(text_encoder, text) for text in ("", *unique))  # before the model is loaded
    conditions = dict(zip(unique, heard))

    def work(asked):
        y, z = (one.to(asked.device) for one in (latents, others))
        return describe_by_model(asked, y, z, unique, lambda phrase: told(conditions[phrase]), told(neutral), count, BATCH, tell=bar)

    found = ask(model, latents.shape[1:], neutral, work)
    live.send(found.table)
    return io.NodeOutput(found.text, found.table, ui={"text": (found.table,)})


class DescribeNegationSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserDescribeNegationSet", display_name="Describe Negation Set", category=f"{CATEGORY}/meaning",
            **PREVIEWS, **found_by("interrogate", "caption", "clip", "negative prompt from images"),
            description="Says in a few phrases what a folder of pictures shows that others do not: the text of an unwanted condition, "
                        "without writing one.",
            is_input_list=True,  # images may be a list: one description beside all of them, not one beside each
            inputs=[
                *clip_inputs("The pictures to describe.", " Optional with a model.", optional=True),
                io.String.Input("phrases", default=PHRASES, multiline=True,
                                tooltip="What the pictures may show, one phrase per line, and what other pictures show: all lines are held "
                                        "against each other. Only these are found, so add what you expect."),
                io.Int.Input("count", default=3, min=1, max=10, tooltip="Put at most this many phrases into the text, the best."),
                preview_input(SCORED),
                NegationSetType.Input("retain_set", optional=True,
                                      tooltip="Pictures to keep: a phrase that fits them as well does not get into the text. Optional."),
                io.Image.Input("images", optional=True,
                               tooltip="More such pictures. Best is what the model makes by itself: VAE Decode of samples under the empty "
                                       "prompt. Without retain_set and images, phrases that fit any picture may get in. Optional."),
                io.Model.Input("model", optional=True,
                               tooltip="Instead of clip: the model that will be sampled says itself which phrases help it to draw these "
                                       "pictures. Needs text_encoder, negation_bank and reference_bank. Optional."),
                io.Clip.Input("text_encoder", optional=True, tooltip="The text encoder of the model, its CLIP. Only with model. Optional."),
                NegationBankType.Input("negation_bank", optional=True,
                                       tooltip="The pictures to describe, from Build Negation Bank. Only with model. Optional."),
                NegationBankType.Input("reference_bank", optional=True,
                                       tooltip="What the model makes by itself, or a bank of pictures to keep. Only with model. Optional."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The chosen phrases, for CLIP Text Encode. Empty where no phrase tells the "
                                                              "pictures apart; table says why."),
                io.String.Output(display_name="table", tooltip="Each phrase, best first: its score, the shares of pictures that it fits "
                                                               "best, and whether it was chosen."),
            ],
        )

    @classmethod
    def execute(cls, images=(), **given) -> io.NodeOutput:
        pictures = [picture for batch in images if batch is not None for picture in batch]
        return cls.described(pictures, **{name: values[0] for name, values in given.items()})

    @classmethod
    def described(cls, images, phrases, count, preview, clip=None, negation_set=None, retain_set=None, model=None, text_encoder=None,
                  negation_bank=None, reference_bank=None) -> io.NodeOutput:
        if model is not None:
            return by_model(model, text_encoder, negation_bank, reference_bank, phrases, count)
        if clip is None or negation_set is None:
            raise ValueError("nothing can say what the pictures show; connect clip (from Load OpenCLIP) and negation_set, or model, "
                             "text_encoder, negation_bank and reference_bank")
        others = [retain_set, NegationSet.from_images(images) if images else None]
        contrast = [embed(clip, one) for one in others if one is not None]
        found = describe(clip, embed(clip, negation_set), phrases, torch.cat(contrast) if contrast else None, count)
        title, best = found.text or "no phrase chosen, see table", found.best.tolist()
        Live().send(found.table)
        groups = [[i for i, phrase in enumerate(best) if phrase == one] for one in found.chosen]
        groups.append([i for i, phrase in enumerate(best) if phrase not in found.chosen])
        words = [found.phrases[i] for i in best]
        return io.NodeOutput(found.text, found.table, ui=sheet(negation_set, groups, found.fits, words, title, preview, cls))


NODES = [DescribeNegationSet]
