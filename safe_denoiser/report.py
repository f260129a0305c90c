"""Report: the steps of one run -> table, JSON, plot."""
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw
from torch.nn.utils.rnn import pad_sequence

from .pictures.contact_sheets import thumbnail, write
from .pictures.negation_set import NegationSet
from .prediction import Step
from .sentence import afterwards

COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194), (23, 190, 207))

UNSTEERED = ("NOTHING WAS STEERED, though strength is above 0: whoever sampled asked the model in a way that this node is not told of; "
             "sample with KSampler or SamplerCustomAdvanced and one of ComfyUI's guiders")
STOPPED = "stopped after"  # begins a note


def _largest(values: np.ndarray) -> float:
    """The largest of these, NaN aside, and at least 0."""
    return float(np.fmax.reduce(values.ravel(), initial=0.0))


def _panel(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], values: np.ndarray, title: str, top: float | None):
    """One line per picture over the model calls."""
    left, upper, right, lower = box
    top = top or _largest(values) or 1.0
    draw.rectangle(box, outline="gray")
    for place, text, anchor in (((left, upper - 4), title, "ld"), ((left - 6, upper), f"{top:.2g}", "rm"),
                                ((left - 6, lower), "0", "rm"), ((right, lower + 4), f"{len(values)} model calls", "ra")):
        write(draw, place, text, "black", 18, anchor)
    for row in range(values.shape[1] if values.size else 0):
        points = [(left + (right - left) * (i + 0.5) / len(values), lower - (lower - upper) * min(1.0, value / top))
                  for i, value in enumerate(values[:, row]) if not math.isnan(value)]
        draw.line(points * (2 if len(points) == 1 else 1), COLOURS[row % len(COLOURS)], 2)


