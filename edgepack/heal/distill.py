"""The training loop: a student towards a frozen teacher, kept only where held-out text says it is better.

AdamW (Loshchilov and Hutter, arXiv:1711.05101) with warm-up and decay, gradients accumulated over as many micro-batches
as memory asks for. The student is scored on held-out windows before the first step and at even distances; the masters
that scored best are what it ends with, so that training can't make it worse. A run notes down its state
(`journal.py`): killed at any time it goes on to the same numbers, on the same machine with the same threads.

Knows nothing of what is wrong with the student (fewer layers, coarser numbers): `weights.py` and `objective.py` do.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgepack.errors import StepError
from edgepack.figures import significant
from edgepack.heal.data import MOST_HELD_OUT
from edgepack.heal.journal import Journal
from edgepack.heal.memory import micro_batch
from edgepack.heal.objective import Objective
from edgepack.heal.order import Order
from edgepack.heal.probe import timed
from edgepack.heal.schedule import Decay, learning_rate
from edgepack.heal.weights import FullWeights, Weights
from edgepack.measure import bootstrap
from edgepack.worker import Progress, no_progress

SCORING_SHARE = 0.15  # of the time of training that scoring may add
SCORED_COST = 0.4  # time of scoring a window, in that of training on one: a pass forward, the teacher's being kept
_PROBED = 8  # micro-batches a run has to have for its time to be worth telling before
_SAVING_SHARE = 0.05  # of the time that writing states may add

Renewed = Callable[[torch.Tensor, int], torch.Tensor]  # training windows, number of the version -> that version


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        tokens: To train on, counted with repetitions; rounded up to whole batches.
        learning_rate: Peak.
        batch_windows: Windows of a step.
        warmup: Steps of rising rate.
        decay: How the rate falls after them.
        final: Share of the peak it falls to.
        weight_decay: Of AdamW; a short repair needs none.
        clip: Longest gradient.
        evaluations: How often held-out text is scored after the first time.
        micro_batch: Windows of one pass; None takes what fits in memory, at most `CPU_WINDOWS` on a CPU.
        checkpointing: Compute activations twice instead of keeping them (models of transformers).
        save_seconds: Time between two states on disk; more where writing one takes long.
        seed: Of the order of windows.
        probe: Time a few passes before the start, to say how long it will take.
    """

    tokens: int
    learning_rate: float
    batch_windows: int = 32
    warmup: int = 20
    decay: Decay = "cosine"
    final: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluations: int = 8
    micro_batch: int | None = None
    checkpointing: bool = False
    save_seconds: float = 60.0
    seed: int = 20260301
    probe: bool = False


