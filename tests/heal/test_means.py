"""Which way of training fits, as a table; sizes are those of models people heal, memory is told, not asked for."""

from __future__ import annotations

import pytest

from edgepack.errors import StepError, UsageError
from edgepack.heal.cost import Facts, memory_bytes
from edgepack.heal.means import Machine, choose, peak_rate, ways

GB = 10**9


def facts(parameters: float, layers: int, hidden: int, ffn: int, vocabulary: int, *, half: bool = True) -> Facts:
    """A Llama whose keys and values are half as wide as its queries."""
    inside = layers * (3 * hidden * hidden + 3 * hidden * ffn)
    flow = layers * (2 * hidden + 3 * hidden + 2 * hidden + 3 * (hidden + ffn))
    return Facts("student", int(parameters), inside, flow, layers, hidden, vocabulary, 4096, half)


SMALL = facts(134e6, 30, 576, 1536, 49_152)
LARGE = facts(1.1e9, 22, 2048, 5632, 32_000)


def on(free_gb: float, *, mixed: bool = True, gpu: bool = False) -> Machine:
    return Machine(int(free_gb * GB), 2, mixed, gpu)


@pytest.mark.parametrize(
    ("model", "free_gb", "method", "checkpointing", "windows", "half"),
    [
        (SMALL, 64, "full", False, 4, False),
        (SMALL, 5.5, "full", False, 2, False),
        (SMALL, 4.1, "full", True, 4, True),
        (SMALL, 3.5, "lora", False, 2, True),
        (SMALL, 2.3, "lora", True, 4, True),
        (LARGE, 64, "full", False, 4, False),
        (LARGE, 24.0, "full", True, 2, True),
        (LARGE, 16, "lora", False, 4, True),
    ],
)
def test_the_best_way_that_fits_is_taken(
    model: Facts, free_gb: float, method: str, checkpointing: bool, windows: int, half: bool
) -> None:
    means = choose(model, model, on(free_gb))
    assert (means.method, means.checkpointing, means.micro_batch, means.half) == (
        method, checkpointing, windows, half,
    )  # fmt: skip
    assert memory_bytes(model, model, means, 512, mixed=True) <= 0.9 * free_gb * GB


def test_nothing_that_comes_before_the_choice_would_have_fitted() -> None:
    for free_gb in (2.5, 3.5, 5, 8, 14, 20, 30):
        machine = on(free_gb)
        try:
            chosen = choose(LARGE, LARGE, machine)
        except StepError:
            chosen = None
        for means in ways(LARGE, machine, 32):
            if means == chosen:
                break
            assert memory_bytes(LARGE, LARGE, means, 512, mixed=True) > 0.9 * free_gb * GB


def test_a_teacher_is_halved_only_where_that_loses_nothing_and_is_fast() -> None:
    single = facts(134e6, 30, 576, 1536, 49_152, half=False)
    for model, machine in ((single, on(64)), (SMALL, on(64, mixed=False))):
        assert not any(means.half for means in ways(model, machine, 32))
    assert any(means.half for means in ways(SMALL, on(64), 32))


def test_a_gpu_takes_more_windows_at_once() -> None:
    assert choose(LARGE, LARGE, on(140, gpu=True)).micro_batch == 32


def test_a_method_that_is_asked_for_is_taken_where_it_fits() -> None:
    assert choose(SMALL, SMALL, on(64), method="lora", rank=16).rank == 16
    assert choose(SMALL, SMALL, on(64), method="full").method == "full"


def test_a_method_that_does_not_fit_is_refused_with_one_that_does() -> None:
    with pytest.raises(StepError, match=r"14\.0 GB are free.*all weights \d+\.\d GB") as caught:
        choose(LARGE, LARGE, on(14), method="full")
    assert "LoRA" not in caught.value.message
    assert "method lora" in (caught.value.hint or "") and caught.value.exit_code == 1


def test_where_nothing_fits_every_way_says_what_it_needs() -> None:
    with pytest.raises(StepError) as caught:
        choose(LARGE, LARGE, on(3))
    for words in ("all weights ", "all weights, activations computed twice ", "LoRA of rank 32 ", "3.0 GB are free"):
        assert words in caught.value.message
    assert "have to be free" in (caught.value.hint or "")


@pytest.mark.parametrize(("method", "rank"), [("qlora", 32), ("lora", 8), ("lora", 128)])
def test_methods_and_ranks_that_are_not_offered_are_usage_errors(method: str, rank: int) -> None:
    with pytest.raises(UsageError, match="expected"):
        choose(SMALL, SMALL, on(64), method=method, rank=rank)  # type: ignore[arg-type]


def test_memory_that_is_not_known_refuses_nothing() -> None:
    assert choose(LARGE, LARGE, Machine(None, 2, mixed=True, gpu=True)).method == "full"


def test_the_learning_rate_falls_with_the_width_and_adapters_take_a_larger_one() -> None:
    full, lora = (choose(SMALL, SMALL, on(64), method=method) for method in ("full", "lora"))
    rates = [peak_rate(full, facts(1e9, 4, width, 4 * width, 1000)) for width in (64, 256, 512, 1024)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 4e-4
    assert rates[2] == pytest.approx(2 * rates[3], rel=0.05)
    assert peak_rate(lora, SMALL) == pytest.approx(10 * peak_rate(full, SMALL), rel=0.05)