@dataclass(frozen=True, eq=False)
class Report:
    """What the safe denoiser did over one run. The steps' tensors stay on their device until the report is read, and are read anew
    each time, so that a report whose steps are still being filled is never stale.

    Args:
        steps: one Step per model call, in order.
        notes: lines for the reader, such as "bank resized".
        source: a name of whoever samples with it, to find it again.
        weak: what makes the set-up weak, and what to do.
        what: must not come out, in the user's words; may be unknown.
        names: of the bank's pictures, by index.
    """

    steps: Sequence[Step]
    notes: Sequence[str] = field(default=())
    source: str = ""
    weak: Sequence[str] = field(default=())
    what: str = ""
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Every field of Step as an array (calls, batch); NaN in a call with fewer rows than the largest has."""
        names = Step.__dataclass_fields__
        return {name: pad_sequence([getattr(step, name).float() for step in self.steps], True, math.nan).cpu().numpy() if self.steps
                else np.zeros((0, 0)) for name in names}

    @property
    def heard(self) -> np.ndarray:
        """t of each call, (calls, batch), where the model's own prediction under the unwanted condition spoke; NaN elsewhere."""
        return self.values["projection"]

    @property
    def summary(self) -> dict[str, float]:
        """Counts of one run; `posterior` and `correction` are the largest values seen."""
        v = self.values
        return {
            "model_calls": len(self.steps),
            "corrected_calls": int((v["active"] > 0).any(1).sum()),
            "clamped": int(np.nansum(v["clamped"])),
            "fallbacks": int(np.nansum(v["fallback"])),
            "posterior": _largest(v["posterior"]),
            "correction": _largest(v["correction"]),
        }

    @property
    def sentence(self) -> str:
        """What happened, in words; the numbers are in `verdict` and `table`."""
        v, summary = self.values, self.summary
        asked = bool(np.isfinite(v["projection"]).any() or ((v["nearest"] >= 0) & (v["active"] > 0)).any())
        most = "".join(self.names[i] for i in self.pushed_most(1) if i in self.names)
        return self._stopped + (afterwards(summary, v["correction"], asked, self.what, most) or self._verdict(summary))

    @property
    def _stopped(self) -> str:
        return "".join(f"{note}: " for note in self.notes if note.startswith(STOPPED))

    @property
    def verdict(self) -> str:
        """One line with numbers: what happened, or why nothing did."""
        return self._stopped + self._verdict(self.summary)

    def _verdict(self, s: dict[str, float]) -> str:
        if not s["model_calls"]:
            return UNSTEERED if UNSTEERED in self.notes else (
                "no model call was recorded: strength is 0, or the sampler has not run yet, or its result was kept from before "
                "(connect its LATENT to this report), or it leaves out what nodes add to a MODEL, as some tiled samplers do")
        if s["fallbacks"]:
            return f"the model gave NaN or infinity {s['fallbacks']} times; those predictions were left as they were"
        if not s["corrected_calls"]:
            return f"nothing was corrected: none of the {s['model_calls']} model calls lay in the window (start to end)"
        heard = self.heard
        heard = heard[np.isfinite(heard)]
        if s["posterior"] < 0.01 and len(heard):
            return f"nothing was corrected: the prompt asks for nothing like the unwanted condition, t at most {heard.max():.2f}"
        if s["posterior"] < 0.01 and ((self.values["nearest"] >= 0) & (self.values["active"] > 0)).any():
            return "nothing was corrected: the bank never came near, r < 0.01 at every step"
        if not s["correction"]:
            return "nothing was corrected: what it needs was not there (guidance, an unwanted condition), or nothing was to be done"
        if s["correction"] < 1e-4:
            return (f"nothing to see: r reached {s['posterior']:.2f}, but the largest correction was {s['correction']:.1g} of the "
                    f"prediction; raise strength, or let start begin earlier")
        witness = f", as the unwanted condition tells (t {heard.min():.2f} to {heard.max():.2f})" if len(heard) else ""
        return f"corrected {s['corrected_calls']} of {s['model_calls']} model calls, posterior up to {s['posterior']:.2f}{witness}"

    @property
    def counts(self) -> str:
        """One line: model calls, window, clamps and fallbacks."""
        s, v = self.summary, self.values
        inside = np.flatnonzero((v["active"] > 0).any(1))
        window = "window never open"
        if len(inside):
            high, low = _largest(v["sigma"][inside[0]]), _largest(v["sigma"][inside[-1]])
            window = f"window open in calls {inside[0] + 1} to {inside[-1] + 1} (sigma {high:.3f} to {low:.3f})"
        return f"{s['model_calls']} model calls, {window}, {s['clamped']} clamps, {s['fallbacks']} fallbacks"

    def table(self) -> str:
        """A line per model call: mean over the batch, largest in brackets; t, the prompt's share of the unwanted, where it was asked."""
        v = self.values
        heard = bool(np.isfinite(v["projection"]).any())
        lines = [self.sentence, *self.weak, self.verdict, self.counts, *self.notes,
                 f"call   sigma      posterior r     correction      active{'   share t' if heard else ''}"]
        for i, step in enumerate(self.steps):
            sigma, r, c, t, active = (v[name][i][:len(step.sigma)] for name in ("sigma", "posterior", "correction", "projection", "active"))
            lines.append(f"{i + 1:>4}  {sigma.max():>7.3f}   {r.mean():.3f} ({r.max():.3f})   {c.mean():.4f} ({c.max():.4f})   "
                         f"{int(active.sum())}/{len(r)}" + (f"    {t.mean():+.3f} ({t.max():+.3f})" if heard else ""))
        return "\n".join(lines)

    def to_json(self) -> str:
        """Summary, notes and every value, as JSON; null where there is none."""
        steps = {name: np.where(np.isfinite(value), value, None).tolist() for name, value in self.values.items()}
        told = {"sentence": self.sentence, "weak": list(self.weak), "verdict": self.verdict, "notes": list(self.notes)}
        return json.dumps({**told, "summary": self.summary, "steps": steps})

    def pushed_most(self, count: int = 3) -> list[int]:
        """Indices of the bank items that weighed most where something was corrected, heaviest first."""
        v = self.values
        asked = v["nearest"] >= 0  # else no bank was
        total = np.bincount(v["nearest"][asked].astype(int), v["correction"][asked]) if asked.any() else np.zeros(0)
        return [int(i) for i in np.argsort(-total)[:count] if total[i] > 0]

    def plot(self, width: int = 720, height: int = 480, negation_set: NegationSet | None = None, blurred: bool = True) -> Image.Image:
        """Two panels over the model calls, one line per picture: posterior r, and the correction relative to the prediction.

        Args:
            negation_set: the set of the bank; the three pictures that pushed most are then shown on the right.
            blurred: blur those pictures beyond recognition.
        """
        picture = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(picture)
        for i, line in enumerate(textwrap.wrap(self.sentence, width // 10)[:2]):
            write(draw, (10, 6 + 22 * i), line, "black", 18)
        write(draw, (10, height - 6), self.counts, "dimgray", 14, "ld")
        panels = (("posterior", "posterior r", 1.0), ("correction", "|correction| / |denoised|", None))
        for k, (name, title, top) in enumerate(panels):
            top_edge = 80 + k * (height - 94) // 2
            box = (70, top_edge, width - 15, top_edge + (height - 94) // 2 - 52)
            _panel(draw, box, self.values[name], title, top)
        if negation_set is None:
            return picture
        wide = Image.new("RGB", (width + 150, height), "white")
        wide.paste(picture)
        for k, item in enumerate(i for i in self.pushed_most() if i < len(negation_set)):
            wide.paste(thumbnail(negation_set, item, 110, blurred), (width + 20, 50 + 140 * k))
            write(ImageDraw.Draw(wide), (width + 20, 46 + 140 * k), negation_set.names[item][:16], "black", 13, "ld")
        write(ImageDraw.Draw(wide), (width + 20, 6), "pushed most", "black", 18)
        return wide
