"""Documents for the report's tests: a whole one, and strings that try to break out of it."""

from __future__ import annotations

from typing import Any

HOSTILE = [
    "</style></script><script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>'",
    "<!-- ]]> --><svg onload=alert(1)>",
    "&lt;b&gt; &amp; javascript:alert(1)",
    "a\0b\x1b[31m\x7f\x85",
    "\u202egnp.exe\u2066\ufeff",
    "half \ud800 a pair \udfff\ufffe",
    "https://example.org/x.png url(//example.org/y)",
]


def measurement(name: str, value: float | None, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": "1", "measured_on": "local", **more}


def point(label: str, kind: str, size: int, kld: float | None, **more: Any) -> dict[str, Any]:
    row = {"label": label, "kind": kind, "bytes": size, "bits_per_weight": size / 5e6, "mean_kld": kld}
    return row | {"ci95": None, "predicted_kld": None, "chosen": False} | more


def details(windows: int = 8, positions: int = 20, text: str = "word") -> dict[str, Any]:
    choices = [{"token": text, "p": 0.75}, {"token": "\n", "p": 0.2}, {"token": "", "p": 1e-9}]
    worst = {
        "window": 3,
        "mean_kld": 0.5,
        "context": f"before {text} ",
        "tokens": [f"{text}{place}" for place in range(positions)],
        "kld": [0.004 * 2.0 ** min(place, 50) for place in range(positions)],
        "positions": [{"at": positions - 1, "kld": 2.5, "reference": choices, "candidate": choices}],
    }
    return {
        "schema_version": 1,
        "unit": "nats/token",
        "window_tokens": 2 * positions + 2,
        "first": positions + 2,
        "kld_by_position": [0.01 + 0.001 * place for place in range(positions)],
        "kld_by_window": [0.02 + 0.01 * window for window in range(windows)],
        "worst": [worst],
    }


def candidate(name: str, best: float | None, expected: float | None, measured: float | None, outcome: str = "") -> Any:
    return {
        "variant": name, "quantize": "4.50bpw", "artifact_bytes": 20_000_000, "predicted_decode_tokens_per_s": 31.0,
        "best_kld": best, "expected_kld": expected, "measured": {} if measured is None else {"mean_kld": measured},
        "outcome": outcome,
    }  # fmt: skip


def choice(text: str = "word") -> dict[str, Any]:
    """What an automatic plan records."""
    return {
        "chosen": "depth=2", "why": text, "judged_on": f"the last tenth of {text}", "trial_tokens": 20_000,
        "candidates": [
            candidate("bits alone", 0.5, 0.5, None, "2 MB over the budget"),
            candidate("depth=2", 0.1, 0.2, 0.15, "chosen: KLD 0.15 measured"),
            candidate("ffn=1024", None, None, None, text),
        ],
    }  # fmt: skip


def whole(text: str = "word") -> dict[str, Any]:
    """Every part, with `text` wherever a stranger's text can stand."""
    budget = {"budget": {"max": 0.03}}
    return {
        "title": f"title {text}",
        "facts": {"model": text, text: 3},
        "verdict": "fail",
        "measurements": [
            measurement("mean_kld", 0.05, ci95=[0.04, 0.06], verdict="fail", note=text, n=2040, **budget),
            measurement("ttft_ms_p90", None, verdict="not_measured", note=f"needs {text}", **budget),
            measurement(text, 4.0, unit=text),
            measurement("perplexity", 11.5, predicted=11.0),
        ],
        "points": [
            point("Q2_K", "preset", 15_890_112, 0.2469, ci95=[0.23, 0.26]),
            point("Q4_K_M", "preset", 23_570_112, 0.0183, ci95=[0.0175, 0.0191]),
            point("smaller", "allocated", 15_890_000, 0.1114, ci95=[0.10, 0.12], predicted_kld=0.115),
            point(text, "allocated", 23_570_000, 0.0107, ci95=[0.0100, 0.0114], predicted_kld=0.0104, chosen=True),
        ],
        "tensors": [
            {"name": "token_embd.weight", "type": "Q6_K", "bits": 6.5625},
            {"name": "blk.0.attn_q.weight", "type": "Q4_K", "bits": 4.5},
            {"name": "blk.0.attn_norm.weight", "type": "F32", "bits": 32.0},
            {"name": "blk.11.attn_q.weight", "type": "IQ2_XXS", "bits": 2.0625},
            {"name": f"blk.11.{text}.weight", "type": text, "bits": 8.5},
        ],
        "details": details(text=text),
        "waterfall": [
            {"step": "source", "bytes": 74_000_000, "mean_kld": 0.0},
            {"step": text, "bytes": 60_000_000, "mean_kld": 0.11, "tokens_per_s": 31.5},
        ],
        "choice": choice(text),
        "notes": [text],
    }
