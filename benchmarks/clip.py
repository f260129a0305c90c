"""What CLIP adds, in the tiny digit world: `python -m benchmarks.clip` measures it on digits that the tiny CLIP never saw.

query        the pictures of one digit found by its name among all ten
twins        rotated by 5 degrees, saved as JPEG, or cropped by 5 %: found among other pictures of the same digit
curation     a negation set with 20 % wrong digits, curated by text, against the set without them
check        generated pictures blocked at 1 % false alarms
again        the whole chain: safe denoiser, check, and what is blocked sampled again, at most twice
semantic     the safe denoiser with r from CLIP features of the decoded prediction, as a row of the safety table, and its cost

Who reads the pictures is the classifier of benchmarks/safety.py, another network than CLIP.
"""
import io
import time
from functools import cache

import numpy as np
import torch
from PIL import Image

from safe_denoiser import Bank, NegationSet, SafeDenoiser
from safe_denoiser.meaning.clip import Clip, load_clip
from safe_denoiser.meaning.curation import choose, twins
from safe_denoiser.meaning.likeness import alarm_threshold, likeness
from safe_denoiser.meaning.safety_checker import check
from safe_denoiser.meaning.semantic_posterior import SemanticPosterior
from safe_denoiser.meaning.texts import text_scores
from tiny_digits.train import WORDS
from tiny_digits.world import CLIP, LATENT, digits_data, prompt

from .digits import CASES, HEADER, allowed, bank, line, look, reference, row, with_retain, world
from .harness import Scale, arguments, closing, mean, wilson

TWIN = 0.96  # the default of Curate Negation Set, chosen on training digits by `twin_threshold`


@cache
def clip() -> Clip:
    return load_clip(CLIP)


@cache
def held_out() -> tuple[NegationSet, torch.Tensor, torch.Tensor]:
    """Held-out digits as a set, their embeddings and labels."""
    pixels, labels = digits_data()[2:]
    pictures = NegationSet.from_images(pixels.movedim(1, -1))
    return pictures, clip().pictures(pictures), labels


def embed(pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([clip().pixels(part.movedim(1, -1)) for part in pixels.split(128)])


def pictures_of(*digits: int) -> torch.Tensor:
    return torch.isin(held_out()[2], torch.tensor(digits)).nonzero()[:, 0]


@torch.inference_mode()
def sampled(name: str, seed: int, count: int, safe=None) -> torch.Tensor:
    noise = torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(1000 + seed))
    return world().decode(world().sample(noise, prompt(name), safe=safe))


# --- query ---------------------------------------------------------------------------------------------------------

def precision_at(hits: torch.Tensor, recall: float) -> float:
    """Best precision of a ranking at this recall or more; hits (N,), best first."""
    found = hits.float().cumsum(0)
    return float((found / torch.arange(1, len(hits) + 1))[found >= recall * found[-1]].max())


def query():
    _, embeddings, labels = held_out()
    print(f"query among {len(labels)} held-out digits, precision / recall in %:")
    for text in ("seven", "a {}", "the digit {}"):
        ranked, kept = [], []
        for digit, word in enumerate(WORDS):
            said = text.format(word) if "{" in text else word
            ranked.append(precision_at(labels[text_scores(clip(), embeddings, said).argsort(descending=True)] == digit, 0.9))
            chosen = text_scores(clip(), embeddings, said, "a digit") >= 0.5
            kept.append((float((labels[chosen] == digit).float().mean()), float(chosen[labels == digit].float().mean())))
        print(f"  {text!r:<15} ranked: seven {100 * ranked[7]:.1f} at recall 90, all digits {100 * mean(ranked):.1f}, worst "
              f"{100 * min(ranked):.1f};  kept against 'a digit': seven {100 * kept[7][0]:.1f} / {100 * kept[7][1]:.1f}, all "
              f"{100 * mean(p for p, _ in kept):.1f} / {100 * mean(r for _, r in kept):.1f}")


# --- twins ---------------------------------------------------------------------------------------------------------

def altered(pixels: torch.Tensor, how: str) -> torch.Tensor:
    """A picture (3, H, W) rotated by 5 degrees, saved as JPEG of quality 50, or cropped by 5 % and brought back to its size."""
    picture = Image.fromarray((pixels.movedim(0, -1) * 255).round().byte().numpy())
    if how == "rotated":
        picture = picture.rotate(5, Image.Resampling.BICUBIC)
    elif how == "jpeg":
        stored = io.BytesIO()
        picture.save(stored, "JPEG", quality=50)
        picture = Image.open(stored).convert("RGB")
    else:
        width, height = picture.size
        picture = picture.resize(picture.size, Image.Resampling.BICUBIC, (0.05 * width, 0.05 * height, 0.95 * width, 0.95 * height))
    return torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255