def paced(
    tokens: int,
    window_tokens: int,
    learning_rate: float,
    *,
    held_out: int = MOST_HELD_OUT,
    most_windows: int = 8,
    least_steps: int = 250,
) -> Settings:
    """Settings for a number of tokens, with a warm-up of 20 steps and a cosine to 5 % as in docs/refining.md.

    Small steps: the teacher's distributions are targets with little noise, so that a budget of tokens brings more in
    many steps than in large ones (docs/healing.md).

    Args:
        tokens: To train on.
        window_tokens: Of a window.
        learning_rate: Peak.
        held_out: Held-out windows: they are scored as often as `SCORING_SHARE` allows, at least twice after the start.
        most_windows: Of a step.
        least_steps: Fewer windows a step are taken, down to 4, where that would leave less than so many.
    """
    windows = max(1, tokens // window_tokens)
    batch = min(most_windows, max(4, windows // least_steps))
    steps = math.ceil(windows / batch)
    evaluations = int(SCORING_SHARE * windows / (SCORED_COST * held_out))
    return Settings(
        tokens,
        learning_rate,
        batch_windows=batch,
        warmup=max(1, min(20, steps // 10)),
        evaluations=max(2, min(Settings.evaluations, evaluations)),
    )


@dataclass(frozen=True)
class Outcome:
    """What training did.

    Args:
        steps: Of the optimizer.
        tokens: Trained on.
        best_step: The step whose masters were kept; 0: nothing was better than the start.
        before: Held-out score of every window at the start.
        after: The same of what was kept.
        history: `step`, `loss`, `learning_rate`; `held_out` where it was scored.
        seconds: It took, those before a kill included.
        predicted_seconds: What was predicted before the start; None where nothing was timed.
    """

    steps: int
    tokens: int
    best_step: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    history: tuple[Mapping[str, float], ...]
    seconds: float = field(default=0.0, compare=False)
    predicted_seconds: float | None = field(default=None, compare=False)

    def as_json(self, score: str = "kld") -> dict[str, Any]:
        """For manifests: means with 95 % confidence intervals, windows drawn with replacement and in pairs.

        Args:
            score: What held-out windows are scored by.
        """
        before, after = np.array(self.before)[:, None], np.array(self.after)[:, None]
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "best_step": self.best_step,
            "held_out_windows": len(before),
            "before": _estimate(before, score),
            "after": _estimate(after, score),
            "difference": _estimate(after - before, score),
            "held_out": [
                {"step": int(row["step"]), score: significant(row["held_out"])}
                for row in self.history
                if "held_out" in row
            ],
        }


def _estimate(samples: Any, score: str) -> dict[str, Any]:
    found = bootstrap.mean(samples)
    return {score: significant(found.value), "ci95": found.ci95 and [significant(end) for end in found.ci95]}


def distill(
    student: Any,
    objective: Objective,
    training: torch.Tensor,
    held_out: torch.Tensor,
    settings: Settings,
    *,
    journal: Path,
    weights: Weights | None = None,
    renewed: Renewed | None = None,
    score: str = "kld",
    progress: Progress = no_progress,
) -> Outcome:
    """Train a student in place; it ends with the weights that scored best on held-out windows.

    Args:
        student: On the device to train on; changed. Dropout is off.
        objective: What it is trained towards, for example `TowardsTeacher(teacher)`.
        training: Token ids `[windows, tokens]`, -1 behind the end of a window that is shorter; passed as often as
            `settings.tokens` asks for, in another order each time.
        held_out: Windows `[windows, tokens]` that are none of them.
        settings: See `Settings`; `paced` makes some.
        journal: Folder that outlives a killed process; the caller removes it when the result is safe.
        weights: What to change; None changes every parameter that asks for gradients.
        renewed: Makes another version of all training windows, of the same lengths, for every pass after the first;
            always the same one of the same windows. None repeats them.
        score: What held-out windows are scored by, as it is named to who watches (`watch.py`).
        progress: In tokens.

    Raises:
        StepError: Loss or score is NaN or infinite; what did best so far stays in `journal` as best.safetensors.
    """
    masters = weights or FullWeights(student)
    return _Run(student, objective, training, held_out, settings, journal, masters, renewed, score, progress).work()


class _Run:
    """The state of one training run between its steps."""

    def __init__(
        self,
        student: Any,
        objective: Objective,
        training: torch.Tensor,
        held_out: torch.Tensor,
        settings: Settings,
        journal: Path,
        weights: Weights,
        renewed: Renewed | None,
        score: str,
        progress: Progress,
    ) -> None:
        self._student, self._objective, self._settings = student, objective, settings
        self._training, self._held_out = training, held_out
        self._weights, self._renewed, self._score, self._progress = weights, renewed, score, progress
        self._version = 0  # of the training windows
        self._device = next(iter(weights.masters.values())).device
        self._batch = min(settings.batch_windows, len(training))
        self._lengths = (training >= 0).sum(dim=1).tolist()
        self._order = Order(self._lengths, self._batch, settings.seed)
        self._step_tokens = max(1, self._batch * sum(self._lengths) // len(training))
        self._steps = math.ceil(settings.tokens / self._step_tokens)
        self._every = max(1, math.ceil(self._steps / settings.evaluations))  # steps from one evaluation to the next
        self._journal = Journal(journal, _fingerprint(student, settings, training, held_out, weights, renewed))
        self._optimizer = torch.optim.AdamW(
            list(weights.masters.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self._step, self._best_step = 0, 0
        self._before: list[float] = []
        self._best: list[float] = []
        self._history: list[dict[str, float]] = []
        self._micro = 0
        self._save_after = time.monotonic() + settings.save_seconds
        self._started, self._spent = time.monotonic(), 0.0
        self._predicted: float | None = None

    def work(self) -> Outcome:
        """All steps."""
        _prepare(self._student, self._settings.checkpointing)
        self._weights.push()
        if not self._resumed():
            self._micro = self._settings.micro_batch or micro_batch(self._student, self._training[:1], self._device)
            note = {"step": 0.0}
            self._evaluate(note)
            self._history.append(note)
            if self._settings.probe:
                self._predicted = self._probed()
            self._note()
            self._save()
        while self._step < self._steps:
            note = self._train()
            if self._step % self._every == 0 or self._step == self._steps:
                self._evaluate(note)
            self._history.append(note)
            if "held_out" in note:
                self._note()
            if time.monotonic() >= self._save_after:
                self._save()
            self._progress(self._step * self._step_tokens, self._steps * self._step_tokens)
        self._take(self._journal.best())
        return Outcome(
            steps=self._steps,
            tokens=self._steps * self._step_tokens,
            best_step=self._best_step,
            before=tuple(self._before),
            after=tuple(self._best),
            history=tuple(self._history),
            seconds=self._seconds,
            predicted_seconds=self._predicted,
        )

    @property
    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._started

    def _probed(self) -> float | None:
        """Time that training will take; None where that is over before it could be told."""
        windows, micro = self._steps * self._batch, min(self._micro, self._batch)
        if windows <= _PROBED * micro:
            return None
        training = self._training[: 2 * micro].to(self._device)
        held_out = self._held_out[:1].to(self._device)
        pace = timed(self._student, self._objective, self._weights, training, held_out, micro_batch=micro)
        new = windows if self._renewed else min(windows, len(self._training))
        scored = math.ceil(self._steps / self._every) * len(self._held_out)
        return self._seconds + pace.seconds(new, windows - new, self._steps, scored) + self._renewing_seconds()

    def _renewing_seconds(self) -> float:
        """Time of making versions of the training windows: nothing where the teacher's answers are kept."""
        versions = self._order.passes(self._steps - 1)
        if self._renewed is None or not versions:
            return 0.0
        started = time.monotonic()
        self._renewed(self._training[:1], 1)
        return float((time.monotonic() - started) * versions * len(self._training))

    def _note(self) -> None:
        self._journal.note(self._history, self._steps, self._predicted, self._score)

    def _train(self) -> dict[str, float]:
        """One step of the optimizer."""
        rate = learning_rate(
            self._step, self._steps, peak=self._settings.learning_rate, warmup=self._settings.warmup,
            decay=self._settings.decay, final=self._settings.final,
        )  # fmt: skip
        self._renew()
        places = self._order.places(self._step)
        loss = 0.0
        for start in range(0, len(places), self._micro):
            some = places[start : start + self._micro]
            windows = self._training[some, : max(self._lengths[place] for place in some)].to(self._device)
            with torch.enable_grad():
                part = self._objective.loss(self._student, windows, some) * (len(some) / len(places))
                part.backward()
            loss += float(part.detach())
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss} at step {self._step + 1} of {self._steps}")
        self._weights.pull()
        torch.nn.utils.clip_grad_norm_(list(self._weights.masters.values()), self._settings.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._weights.push()
        self._step += 1
        return {"step": float(self._step), "loss": loss, "learning_rate": rate}

    def _renew(self) -> None:
        """A version of its own of the training windows for every pass."""
        version = self._order.passes(self._step)
        if self._renewed is not None and version > self._version:
            self._training, self._version = self._renewed(self._training, version), version

    def _evaluate(self, note: dict[str, float]) -> None:
        """Score the student and keep its masters if none were better."""
        score = self._objective.score(self._student, self._held_out.to(self._device)).tolist()
        mean = sum(score) / len(score)
        note["held_out"] = mean
        if not self._best:
            if not math.isfinite(mean):
                raise StepError(f"training: the held-out divergence is {mean} before the first step")
            self._before = score
        elif not math.isfinite(mean):
            raise self._diverged(f"the held-out divergence is {mean} after step {self._step} of {self._steps}")
        if not self._best or mean < sum(self._best) / len(self._best):
            self._best, self._best_step = score, self._step
            self._journal.save_best(self._weights.masters)

    def _diverged(self, what: str) -> StepError:
        mean = sum(self._best) / len(self._best)
        return StepError(
            f"training: {what}; the best so far, held-out score {mean:.4g} after step {self._best_step}, is kept in "
            f"{self._journal.best_file}",
            hint="Train with a lower learning rate.",
        )

    def _save(self) -> None:
        started = time.monotonic()
        masters = {name: value.detach() for name, value in self._weights.masters.items()}
        self._journal.save(
            {
                "step": self._step,
                "seconds": self._seconds,
                "predicted_seconds": self._predicted,
                "micro_batch": self._micro,
                "best_step": self._best_step,
                "before": self._before,
                "best": self._best,
                "history": self._history,
                "masters": masters if self._step else {},  # at the start they are the student's
                "version": self._version,
                "training": self._training.int() if self._version else None,
                "optimizer": self._optimizer.state_dict(),
                "random": torch.get_rng_state(),
            }
        )
        now, pause = time.monotonic(), self._settings.save_seconds
        self._save_after = now + (max(pause, (now - started) / _SAVING_SHARE) if pause else 0.0)

    def _resumed(self) -> bool:
        """Take up the last state, if there is one."""
        state = self._journal.load()
        if state is None or not self._journal.best_file.is_file():
            return False
        self._step, self._micro, self._best_step = state["step"], state["micro_batch"], state["best_step"]
        self._before, self._best, self._history = state["before"], state["best"], state["history"]
        self._spent, self._predicted = state["seconds"], state["predicted_seconds"]
        torch.set_rng_state(state["random"])
        if state["version"]:
            self._training, self._version = state["training"].to(self._training.dtype), state["version"]
        if self._step:
            self._optimizer.load_state_dict(state["optimizer"])
            self._take(state["masters"].items())
        return True

    def _take(self, masters: Iterable[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            for name, value in masters:
                self._weights.masters[name].copy_(value)
        self._weights.push()


def _prepare(student: Any, checkpointing: bool) -> None:
    """Dropout off; with checkpointing the model has to stand in training mode, so its rates are set to zero."""
    student.eval()
    if not checkpointing:
        return
    student.activation_checkpointing_enable()
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _fingerprint(
    student: Any,
    settings: Settings,
    training: torch.Tensor,
    held_out: torch.Tensor,
    weights: Weights,
    renewed: Renewed | None,
) -> str:
    """Stands for what shapes a run: settings (not how often it is saved), text, and the weights it starts from."""
    shaping = replace(settings, save_seconds=0.0, probe=False)
    digest = hashlib.sha256(repr((sorted(asdict(shaping).items()), renewed is not None)).encode())
    for windows in (training, held_out):
        digest.update(f"{tuple(windows.shape)}".encode() + windows.cpu().numpy().tobytes())
    for name, value in (*weights.masters.items(), *student.named_parameters()):
        values = value.detach().flatten()
        total, square = values.sum(dtype=torch.float64), values @ values  # neither makes a copy
        digest.update(f"{name} {tuple(value.shape)} {float(total)} {float(square)}".encode())
    return digest.hexdigest()
