"""A condition learned from pictures: what the model has to be told so that it denoises them best.

    pictures --noise--> x --model under the condition--> E_n --|y - E_n|^2--> gradient of the condition, the model as it is
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gain import LEVELS, Condition, Gain, Model, Probe, together

RATE = 0.03  # of Adam, in units of a condition's own size: a few dozen steps lead from one prompt to another
DEEPEST = 0.9  # fraction of the schedule down to which is learned; below it no condition says anything
FEW, FOLDS = 40, 3  # pictures below which none can be spared to stop by: then each third is left out once
HELD = 0.2  # share of more pictures that stops
EVERY, PATIENCE = 10, 3  # steps between two looks at what was held out, and looks without a gain after which it ends


@dataclass(frozen=True)
class Schedule:
    """How a condition is learned.

    Args:
        steps: at most; the rate falls to 0 over them. batch: pictures of a step. rows: of them in one call of the model, to save memory.
        seed: of what is held out, drawn and noised.
    """

    steps: int = 150
    batch: int = 8
    rows: int = 8
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Learned:
    """A condition and how good it is.

    Args:
        condition: like the one it began with.
        gain: on pictures from which it was not learned; from few pictures, of conditions that were learned without these.
        steps: after which it was best. curve: (steps, gain on held-out pictures) at each look.
    """

    condition: list[Tensor]
    gain: Gain
    steps: int
    curve: list[tuple[int, float]]


class Descent:
    """Adam on a condition. Each step draws pictures anew, at noise levels spread over the schedule, and by its number alone, so that one
    that was stopped goes on as if it had not been.

    Args:
        model: that is asked. latents: (N, *shape) in its space. start: where it begins.
        weight: |y - E_0|^2 at fractions of the schedule (B,).
    """

    def __init__(self, model: Model, latents: Tensor, start: Condition, weight: Callable[[Tensor], Tensor], schedule: Schedule, seed: int):
        self.model, self.latents, self.weight, self.schedule, self.seed, self.done = model, latents, weight, schedule, seed, 0
        self.parts = [part.clone().requires_grad_(True) for part in start]
        self.sizes = [float(part.square().mean().sqrt()) or 1.0 for part in start]
        self.adam = torch.optim.Adam([{"params": [part]} for part in self.parts])

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, *shape), noise like them, and fractions of the schedule (B,), of this step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.done)
        count = self.schedule.batch
        y = self.latents[torch.randint(len(self.latents), (count,), generator=generator).to(self.latents.device)]
        fraction = (torch.arange(count) + torch.rand(count, generator=generator)) / count * DEEPEST
        return y, torch.randn(y.shape, generator=generator).to(y), fraction

    def step(self) -> list[Tensor]:
        """The condition after one more step."""
        for group, size in zip(self.adam.param_groups, self.sizes):
            group["lr"] = RATE * size * (1 - self.done / self.schedule.steps)
        self.adam.zero_grad()
        for y, noise, fraction in zip(*(one.split(self.schedule.rows) for one in self.drawn())):
            x, sigma = self.model.noised(y, noise, fraction.to(y.device))
            with torch.enable_grad():
                errors = (y - self.model.predict(x, sigma, [self.parts])[0]).flatten(1).float().square().sum(1)
                (errors / self.weight(fraction).to(errors)).sum().div(self.schedule.batch).backward()
        if all(part.grad is None or bool(part.grad.isfinite().all()) for part in self.parts):  # else half precision overflowed once
            self.adam.step()
        self.done += 1
        return [part.detach() for part in self.parts]

    def state(self) -> dict[str, Tensor]:
        """All that it needs to go on."""
        moments = {f"{i} {name}": value for i, part in enumerate(self.parts) for name, value in self.adam.state[part].items()}
        return {"done": torch.tensor(self.done), **{f"{i} part": part.detach() for i, part in enumerate(self.parts)}, **moments}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.done = int(state["done"])
        for i, part in enumerate(self.parts):
            part.data.copy_(state[f"{i} part"])
            found = {name.split()[1]: value for name, value in state.items() if name.startswith(f"{i} ") and name != f"{i} part"}
            self.adam.state[part] = {name: value.clone() if name == "step" else value.to(part, copy=True) for name, value in found.items()}


class Learning:
    """The condition under which the model denoises pictures best, by gradient; the model stays as it is.

        min over c of the mean over noise levels of |y - E[x0 | x, c]|^2 / |y - E_0|^2,   x = alpha y + sigma eps

    so that each noise level counts alike, whatever the model predicts (noise, velocity, picture). A part of the pictures is held out and
    ends it when their gain stops growing; of fewer than FEW pictures each third in turn, and then all are learned from for as many steps.

    Source: textual inversion, arXiv:2208.01618, in the space that the model reads.

    Args:
        model: that is asked.
        latents: (N, *shape) in the model's space.
        neutral: the condition that means nothing in particular. start: where it begins; None is `neutral`.

    Raises:
        ValueError: fewer than 2 pictures.
    """

    def __init__(self, model: Model, latents: Tensor, neutral: Condition, start: Condition | None = None, schedule: Schedule = Schedule()):
        if len(latents) < 2:
            raise ValueError(f"{len(latents)} picture is too few to learn a condition from, since some are held out; use 15 or more")
        self.schedule, seed = schedule, schedule.seed
        self.start = [part.detach().float().clone() for part in start or neutral]
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed)).to(latents.device)
        few = len(latents) < FEW
        folds = order.chunk(FOLDS) if few else [order[:round(HELD * len(order))]]
        self.probes = [Probe(model, latents[fold], neutral, batch=schedule.rows, seed=seed) for fold in folds]
        weight = error_by_level(self.probes)
        self.runs = [Descent(model, latents[order[~torch.isin(order, fold)]], self.start, weight, schedule, seed + i)
                     for i, fold in enumerate(folds)]
        self.whole = Descent(model, latents, self.start, weight, schedule, seed + FOLDS) if few else None
        self.curve: list[tuple[int, float]] = []
        self.best = self._look([self.start] * len(folds), 0)

    def _look(self, conditions: Sequence[Condition], done: int) -> Learned:
        gain = together([probe.gain(one) for probe, one in zip(self.probes, conditions)])
        self.curve.append((done, gain.mean))
        return Learned([part.clone() for part in conditions[0]], gain, done, self.curve)

    @property
    def finished(self) -> bool:
        """Whether more steps would not be taken."""
        done = self.runs[0].done
        return done >= self.schedule.steps or done >= self.best.steps + EVERY * PATIENCE

    def run(self, seconds: float = float("inf"), tell: Callable[[int, int, Gain], None] | None = None) -> Learned:
        """Learn until the held-out pictures gain no more.

        Args:
            seconds: after which the best so far is taken.
            tell: called as tell(steps done, steps at most, best gain so far) after each step; may raise, and `state` then is what is left.
        """
        until = time.monotonic() + seconds
        while not self.finished and time.monotonic() < until:
            done = self.runs[0].done
            conditions = [run.step() for run in self.runs]
            if (done + 1) % EVERY == 0 or done + 1 == self.schedule.steps:
                found = self._look(conditions, done + 1)
                self.best = found if found.gain.mean > self.best.gain.mean else self.best
            if tell:
                tell(done + 1, self.schedule.steps, self.best.gain)
        if self.whole is None or not self.best.steps:
            return self.best
        while self.whole.done < self.best.steps:
            self.whole.step()
            if tell:
                tell(self.runs[0].done, self.schedule.steps, self.best.gain)
        return Learned([part.detach().clone() for part in self.whole.parts], self.best.gain, self.best.steps, self.curve)

    def state(self) -> dict[str, Tensor]:
        """All that `resume` needs, as tensors by name."""
        runs = {f"run {i}": run for i, run in enumerate([*self.runs, *([self.whole] if self.whole else [])])}
        best = {"steps": torch.tensor(self.best.steps), "curve": torch.tensor(self.curve, dtype=torch.float64), **self.best.gain.tensors,
                **{f"part {i}": part for i, part in enumerate(self.best.condition)}}
        return {f"{name}: {key}": value for name, run in runs.items() for key, value in run.state().items()} | \
            {f"best: {key}": value for key, value in best.items()}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state` of the same pictures, model and schedule, to the same end."""
        def under(name: str) -> dict[str, Tensor]:
            return {key.split(": ", 1)[1]: value for key, value in state.items() if key.startswith(f"{name}: ")}

        for i, run in enumerate([*self.runs, *([self.whole] if self.whole else [])]):
            run.resume(under(f"run {i}"))
        best, like = under("best"), self.best
        self.curve[:] = [(int(step), float(gain)) for step, gain in best["curve"]]
        gain = Gain(*(best[name].to(like.gain.zero) for name in Gain.NAMES))
        self.best = Learned([best[f"part {i}"].to(part) for i, part in enumerate(like.condition)], gain, int(best["steps"]), self.curve)


def error_by_level(probes: Sequence[Probe]) -> Callable[[Tensor], Tensor]:
    """|y - E_0|^2 at fractions of the schedule (B,), between the measured levels by its logarithm."""
    at, logs = torch.tensor(LEVELS), torch.cat([probe.zero_errors for probe in probes], 1).mean(1).log().cpu()

    def error(fraction: Tensor) -> Tensor:
        place = torch.searchsorted(at, fraction, right=True).clamp(1, len(at) - 1)
        slope = (logs[place] - logs[place - 1]) / (at[place] - at[place - 1])
        return (logs[place - 1] + slope * (fraction - at[place - 1])).exp()

    return error
