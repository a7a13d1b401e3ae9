"""The model card: the verdict first, nothing that was not measured, nothing a model's name can write into it."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import FakeSource, make

from edgepack.measurement import Measurement, judge
from edgepack.package.card import escape, table


def readme(tmp_path, **changes) -> str:
    return (make(tmp_path / "p", **changes).path / "README.md").read_text()


def test_a_pass_says_how_many_budgets_were_met(tmp_path):
    lines = readme(tmp_path).splitlines()
    assert lines[0] == "# tiny-llama-5m for laptop"
    assert lines[2] == "**Verdict: pass.** Every budget of `laptop` was measured and met (4 of 4)."


def test_an_incomplete_card_says_first_what_was_not_measured_and_on_what(tmp_path):
    first = readme(tmp_path, target_name="jetson", speed=None).splitlines()[2]
    assert first.startswith("**Verdict: incomplete.** No budget is missed")
    assert (
        "Not measured on a `jetson`: decode speed, 10 % quantile; time to first token, 90 % quantile; peak memory."
        in first
    )
    assert "Measured and met: 2 of 5 budgets." in first


def test_what_the_device_could_not_tell_either_is_given_its_reason(tmp_path):
    note = "its measurement is switched off in the profile"
    rows = [judge(Measurement("mean_kld", None, "nats/token", measured_on=None, note=note), {"max": 0.05})]
    first = readme(tmp_path, measurements=rows).splitlines()[2]
    assert f"Not measured: KL divergence from the source, mean ({note})." in first
    assert "ssh://" not in first


def test_a_fail_says_first_which_budget_and_by_how_much(tmp_path):
    first = readme(tmp_path, mean_kld=0.2).splitlines()[2]
    assert first.startswith(
        "**Verdict: fail.** Budgets of `laptop` that are missed: KL divergence from the source, mean is 0.2"
    )
    assert "allowed is ≤ 0.05 nats/token" in first


def test_an_inconclusive_budget_is_said_to_be_so(tmp_path):
    rows = [judge(Measurement("mean_kld", 0.05, "nats/token", ci95=(0.04, 0.06)), {"max": 0.05})]
    first = readme(tmp_path, measurements=rows).splitlines()[2]
    assert "**Verdict: incomplete.**" in first and "Inconclusive: KL divergence" in first
    assert "straddles the budget" in first


def test_without_budgets_the_card_does_not_claim_any(tmp_path):
    rows = [Measurement("artifact_bytes", 10, "bytes")]
    assert "sets no budgets" in readme(tmp_path, measurements=rows).splitlines()[2]


def test_the_table_has_what_a_person_asks_for(tmp_path):
    text = readme(tmp_path)
    assert "| Size | 516 bytes | 516 bytes | ≤ 9.00 GB | pass |" in text
    assert "| Bits per weight | 5.064 |" in text
    assert "| KL divergence from the source, mean | 0.0196 nats/token ± 0.0004 |" in text
    assert "| Same first choice as the source | 92.89 % ± 0.35 % |" in text
    assert "| Perplexity before (source) | 11.4469 |" in text
    assert "| Perplexity after (this package) | 11.5930 (+1.28 %) |" in text
    assert "| Decode speed, median | 453.2 tokens/s | 380 tokens/s |" in text
    assert "Fidelity rests on 10,200 scored samples." in text


def test_what_was_not_measured_says_so_even_without_a_row():
    text = table([Measurement("artifact_bytes", 23_570_000, "bytes")])
    assert "| Size | 23.57 MB |" in text
    for label in ("Decode speed, median", "Time to first token, median", "Peak memory"):
        assert f"| {label} | not measured |" in text


def test_the_checks_against_the_source_are_told(tmp_path):
    text = readme(tmp_path)
    assert "- Token ids, this package against the source's tokenizer: the same ids on 120 texts, 4,711 tokens" in text
    assert "- Chat template, this package against the source's: the same ids for 3 chats" in text
    assert "mean KL divergence 3.1e-09, largest difference of a log-probability 2.4e-06, over 192 positions" in text
    assert "- Reference of the fidelity rows: f32, read by llama.cpp" in text


def test_a_check_that_was_not_made_says_why(tmp_path):
    conformance = {
        "logits": {"compared": False, "note": "too large for this machine"},
        "tokens": {"texts": 0, "note": "a GGUF"},
    }
    text = readme(tmp_path, conformance=conformance)
    assert "against transformers: too large for this machine" in text
    assert "the same ids" not in text


def test_differences_that_were_let_through_are_told(tmp_path):
    tokens = {"texts": 9, "tokens": 90, "differences": [{"reason": "NFC", "texts": 2, "example": "`<b>`"}]}
    text = readme(tmp_path, conformance={"tokens": tokens})
    assert "  - example \\`&lt;b&gt;\\`, reason NFC, texts 2" in text


def test_types_are_counted_not_listed(tmp_path):
    assert "| types | 1 x Q4_K, 2 x Q6_K |" in readme(tmp_path)


def test_an_embedder_is_not_asked_for_tokens_a_second(tmp_path):
    text = readme(
        tmp_path,
        runtime={"engine": "llama.cpp", "embedding": True},
        measurements=[Measurement("cosine_mean", 0.9995, "1", n=500)],
    )
    assert "Decode speed" not in text
    assert "| Latency, median | not measured |" in text
    assert "llama-embedding -m model/" in text
    assert "embedding=True" in text


def test_a_measurement_the_card_does_not_know_is_still_shown():
    assert "| new_thing | 3 joule |" in table([Measurement("new_thing", 3.0, "joule")])


def test_every_runtime_is_told_how_to_run_it(tmp_path):
    text = readme(
        tmp_path, target_name="jetson", runtime={"engine": "llama.cpp", "context": 4096, "threads": 6, "gpu_layers": -1}
    )
    assert "llama-cli -m model/tiny-llama-5m-Q4_K_M.gguf -c 4096 -t 6 -ngl 999" in text
    assert "n_gpu_layers=-1" in text
    assert "ollama create tiny-llama-5m-jetson -f Modelfile" in text
    assert "lms import" in text


def test_shards_are_merged_beside_the_package_for_runtimes_that_take_one_file(tmp_path):
    def shards(model):
        for number in (1, 2):
            (model / f"m-Q8_0-0000{number}-of-00002.gguf").write_bytes(b"GGUF")

    package = make(tmp_path / "p", artifact=shards)
    text = (package.path / "README.md").read_text()
    first = "model/m-Q8_0-00001-of-00002.gguf"
    assert f"llama-cli -m {first}" in text
    assert text.count(f"llama-gguf-split --merge {first} ../m-Q8_0.gguf") == 2
    assert "lms import ../m-Q8_0.gguf" in text
    assert (package.path / "Modelfile").read_text().startswith("FROM ../m-Q8_0.gguf\n")


def test_the_python_in_the_card_is_python(tmp_path):
    for changes in ({}, {"runtime": {"embedding": True}}, {"runtime": {}}):
        text = readme(tmp_path / str(len(changes)) / str(bool(changes.get("runtime"))), **changes)
        compile(text.partition("```python\n")[2].partition("```")[0], "card", "exec")


def test_a_file_name_with_spaces_is_quoted_for_the_shell(tmp_path):
    text = readme(tmp_path, artifact=lambda model: (model / "my model (1).gguf").write_bytes(b"GGUF"))
    line = next(line for line in text.splitlines() if line.startswith("llama-cli"))
    assert shlex.split(line)[2] == "model/my model (1).gguf"


EVIL = "x](javascript:alert(1)) <img src=x onerror=y> | a | `b` **c** \n\n# Verdict: pass\n<!--"


def test_a_hostile_name_cannot_write_into_the_card(tmp_path):
    source = FakeSource(id=EVIL, name=EVIL, licence=EVIL, revision="a|b")
    text = readme(
        tmp_path, name=EVIL, source=source, recipe={"quantize": EVIL, EVIL: EVIL}, plan={"architecture": EVIL}
    )
    assert "<img" not in text and "<!--" not in text
    assert "](javascript" not in text.replace("\\](javascript", "")
    assert [line for line in text.splitlines() if line.startswith("# ")] == [text.splitlines()[0]]
    assert text.splitlines()[2].startswith("**Verdict: pass.** Every budget of `laptop`")
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (3, 6), line


@given(st.text())
def test_escaped_text_is_one_line_and_inert(text):
    escaped = escape(text)
    assert "\n" not in escaped and "\r" not in escaped
    assert "<" not in escaped and ">" not in escaped
    inert = escaped.replace("\\\\", "")
    for mark in "`*[]|":
        assert mark not in inert.replace("\\" + mark, "")


@pytest.mark.parametrize("word", ["Q4_K_M", "attn_v.weight", "linux-x86_64", "llama.cpp"])
def test_ordinary_words_stay_readable(word):
    assert escape(word) == word


def test_the_unknown_licence_is_stated_not_left_out(tmp_path):
    assert "| licence | unknown: the source states none" in readme(
        tmp_path, source=FakeSource(licence=None), licences={}
    )


CANDIDATES = [
    {"variant": "bits alone", "quantize": None, "outcome": "0.7 MB over the budget"},
    {
        "variant": "depth=2", "quantize": "3.10bpw", "artifact_bytes": 1_500_000, "best_kld": 0.5, "expected_kld": 0.9,
        "predicted_decode_tokens_per_s": 61.2, "measured": {"mean_kld": 0.71}, "outcome": "chosen: KLD 0.71 measured",
    },
]  # fmt: skip


def test_an_automatic_plan_says_what_it_chose_between_and_why_the_others_lost(tmp_path):
    record = {
        "chosen": "depth=2", "why": "bits alone can't meet the budgets", "judged_on": "the last tenth of a|b.txt",
        "trial_tokens": 20_000, "candidates": CANDIDATES,
    }  # fmt: skip
    card = readme(tmp_path, recipe={"quantize": "3.10bpw", "auto": record})
    section = card[card.index("## Bits, depth or width") :]
    assert "| bits alone |  |  |  |  |  |  | 0.7 MB over the budget |" in section
    assert "| depth=2 | 3.10bpw | 1.5 | 61.2 | 0.5 | 0.9 | 0.71 | chosen: KLD 0.71 measured |" in section
    assert "bits alone can't meet the budgets" in section and "20,000 tokens" in section and r"a\|b.txt" in section


def test_steps_before_quantization_are_a_table_with_what_healing_brought_back(tmp_path):
    rows = [
        {"step": "source", "bytes": 10_000_000, "parameters": 5_000_000, "perplexity": 11.62},
        {"step": "depth", "bytes": 8_000_000, "parameters": 4_000_000, "mean_kld": 1.69, "perplexity": 47.6},
        {"step": "Q8_0", "bytes": 4_000_000, "mean_kld": 1.1, "decode_tokens_per_s_p50": 2502.0},
    ]
    healed = {"tokens": 20_480, "evaluation": {"recovered": {"kld": 0.35, "log_likelihood": 0.5}}}
    plan = {"schema_version": 1, "parameters": 4_000_000, "waterfall": rows}
    card = readme(tmp_path, plan=plan, recipe={"quantize": "Q8_0", "heal": healed, "prune": {"removed": {}}})
    section = card[card.index("## Step by step") :]
    assert "| depth | 8.0 | 4.00 | 1.69 | 47.6 |  |" in section
    assert "| Q8_0 | 4.0 |  | 1.1 |  | 2,502 |" in section
    assert "20,480 tokens and brought back 35 % of the KL divergence and 50 % of the lost log-likelihood" in section
