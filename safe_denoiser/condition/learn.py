"""A condition learned from pictures: what the model has to be told so that it denoises them best.

    pictures --noise--> x --model under the condition--> E_n --|y - E_n|^2--> gradient of the condition; the model's weights stay
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gain import LEVELS, Condition, Gain, Model, Probe, together

RATE = 0.03  # Adam's rate, in units of a condition's own size: a few dozen steps lead from one prompt to another
DEEPEST = 0.9  # fraction of the schedule, 0 the noisiest, down to which is learned; below it no condition matters
FEW, FOLDS = 40, 3  # with fewer pictures none can be spared to tell when to stop: each third is then held out once
HELD = 0.2  # share that is held out of FEW or more
EVERY, PATIENCE = 10, 3  # steps between two looks at the held-out pictures; looks without progress after which it ends


@dataclass(frozen=True)
class Schedule:
    """How a condition is learned.

    Args:
        steps: at most; the learning rate falls to 0 over them. batch: pictures in a step. rows: how many of these the model is asked for
            at once; fewer take less memory. seed: of what is held out, drawn and noised.
    """

    steps: int = 150
    batch: int = 8
    rows: int = 8
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned condition and how good it is.

    Args:
        condition: tensors shaped like those it started from.
        gain: on held-out pictures. Where there were few pictures, on each third of them, by a condition learned from the other two.
        steps: after how many it was best. curve: (steps, gain on held-out pictures) at each look.
    """

    condition: list[Tensor]
    gain: Gain
    steps: int
    curve: list[tuple[int, float]]


class Descent:
    """Adam on the tensors of a condition. Each step draws pictures, noise, and levels spread over the schedule; what it draws depends on
    its number alone, so that a descent that was interrupted goes on to the same end.

    Args:
        model: the one that is asked. latents: (N, *shape), in its space. start: the condition to start from.
        weight: the error to be expected, |y - E_0|^2, at fractions of the schedule (B,); errors are divided by it.
    """

    def __init__(self, model: Model, latents: Tensor, start: Condition, weight: Callable[[Tensor], Tensor], schedule: Schedule, seed: int):
        self.model, self.latents, self.weight, self.schedule, self.seed, self.done = model, latents, weight, schedule, seed, 0
        self.parts = [part.clone().requires_grad_(True) for part in start]
        self.sizes = [float(part.square().mean().sqrt()) or 1.0 for part in start]
        self.adam = torch.optim.Adam([{"params": [part]} for part in self.parts])

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """What this step looks at: pictures (B, *shape), noise of the same shape, and fractions of the schedule (B,)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.done)
        count = self.schedule.batch
        y = self.latents[torch.randint(len(self.latents), (count,), generator=generator).to(self.latents.device)]
        fraction = (torch.arange(count) + torch.rand(count, generator=generator)) / count * DEEPEST
        return y, torch.randn(y.shape, generator=generator).to(y), fraction

    def step(self) -> list[Tensor]:
        """Take a step; the condition after it."""
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
        """All that is needed to go on later, as tensors by name."""
        moments = {f"{i} {name}": value for i, part in enumerate(self.parts) for name, value in self.adam.state[part].items()}
        return {"done": torch.tensor(self.done), **{f"{i} part": part.detach() for i, part in enumerate(self.parts)}, **moments}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.done = int(state["done"])
        for i, part in enumerate(self.parts):
            part.data.copy_(state[f"{i} part"])
            found = {name.split()[1]: value for name, value in state.items() if name.startswith(f"{i} ") and name != f"{i} part"}
            self.adam.state[part] = {name: value.clone() if name == "step" else value.to(part, copy=True) for name, value in found.items()}


class Learning:
    """Looks for the condition under which the model denoises pictures best, by gradient descent; the model's weights stay.

        min over c of the mean over noise levels of |y - E[x0 | x, c]|^2 / |y - E_0|^2,   x = alpha y + sigma eps

    Divided by |y - E_0|^2, each noise level counts alike, whatever the model predicts (noise, velocity, picture). Some pictures are held
    out, and learning ends when the gain on them stops growing. Of fewer than FEW pictures each third is held out in a run of its own; one
    more run then learns from all of them, for as many steps as were best.

    Source: textual inversion, arXiv:2208.01618, in the space that the model reads.

    Args:
        model: the one that is asked.
        latents: (N, *shape), in the model's space.
        neutral: the condition that means nothing in particular. start: the condition to start from; None: `neutral`.

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
        """Whether all steps are done, or the held-out pictures gain no more."""
        done = self.runs[0].done
        return done >= self.schedule.steps or done >= self.best.steps + EVERY * PATIENCE

    def run(self, seconds: float = float("inf"), tell: Callable[[int, int, Gain], None] | None = None) -> Learned:
        """Learn until `finished`, or for `seconds`; the best condition that was found.

        Args:
            tell: called as tell(steps done, steps at most, best gain so far) after each step. It may raise to stop; `state` then holds
                what was done.
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
        """Go on from what `state` gave, with the same pictures, model and schedule; the end is the same."""
        def under(name: str) -> dict[str, Tensor]:
            return {key.split(": ", 1)[1]: value for key, value in state.items() if key.startswith(f"{name}: ")}

        for i, run in enumerate([*self.runs, *([self.whole] if self.whole else [])]):
            run.resume(under(f"run {i}"))
        best, like = under("best"), self.best
        self.curve[:] = [(int(step), float(gain)) for step, gain in best["curve"]]
        gain = Gain(*(best[name].to(like.gain.zero) for name in Gain.NAMES))
        self.best = Learned([best[f"part {i}"].to(part) for i, part in enumerate(like.condition)], gain, int(best["steps"]), self.curve)


def error_by_level(probes: Sequence[Probe]) -> Callable[[Tensor], Tensor]:
    """A function of fractions of the schedule (B,): |y - E_0|^2 there, its logarithm interpolated between the measured levels."""
    at, logs = torch.tensor(LEVELS), torch.cat([probe.zero_errors for probe in probes], 1).mean(1).log().cpu()

    def error(fraction: Tensor) -> Tensor:
        place = torch.searchsorted(at, fraction, right=True).clamp(1, len(at) - 1)
        slope = (logs[place] - logs[place - 1]) / (at[place] - at[place - 1])
        return (logs[place - 1] + slope * (fraction - at[place - 1])).exp()

    return error
