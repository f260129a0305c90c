"""Curate and Split Negation Set: which pictures of a folder to use."""
import torch
from comfy_api.latest import io

from ...safe_denoiser import NegationSet
from ...safe_denoiser.meaning.curation import choose
from ...safe_denoiser.meaning.likeness import nearest
from ...safe_denoiser.meaning.texts import text_scores
from ...safe_denoiser.pictures import contact_sheets
from ..io_types import CATEGORY, PREVIEWS, NegationSetType, found_by
from ..pictures.negation_set import as_preview, preview_input
from .clip import clip_inputs, embed


def table(title: str, negation_set: NegationSet, scores: torch.Tensor, words: list[str]) -> str:
    order = scores.argsort(descending=True, stable=True).tolist()
    return "\n".join([title, *(f"{scores[i]:.3f} {negation_set.names[i]}: {words[i]}" for i in order)])


def sheet(negation_set: NegationSet, groups: list[list[int]], scores: torch.Tensor, words: list[str], title: str, style: str,
          cls) -> dict | None:
    """Contact sheet of a few pictures of each group with score and fate, or None when the preview is off."""
    rows = [i for group in groups if group for i in contact_sheets.evenly(group, 8)]
    captions = [f"{scores[i]:.2f} {words[i].partition(',')[0]}" for i in rows]  # why is in the table
    return as_preview(lambda blurred: contact_sheets.sheet(negation_set, rows, [title], blurred, captions), style, cls)


MEANING = "in plain words, one meaning per line; of several, the best counts."
SCORED = ("Contact sheet on the node: up to 8 pictures of each kind with their scores. Blurred by default, since sets hold what people do "
          "not want to see. off: no preview is made or stored.")
INFO = "Counts, and score and fate of each picture, best first."


class CurateNegationSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserCurateNegationSet", display_name="Curate Negation Set", category=f"{CATEGORY}/meaning",
            **PREVIEWS, **found_by("sort images", "duplicates", "clip search", "filter images"),
            description="Keeps the pictures that mean something, drops near-duplicates, and picks a few that cover the rest.",
            inputs=[
                *clip_inputs("The pictures to choose from."),
                io.String.Input("text", default="", tooltip=f"What to keep, {MEANING} Empty: example decides, or all are kept."),
                io.String.Input("against", default="a picture",
                                tooltip=f"What text is compared with, {MEANING} The score is then the probability of text. Empty: the "
                                        "score is the cosine similarity to text, mostly below 0.4."),
                io.Float.Input("threshold", default=0.5, min=-1.0, max=1.0, step=0.01,
                               tooltip="Keep pictures with at least this score: a probability, or without against, or with example, a "
                                       "cosine similarity. 0: keep any."),
                io.Float.Input("duplicates", default=0.96, min=0.0, max=1.0, step=0.005,
                               tooltip="Of pictures with at least this cosine similarity, keep only the best. 0: keep all."),
                io.Int.Input("top_k", default=0, min=0, max=100_000, tooltip="Keep at most this many, the best. 0: all."),
                io.Int.Input("diverse_k", default=0, min=0, max=100_000,
                             tooltip="Of these, keep at most this many that cover the others (greedy k-center). 0: all."),
                preview_input(SCORED),
                NegationSetType.Input("example", optional=True,
                                      tooltip="Example pictures: the score is the cosine similarity to the nearest. Then leave text empty. "
                                              "Optional."),
            ],
            outputs=[NegationSetType.Output(display_name="negation_set", tooltip="The kept pictures, best first."),
                     io.String.Output(display_name="info", tooltip=INFO)],
        )

    @classmethod
    def execute(cls, clip, negation_set, text, against, threshold, duplicates, top_k, diverse_k, preview, example=None) -> io.NodeOutput:
        if text.strip() and example is not None:
            raise ValueError("both text and example say what to keep; leave text empty or disconnect example")
        embeddings = embed(clip, negation_set)
        if example is not None:
            scores = nearest(embeddings, embed(clip, example), 1)[0]
        else:
            scores = text_scores(clip, embeddings, text, against) if text.strip() else torch.ones(len(embeddings))
        kept, why = choose(scores, embeddings, negation_set.names, threshold, duplicates, top_k, diverse_k)
        if not kept:
            best = int(scores.argmax())
            raise ValueError(f"none of {len(scores)} pictures scores {threshold:g} or more; the best is {negation_set.names[best]} with "
                             f"{scores[best]:.3f}: lower the threshold or say it in other words")
        words = [reason and f"dropped, {reason}" or "kept" for reason in why]
        dropped = [i for i in scores.argsort(descending=True).tolist() if why[i]]
        title = f"{len(kept)} kept, {len(dropped)} dropped"
        return io.NodeOutput(negation_set.take(kept), table(title, negation_set, scores, words),
                             ui=sheet(negation_set, [kept, dropped], scores, words, title, preview, cls))


class SplitNegationSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserSplitNegationSet", display_name="Split Negation Set", category=f"{CATEGORY}/meaning",
            **PREVIEWS, **found_by("sort images", "clip search", "filter images"),
            description="Makes a negation set and a retain set from one folder, by two texts: what must not come out, and what may.",
            inputs=[
                *clip_inputs("The pictures to split."),
                io.String.Input("unwanted", default="a weapon", tooltip=f"What must not come out, {MEANING}"),
                io.String.Input("wanted", default="a tool", tooltip=f"What may come out, {MEANING}"),
                io.Float.Input("sure", default=0.5, min=0.5, max=1.0, step=0.01,
                               tooltip="A picture goes where its probability is at least this; the others go nowhere. 0.5: every picture "
                                       "goes somewhere."),
                preview_input(SCORED),
            ],
            outputs=[NegationSetType.Output(display_name="negation_set", tooltip="The unwanted pictures, surest first."),
                     NegationSetType.Output(display_name="retain_set", tooltip="The wanted pictures, surest first: for a retain bank."),
                     io.String.Output(display_name="info", tooltip=INFO)],
        )

    @classmethod
    def execute(cls, clip, negation_set, unwanted, wanted, sure, preview) -> io.NodeOutput:
        scores = text_scores(clip, embed(clip, negation_set), unwanted, wanted)
        order = scores.argsort(descending=True, stable=True).tolist()
        negation = [i for i in order if scores[i] >= sure]
        retain = [i for i in reversed(order) if 1 - scores[i] >= sure and i not in negation]
        words = ["unwanted" if i in negation else "wanted" if i in retain else "unsure" for i in range(len(scores))]
        title = f"{len(negation)} unwanted, {len(retain)} wanted, {len(scores) - len(negation) - len(retain)} unsure"
        if not negation or not retain:
            raise ValueError(f"the texts split {len(scores)} pictures into {title}; choose texts that tell them apart")
        rest = [i for i in order if words[i] == "unsure"]
        return io.NodeOutput(negation_set.take(negation), negation_set.take(retain), table(title, negation_set, scores, words),
                             ui=sheet(negation_set, [negation, retain, rest], scores, words, title, preview, cls))


NODES = [CurateNegationSet, SplitNegationSet]
