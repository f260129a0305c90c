"""What all benchmarks share: how much is sampled, intervals, files of figures, the command line."""
import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safe_denoiser import SafeDenoiser
from safe_denoiser.rules.sld import PRESETS

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Scale:
    """How much is sampled per row."""

    seeds: int = 3
    pictures: int = 200  # per case and seed; benign and direct prompts get half


def stacked(*layers: SafeDenoiser) -> Callable:
    """`safe` of several safe denoisers on one model, as its patches do it: each corrects what guidance made, and corrections add up."""
    def safe(x, denoised, *args, **predicted):
        found = [layer.safe(x, denoised, *args, **predicted) for layer in layers]
        return denoised + sum(one - denoised for one, _ in found), found[-1][1]

    return safe


def safe_latent_diffusion(preset: str, sigma_at: Callable[[float], float]) -> SafeDenoiser:
    """SLD with the numbers of a preset; `sigma_at` is the noise level at that share of the schedule, where its warm-up ends."""
    numbers, warmup = PRESETS[preset]
    return SafeDenoiser(None, method="sld", own=numbers, sigma_start=float(sigma_at(warmup)))


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate, both ends in percent."""
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return tuple(max(0.0, 100 * (middle + sign * half) / (1 + z * z / n)) for sign in (-1, 1))


def mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values) if values else math.nan


def record(rows: dict, path: Path, partly: bool) -> dict:
    """Write figures; those of a part of the rows beside what is there, which stays. Returns what the file then holds."""
    def beside(old, new):
        return {**old, **{key: beside(old.get(key), one) for key, one in new.items()}} if isinstance(old, dict) and isinstance(new, dict) \
            else new

    if partly and path.exists():
        rows = beside(json.loads(path.read_text()), rows)
    path.write_text(json.dumps(rows, indent=1))
    return rows


def arguments(doc: str, seeds: int = 3, pictures: int = 100, per: str = "per case and seed", count: str = "--pictures",
              only: str = "only rows whose label contains this", file: str = "") -> argparse.ArgumentParser:
    """The options that benchmarks have; `file` is where figures go, if anywhere."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument(count, type=int, default=pictures, help=per)
    parser.add_argument("--only", default="", help=only)
    if file:
        parser.add_argument("--json", type=Path, default=HERE / file, help="where the figures go")
    parser.set_defaults(began=time.time())
    return parser


def closing(scale: Scale, began: float, per: str = "per case and seed") -> None:
    print(f"\n{scale.seeds} seeds, {scale.pictures} pictures {per}, {time.time() - began:.0f} s")
