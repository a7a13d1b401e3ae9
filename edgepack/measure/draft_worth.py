"""The arithmetic of speculative decoding, and the verdict whether a draft model earns its place.

With a draft of g tokens, of which each is accepted with probability a independently of the others, a pass of the target
yields (Leviathan et al., arXiv:2211.17192, equation 1 and theorem 3.8)

    tokens per pass = (1 - a^(g+1)) / (1 - a)
    speed-up        = tokens per pass / (v + c (g + v))

c is the time of a token in the draft over that of one in the target, v the time of a pass over g + 1 tokens over that
of a pass over one. The paper has 1 + c g below the line: there v is 1, where a CPU does not check several tokens in the
time of one; and llama.cpp reads what the target has checked through the draft once more, which is c v.

Knows nothing of how acceptance and times were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# A second model has to be downloaded, stored and kept in memory: less than this is not worth it. Answers timed in turns
# on a shared machine differ by a few percent without any cause (docs/drafting.md).
WORTH = 1.05
# A prediction is a ratio of predicted times, with neither the cost of a pass nor that of starting the draft measured on
# the target: it has to promise more.
PREDICTED_WORTH = 1.2

Basis = Literal["measured", "predicted", "budget"]


@dataclass(frozen=True)
class Worth:
    """The verdict.

    Args:
        worth: True when the draft goes into the package.
        basis: What it rests on: a measured speed-up, a predicted one, or a budget that the draft breaks.
        words: The numbers behind it, as a sentence.
        predicted: The predicted speed-up; None where it was measured or not asked for.
    """

    worth: bool
    basis: Basis
    words: str
    predicted: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The verdict as it stands in the manifest's recipe."""
        rounded = {} if self.predicted is None else {"predicted_speed_up": round(self.predicted, 3)}
        return {"worth_it": self.worth, "basis": self.basis, "reason": self.words} | rounded


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens that a pass of the target yields, the one it finds itself included.

    Args:
        acceptance: Probability that a drafted token is accepted when all before it were, 0 to 1.
        length: Drafted tokens per pass.
    """
    return float(sum(acceptance**place for place in range(length + 1)))  # the geometric sum, defined at 1 too


def speed_up(tokens_per_pass: float, length: int, *, draft_cost: float, pass_cost: float = 1.0) -> float:
    """How much sooner an answer is there than without a draft.

    Args:
        tokens_per_pass: Measured, or `expected_tokens`.
        length: Drafted tokens per pass.
        draft_cost: Time of one token in the draft over that of one token in the target.
        pass_cost: Time of a pass over `length + 1` tokens over that of one token, in either.
    """
    return tokens_per_pass / (pass_cost + draft_cost * (length + pass_cost))


@dataclass(frozen=True)
class Elsewhere:
    """What is known of a target that is not this machine.

    Args:
        draft_cost: Predicted time of a token in the draft over that in the artifact; None where nothing is predicted.
        on_cpu: The target computes on a CPU, where a pass over several tokens costs more than one: by the factor found
            here, for want of the device. An accelerator is taken to do it in the time of one.
    """

    draft_cost: float | None
    on_cpu: bool

    def speed_up(self, row: Mapping[str, Any], tokens_per_pass: float) -> float | None:
        """Predicted; None where nothing is.

        Args:
            row: A draft length as measured: `length`, `pass_cost`.
            tokens_per_pass: What a pass yields there.
        """
        if self.draft_cost is None:
            return None
        pass_cost = row["pass_cost"] if self.on_cpu else 1.0
        return speed_up(tokens_per_pass, row["length"], draft_cost=self.draft_cost, pass_cost=pass_cost)


def ceiling(found: Mapping[str, Any], elsewhere: Elsewhere | None) -> float | None:
    """The speed-up if every drafted token were accepted, at the length where it is largest.

    Training makes a draft propose better tokens, not propose them faster: below 1 it can't help.

    Args:
        found: Of `edgepack.measure.speculative:speculative`.
        elsewhere: Where this machine is not the target.

    Returns:
        The factor; None where nothing can be predicted.
    """
    best = None
    for row in (found, *found["tried"]):
        every = row["length"] + 1
        if elsewhere is None:
            costs = {"draft_cost": row["draft_cost"], "pass_cost": row["pass_cost"]}
            gain: float | None = speed_up(every, row["length"], **costs)
        else:
            gain = elsewhere.speed_up(row, every)
        best = gain if best is None or gain is None else max(best, gain)
    return best


def judge(found: Mapping[str, Any], elsewhere: Elsewhere | None) -> Worth:
    """The verdict.

    Args:
        found: Of `edgepack.measure.speculative:speculative`.
        elsewhere: Where this machine is not the target; of the times only `pass_cost` is then looked at.
    """
    return _measured(found) if elsewhere is None else _predicted(found, elsewhere)


def hopeless(found: Mapping[str, Any], elsewhere: Elsewhere | None) -> Worth | None:
    """The verdict on a draft that no training would make worth it; None where there is hope.

    Args:
        found: As measured before training.
        elsewhere: Where this machine is not the target.
    """
    best = ceiling(found, elsewhere)
    if best is None:
        return judge(found, elsewhere)
    if best >= 1:
        return None
    how = "" if elsewhere is None else "predicted "
    words = (
        f"not worth it: {how}{best:.2f} times the speed without it even if every drafted token were accepted, so it "
        f"was not healed; {_acceptance(found)} before healing"
    )
    return Worth(False, "measured" if elsewhere is None else "predicted", words, None if elsewhere is None else best)


def _measured(found: Mapping[str, Any]) -> Worth:
    gain = found["speed_up"]["value"]
    low, high = found["speed_up"]["ci95"]
    facts = f"{gain:.2f} times the speed without it (95 % interval {low:.2f} to {high:.2f}), {_acceptance(found)}"
    if low >= WORTH:
        return Worth(True, "measured", f"worth it: {facts}")
    return Worth(False, "measured", f"not worth it: {facts}; asked for is {WORTH:g} at the low end")


def _predicted(found: Mapping[str, Any], elsewhere: Elsewhere) -> Worth:
    gain = elsewhere.speed_up(found, found["tokens_per_pass"])
    if gain is None:
        reason = "the profile states no memory bandwidth, so no speed-up can be predicted"
        return Worth(False, "predicted", f"not worth it: {reason}; {_acceptance(found)}")
    facts = f"predicted {gain:.2f} times the speed without it, not measured on the target, {_acceptance(found)}"
    if gain >= PREDICTED_WORTH:
        return Worth(True, "predicted", f"worth it: {facts}", gain)
    return Worth(False, "predicted", f"not worth it: {facts}; asked for is {PREDICTED_WORTH:g}", gain)


def _acceptance(found: Mapping[str, Any]) -> str:
    accepted = 100 * found["acceptance"]["value"]
    return (
        f"{accepted:.0f} % of the drafted tokens accepted, {found['tokens_per_pass']:.2f} tokens per pass "
        f"at {found['length']} drafted"
    )