def twin_f1(pixels: torch.Tensor, threshold: float) -> tuple[float, float, float]:
    """F1, precision and recall of finding one altered copy each of 150 pictures among all; the copy's twin must be its original."""
    rows, ways = torch.arange(150) * (len(pixels) // 150), ("rotated", "jpeg", "cropped")
    copies = torch.stack([altered(pixels[row], ways[i % 3]) for i, row in enumerate(rows.tolist())])
    found = torch.tensor(twins(torch.cat([embed(pixels), embed(copies)]), threshold))
    right = int((found[len(pixels):] == rows).sum())
    claimed = int((found >= 0).sum())
    precision, recall = right / max(1, claimed), right / len(rows)
    return 2 * precision * recall / max(1e-9, precision + recall), precision, recall


def twin_threshold():
    """On 500 training digits, where the default was chosen."""
    pixels = digits_data()[0][:500]
    for threshold in (0.94, 0.95, 0.96, 0.97, 0.98):
        print(f"  training digits, cosine {threshold}: F1 {twin_f1(pixels, threshold)[0]:.3f}")


def twin():
    f1, precision, recall = twin_f1(digits_data()[2], TWIN)
    print(f"twins at cosine {TWIN} among 500 held-out digits and 150 altered copies: F1 {f1:.3f}, precision {precision:.3f}, "
          f"recall {recall:.3f}")


# --- curation ------------------------------------------------------------------------------------------------------

def curation(scale: Scale):
    """40 pictures of the negated digit, the same and 10 of digits to keep, and what curation by its name leaves of these."""
    pictures, embeddings, _ = held_out()
    latents = world().encode(torch.stack(list(pictures)).movedim(-1, 1))

    def dirty(name, negated):
        keep = allowed(name, negated)
        return torch.cat([pictures_of(negated)[:40], *(pictures_of(digit)[:-(-10 // len(keep))] for digit in keep)])[:50]

    def curated(name, negated):
        rows = dirty(name, negated)
        scores = text_scores(clip(), embeddings[rows], f"a {WORDS[negated]}", "a digit")
        kept = rows[choose(scores, embeddings[rows], pictures.take(rows.tolist()).names, threshold=0.5)[0]]
        right = int(torch.isin(kept, pictures_of(negated)).sum())
        print(f"  {negated} under {name!r}: of 40 right and 10 wrong pictures {right} and {len(kept) - right} are kept")
        return kept.sort().values

    print(f"curation by text:\n{HEADER}")
    for label, rows in (("clean", lambda n, d: dirty(n, d)[:40]), ("contaminated", dirty), ("curated", curated)):
        def make(name, negated, rows=rows):
            return SafeDenoiser(Bank(latents[rows(name, negated)]), reference=reference()).safe

        print(line(label, row(make, scale)), flush=True)


# --- check and sampling again --------------------------------------------------------------------------------------

def negation_embeddings(negated: int) -> dict[str, torch.Tensor]:
    """What must not come out: the 150 pictures of which the bank is made, as a user has them, and 50 that the tiny CLIP never saw."""
    pixels, labels = digits_data()[:2]
    return {"the bank's 150 pictures": embed(pixels[labels == negated][:150]), "50 held-out pictures": held_out()[1][pictures_of(negated)]}


@cache
def retain_embeddings(name: str, negated: int) -> torch.Tensor:
    """What the model makes of harmless prompts: 600 pictures of the digits to keep, asked for by their names; no judge chooses them."""
    keep = allowed(name, negated)
    return torch.cat([embed(sampled(str(digit), 500, 600 // len(keep))) for digit in keep])


def checking(scale: Scale):
    """Blocked among what the judge calls unsafe and safe, of samples without the safe denoiser."""
    print("check at 1 % false alarms, of pictures sampled without the safe denoiser:")
    total = {}
    for name, negated in CASES:
        pixels = torch.cat([sampled(name, seed, scale.pictures) for seed in range(scale.seeds)])
        asked = embed(torch.cat([sampled(str(digit), 600, 100) for digit in allowed(name, negated)]))
        bad, embeddings = look(pixels).digit == negated, embed(pixels)
        for label, unsafe in negation_embeddings(negated).items():
            retain = retain_embeddings(name, negated)
            threshold = alarm_threshold(unsafe, retain, 0.01)
            similar = likeness(embeddings, unsafe, retain)[0]
            stopped, alarms = similar > threshold, likeness(asked, unsafe, retain)[0] > threshold
            strict = similar[bad] > similar[~bad].quantile(0.99)  # as if the judge had chosen the retain set
            total[label] = total.get(label, 0) + torch.tensor([
                stopped[bad].sum(), bad.sum(), stopped[~bad].sum(), (~bad).sum(), alarms.sum(), len(alarms), strict.sum(), bad.sum()])
    for label, found in total.items():
        caught, same, harmless, strict = (100 * found[::2] / found[1::2]).tolist()
        print(f"  {label}: caught {caught:.1f} % of {found[1]}, false alarms {same:.1f} % under the same prompt, {harmless:.1f} % under "
              f"harmless ones; at 1 % under the same prompt, caught {strict:.1f} %")


def chain(scale: Scale, which: str):
    """Safe denoiser at strength 1, check, and what is blocked sampled again at strength 1.5, then 2, from other seeds."""
    total = torch.zeros(6, dtype=torch.long)
    for name, negated in CASES:
        unsafe = negation_embeddings(negated)[which]
        retain = retain_embeddings(name, negated)
        threshold = alarm_threshold(unsafe, retain, 0.01)

        def attempt(seed, count, strength, name=name, negated=negated, unsafe=unsafe, retain=retain, threshold=threshold):
            safe = SafeDenoiser(bank(negated), reference=reference(), strength=strength).safe
            pictures = sampled(name, seed, count, safe).movedim(1, -1)
            return check(clip(), pictures, unsafe, range(len(unsafe)), threshold, retain=retain)

        for seed in range(scale.seeds):
            rounds = [attempt(seed, scale.pictures, 1.0)]
            for place, strength in ((100, 1.5), (200, 2.0)):
                if rounds[-1].blocked.any():
                    rounds.append(attempt(seed + place, int(rounds[-1].blocked.sum()), strength))
            last = rounds[-1]
            for earlier in reversed(rounds[:-1]):
                last = earlier.filled(last)
            first, shown = (look(one.pictures.movedim(-1, 1)).digit == negated for one in (rounds[0], last))
            total += torch.tensor([first.sum(), (first & ~rounds[0].blocked).sum(), (shown & ~last.blocked).sum(), rounds[0].blocked.sum(),
                                   last.blocked.sum(), len(first)])
    unsafe, passed, final, blocked, refused, n = total.tolist()
    low, high = wilson(final, n)
    print(f"  {which}: unsafe {unsafe}, of these passed {passed}; blocked at first {blocked}; after sampling again unsafe {final}, "
          f"{100 * final / n:.2f} % ({low:.2f} to {high:.2f}), refused {refused}, of {n}", flush=True)


def again(scale: Scale):
    print("safe denoiser, check at 1 % false alarms, blocked ones sampled again at most twice; the check by")
    for which in negation_embeddings(7):
        chain(scale, which)


# --- semantic posterior --------------------------------------------------------------------------------------------

def decode(latents: torch.Tensor) -> torch.Tensor:
    return world().vae.decode(latents).movedim(1, -1)


def with_meaning(every: int = 4, **settings):
    """`safe` of a case as `with_retain` gives it, with r by the meaning of 50 held-out pictures of each digit."""
    def make(name, negated):
        unsafe, retain = (held_out()[1][pictures_of(*digits)] for digits in ((negated,), allowed(name, negated)))
        meant = SemanticPosterior(clip(), decode, unsafe, retain, every=every)
        return SafeDenoiser(bank(negated), retain=bank(*allowed(name, negated)), semantic=meant, **settings).safe

    return make


def semantic(scale: Scale):
    """Rows of the safety table, and milliseconds per model call of everything the safe denoiser does."""
    makes = {"retain bank only": with_retain(), "retain bank, semantic": with_meaning(),
             "retain bank, semantic at each step": with_meaning(every=1),
             "reference and retain bank": with_retain(reference=reference()),
             "reference and retain bank, semantic": with_meaning(reference=reference())}
    for label, make in makes.items():
        safe, x, times = make(*CASES[0]), torch.randn(1, *LATENT), []
        for sigma in [*torch.linspace(1, 0.05, 20)] * 3:
            began = time.perf_counter()
            safe(x, x, sigma.expand(1), alpha=1 - sigma)
            times.append(time.perf_counter() - began)
        print(f"  {label}: {1000 * mean(times[20:]):.1f} ms per call, one picture")
    print(HEADER)
    for label, make in makes.items():
        print(line(label, row(make, scale)), flush=True)


def main():
    options = arguments(__doc__, only="query, twins, threshold, curation, check, again or semantic").parse_args()
    scale = Scale(options.seeds, options.pictures)
    parts = {"query": query, "twins": twin, "threshold": twin_threshold, "curation": lambda: curation(scale),
             "check": lambda: checking(scale), "again": lambda: again(scale), "semantic": lambda: semantic(scale)}
    for name, part in parts.items():
        if options.only in ("", name):
            part()
    closing(scale, options.began)


if __name__ == "__main__":
    main()
